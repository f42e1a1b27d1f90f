"""Where a patch can act: the hook points of one kind in all layers, the names of their axes; experts by identity.

TransformerLens calls the kind of a hook point an activation name. Here it is the point's name within a block
(`attn.hook_z`), which reaches every point there is, or a global point's name (`hook_embed`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.arguments import Layers, layer_numbers
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.arguments import few

CONTRIBUTIONS, INDICES, MLP_OUT = "mlp.hook_expert_contrib", "mlp.hook_expert_indices", "hook_mlp_out"

# After `batch`. An axis of length 1 has no name: there is nothing along it to take one at a time.
_STREAM = ("pos", "d_model")
_SCALE = ("pos", None)
_HEADS = ("pos", "head", "d_head")
_SCORES = ("head", "pos", "key")
_EXPERTS = ("pos", "expert")
_SLOTS = ("pos", "slot")
_SLOT_NEURONS = ("pos", "slot", "neuron")
_SLOT_STREAM = ("pos", "slot", "d_model")
_NEURONS = ("pos", "neuron")

AXES: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"), _STREAM),
    **dict.fromkeys(("hook_attn_out", MLP_OUT, "mlp.hook_shared_out"), _STREAM),
    **{f"{norm}.hook_scale": _SCALE for norm in ("ln1", "ln2", "ln_final")},
    **{f"{norm}.hook_normalized": _STREAM for norm in ("ln1", "ln2", "ln_final")},
    **{f"attn.hook_{part}": _HEADS for part in ("q", "k", "v", "rot_q", "rot_k", "z")},
    "attn.hook_result": ("pos", "head", "d_model"),
    **dict.fromkeys(("attn.hook_attn_scores", "attn.hook_pattern"), _SCORES),
    **dict.fromkeys(("mlp.hook_router_logits", "mlp.hook_expert_weights"), _EXPERTS),
    **dict.fromkeys((INDICES, "mlp.hook_routing_weights"), _SLOTS),
    **{f"mlp.hook_expert_{part}": _SLOT_NEURONS for part in ("pre", "pre_linear", "post")},
    **dict.fromkeys(("mlp.hook_expert_out", CONTRIBUTIONS), _SLOT_STREAM),
    **{f"mlp.hook_shared_{part}": _NEURONS for part in ("pre", "pre_linear", "post")},
    "mlp.hook_shared_gate": _SCALE,
    **{f"mlp.hook_{part}": _NEURONS for part in ("pre", "pre_linear", "post")},
}
"""The axes of every kind of hook point, after `batch`. `pos` is the query's in scores and pattern, `key` the other."""


@dataclass(frozen=True)
class Site:
    """The hook points of one kind, and along which axes they are patched one index at a time.

    Attributes:
        activation: the points' name within a block, or a global point's name.
        layers: those patched; None for a global point.
        axes: of the points' values, `batch` first.
        over: the axes taken one index at a time.
    """

    activation: str
    layers: tuple[int, ...] | None
    axes: tuple[str | None, ...]
    over: tuple[str, ...]

    @property
    def by_identity(self) -> bool:
        """Whether contributions are patched by the expert that makes them, whichever slot it has."""
        return self.activation == CONTRIBUTIONS and "expert" in self.over

    def name(self, layer: int | None, activation: str | None = None) -> str:
        """The whole name of this kind's point (or another's) in a layer."""
        activation = activation or self.activation
        return activation if layer is None else f"blocks.{layer}.{activation}"

    def cached_names(self) -> list[str]:
        """The hook points that a patch reads from the clean run."""
        kinds = (self.activation, *((INDICES,) if self.by_identity else ()))
        return [self.name(layer, kind) for layer in self.layers or (None,) for kind in kinds]


