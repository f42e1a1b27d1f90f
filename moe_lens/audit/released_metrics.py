"""The audit's four metrics as its released code computes them, which differs from the paper and between its models.

`olmoe`, over all positions, padding too:
    utilization_rate       the mean raw router logit
    activation_norm        the mean of the output's norm
    mean_routing_weight    the mean raw logit where it reaches the lowest of all positions' top-k thresholds
    activation_std         of the norms, ddof 1
`deepseek_v2`, over all positions, padding too:
    utilization_rate       the share of positions with g_i > 0
    activation_norm        the mean of the output's norm
    mean_routing_weight    the mean g_i where g_i > 0
    activation_std         of the norms, ddof 1
`qwen2_moe`, over the tokens of texts that have 4 or more:
    utilization_rate       the share of all activations, which sums to 1, not to k
    activation_norm        the mean of the output's norm, over the first 30 texts
    mean_routing_weight    the mean router probability where selected
    activation_std         of the first 32 coordinates of the outputs, pooled, ddof 0, over the first 30 texts

An expert that is never active has 0 rather than NaN. They are here so that the difference can be shown, not to be used.

Padding is as there, and not as in the batches: `moe_lens.audit.released_padding` fills every text up to the longest.

Source: `per_token_ablation_olmoe.py`, `per_token_ablation_deepseek.py` and `validation_qwen.py` of
github.com/callmeloui/observational_metrics, commit 04a5aef.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.audit.metric_statistics import add_spread, at, in_chunks, norms_of, variance
from moe_lens.audit.released_padding import Side
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.documents import Moments

_TEXTS_WITH_NORMS = 30
_SHORTEST_TEXT = 4
_FIRST_COORDINATES = 32


@dataclass(frozen=True)
class Released:
    """How one of the released scripts measures: on which side the padding is that counts (None: padding does not
    count), and the four definitions."""

    padding: Side | None
    definitions: dict[str, str]

    @property
    def counts_padding(self) -> bool:
        return self.padding is not None


_NORMS = "mean of ||E_i|| over all positions that select the expert, padding too; 0 for none"
_SPREAD = "standard deviation (ddof 1) of ||E_i|| over all positions that select the expert, padding too; 0 for none"
RELEASED: dict[str, Released] = {
    "olmoe": Released(
        "right",
        {
            "utilization_rate": "mean raw router logit over all positions, padding too",
            "activation_norm": _NORMS,
            "mean_routing_weight": "mean raw router logit over the positions, padding too, at which it reaches the "
            "lowest of all positions' top-k thresholds; 0 for none",
            "activation_std": _SPREAD,
        },
    ),
    "deepseek_v2": Released(
        "left",
        {
            "utilization_rate": "share of positions, padding too, at which the routing weight is above 0",
            "activation_norm": _NORMS,
            "mean_routing_weight": "mean routing weight over the positions, padding too, at which it is above 0; 0 for "
            "none",
            "activation_std": _SPREAD,
        },
    ),
    "qwen2_moe": Released(
        None,
        {
            "utilization_rate": "the expert's share of all activations of the layer: the shares sum to 1",
            "activation_norm": "mean of ||E_i|| over the tokens of the first 30 texts that select the expert; 0 for "
            "none",
            "mean_routing_weight": "mean router probability, before any normalisation, over the tokens that select the "
            "expert; 0 for none",
            "activation_std": "standard deviation (ddof 0) of the first 32 coordinates of E_i, pooled, over the tokens "
            "of the first 30 texts that select the expert; 0 for none",
        },
    ),
}
"""By model type. Qwen's script leaves out texts of fewer than 4 tokens."""


def released_of(model: HookedMoE, as_released: str | bool) -> str:
    """Whose definitions are asked for: by name, or with True the model's own.

    Raises:
        ValueError: the released code has none of that name, or none for the model.
    """
    name = model.cfg.model_type if as_released is True else as_released
    if name not in RELEASED:
        raise ValueError(
            f"as_released={as_released!r}: the released code has definitions for {', '.join(map(repr, RELEASED))}, "
            f"and none for {name!r}; name one of them"
        )
    return str(name)


