"""What a layer's specs do at its hook points, in the order in which a forward pass meets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.changed_routing import choose, ranking, renormalized, weights_of
from moe_lens.interventions.expert_reference import SHARED, ExpertReference, prefix_hashes
from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.spec import (
    Ablate,
    ExpertName,
    ForbidExperts,
    ForceExperts,
    NamedExperts,
    Spec,
    SwapRanks,
    TopK,
)
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.moe import applied_weights
from moe_lens.model.observers import Run

Numbered = tuple[int, Spec]
"""A spec with its index among all that are applied, which the receipt's lines go by."""


class LayerHooks:
    """The hooks of one MoE layer.

    Attributes:
        specs: those that act here, without `RouterOnly`.

    Raises:
        ValueError: specs that contradict each other here.
    """

    def __init__(self, model: HookedMoE, layer: int, specs: Sequence[Numbered], receipt: Receipt):
        self.model, self.layer, self.receipt = model, layer, receipt
        self.specs = list(specs)
        self.ablations = [(i, spec) for i, spec in specs if isinstance(spec, Ablate)]
        self.places: dict[int, Bool[Tensor, "batch pos"]] = {}
        self.run: Run | None = None
        self.probabilities: Tensor | None = None
        self.indices: Tensor = torch.empty(0)
        self.weights: Tensor | None = None
        self.removed: dict[int, Bool[Tensor, "batch pos k"]] = {}
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        choosing = [spec for _, spec in self.specs if self._chooses(spec)]
        swaps = [spec for spec in choosing if isinstance(spec, SwapRanks)]
        sizes = [spec for spec in choosing if isinstance(spec, TopK)]
        if swaps and len(choosing) > len(swaps):
            other = next(spec for spec in choosing if not isinstance(spec, SwapRanks))
            raise ValueError(f"layer {self.layer}: {swaps[0]} and {other} both change the choice of experts")
        forced = self._named(ForceExperts)
        if sizes and sizes[0].pos is not None and forced:
            raise ValueError(
                f"layer {self.layer}: {sizes[0]} at some positions does not go with ForceExperts"
            )
        both = forced & self._named(ForbidExperts)
        if both:
            raise ValueError(f"M{self.layer}E{min(both)} is forced and forbidden")

    def _named(self, kind: type[NamedExperts]) -> set[int]:
        return {e for _, spec in self.specs if isinstance(spec, kind) for e in spec.routed_at(self.layer)}

    @staticmethod
    def _chooses(spec: Spec) -> bool:
        """Whether it changes which experts are chosen."""
        return not isinstance(spec, Ablate) or spec.how == "reroute"

    def begin(self, index: int, spec: Spec, places: Bool[Tensor, "batch pos"], run: Run) -> None:
        """A run is about to begin, in which the index-th spec acts at these places."""
        if all(index != i for i, _ in self.specs):
            return
        self.run, self.removed, self.probabilities, self.weights = run, {}, None, None
        self.places[index] = places
        if isinstance(spec, Ablate) and spec.how == "resample" and run.tokens is None:
            raise ValueError(
                "resample tells tokens by what comes before them, so it needs a run from tokens: use model.intervene"
            )

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        mlp = f"blocks.{self.layer}.mlp"
        hows = {spec.how for _, spec in self.ablations}
        points: list[tuple[str, Callable[..., Any]]] = [("hook_expert_indices", self._on_indices)]
        if any(self._chooses(spec) for _, spec in self.specs):
            points.insert(0, ("hook_expert_weights", self._on_probabilities))
            points.append(("hook_routing_weights", self._on_weights))
        elif "renormalize" in hows:
            points.append(("hook_routing_weights", self._on_weights))
        if hows & {"mean", "resample"}:
            points.append(("hook_expert_out", self._on_expert_out))
        if "zero" in hows:
            points.append(("hook_expert_contrib", self._on_contrib))
        if any(spec.shared_at(self.layer) for _, spec in self.ablations):
            points.append(("hook_shared_out", self._on_shared_out))
        return [(f"{mlp}.{point}", hook) for point, hook in points]

    # ---- the choice ----

    def _on_probabilities(self, value: Float[Tensor, "batch pos expert"], hook: HookPoint) -> None:
        self.probabilities = value

    def _on_indices(
        self, value: Int[Tensor, "batch pos k"], hook: HookPoint
    ) -> Int[Tensor, "batch pos k"] | None:
        """The changed choice; and which of its slots the ablations remove."""
        indices = value
        if any(self._chooses(spec) for _, spec in self.specs):
            indices = self._swapped(self._chosen(value))
        claimed = torch.zeros_like(indices, dtype=torch.bool)
        for i, spec in self.ablations:
            if spec.how == "reroute":
                continue
            removed = self._slots(i, spec, indices)
            twice = (claimed & removed).nonzero()
            if len(twice):
                batch, pos, k = twice[0].tolist()
                expert = ExpertName(self.layer, int(indices[batch, pos, k]))
                raise ValueError(f"{expert} is ablated by two specs at row {batch}, position {pos}")
            claimed |= removed
            self.removed[i] = removed
        self.indices = indices
        return None if indices is value else indices

    def _slots(
        self, index: int, spec: Ablate, indices: Int[Tensor, "batch pos k"]
    ) -> Bool[Tensor, "batch pos k"]:
        """The slots of the choice that an ablation removes, counted as asked for.

        Raises:
            UnfiredIntervention: a named expert is not active where it has to be.
        """
        places = self.places[index][..., None]
        named = torch.tensor(spec.routed_at(self.layer), device=indices.device, dtype=indices.dtype)
        if spec.ranks:
            slots = torch.arange(1, indices.shape[-1] + 1, device=indices.device)
            removed = places & torch.isin(slots, torch.tensor(spec.ranks, device=indices.device))
        elif spec.all_but:
            removed = places & ~torch.isin(indices, named)
        else:
            removed = places & torch.isin(indices, named)
            self._require_active(index, spec, removed, indices)
        self.receipt.add(index, self.layer, asked=int(removed.sum()))
        if spec.shared_at(self.layer):
            self.receipt.add(index, self.layer, asked=int(places.sum()))
        return removed

    def _require_active(
        self,
        index: int,
        spec: NamedExperts,
        removed: Bool[Tensor, "batch pos k"],
        indices: Int[Tensor, "batch pos k"],
    ) -> None:
        places = self.places[index]
        must_be_active = isinstance(spec, Ablate) and spec.must_be_active
        assert self.run is not None
        may_be_nowhere = spec.inactive == "allow" or self.run.n_past > 0
        for expert in spec.routed_at(self.layer):
            active = (indices == expert).any(dim=-1) & places
            name = ExpertName(self.layer, expert)
            if must_be_active and bool((places & ~active).any()):
                batch, pos = (places & ~active).nonzero()[0].tolist()
                raise UnfiredIntervention(
                    f"{name} is not active at row {batch}, position {pos}, where experts "
                    f"{indices[batch, pos].tolist()} are; inactive='allow' lets that pass"
                )
            if not may_be_nowhere and not bool(active.any()):
                raise UnfiredIntervention(
                    f"{name} is active at none of the {int(places.sum())} positions of {spec}; inactive='allow' lets "
                    f"that pass"
                )

    def _chosen(self, arriving: Int[Tensor, "batch pos k"]) -> Int[Tensor, "batch pos new_k"]:
        """The choice after what excludes, forces, or asks for another number of experts."""
        assert self.probabilities is not None
        probabilities, router = self.probabilities, self.model.cfg.router
        excluded = torch.zeros_like(probabilities, dtype=torch.bool)
        forced = torch.zeros_like(excluded)
        touched = torch.zeros_like(excluded[..., 0])
        sizes = torch.full_like(arriving[..., 0], arriving.shape[-1])
        counted: list[tuple[int, Bool[Tensor, "batch pos expert"]]] = []
        for i, spec in self.specs:
            if isinstance(spec, TopK):
                # Everywhere is everywhere: a choice has one width, and padding has to have it too.
                places = self.places[i] if spec.pos is not None else torch.ones_like(touched)
                sizes, touched = sizes.masked_fill(places, spec.k), touched | places
                self.receipt.add(i, self.layer, asked=int(self.places[i].sum()))
        base = self._selected(arriving, touched, sizes, excluded, forced)
        for i, spec in self.specs:
            places = self.places[i]
            if isinstance(spec, (ForceExperts, ForbidExperts)):
                named = torch.zeros_like(excluded[0, 0]).index_fill(
                    0, torch.tensor(spec.routed_at(self.layer), device=arriving.device), True
                )
                here = places[..., None] & named
                if isinstance(spec, ForceExperts):
                    forced = forced | here
                    self.receipt.add(i, self.layer, asked=int(here.sum()))
                else:
                    excluded = excluded | here
                    self._require_active(i, spec, here, base[0])
                    self.receipt.add(i, self.layer, asked=int((here & base[1]).sum()))
                touched = touched | places
            elif isinstance(spec, Ablate) and spec.how == "reroute":
                removed = self._slots(i, spec, base[0])
                here = torch.zeros_like(excluded).scatter(-1, base[0], removed)
                excluded, touched = excluded | here, touched | here.any(dim=-1)
            else:
                continue
            counted.append((i, here))
        indices, taken = self._selected(arriving, touched, sizes, excluded, forced)
        for i, here in counted:
            spec = self.specs_by_index[i]
            done = here & taken if isinstance(spec, ForceExperts) else here & base[1] & ~taken
            self.receipt.add(i, self.layer, fired=int(done.sum()))
        for i, spec in self.specs:
            if isinstance(spec, TopK):
                right = taken.sum(dim=-1) == spec.k
                self.receipt.add(i, self.layer, fired=int((right & self.places[i]).sum()))
        kept = taken.gather(-1, indices)
        if not bool(kept.all()):
            # The choice is wider than what some positions take: the slots beyond it have no weight.
            self.weights = weights_of(probabilities, indices, kept, router)
        return indices

    @property
    def specs_by_index(self) -> dict[int, Spec]:
        return dict(self.specs)

    def _selected(
        self,
        arriving: Int[Tensor, "batch pos k"],
        touched: Bool[Tensor, "batch pos"],
        sizes: Int[Tensor, "batch pos"],
        excluded: Bool[Tensor, "batch pos expert"],
        forced: Bool[Tensor, "batch pos expert"],
    ) -> tuple[Int[Tensor, "batch pos new_k"], Bool[Tensor, "batch pos expert"]]:
        """Slots, heaviest first, and which experts are taken; where nothing is touched, as they came."""
        probabilities = self.probabilities
        assert probabilities is not None
        taken = torch.zeros_like(excluded).scatter(-1, arriving, True)
        for size in sizes.unique().tolist():
            here = (touched & (sizes == size))[..., None]
            if bool(here.any()):
                new = choose(
                    probabilities,
                    self.model.cfg.router,
                    k=size,
                    excluded=excluded & here,
                    forced=forced & here,
                )
                taken = torch.where(here, torch.zeros_like(taken).scatter(-1, new, True), taken)
        width = int(taken.sum(dim=-1).max())
        # Probabilities lie in [0, 1], so what is not taken comes after all that is.
        indices = torch.where(taken, probabilities, probabilities - 2).topk(width, dim=-1).indices
        if width == arriving.shape[-1]:
            indices = torch.where(touched[..., None], indices, arriving)
        return indices, taken

    def _swapped(self, indices: Int[Tensor, "batch pos k"]) -> Int[Tensor, "batch pos k"]:
        swaps = [(i, spec) for i, spec in self.specs if isinstance(spec, SwapRanks)]
        if not swaps:
            return indices
        assert self.probabilities is not None
        probabilities, router, k = self.probabilities, self.model.cfg.router, indices.shape[-1]
        ranked = ranking(probabilities, router)
        weights = applied_weights(probabilities, indices, router)
        swapped_at = torch.zeros_like(indices[..., 0], dtype=torch.bool)
        for number, spec in swaps:
            places = self.places[number]
            if bool((swapped_at & places).any()):
                raise ValueError(f"layer {self.layer}: two SwapRanks act at the same position")
            swapped_at = swapped_at | places
            i, j = spec.i - 1, spec.rank_in(self.model.cfg) - 1
            new = indices.clone()
            new[..., i] = ranked[..., j] if j >= k else indices[..., j]
            if j < k:
                new[..., j] = indices[..., i]
            new_weights = weights
            if spec.weights == "own":
                order = probabilities.gather(-1, new).argsort(dim=-1, descending=True, stable=True)
                new = new.gather(-1, order)
                new_weights = applied_weights(probabilities, new, router)
            entered = (new == (ranked[..., j] if j >= k else indices[..., j])[..., None]).any(dim=-1)
            left = (new != indices[..., i][..., None]).all(dim=-1) if j >= k else entered
            self.receipt.add(
                number, self.layer, asked=int(places.sum()), fired=int((places & entered & left).sum())
            )
            indices = torch.where(places[..., None], new, indices)
            weights = torch.where(places[..., None], new_weights, weights)
        self.weights = weights
        return indices

    # ---- weights and outputs ----

    def _on_weights(
        self, value: Float[Tensor, "batch pos k"], hook: HookPoint
    ) -> Float[Tensor, "batch pos k"] | None:
        weights = value if self.weights is None else self.weights.to(value.dtype)
        for i, spec in self.ablations:
            if spec.how != "renormalize":
                continue
            removed = self.removed[i]
            emptied = removed.all(dim=-1).nonzero()
            if len(emptied):
                batch, pos = emptied[0].tolist()
                raise ValueError(
                    f"layer {self.layer}, row {batch}, position {pos}: renormalize needs an expert that stays, and "
                    f"{spec} removes all"
                )
            new = renormalized(weights, ~removed)
            weights = torch.where(removed.any(dim=-1, keepdim=True), new, weights)
            self.receipt.add(i, self.layer, fired=int(removed.sum()))
        return None if weights is value else weights

    def _on_expert_out(
        self, value: Float[Tensor, "batch pos k d_model"], hook: HookPoint
    ) -> Float[Tensor, "batch pos k d_model"]:
        for i, spec in self.ablations:
            if spec.how not in ("mean", "resample"):
                continue
            removed, indices = self.removed[i], self.indices
            assert spec.reference is not None
            instead = torch.zeros_like(value)
            if bool(removed.any()):
                prefixes = (
                    self._prefixes()[..., None].expand_as(removed)[removed]
                    if spec.how == "resample"
                    else None
                )
                instead[removed] = self._instead(spec.reference, spec, indices[removed], prefixes).to(
                    value.dtype
                )
            value = torch.where(removed[..., None], instead, value)
            self.receipt.add(i, self.layer, fired=int(removed.sum()))
        return value

    def _instead(
        self, reference: ExpertReference, spec: Ablate, experts: Int[Tensor, " n"], prefixes: Tensor | None
    ) -> Float[Tensor, "n d_model"]:
        if prefixes is None:
            return reference.mean_output(self.layer, experts)
        return reference.resampled_output(self.layer, experts, prefixes, spec.seed)

    def _prefixes(self) -> Int[Tensor, "batch pos"]:
        assert self.run is not None
        assert self.run.tokens is not None
        return prefix_hashes(self.run.tokens, self.run.real)

    def _on_contrib(
        self, value: Float[Tensor, "batch pos k d_model"], hook: HookPoint
    ) -> Float[Tensor, "batch pos k d_model"]:
        for i, spec in self.ablations:
            if spec.how == "zero":
                value = value.masked_fill(self.removed[i][..., None], 0.0)
                self.receipt.add(i, self.layer, fired=int(self.removed[i].sum()))
        return value

    def _on_shared_out(
        self, value: Float[Tensor, "batch pos d_model"], hook: HookPoint
    ) -> Float[Tensor, "batch pos d_model"]:
        for i, spec in self.ablations:
            if not spec.shared_at(self.layer):
                continue
            places = self.places[i]
            instead = torch.zeros_like(value)
            if spec.reference is not None and bool(places.any()):
                prefixes = self._prefixes()[places] if spec.how == "resample" else None
                shared = torch.full((int(places.sum()),), SHARED, device=value.device)
                instead[places] = self._instead(spec.reference, spec, shared, prefixes).to(value.dtype)
            value = torch.where(places[..., None], instead, value)
            self.receipt.add(i, self.layer, fired=int(places.sum()))
        return value
