"""Where branches begin: the stream after an MoE layer, had some of its slots been changed at this one token.

A branch starts as `resid_mid` plus the layer's output made of its changed slots, summed in the block's own order and
dtype; never as the whole output minus a part of it, which would round otherwise than the model does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.changed_routing import choose, renormalized
from moe_lens.interventions.clean_run import CleanRun, MoEValues
from moe_lens.interventions.expert_outputs import SHARED
from moe_lens.interventions.expert_reference import ExpertReference
from moe_lens.interventions.token_hashes import prefix_hashes
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.moe import MoE, applied_weights, eligible_probabilities
from moe_lens.model.streamed_moe import OnDisk
from moe_lens.routing.provenance import weights_fingerprint

How = Literal["zero", "renormalize", "reroute", "mean", "resample"]
HOWS: tuple[How, ...] = ("zero", "renormalize", "reroute", "mean", "resample")


@dataclass(frozen=True)
class Change:
    """How a removed slot is removed, and what takes its place.

    Attributes:
        how: see `Ablate`.
        reference: where `mean` and `resample` take their outputs from.
        seed: of `resample`'s draws.
    """

    how: How = "zero"
    reference: ExpertReference | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise ValueError(f"how={self.how!r} must be one of {', '.join(map(repr, HOWS))}")
        needs_reference = self.how in ("mean", "resample")
        if needs_reference and not isinstance(self.reference, ExpertReference):
            raise ValueError(
                f"how={self.how!r} needs reference=, what experts put out over a corpus: "
                f"expert_reference(model, batches) makes one"
            )
        if not needs_reference and self.reference is not None:
            raise ValueError(f"how={self.how!r} reads no reference; 'mean' and 'resample' do")

    def check_model(self, model: HookedMoE, layers: Iterable[int]) -> None:
        """Raises:
        ValueError: the reference is of another model, or lacks a layer.
        """
        if self.reference is None:
            return
        of, cfg = self.reference.provenance, model.cfg
        # Where the weights are elsewhere (`moe_lens.interop.nnsight`), their name has to do.
        comparable = of["dtype"] == str(cfg.dtype).removeprefix("torch.") and not any(
            parameter.is_meta for parameter in model.parameters() if not isinstance(parameter, OnDisk)
        )
        if of["model"] != cfg.model_name or (comparable and of["weights"] != weights_fingerprint(model)):
            raise ValueError(
                f"the reference is of other weights ({of['model']}, {of['dtype']}) than this model's "
                f"({cfg.model_name}); make one with expert_reference(model, batches)"
            )
        missing = sorted(set(layers) - set(self.reference.layers))
        if missing:
            raise ValueError(f"the reference lacks layers {missing}; it is of {list(self.reference.layers)}")

    def describe(self) -> dict[str, Any]:
        """As JSON data, for provenance."""
        facts: dict[str, Any] = {"how": self.how}
        if self.reference is not None:
            facts["reference"] = self.reference.fingerprint
        if self.how == "resample":
            facts["seed"] = self.seed
        return facts


class Starts(NamedTuple):
    """Attributes:
    streams: after the layer, in the model's dtype.
    gap_norm: ||y - y_changed||_2 of the layer's output, float32.
    """

    streams: Float[Tensor, "pos branch d_model"]
    gap_norm: Float[Tensor, "pos branch"]


def replacements(
    clean: CleanRun,
    values: MoEValues,
    rows: Int[Tensor, " n"],
    needed: Bool[Tensor, "n k"],
    shared_needed: bool,
    change: Change,
) -> tuple[Float[Tensor, "n k d_model"], Float[Tensor, "n d_model"]] | None:
    """What stands in for slots' outputs, and for the shared experts', at some tokens; None where nothing does.

    Args:
        needed: the slots that some branch changes. Others are zero, and nobody reads them: an expert that the
            reference never met matters only where it is changed.
    """
    reference = change.reference
    if reference is None:
        return None
    experts = values.indices[rows]
    of_slots = torch.zeros(*experts.shape, values.resid_mid.shape[-1], device=rows.device)
    of_shared = of_slots[:, 0].clone()
    shared = torch.full_like(rows, SHARED)
    if change.how == "mean":
        of_slots[needed] = reference.mean_output(values.layer, experts[needed])
        if shared_needed:
            of_shared = reference.mean_output(values.layer, shared)
        return of_slots, of_shared
    every = torch.ones_like(clean.tokens, dtype=torch.bool)
    prefixes = prefix_hashes(clean.tokens[None], every[None])[0, rows]
    per_slot = repeat(prefixes, "n -> n k", k=experts.shape[1])
    of_slots[needed] = reference.resampled_output(
        values.layer, experts[needed], per_slot[needed], change.seed
    )
    if shared_needed:
        of_shared = reference.resampled_output(values.layer, shared, prefixes, change.seed)
    return of_slots, of_shared


def starts(
    clean: CleanRun,
    values: MoEValues,
    rows: Int[Tensor, " n"],
    removed: Bool[Tensor, "n branch k"],
    change: Change,
    shared_removed: Bool[Tensor, " branch"] | None = None,
) -> Starts:
    """The streams with which branches leave an MoE layer.

    Args:
        clean, values: the document, and the layer.
        rows: which of its tokens.
        removed: for each branch, the slots that are changed; none is the null branch.
        change: how.
        shared_removed: the branches in which the shared experts are changed (by `zero`, `mean` or `resample`).
    """
    expert_out = values.expert_out[rows][:, None]
    weights = values.weights[rows][:, None]
    contrib = values.contrib[rows][:, None]
    instead = replacements(clean, values, rows, removed.any(dim=1), shared_removed is not None, change)
    if change.how == "reroute":
        changed = _rerouted(clean, values, rows, removed)
        # A branch that removes nothing is the layer as it was, slot by slot.
        changed = torch.where(removed.any(dim=-1)[..., None, None], changed, contrib)
    elif change.how == "renormalize":
        # Only what is changed is computed anew: slots of a null branch stay bit by bit.
        new_weights = renormalized(weights.expand(removed.shape), ~removed)
        changed = (new_weights[..., None] * expert_out).to(contrib.dtype)
        changed = torch.where(removed.any(dim=-1)[..., None, None], changed, contrib)
    elif instead is not None:
        other = (weights[..., None] * instead[0][:, None].to(expert_out.dtype)).to(contrib.dtype)
        changed = torch.where(removed[..., None], other, contrib)
    else:
        changed = contrib.masked_fill(removed[..., None], 0.0)
    out = changed.sum(dim=2)
    # Slots that are as they were cancel exactly, so that a lone slot's gap is its own norm.
    difference = (
        (contrib.float() - changed.float()).sum(dim=2)
        if change.how != "reroute"
        else contrib.float().sum(dim=2) - changed.float().sum(dim=2)
    )
    if values.shared_out is not None:
        shared = values.shared_out[rows][:, None]
        if shared_removed is None:
            out = out + shared
        else:
            others = torch.zeros_like(shared) if instead is None else instead[1][:, None].to(shared.dtype)
            of_branch = torch.where(shared_removed[None, :, None], others, shared)
            out, difference = out + of_branch, difference + (shared.float() - of_branch.float())
    return Starts(values.resid_mid[rows][:, None] + out, difference.norm(dim=-1))


def _rerouted(
    clean: CleanRun, values: MoEValues, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n branch k"]
) -> Float[Tensor, "n branch k d_model"]:
    """Contributions when the removed experts had not been there to be chosen."""
    block: Any = clean.model.blocks[values.layer]
    mlp: MoE = block.mlp
    _, n_branches, k = removed.shape
    probabilities = repeat(values.probabilities[rows], "n e -> n branch e", branch=n_branches)
    indices = repeat(values.indices[rows], "n k -> n branch k", branch=n_branches)
    excluded = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, indices, removed)
    try:
        chosen = choose(probabilities, mlp.cfg, k=k, excluded=excluded)
    except ValueError:
        left = (
            eligible_probabilities(probabilities.masked_fill(excluded, -torch.inf), mlp.cfg) > -torch.inf
        ).sum(-1)
        row, branch = (left < k).nonzero()[0].tolist()
        raise ValueError(
            f"reroute at layer {values.layer}, position {int(clean.columns[rows[row]])}: without "
            f"{', '.join(f'M{values.layer}E{e}' for e in indices[row, branch, removed[row, branch]].tolist())} "
            f"{int(left[row, branch])} experts remain to be chosen from, and {k} are wanted"
        ) from None
    weights = applied_weights(probabilities, chosen, mlp.cfg)
    if not mlp.cfg.float32_weights:
        weights = weights.to(values.normalized.dtype)
    x = repeat(values.normalized[rows], "n d -> n branch d", branch=n_branches)
    out = mlp.run_experts(x, chosen)
    return (weights[..., None] * out).to(out.dtype)


def single_slots(k: int, device: torch.device | None = None) -> Bool[Tensor, "branch k"]:
    """One branch for each slot, which it removes."""
    return torch.eye(k, dtype=torch.bool, device=device)


def heaviest_slots(k: int, device: torch.device | None = None) -> Bool[Tensor, "branch k"]:
    """The branches of progressive removal: the heaviest slot, the two heaviest, ... all but the lightest."""
    slots = torch.arange(k, device=device)
    return rearrange(slots, "k -> 1 k") < rearrange(slots[1:], "branch -> branch 1")
