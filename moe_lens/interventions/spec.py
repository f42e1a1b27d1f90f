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

A spec says nothing of a model until it is applied to one (`moe_lens.interventions.hooks`); then all that makes no sense
there raises before anything runs.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch

from moe_lens.config import MoEConfig
from moe_lens.interventions.arguments import integer, integers, layer_numbers
from moe_lens.interventions.branches import Change, How
from moe_lens.interventions.expert_reference import SHARED, ExpertReference
from moe_lens.interventions.spec_base import Inactive, NamedExperts, Spec, check_inactive, check_layer
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.senders import GRANULARITIES, SenderGroup, senders_before


@dataclass(frozen=True, repr=False)
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
            and scaling apply; of several named none takes the slot of another. `mean`: E_i(x) becomes the expert's
            mean output over a reference corpus. `resample`: E_i(x) becomes its output at another token where it was
            active.
        reference: what `mean` and `resample` read (`expert_reference(model, batches)`).
        inactive: what to do where a named expert is not active: `"raise"`, the rule where positions are named; or
            `"allow"`. With `pos=None` the rule is that one which is active nowhere in a run raises.
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
        has_ranks = not (isinstance(self.ranks, tuple | list) and len(self.ranks) == 0)
        self._set("ranks", integers(self.ranks, "ranks") if has_ranks else ())
        self._set("seed", integer(self.seed, "seed"))
        if not isinstance(self.all_but, bool):
            raise ValueError(f"all_but={self.all_but!r} must be True or False")
        if bool(self.ranks) == bool(self.experts or self.all_but):
            raise ValueError("say what is ablated: experts (or all_but=True), or ranks=, and not both")
        if self.all_but and any(name.expert == SHARED for name in self.named):
            raise ValueError("all_but is about routed experts; shared experts are not removed by it anyway")
        if self.all_but and not self.experts and self.layers is None:
            raise ValueError("all_but=True without experts removes all of a layer's: say which layers")
        if self.inactive is not None and (self.ranks or self.all_but):
            raise ValueError("ranks and all_but name active experts only, so inactive= says nothing of them")
        shared = [name for name in self.named if name.expert == SHARED]
        if shared and self.how in ("renormalize", "reroute"):
            raise ValueError(
                f"how={self.how!r} is about routed experts' weights; {shared[0]} takes 'zero', 'mean' or 'resample'"
            )
        if self.how == "renormalize" and self.all_but and not self.experts:
            raise ValueError(
                "renormalize needs an expert that stays, and all_but=True without experts keeps none"
            )
        self.change  # noqa: B018  it raises for what does not fit together

    @property
    def change(self) -> Change:
        return Change(self.how, self.reference, self.seed)

    @property
    def must_be_active(self) -> bool:
        if not self.experts or self.all_but:
            return False
        return self.inactive == "raise" or (self.pos is not None and self.inactive is None)

    def check(self, model: HookedMoE) -> None:
        super().check(model)
        layers = self.moe_layers(model.cfg)
        self.change.check_model(model, layers)
        if self.reference is not None and not self.all_but:
            for layer in layers:
                experts = [name.expert for name in self.named if name.layer == layer]
                # It raises for an expert that the reference never met.
                self.reference.mean_output(layer, torch.tensor(experts, dtype=torch.long))


@dataclass(frozen=True, repr=False)
class ForceExperts(NamedExperts):
    """The choice contains these experts; the remaining slots go to the highest-ranked others.

    Routing weights are read for the chosen by the family's rule: a forced expert gets its own probability, however
    small. Under group-limited routing a forced expert need not be of an eligible group.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_routed()
        if self.inactive is not None:
            raise ValueError(
                "a forced expert is active after, whether or not it was before; leave inactive= away"
            )


@dataclass(frozen=True, repr=False)
class ForbidExperts(NamedExperts):
    """These experts are never chosen; the next-ranked take their slots, as in `Ablate(how="reroute")`.

    Unlike there, a forbidden expert need not be active where positions are named. One that would have been chosen
    nowhere in a run raises, unless `inactive="allow"`; with `inactive="raise"` it has to be everywhere.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_routed()


@dataclass(frozen=True, repr=False)
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

    i: int
    j: int
    _: KW_ONLY
    weights: Literal["own", "slot"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("i", integer(self.i, "i"))
        self._set("j", integer(self.j, "j"))
        if self.weights not in ("own", "slot"):
            raise ValueError(f"weights={self.weights!r} must be 'own' or 'slot'")

    def rank_in(self, n_experts: int) -> int:
        """j, counted from 1."""
        return self.j if self.j >= 0 else n_experts + 1 + self.j

    def check(self, model: HookedMoE) -> None:
        super().check(model)
        k, j = model.cfg.top_k, self.rank_in(model.cfg.n_experts)
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


@dataclass(frozen=True, repr=False)
class TopK(Spec):
    """Layers take k experts instead of the model's number; weights by the family's rule for k.

    Attributes:
        k: from 1 to the number of experts (of those in eligible groups, where there are groups).
    """

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("k", integer(self.k, "k"))

    def check(self, model: HookedMoE) -> None:
        super().check(model)
        router = model.cfg.router
        most = router.top_k_groups * (router.n_experts // router.n_groups)
        if not 1 <= self.k <= most:
            eligible = f", and {most} are in eligible groups" if router.n_groups > 1 else ""
            raise ValueError(
                f"k={self.k} must lie in 1..{most}: a layer has {router.n_experts} experts{eligible}"
            )


@dataclass(frozen=True, repr=False)
class RouterOnly(Spec):
    """Routers no longer see what a sender wrote; everything else does.

    The sender's exact score, R_r z_c / s_r, is subtracted from the router's logits, with the scale s_r as it is in the
    run: the residual stream, and what the experts read, stay. Outputs then follow the new choice.

    Attributes:
        sender: `embed`, `A3`, `M3`, `A3H5`, `A3bias`, `A3H5<-17`, `M1E9`, `M1S`, `M1E9N40`, ...; see
            `moe_lens.routing.senders`.
        receivers: MoE layers (3 or `"M3"`) after the sender; None is all of them.
        hold_outputs: keep the receivers' outputs as their own choice makes them, at all positions, so that the residual
            stream is untouched and only routing quantities show the change.
        inactive: as in `Ablate`, for senders that are not everywhere: experts, and source tokens after the query.

    Source: the AARV experiment of "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs"
    (ICLR 2026), section 7.2, where the scores assigned by an expert are set to zero.
    """

    sender: str
    receivers: Any = None
    _: KW_ONLY
    hold_outputs: bool = False
    inactive: Inactive = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sender, str):
            raise ValueError(f"sender={self.sender!r} must be a name, such as 'A3' or 'M1E9'")
        if self.layers is not None:
            raise ValueError("RouterOnly acts on receivers=; it has no other layers")
        if self.receivers is not None:
            self._set("receivers", layer_numbers(self.receivers, "receivers"))
        if not isinstance(self.hold_outputs, bool):
            raise ValueError(f"hold_outputs={self.hold_outputs!r} must be True or False")
        check_inactive(self.inactive)

    def located(self, cfg: MoEConfig) -> tuple[SenderGroup, dict[str, int], str]:
        """The group that the sender is of, where in it, and the granularity.

        Raises:
            ValueError: there is no such sender; how they are named is said.
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
            check_layer(cfg, layer)
            if layer not in later:
                raise ValueError(
                    f"the router of layer {layer} comes before {self.sender}, which it cannot read"
                )
        return self.receivers
