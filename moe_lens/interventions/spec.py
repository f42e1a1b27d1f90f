"""Interventions as plain data: what, where, how.

    Ablate("M1E9", pos=-1)                            expert 9 of layer 1 contributes nothing at the last column
    Ablate(9, layers=1, how="renormalize")            everywhere where it is active; the others' weights grow
    Ablate(ranks=(1, 2), layers=(3, 4), pos=7)        the two heaviest experts of each of two layers
    Ablate(("M1E9", "M1E3"), all_but=True)            every active expert of layer 1 but these
    ForceExperts("M1E9", pos=7)                       it is chosen, in place of the lightest
    ForbidExperts(("M1E9", "M2E30"))                  they are never chosen
    SwapRanks(8, 9, layers=5)                         rank 8 leaves the choice, rank 9 comes
    TopK(16)                                          every MoE layer takes sixteen experts
    RouterOnly("M1E9", receivers=(5, 10))             two routers do not see what the expert wrote; all else does

A spec says nothing of a model until it is applied to one (`moe_lens.interventions.hooks`); `check` then raises for all
that makes no sense there, before anything runs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens.config import MoEConfig
from moe_lens.interventions.branches import Change, How
from moe_lens.interventions.expert_reference import SHARED, ExpertReference
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.score_maps import position_columns
from moe_lens.routing.senders import GRANULARITIES, SenderGroup, senders_before

Pos = int | tuple[int, ...] | tuple[tuple[bool, ...], ...] | None
"""Columns: None is every real token; an int one of each row (negative from the end); a tuple of ints one for each
row; a tuple of tuples of bools a mask `[batch, pos]`. Tensors, arrays and lists are taken and become tuples."""

_EXPERT = re.compile(r"M(\d+)(?:E(\d+)|S)")


class ExpertName(NamedTuple):
    layer: int
    expert: int
    """-1 (`SHARED`) stands for the layer's shared experts."""

    def __str__(self) -> str:
        return f"M{self.layer}S" if self.expert == SHARED else f"M{self.layer}E{self.expert}"


