"""Which experts a layer chooses under specs that change its choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.config import RouterConfig
from moe_lens.interventions.arguments import ExpertName
from moe_lens.interventions.changed_routing import choose, ranking, weights_of
from moe_lens.interventions.contradictions import Numbered, Places, chooses
from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.spec import Ablate, ForbidExperts, ForceExperts, NamedExperts, SwapRanks, TopK
from moe_lens.model.moe import applied_weights


class Chosen(NamedTuple):
    """Attributes:
    indices: the choice, heaviest first.
    kept: False in the slots that a token has to spare, where others take more experts than it does.
    weights: in float32, where they are not what the family's rule makes of the indices.
    """

    indices: Int[Tensor, "batch pos k"]
    kept: Bool[Tensor, "batch pos k"]
    weights: Float[Tensor, "batch pos k"] | None = None


class LayerChoice:
    """What a layer's `ForceExperts`, `ForbidExperts`, `TopK`, `SwapRanks` and `reroute` make of its choice.

    They act together: what is excluded and what is forced, at every place, and then one choice of the family's rule.
    `reroute` reads what is active from the choice as it arrives, after `TopK`.
    """

    def __init__(self, router: RouterConfig, layer: int, specs: Sequence[Numbered], receipt: Receipt):
        self.router, self.layer, self.receipt = router, layer, receipt
        self.specs = [(i, spec) for i, spec in specs if chooses(spec)]

    def change(
        self,
        probabilities: Float[Tensor, "batch pos expert"],
        arriving: Int[Tensor, "batch pos k"],
        places: Places,
        *,
        may_be_nowhere: bool,
    ) -> Chosen:
        """The choice at one run, counted in the receipt.

        Args:
            probabilities: over all experts.
            arriving: the choice without these specs.
            places: where they act.
            may_be_nowhere: whether an expert that is active nowhere is let pass.

        Raises:
            ValueError: too few experts remain to be chosen from; one is forced and rerouted.
            UnfiredIntervention: a named expert is not active where it has to be.
        """
        if any(isinstance(spec, SwapRanks) for _, spec in self.specs):
            return self._swapped(probabilities, arriving, places)
        nowhere = torch.zeros_like(probabilities, dtype=torch.bool)
        touched, sizes = self._sizes(arriving, places)
        base_taken, (base_indices, kept) = self._selected(
            probabilities, arriving, touched, sizes, nowhere, nowhere
        )
        excluded, forced = nowhere, nowhere
        counted: list[tuple[int, Bool[Tensor, "batch pos expert"]]] = []
        for i, spec in self.specs:
            if isinstance(spec, TopK):
                continue
            assert isinstance(spec, NamedExperts)
            here = places[i][..., None] & self._named(spec, probabilities)
            if isinstance(spec, ForceExperts):
                forced, asked = forced | here, here
                touched = touched | (here & ~base_taken).any(dim=-1)
            else:
                removed = removed_slots(spec, self.layer, places[i], base_indices, kept)
                require_active(spec, self.layer, places[i], base_indices, kept, may_be_nowhere=may_be_nowhere)
                asked = nowhere.scatter(-1, base_indices, removed)
                # Of several that are named none may take the slot of another, so the inactive go as well.
                by_name = isinstance(spec, ForbidExperts) or (
                    isinstance(spec, Ablate) and not spec.ranks and not spec.all_but
                )
                excluded = excluded | (here if by_name else asked)
                touched = touched | removed.any(dim=-1)
            self.receipt.add(i, self.layer, asked=int(asked.sum()))
            counted.append((i, asked))
        self._refuse_both(forced & excluded)
        taken, (indices, kept) = self._selected(probabilities, arriving, touched, sizes, excluded, forced)
        for i, asked in counted:
            is_forced = isinstance(dict(self.specs)[i], ForceExperts)
            self.receipt.add(i, self.layer, fired=int((asked & (taken if is_forced else ~taken)).sum()))
        for i, spec in self.specs:
            if isinstance(spec, TopK):
                right = places[i] & (taken.sum(dim=-1) == spec.k)
                self.receipt.add(i, self.layer, asked=int(places[i].sum()), fired=int(right.sum()))
        if bool(kept.all()):
            return Chosen(indices, kept)
        # The choice is wider than what some places take: the slots beyond it have no weight.
        return Chosen(indices, kept, weights_of(probabilities, indices, kept, self.router))

    def _named(
        self, spec: NamedExperts, probabilities: Float[Tensor, "batch pos expert"]
    ) -> Bool[Tensor, " expert"]:
        named = torch.zeros(probabilities.shape[-1], dtype=torch.bool, device=probabilities.device)
        named[list(spec.routed_at(self.layer))] = True
        return named

    def _sizes(
        self, arriving: Int[Tensor, "batch pos k"], places: Places
    ) -> tuple[Bool[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Where a `TopK` acts, and how many experts each token takes."""
        touched = torch.zeros_like(arriving[..., 0], dtype=torch.bool)
        sizes = torch.full_like(arriving[..., 0], arriving.shape[-1])
        for i, spec in self.specs:
            if isinstance(spec, TopK):
                # Everywhere is everywhere: a choice has one width, and padding has to have it too.
                at = torch.ones_like(touched) if spec.pos is None else places[i]
                sizes, touched = sizes.masked_fill(at, spec.k), touched | at
        return touched, sizes

    def _selected(
        self,
        probabilities: Float[Tensor, "batch pos expert"],
        arriving: Int[Tensor, "batch pos k"],
        touched: Bool[Tensor, "batch pos"],
        sizes: Int[Tensor, "batch pos"],
        excluded: Bool[Tensor, "batch pos expert"],
        forced: Bool[Tensor, "batch pos expert"],
    ) -> tuple[
        Bool[Tensor, "batch pos expert"],
        tuple[Int[Tensor, "batch pos new_k"], Bool[Tensor, "batch pos new_k"]],
    ]:
        """Which experts are taken; their slots, heaviest first, and which slots are kept. Where nothing is touched,
        they are as they came."""
        taken = torch.zeros_like(excluded).scatter(-1, arriving, True)
        for size in sizes[touched].unique().tolist():
            here = (touched & (sizes == size))[..., None]
            new = choose(probabilities, self.router, k=size, excluded=excluded & here, forced=forced & here)
            taken = torch.where(here, torch.zeros_like(taken).scatter(-1, new, True), taken)
        width = int(taken.sum(dim=-1).max())
        # Probabilities lie in [0, 1], so what is not taken comes after all that is.
        indices = torch.where(taken, probabilities, probabilities - 2).topk(width, dim=-1).indices
        if width == arriving.shape[-1]:
            indices = torch.where(touched[..., None], indices, arriving)
        return taken, (indices, taken.gather(-1, indices))

    def _refuse_both(self, both: Bool[Tensor, "batch pos expert"]) -> None:
        where = both.nonzero()
        if len(where):
            row, column, expert = where[0].tolist()
            raise ValueError(
                f"{ExpertName(self.layer, expert)} is forced and excluded at row {row}, position {column}"
            )

    def _swapped(
        self,
        probabilities: Float[Tensor, "batch pos expert"],
        arriving: Int[Tensor, "batch pos k"],
        places: Places,
    ) -> Chosen:
        k = arriving.shape[-1]
        ranked = ranking(probabilities, arriving, self.router)
        indices, takes_slot = arriving, torch.zeros_like(arriving[..., 0], dtype=torch.bool)
        for number, spec in self.specs:
            assert isinstance(spec, SwapRanks)
            i, j = spec.i - 1, spec.rank_in(probabilities.shape[-1]) - 1
            leaves = arriving[..., i]
            comes = ranked[..., j] if j >= k else arriving[..., j]
            new = arriving.clone()
            new[..., i] = comes
            if j < k:
                new[..., j] = leaves
            if spec.weights == "own":
                order = probabilities.gather(-1, new).argsort(dim=-1, descending=True, stable=True)
                new = new.gather(-1, order)
            else:
                takes_slot = takes_slot | places[number]
            indices = torch.where(places[number][..., None], new, indices)
            has_come = (indices == comes[..., None]).any(dim=-1)
            has_left = (indices != leaves[..., None]).all(dim=-1) if j >= k else indices[..., i] == comes
            fired = places[number] & has_come & has_left
            self.receipt.add(number, self.layer, asked=int(places[number].sum()), fired=int(fired.sum()))
        kept = torch.ones_like(indices, dtype=torch.bool)
        if not bool(takes_slot.any()):
            return Chosen(indices, kept)
        weights = torch.where(
            takes_slot[..., None],
            applied_weights(probabilities, arriving, self.router),
            applied_weights(probabilities, indices, self.router),
        )
        return Chosen(indices, kept, weights)


