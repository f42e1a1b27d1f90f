"""Super experts: those whose outputs are of extreme size, and how much they move the next router.

An expert counts where the largest |coordinate| of its output E_i(x), before the routing weight, over all tokens that
chose it, is extreme among all experts of the model. The recipe follows Su et al., "Unveiling Super Experts in
Mixture-of-Experts Large Language Models" (2025, arXiv:2507.23279), which finds them by outliers in the output of the
down projection: above a high quantile of all experts' maxima, at least a share of the largest of them, and not in the
last layers, which come after those where massive activations form. The three numbers are parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.corpus import TokenBatches, refuse_bare_pair
from moe_lens.model.corpus_passes import CorpusBatch, run_batches
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.queries import expert_variance_rank
from moe_lens.routing.result import RoutingContributions

QUANTILE, SHARE_OF_LARGEST, DEPTH = 0.995, 0.1, 0.75

Batches = Tensor | TokenBatches | Iterable[Tensor | Sequence[Any]]


def super_experts(
    model: HookedMoE,
    batches: Batches,
    *,
    quantile: float = QUANTILE,
    share_of_largest: float = SHARE_OF_LARGEST,
    depth: float = DEPTH,
    verbose: bool = False,
) -> pd.DataFrame:
    """Which experts' outputs are extreme, over a corpus.

    Args:
        model: run without gradients; of a streamed model each layer is read once for all batches.
        batches: tokens `[batch, pos]`, or an iterable of batches, each such tokens or a tuple of tokens, the mask of
            real ones (or None), and whatever else, which is not read. Padding is not counted.
        quantile: a super expert's maximum is above this quantile of the maxima of all experts of all layers that any
            token chose.
        share_of_largest: and at least this share of the largest of them.
        depth: and its layer lies within this share of the model's layers, from the first.
        verbose: show a progress bar.

    Returns:
        A row for each routed expert, largest first: `layer`, `expert`, `name`, `max_output` (the largest |coordinate|
        of its output, no unit; NaN where no token chose it), `tokens` (how many chose it) and `is_super`.

    Raises:
        ValueError: a parameter that is no share; text; no batches; a bare `(tokens, mask)`, which is one; a model
            without MoE layers; an output that is not finite.

    Source: the recipe of Su et al. 2025, arXiv:2507.23279.
    """
    for name, value in (("quantile", quantile), ("share_of_largest", share_of_largest), ("depth", depth)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie between 0 and 1")
    refuse_bare_pair(batches)
    maxima, counts = _largest_outputs(model, batches, verbose)
    layers, experts = np.indices(maxima.shape).reshape(2, -1)
    layers = np.array(model.cfg.moe_layers)[layers]
    sizes, tokens = maxima.numpy().ravel(), counts.numpy().ravel()
    seen = sizes[tokens > 0]
    frame = pd.DataFrame(
        {
            "layer": layers,
            "expert": experts,
            "name": [f"M{layer}E{expert}" for layer, expert in zip(layers, experts, strict=True)],
            "max_output": np.where(tokens > 0, sizes, np.nan),
            "tokens": tokens,
            "is_super": (tokens > 0)
            & (sizes > np.quantile(seen, quantile))
            & (sizes >= share_of_largest * seen.max())
            & (layers < depth * model.cfg.n_layers),
        }
    )
    return frame.sort_values("max_output", ascending=False, kind="stable", ignore_index=True)


def super_expert_table(
    model: HookedMoE,
    batches: Batches,
    contributions: RoutingContributions,
    *,
    position: str = "rest",
    verbose: bool = False,
    **criterion: float,
) -> pd.DataFrame:
    """The super experts, with the rank of their variance at the next router among the experts of their layer.

    Args:
        model, batches, verbose, criterion: see `super_experts`.
        contributions: of the same model (its name, revision and dtype), by expert.
        position: `lead` or `rest`.

    Returns:
        A row for each super expert: `name`, `max_output`, `tokens`, `receiver`, `variance_rank` (over all tokens, as in
        the paper's table), `variance_rank_when_active` (both 1 the largest) and `experts` (how many there are). No
        receiver and no ranks where no measured router comes after it.

    Raises:
        ValueError: see `super_experts`; contributions of another model, or not by expert.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", appendix H, table 2.
    """
    _require_same_model(model, contributions)
    if contributions.by != "expert":
        raise ValueError(f"the ranks need contributions by 'expert', and these are by {contributions.by!r}")
    found = super_experts(model, batches, verbose=verbose, **criterion)
    rows = []
    last = int(contributions.receivers[-1].removeprefix("M"))
    for row in found.to_dict("records"):
        if not row["is_super"]:
            continue
        ranks: dict[str, Any] = dict(receiver=None, variance_rank=None, variance_rank_when_active=None)
        if row["layer"] < last:
            rank = expert_variance_rank(contributions, row["name"], position=position)
            ranks = dict(receiver=rank.receiver, variance_rank=rank.rank, variance_rank_when_active=None)
            active = contributions.when_active("variance")[position]
            places = contributions.senders.index(row["name"]), contributions.receiver_index(rank.receiver)
            if not np.isnan(active[places]):
                rank = expert_variance_rank(contributions, row["name"], position=position, when_active=True)
                ranks["variance_rank_when_active"] = rank.rank
        rows.append({key: row[key] for key in ("name", "max_output", "tokens")} | ranks)
    columns = ["name", "max_output", "tokens", "receiver", "variance_rank", "variance_rank_when_active"]
    frame = pd.DataFrame(rows, columns=columns)
    frame = frame.astype({"variance_rank": "Int64", "variance_rank_when_active": "Int64"})
    return frame.assign(experts=model.cfg.n_experts)


def _require_same_model(model: HookedMoE, contributions: RoutingContributions) -> None:
    cfg, provenance = model.cfg, contributions.provenance
    here = {
        "model": cfg.model_name,
        "revision": cfg.revision,
        "dtype": str(cfg.dtype).removeprefix("torch."),
    }
    for name, value in here.items():
        measured = provenance.get(name)
        if measured != value:
            raise ValueError(
                f"the contributions are of {name} {measured!r}, and the model is of {name} {value!r}"
                if name != "model"
                else f"the contributions are of {measured!r}, and the model is {value!r}"
            )


@torch.no_grad()
def _largest_outputs(
    model: HookedMoE, batches: Batches, verbose: bool
) -> tuple[Float[Tensor, "moe_layer expert"], Int[Tensor, "moe_layer expert"]]:
    """Each expert's largest |output coordinate| over real tokens, and how many of those chose it."""
    if not model.cfg.moe_layers:
        raise ValueError(f"{model.cfg.model_name} has no MoE layer, so it has no experts")
    shape = (len(model.cfg.moe_layers), model.cfg.n_experts)
    maxima = torch.zeros(shape, device=model.cfg.device)
    counts = torch.zeros(shape, dtype=torch.long, device=model.cfg.device)

    def listening(batch: CorpusBatch) -> AbstractContextManager[None]:
        largest = _Largest(batch.real, maxima, counts)
        hooks: list[tuple[str, Any]] = []
        for place, layer in enumerate(model.cfg.moe_layers):
            hooks.append((f"blocks.{layer}.mlp.hook_expert_indices", largest.chose))
            hooks.append((f"blocks.{layer}.mlp.hook_expert_out", partial(largest.wrote, place)))
        return model.listening(hooks)

    given = [batches] if isinstance(batches, Tensor) else batches
    run_batches(model, given, listening, stop_at_layer=model.cfg.moe_layers[-1] + 1, verbose=verbose)
    if not bool(maxima.isfinite().all()):
        raise ValueError("an expert's output holds values that are not finite")
    return maxima.cpu(), counts.cpu()


class _Largest:
    """One forward pass: what each layer's chosen experts wrote, into the maxima and counts so far."""

    def __init__(
        self,
        real: Bool[Tensor, "batch pos"],
        maxima: Float[Tensor, "moe_layer expert"],
        counts: Int[Tensor, "moe_layer expert"],
    ):
        self.real, self.maxima, self.counts = real, maxima, counts

    def chose(self, indices: Int[Tensor, "batch pos k"], hook: HookPoint) -> None:
        self.chosen = indices[self.real].flatten()

    def wrote(self, place: int, out: Float[Tensor, "batch pos k d_model"], hook: HookPoint) -> None:
        sizes = out[self.real].abs().amax(dim=-1).float().flatten()
        self.maxima[place].scatter_reduce_(0, self.chosen, sizes, "amax")
        self.counts[place] += torch.bincount(self.chosen, minlength=self.counts.shape[1])
        del self.chosen