def parse_expert(name: str) -> ExpertName:
    """`M1E9`, or `M1S`.

    Raises:
        ValueError: it is no expert's name.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is no expert; name one as 'M1E9' (layer 1, expert 9) or 'M1S' (shared experts)"
        )
    return ExpertName(int(match[1]), SHARED if match[2] is None else int(match[2]))


@dataclass(frozen=True)
class Spec:
    """What all interventions have in common: layers and positions."""

    _: KW_ONLY
    layers: int | tuple[int, ...] | None = None
    """MoE layers; None is those that the experts' names give, and for what names none, every MoE layer."""
    pos: Pos = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            self._set("layers", _integers(self.layers, "layers"))
        self._set("pos", _position(self.pos))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __str__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                value = "..." if isinstance(value, ExpertReference) else value
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def moe_layers(self, cfg: MoEConfig) -> tuple[int, ...]:
        """The layers that it acts on.

        Raises:
            ValueError: a layer without experts; those that have some are named.
        """
        chosen = cfg.moe_layers if self.layers is None else self.layers
        assert isinstance(chosen, tuple)
        for layer in chosen:
            _check_layer(cfg, layer)
        return chosen

    def check(self, model: HookedMoE, k: int | None = None) -> None:
        """Raise for what makes no sense in this model.

        Args:
            k: how many experts its layers take; None is the model's own number.
        """
        self.moe_layers(model.cfg)

    def places(self, real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """The positions where it acts, in a batch with these real tokens.

        Raises:
            ValueError: a position past the sequence, padding, or a mask of another shape.
        """
        if self.pos is None:
            return real
        if isinstance(self.pos, tuple) and isinstance(self.pos[0], tuple):
            mask = torch.tensor(self.pos, device=real.device)
            if mask.shape != real.shape:
                raise ValueError(f"the mask pos is {list(mask.shape)}, and the tokens are {list(real.shape)}")
            if bool((mask & ~real).any()):
                row, column = (mask & ~real).nonzero()[0].tolist()
                raise ValueError(f"row {row}: position {column} of the mask pos is padding")
            return mask
        columns = position_columns(self.pos, "pos", real)  # type: ignore[arg-type]
        return torch.zeros_like(real).scatter(1, columns[:, None], True)


@dataclass(frozen=True)
class NamedExperts(Spec):
    """An intervention on experts that are named, or numbered with `layers=`."""

    experts: Any = ()
    _: KW_ONLY
    inactive: Literal["raise", "allow"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.experts
        if isinstance(given, (Tensor, np.ndarray)):
            given = given.tolist()
        if isinstance(given, (str, int, np.integer)) and not isinstance(given, bool):
            given = (given,)
        given = tuple(given)
        if given and all(isinstance(name, str) for name in given):
            if self.layers is not None:
                raise ValueError(f"the names {given} say their layers; leave layers={self.layers} away")
            named = tuple(parse_expert(name) for name in given)
        else:
            numbers = _integers(given, "experts") if given else ()
            if numbers and self.layers is None:
                raise ValueError(
                    f"experts {numbers} are numbers: say of which layers, or name them as 'M1E9'"
                )
            layers = self.layers if isinstance(self.layers, tuple) else ()
            named = tuple(ExpertName(layer, expert) for layer in layers for expert in numbers)
        if len(set(named)) < len(named):
            raise ValueError(f"an expert is named twice: {', '.join(map(str, named))}")
        if self.inactive not in ("raise", "allow", None):
            raise ValueError(f"inactive={self.inactive!r} must be 'raise', 'allow' or None")
        # Named experts say their layers: one way to say it, and a copy with `dataclasses.replace` stays valid.
        self._set("experts", tuple(map(str, named)))
        if named:
            self._set("layers", None)

    @property
    def named(self) -> tuple[ExpertName, ...]:
        """The experts, taken apart."""
        return tuple(parse_expert(name) for name in self.experts)

    def moe_layers(self, cfg: MoEConfig) -> tuple[int, ...]:
        if not self.experts:
            return super().moe_layers(cfg)
        layers = tuple(dict.fromkeys(name.layer for name in self.named))
        for layer in layers:
            _check_layer(cfg, layer)
        return layers

    def routed_at(self, layer: int) -> tuple[int, ...]:
        """The routed experts named of a layer."""
        return tuple(name.expert for name in self.named if name.layer == layer and name.expert != SHARED)

    def shared_at(self, layer: int) -> bool:
        """Whether the layer's shared experts are named."""
        return ExpertName(layer, SHARED) in self.named

    def check(self, model: HookedMoE, k: int | None = None) -> None:
        super().check(model)
        for name in self.named:
            if name.expert == SHARED and model.cfg.shared is None:
                raise ValueError(f"there is no {name}: {model.cfg.model_name} has no shared experts")
            if name.expert != SHARED and not 0 <= name.expert < model.cfg.n_experts:
                raise ValueError(
                    f"there is no expert {name}; a layer of {model.cfg.model_name} has 0..{model.cfg.n_experts - 1}"
                )


@dataclass(frozen=True)
class Ablate(NamedExperts):
    """Take experts away, in one of five ways.

    Attributes:
        experts: names (`"M1E9"`, `"M1S"` the shared experts, or several), or numbers with `layers`.
        ranks: instead of experts, slots of the choice: 1 is the heaviest.
        all_but: every active routed expert except those named.
        pos: where; see `Pos`.
        how: `zero`: its contribution g_i E_i(x) becomes 0, other weights untouched. `renormalize`: zero, and the
            remaining routing weights are scaled so that their sum is what it was. `reroute`: it is removed before top-k
            (the softmax stays over all experts), the next-ranked takes the slot, and the family's own normalisation
            and scaling apply. `mean`: E_i(x) becomes the expert's mean output over a reference corpus. `resample`:
            E_i(x) becomes its output at another token where it was active.
        reference: what `mean` and `resample` read (`expert_reference(model, batches)`).
        inactive: what to do where a named expert is not active: `"raise"`, the rule where positions are named; or
            `"allow"`. With `pos=None` (the default rule) one that is active nowhere in a run raises.
        seed: of `resample`'s draws.
    """

    _: KW_ONLY
    ranks: Any = ()
    all_but: bool = False
    how: How = "zero"
    reference: ExpertReference | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("ranks", _integers(self.ranks, "ranks") if _given(self.ranks) else ())
        if bool(self.ranks) == bool(self.experts or self.all_but):
            raise ValueError("say what is ablated: experts (or all_but=True), or ranks=, and not both")
        if self.ranks and len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"ranks={self.ranks} has one twice")
        if self.all_but and any(name.expert == SHARED for name in self.named):
            raise ValueError("all_but is about routed experts; shared experts are not removed by it anyway")
        if self.all_but and not self.experts and self.layers is None:
            raise ValueError("all_but=True without experts removes all of a layer's: say which layers")
        self.change  # noqa: B018  it raises for what does not fit together

    @property
    def change(self) -> Change:
        return Change(self.how, self.reference, self.seed)

    @property
    def must_be_active(self) -> bool:
        """Whether every named expert has to be active at every position."""
        explicit = self.pos is not None and self.inactive is None
        return bool(self.experts) and not self.all_but and (explicit or self.inactive == "raise")

    def check(self, model: HookedMoE, k: int | None = None) -> None:
        super().check(model)
        cfg = model.cfg
        k = cfg.top_k if k is None else k
        layers = self.moe_layers(cfg)
        self.change.check_model(model, layers)
        outside = [rank for rank in self.ranks if not 1 <= rank <= k]
        if outside:
            raise ValueError(
                f"there is no active expert of rank {outside[0]}: ranks go from 1, the heaviest, to {k}"
            )
        for layer in layers:
            n_named = len(self.routed_at(layer))
            if self.shared_at(layer) and self.how in ("renormalize", "reroute"):
                raise ValueError(
                    f"how={self.how!r} is about routed experts' weights; M{layer}S takes 'zero', 'mean' or 'resample'"
                )
            if self.must_be_active and n_named > k:
                raise ValueError(
                    f"layer {layer}: {n_named} experts are to be removed, and only {k} are active"
                )
            n_certain = len(self.ranks) or (n_named if self.must_be_active else 0)
            if self.how == "renormalize" and (n_certain >= k or (self.all_but and not n_named)):
                raise ValueError(
                    f"layer {layer}: renormalize needs an expert that stays, and all {k} active ones would be removed"
                )
            if self.how == "reroute":
                n_removed = max(0, k - n_named) if self.all_but else len(self.ranks) or n_named
                n_left = cfg.n_experts - n_removed
                if n_left < k:
                    raise ValueError(
                        f"layer {layer}: {n_left} experts remain to be chosen from, and {k} are wanted"
                    )


@dataclass(frozen=True)
class ForceExperts(NamedExperts):
    """The choice contains these experts; the remaining slots go to the highest-ranked others.

    Routing weights are read for the chosen by the family's rule: a forced expert gets its own probability, however
    small. Under group-limited routing a forced expert need not be of an eligible group.
    """

    def check(self, model: HookedMoE, k: int | None = None) -> None:
        super().check(model)
        _require_routed(self)
        k = model.cfg.top_k if k is None else k
        for layer in self.moe_layers(model.cfg):
            if len(self.routed_at(layer)) > k:
                raise ValueError(
                    f"layer {layer}: {len(self.routed_at(layer))} experts are forced into {k} slots"
                )


@dataclass(frozen=True)
class ForbidExperts(NamedExperts):
    """These experts are never chosen; the next-ranked take their slots, as in `Ablate(how="reroute")`.

    Unlike there, a forbidden expert need not be active where positions are named. One that would have been chosen
    nowhere in a run raises, unless `inactive="allow"`.
    """

    def check(self, model: HookedMoE, k: int | None = None) -> None:
        super().check(model)
        _require_routed(self)
        k = model.cfg.top_k if k is None else k
        for layer in self.moe_layers(model.cfg):
            n_left = model.cfg.n_experts - len(self.routed_at(layer))
            if n_left < k:
                raise ValueError(
                    f"layer {layer}: {n_left} experts remain to be chosen from, and {k} are wanted"
                )


@dataclass(frozen=True)
class SwapRanks(Spec):
    """The expert of rank i leaves the choice, and the one of rank j takes its slot.

    Ranks are 1 for the heaviest, among all experts; those of groups that are not eligible come last. A negative j
    counts from the end: -1 is the last of all.

    Attributes:
        i: from 1 to K.
        j: any other.
        weights: which weight the swapped-in expert gets. `"own"`: its own, by the family's rule, which under
            renormalisation changes the others' too. `"slot"`: exactly that of the expert it replaces, the others'
            unchanged; with both ranks in the choice the two exchange weights.
    """

    i: int = 0
    j: int = 0
    _: KW_ONLY
    weights: Literal["own", "slot"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("i", "j"):
            self._set(name, _integers(getattr(self, name), name)[0])
        if self.weights not in ("own", "slot"):
            raise ValueError(f"weights={self.weights!r} must be 'own' or 'slot'")

    def rank_in(self, cfg: MoEConfig) -> int:
        """j, counted from 1."""
        return self.j if self.j >= 0 else cfg.n_experts + 1 + self.j

    def check(self, model: HookedMoE, k: int | None = None) -> None:
        super().check(model)
        k = model.cfg.top_k if k is None else k
        j = self.rank_in(model.cfg)
        if not 1 <= self.i <= k:
            raise ValueError(f"rank i={self.i} is not in the choice: it holds ranks 1..{k}")
        if not 1 <= j <= model.cfg.n_experts:
            raise ValueError(f"there is no rank j={self.j} among {model.cfg.n_experts} experts")
        if j == self.i:
            raise ValueError(f"rank {j} cannot be swapped with itself")
        if j <= k and self.weights == "own":
            raise ValueError(
                f"ranks {self.i} and {j} are both in the choice, so a swap with their own weights changes nothing; "
                f"weights='slot' exchanges their weights"
            )


@dataclass(frozen=True)
class TopK(Spec):
    """Layers take k experts instead of the model's number; weights by the family's rule for k.

    Attributes:
        k: from 1 to the number of experts.
    """

    k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("k", _integers(self.k, "k")[0])

    def check(self, model: HookedMoE, k: int | None = None) -> None:
        super().check(model)
        router = model.cfg.router
        most = router.top_k_groups * (router.n_experts // router.n_groups)
        if not 1 <= self.k <= most:
            eligible = f", and {most} are in eligible groups" if router.n_groups > 1 else ""
            raise ValueError(
                f"k={self.k} must lie in 1..{most}: a layer has {router.n_experts} experts{eligible}"
            )


@dataclass(frozen=True)
class RouterOnly(Spec):
    """Routers no longer see what a sender wrote; everything else does.

    The sender's exact score, R_r z_c / s_r, is subtracted from the router's logits, with the scale s_r as it is in the
    run: the residual stream, and what the experts read, stay. Outputs then follow the new choice.

    Attributes:
        sender: `embed`, `A3`, `M3`, `A3H5`, `A3bias`, `A3H5<-17`, `M1E9`, `M1S`, `M1E9N40`, ...; see
            `moe_lens.routing.senders`.
        receivers: MoE layers (3 or `"M3"`) after the sender; None is all of them.
        hold_outputs: keep the receivers' outputs as they were, so that the residual stream is untouched and only
            routing quantities show the change.
        inactive: as in `Ablate`, for senders that are not everywhere: experts, and source tokens after the query.

    Source: the AARV experiment of "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs"
    (ICLR 2026), section 7.2, where the scores assigned by an expert are set to zero.
    """

    sender: str = ""
    receivers: Any = None
    _: KW_ONLY
    hold_outputs: bool = False
    inactive: Literal["raise", "allow"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            raise ValueError("RouterOnly acts on receivers=; it has no other layers")
        if self.receivers is not None:
            given = self.receivers
            given = (given,) if isinstance(given, (str, int)) else tuple(given)
            plain = [r[1:] if isinstance(r, str) and re.fullmatch(r"M\d+", r) else r for r in given]
            numbers = tuple(int(r) if isinstance(r, str) and r.isdecimal() else r for r in plain)
            self._set("receivers", _integers(numbers, "receivers"))
        if self.inactive not in ("raise", "allow", None):
            raise ValueError(f"inactive={self.inactive!r} must be 'raise', 'allow' or None")

    def located(self, cfg: MoEConfig) -> tuple[SenderGroup, dict[str, int], str]:
        """The group that the sender is of, where in it, and the name.

        Raises:
            ValueError: there is no such sender; some that there are, are named.
        """
        last = cfg.moe_layers[-1]
        for by in GRANULARITIES:
            senders = senders_before(cfg, last, by, n_sources=cfg.n_ctx)
            if self.sender in senders:
                index = senders.index(self.sender)
                return senders.group_of(index), senders.coordinates(index), by
        raise ValueError(
            f"there is no sender {self.sender!r} before the last router; name one as 'embed', 'A3', 'A3H5', "
            f"'A3H5<-17', 'M3', 'M1E9', 'M1S' or 'M1E9N40'"
        )

    def moe_layers(self, cfg: MoEConfig) -> tuple[int, ...]:
        group, _, _ = self.located(cfg)
        first = 0 if group.layer is None else group.layer + group.component.startswith("M")
        later = tuple(layer for layer in cfg.moe_layers if layer >= first)
        if self.receivers is None:
            return later
        for layer in self.receivers:
            _check_layer(cfg, layer)
            if layer not in later:
                raise ValueError(
                    f"the router of layer {layer} comes before {self.sender}, which it cannot read"
                )
        return self.receivers


def _require_routed(spec: NamedExperts) -> None:
    if not spec.experts:
        raise ValueError(f"{type(spec).__name__} needs experts")
    for name in spec.named:
        if name.expert == SHARED:
            raise ValueError(
                f"{name} is always active: no router chooses it, and {type(spec).__name__} acts on routers"
            )


def _check_layer(cfg: MoEConfig, layer: int) -> None:
    if layer not in cfg.moe_layers:
        raise ValueError(
            f"layer {layer} has no experts; MoE layers are {', '.join(map(str, cfg.moe_layers))}"
        )


def _given(value: Any) -> bool:
    return not (isinstance(value, (tuple, list)) and len(value) == 0)


def _integers(value: Any, name: str) -> tuple[int, ...]:
    """One or more integers, as a tuple."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    items = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    try:
        if any(isinstance(item, bool) for item in items):
            raise TypeError
        numbers = tuple(operator.index(item) for item in items)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}={value!r} must be an integer, or several") from None
    if not numbers:
        raise ValueError(f"{name} is empty")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={numbers} has one twice")
    return numbers


def _position(pos: Any) -> Pos:
    """A position argument as plain data."""
    if pos is None:
        return None
    if isinstance(pos, (Tensor, np.ndarray)):
        pos = pos.tolist()
    if isinstance(pos, Iterable) and not isinstance(pos, str):
        rows: Any = tuple(tuple(row) if isinstance(row, Iterable) else row for row in pos)
        is_mask = bool(rows) and all(
            isinstance(row, tuple) and all(type(v) is bool for v in row) for row in rows
        )
        if is_mask and len({len(row) for row in rows}) == 1:
            if not any(any(row) for row in rows):
                raise ValueError("the mask pos selects no position")
            return rows
        pos = rows
    items = pos if isinstance(pos, tuple) else (pos,)
    try:
        if not items or any(isinstance(item, bool) for item in items):
            raise TypeError
        numbers = tuple(operator.index(item) for item in items)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"pos={pos!r} must be a column, one for each row, or a mask of bools [batch, pos]"
        ) from None
    return numbers if isinstance(pos, tuple) else numbers[0]