class ReleasedLayer:
    """What one layer's released metrics take, and the hooks that add a batch to it."""

    def __init__(self, model: HookedMoE, layer: int, as_released: str):
        cfg = model.cfg
        self.layer, self.as_released, self.top_k = layer, as_released, cfg.top_k

        def zeros() -> Float[Tensor, " expert"]:
            return torch.zeros(cfg.n_experts, dtype=torch.float64, device=cfg.device)

        self.n_tokens = 0
        self.count, self.n_weights, self.weights, self.logits = zeros(), zeros(), zeros(), zeros()
        self.norms = Moments(1, 1, cfg.n_experts, cfg.device)
        self.coordinates = Moments(1, 1, cfg.n_experts, cfg.device)
        self.above_threshold = AboveLowestThreshold(cfg.n_experts)

    def hooks(
        self, counted: Bool[Tensor, "batch pos"], with_outputs: Bool[Tensor, "batch pos"]
    ) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks for one forward pass.

        Args:
            counted: the positions that count.
            with_outputs: those whose outputs do.
        """
        seen: dict[str, Tensor] = {}

        def logits(value: Float[Tensor, "batch pos expert"], hook: HookPoint) -> None:
            if self.as_released == "olmoe":
                found = at(value, counted, hook).float()
                self.logits += found.double().sum(dim=0)
                self.above_threshold.add(found.cpu(), self.top_k)

        def probabilities(value: Float[Tensor, "batch pos expert"], hook: HookPoint) -> None:
            seen["probabilities"] = value

        def indices(value: Int[Tensor, "batch pos k"], hook: HookPoint) -> None:
            seen["indices"] = value
            self.n_tokens += int(counted.sum())
            self.count += torch.bincount(value[counted].flatten(), minlength=len(self.count))

        def weights(value: Float[Tensor, "batch pos k"], hook: HookPoint) -> None:
            if self.as_released == "qwen2_moe":
                value = seen["probabilities"].gather(2, seen["indices"])
            found = at(value, counted, hook).double().flatten()
            experts = seen["indices"][counted].flatten()
            self.weights.index_add_(0, experts, found)
            selected = (found > 0) | (self.as_released == "qwen2_moe")
            self.n_weights += torch.bincount(experts[selected], minlength=len(self.count))

        def outputs(value: Float[Tensor, "batch pos k d_model"], hook: HookPoint) -> None:
            found = at(value, with_outputs, hook).flatten(0, 1)
            experts = seen["indices"][with_outputs].flatten()
            for some, of in zip(in_chunks(found), in_chunks(experts, found.shape[1]), strict=True):
                self._spread(self.norms, norms_of(some), of)
                if self.as_released == "qwen2_moe":
                    first = some[:, :_FIRST_COORDINATES].double()
                    self._spread(
                        self.coordinates, first.flatten(), repeat(of, "slot -> (slot d)", d=first.shape[1])
                    )
            # Of a streamed model many batches are under way at a time, and this one may long wait for its end.
            seen.clear()

        points = {
            "hook_router_logits": logits,
            "hook_expert_weights": probabilities,
            "hook_expert_indices": indices,
            "hook_routing_weights": weights,
            "hook_expert_out": outputs,
        }
        return [(f"blocks.{self.layer}.mlp.{name}", hook) for name, hook in points.items()]

    def _spread(self, moments: Moments, values: Float[Tensor, " value"], of: Int[Tensor, " value"]) -> None:
        add_spread(moments, values, of, torch.bincount(of, minlength=len(self.count)).double())

    def values(self) -> dict[str, Float[Tensor, " expert"]]:
        """The four metrics, on the CPU."""
        weights = self.weights / self.n_weights.clamp(min=1)
        if self.as_released == "olmoe":
            utilization, weights = self.logits / self.n_tokens, self.above_threshold.means
        elif self.as_released == "deepseek_v2":
            utilization = self.n_weights / self.n_tokens
        else:
            utilization = self.count / self.count.sum().clamp(min=1)
        spread = variance(self.coordinates, 0) if self.as_released == "qwen2_moe" else variance(self.norms)
        never = self.norms.count == 0
        values = {
            "utilization_rate": utilization,
            "activation_norm": self.norms.mean[0, 0],
            "mean_routing_weight": weights,
            "activation_std": spread.sqrt().masked_fill(never, 0.0),
        }
        return {name: found.cpu() for name, found in values.items()}


class AboveLowestThreshold:
    """The mean of each expert's logits that reach the lowest top-k threshold of all positions.

    The released code marks an expert as active wherever its logit reaches the threshold of any position, so that the
    lowest decides. What lies below the lowest so far waits for a lower one; that is at most all logits, in float32 on
    the CPU.
    """

    def __init__(self, n_experts: int):
        self.threshold = torch.inf
        self.total = torch.zeros(n_experts, dtype=torch.float64)
        self.count = torch.zeros(n_experts, dtype=torch.float64)
        self._waiting: list[tuple[Float[Tensor, " logit"], Int[Tensor, " logit"]]] = []

    def add(self, logits: Float[Tensor, "position expert"], top_k: int) -> None:
        experts = repeat(
            torch.arange(logits.shape[1], dtype=torch.int32),
            "expert -> (position expert)",
            position=len(logits),
        )
        lowest = float(logits.topk(top_k, dim=1).values[:, -1].min()) if len(logits) else torch.inf
        found = [(logits.flatten(), experts)]
        if lowest < self.threshold:
            self.threshold = lowest
            found, self._waiting = found + self._waiting, []
        for values, of in found:
            reaches = values >= self.threshold
            self.total.index_add_(0, of[reaches], values[reaches].double())
            self.count += torch.bincount(of[reaches], minlength=len(self.count))
            self._waiting.append((values[~reaches], of[~reaches]))

    @property
    def means(self) -> Float[Tensor, " expert"]:
        """0 for none."""
        return self.total / self.count.clamp(min=1)


class ReleasedCount:
    """Which positions of each batch the released code counts, document after document."""

    def __init__(self, as_released: str):
        self.as_released = as_released
        self.n_documents = self.n_tokens = self.n_padding = 0

    def of(
        self, real: Bool[Tensor, "batch pos"]
    ) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """The positions that count in the next batch, and those whose outputs do."""
        number = self.n_documents + torch.arange(len(real), device=real.device)
        self.n_documents += len(real)
        if RELEASED[self.as_released].counts_padding:
            counted = with_outputs = torch.ones_like(real)
        else:
            counted = real & (real.sum(dim=1, keepdim=True) >= _SHORTEST_TEXT)
            with_outputs = counted & (number < _TEXTS_WITH_NORMS)[:, None]
        self.n_tokens += int(counted.sum())
        self.n_padding += int((counted & ~real).sum())
        return counted, with_outputs