# ---- active experts ----


def removed_slots(
    spec: NamedExperts,
    layer: int,
    places: Bool[Tensor, "batch pos"],
    indices: Int[Tensor, "batch pos k"],
    kept: Bool[Tensor, "batch pos k"],
) -> Bool[Tensor, "batch pos k"]:
    """The slots of a choice that a spec removes.

    Args:
        kept: the slots that hold an active expert.
    """
    named = torch.tensor(spec.routed_at(layer), device=indices.device, dtype=indices.dtype)
    here = places[..., None] & kept
    if isinstance(spec, Ablate) and spec.ranks:
        slots = torch.arange(1, indices.shape[-1] + 1, device=indices.device)
        return here & torch.isin(slots, torch.tensor(spec.ranks, device=indices.device))
    if isinstance(spec, Ablate) and spec.all_but:
        return here & ~torch.isin(indices, named)
    return here & torch.isin(indices, named)


def require_active(
    spec: NamedExperts,
    layer: int,
    places: Bool[Tensor, "batch pos"],
    indices: Int[Tensor, "batch pos k"],
    kept: Bool[Tensor, "batch pos k"],
    *,
    may_be_nowhere: bool,
) -> None:
    """Raise where a spec names an expert that is not active.

    Args:
        kept: the slots that hold an active expert.
        may_be_nowhere: whether one that is active at none of the places is let pass, unless positions are named.

    Raises:
        UnfiredIntervention: with the place named.
    """
    if isinstance(spec, Ablate) and (spec.ranks or spec.all_but):
        return
    for expert in spec.routed_at(layer):
        active = ((indices == expert) & kept).any(dim=-1) & places
        name = ExpertName(layer, expert)
        absent = (places & ~active).nonzero()
        if spec.must_be_active and len(absent):
            row, column = absent[0].tolist()
            there = indices[row, column][kept[row, column]].tolist()
            raise UnfiredIntervention(
                f"{name} is not active at row {row}, position {column}, where experts {there} are; "
                f"inactive='allow' lets that pass"
            )
        if spec.inactive is None and not may_be_nowhere and len(absent) == int(places.sum()):
            raise UnfiredIntervention(
                f"{name} is active at none of the {len(absent)} positions of {spec}; inactive='allow' lets that pass"
            )