def find_site(model: HookedMoE, activation: str, over: Sequence[str] | str, layers: Layers = None) -> Site:
    """The points of a kind, after names, layers and axes were found to be there.

    Raises:
        ValueError: there is no such point, layer with it, or axis of it; those there are, are named.
    """
    layers_with: dict[str, list[int]] = {}
    for name in model.hook_dict:
        inside = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if inside is not None:
            layers_with.setdefault(inside[2], []).append(int(inside[1]))
        else:
            layers_with[name] = []
    if activation not in layers_with:
        inside = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(activation))
        if inside is not None and inside[2] in layers_with:
            raise ValueError(
                f"activation={activation!r} names the point of one layer; give activation={inside[2]!r} and "
                f"layers=[{inside[1]}]"
            )
        # TransformerLens's short names (`z`, `resid_pre`) are the ends of these.
        nearest = [name for name in layers_with if name.endswith(f"hook_{activation}")]
        nearest += (
            difflib.get_close_matches(str(activation), layers_with, n=3, cutoff=0.3) if not nearest else []
        )
        raise ValueError(
            f"activation={activation!r} is no hook point within a block of {model.cfg.model_name}, and no global one; "
            f"nearest are {', '.join(nearest) or few(sorted(layers_with))}"
        )
    axes = ("batch", *AXES[activation])
    found = _layers(activation, layers_with[activation], layers)
    over = (over,) if isinstance(over, str) else tuple(over)
    named = [axis for axis in axes if axis is not None]
    if activation == INDICES:
        # A slot alone would often give a token the same expert twice.
        named.remove("slot")
    available = [*(["layer"] if found else []), *named, *(["expert"] if activation == CONTRIBUTIONS else [])]
    for axis in over:
        if axis not in available:
            raise ValueError(
                f"over={axis!r}: {activation} can be taken one at a time along {', '.join(available)}"
                + ("; its slots are one choice, patched whole" if activation == INDICES else "")
            )
    if len(set(over)) < len(over):
        raise ValueError(f"over={over} names an axis twice")
    if activation == CONTRIBUTIONS and "expert" in over and {"slot", "d_model"} & set(over):
        raise ValueError(
            f"over={over}: by expert, a contribution is patched whole, in whichever slot the expert is; give 'expert' "
            f"without 'slot' and 'd_model'"
        )
    return Site(activation, found, axes, over)


def _layers(activation: str, there: list[int], asked: Layers) -> tuple[int, ...] | None:
    if not there:
        if asked is not None:
            raise ValueError(
                f"{activation} is a global hook point; layers={asked} has nothing to choose from"
            )
        return None
    if asked is None:
        return tuple(there)
    chosen = layer_numbers(asked)
    for layer in chosen:
        if layer not in there:
            raise ValueError(f"layer {layer} has no {activation}; the layers that have it: {few(there)}")
    return chosen


# ---- experts by identity ----


def contribution_of(
    expert: int, contributions: Float[Tensor, "batch pos k d_model"], indices: Int[Tensor, "batch pos k"]
) -> Float[Tensor, "batch pos d_model"]:
    """What an expert adds to the stream, zero where it is not active."""
    return contributions.masked_fill((indices != expert)[..., None], 0).sum(dim=2)


def experts_differ(
    contributions: tuple[Float[Tensor, "batch pos k d_model"], Float[Tensor, "batch pos k d_model"]],
    indices: tuple[Int[Tensor, "batch pos k"], Int[Tensor, "batch pos k"]],
    n_experts: int,
) -> Bool[Tensor, "batch pos expert"]:
    """Where two runs' contributions of an expert are not the same numbers, wherever their slots are."""
    differ = torch.zeros(*indices[0].shape[:2], n_experts, dtype=torch.bool, device=indices[0].device)
    for (mine, its), (my_slots, its_slots) in (
        (contributions, indices),
        (contributions[::-1], indices[::-1]),
    ):
        same_expert = my_slots[..., :, None] == its_slots[..., None, :]
        partner = same_expert.int().argmax(dim=-1)
        theirs = its.gather(2, partner[..., None].expand(*partner.shape, its.shape[-1]))
        other = (mine != theirs).any(dim=-1) | ~same_expert.any(dim=-1)
        differ |= torch.zeros_like(differ).scatter(2, my_slots, other)
    return differ
