"""How much work each expert gets: the share of tokens that choose it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.documents import real_tokens


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """The share of real tokens whose top-k holds each expert. A layer's shares sum to k.

    Attributes:
        shares: `[layer, expert]`, over the MoE layers in order.
        layers: which layers those are.
        top_k: experts a token chooses.
        n_tokens: real tokens counted.
    """

    shares: Float[np.ndarray, "layer expert"]
    layers: tuple[int, ...]
    top_k: int
    n_tokens: int

    @property
    def uniform(self) -> float:
        """The share that every expert would have if all had the same: k / N."""
        return self.top_k / self.shares.shape[1]

    def to_frame(self) -> pd.DataFrame:
        """One row per (layer, expert): columns `layer`, `expert`, `share`."""
        n_layers, n_experts = self.shares.shape
        return pd.DataFrame(
            {
                "layer": np.repeat(self.layers, n_experts),
                "expert": np.tile(np.arange(n_experts), n_layers),
                "share": self.shares.ravel(),
            }
        )


class LoadCounter:
    """Counts choices at `hook_expert_indices` over forward passes; `listening` wraps each."""

    def __init__(self, model: HookedMoE):
        self.model = model
        self._counts = torch.zeros(len(model.cfg.moe_layers), model.cfg.n_experts, dtype=torch.long)
        self._n_tokens = 0

    @contextmanager
    def listening(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None
    ) -> Iterator[None]:
        """While open, exactly one forward pass of these tokens must be made; padding is not counted."""
        real = real_tokens(tokens, mask)
        # Of each layer, and not its choices: of a streamed model many batches are under way at a time.
        counts: dict[int, Int[Tensor, " expert"]] = {}

        def count(value: Int[Tensor, "batch pos k"], hook: HookPoint, place: int) -> None:
            chosen = value[real].flatten().cpu()
            counts[place] = torch.bincount(chosen, minlength=self.model.cfg.n_experts)

        hooks = [
            (f"blocks.{layer}.mlp.hook_expert_indices", partial(count, place=place))
            for place, layer in enumerate(self.model.cfg.moe_layers)
        ]
        with self.model.hooks(hooks):
            yield
        if len(counts) != len(self.model.cfg.moe_layers):
            raise RuntimeError("listening() must see one whole forward pass of its tokens")
        for place, of_layer in counts.items():
            self._counts[place] += of_layer
        self._n_tokens += int(real.sum())

    def result(self) -> ExpertLoad:
        """The shares so far.

        Raises:
            ValueError: nothing was counted.
        """
        if self._n_tokens == 0:
            raise ValueError("no tokens were counted")
        return ExpertLoad(
            shares=self._counts.double().numpy() / self._n_tokens,
            layers=self.model.cfg.moe_layers,
            top_k=self.model.cfg.top_k,
            n_tokens=self._n_tokens,
        )
