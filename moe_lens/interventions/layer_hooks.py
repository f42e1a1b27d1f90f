"""What a layer's specs do at its hook points, in the order in which a forward pass meets them.

Two kinds of hooks. *Edits* change a value, before anything else that listens there: a cache holds what they made of it.
*Witnesses* look at a value after everything else has had it: what other hooks edit is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.arguments import ExpertName
from moe_lens.interventions.changed_routing import renormalized
from moe_lens.interventions.contradictions import Numbered, Places, check_together, chooses
from moe_lens.interventions.expert_reference import SHARED, prefix_hashes
from moe_lens.interventions.layer_choice import Chosen, LayerChoice, removed_slots, require_active
from moe_lens.interventions.positions import certain_places
from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.spec import Ablate
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.observers import Run

Hook = tuple[str, Callable[..., Any]]


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
        self.choice = LayerChoice(model.cfg.router, layer, specs, receipt)
        self.ablations = [(i, spec) for i, spec in specs if isinstance(spec, Ablate) and not chooses(spec)]
        certain = certain_places({i: spec.pos for i, spec in specs})
        check_together(model.cfg.router, layer, specs, certain, all_known=False)
        self.forget()

    def forget(self) -> None:
        """Let go of a run's values."""
        self.run: Run | None = None
        self.places: Places = {}
        self.probabilities: Float[Tensor, "batch pos expert"] | None = None
        self.chosen: Chosen | None = None
        self.indices: Int[Tensor, "batch pos k"] = torch.empty(0, dtype=torch.long)
        self.kept: Bool[Tensor, "batch pos k"] | None = None
        self.removed: dict[int, Bool[Tensor, "batch pos k"]] = {}

    def begin(self, places: Places, run: Run) -> None:
        """A run is about to begin, in which the specs act at these places, by their index.

        Raises:
            ValueError: specs that contradict each other there; `resample` without the tokens that came before.
        """
        self.forget()
        here = {i: places[i] for i, _ in self.specs}
        check_together(self.model.cfg.router, self.layer, self.specs, here, all_known=True)
        for _, spec in self.ablations:
            if spec.how == "resample" and (run.tokens is None or run.n_past is not None):
                raise ValueError(
                    f"{spec} tells tokens by what comes before them, so it needs a run from tokens: neither "
                    f"start_at_layer nor generate gives them"
                )
        self.run, self.places = run, here

    def edits(self) -> list[Hook]:
        hows = {spec.how for _, spec in self.ablations}
        points: list[Hook] = []
        if self.choice.specs:
            points.append(("hook_expert_indices", self._change_choice))
        if self.choice.specs or "renormalize" in hows:
            points.append(("hook_routing_weights", self._change_weights))
        if hows & {"mean", "resample"}:
            points.append(("hook_expert_out", self._change_outputs))
        if "zero" in hows:
            points.append(("hook_expert_contrib", self._zero_contributions))
        if any(spec.shared_at(self.layer) for _, spec in self.ablations):
            points.append(("hook_shared_out", self._change_shared))
        return [(f"blocks.{self.layer}.mlp.{point}", hook) for point, hook in points]

    def witnesses(self) -> list[Hook]:
        points: list[Hook] = [("hook_expert_indices", self._see_choice)]
        if self.choice.specs:
            points.append(("hook_expert_weights", self._see_probabilities))
        return [(f"blocks.{self.layer}.mlp.{point}", hook) for point, hook in points]

    def _running(self) -> Run:
        if self.run is None or self.run is not self.model.current_run:
            raise RuntimeError(
                f"an intervention at layer {self.layer} was not told of this run: hooks of as_hooks begin at the "
                f"embedding, of the model that they were made for; model.intervene also goes with start_at_layer"
            )
        return self.run

    # ---- the choice ----

    def _see_probabilities(self, value: Float[Tensor, "batch pos expert"], hook: HookPoint) -> None:
        self.probabilities = value

    def _change_choice(
        self, value: Int[Tensor, "batch pos k"], hook: HookPoint
    ) -> Int[Tensor, "batch pos new_k"]:
        run = self._running()
        assert self.probabilities is not None
        self.chosen = self.choice.change(
            self.probabilities, value, self.places, may_be_nowhere=_is_continued(run)
        )
        return self.chosen.indices

    def _see_choice(self, value: Int[Tensor, "batch pos k"], hook: HookPoint) -> None:
        """Which of the final slots the ablations remove, counted as asked for.

        Raises:
            UnfiredIntervention: a named expert is not active where it has to be; another hook changed the choice again.
            ValueError: a slot that two ablations remove.
        """
        run = self._running()
        if self.choice.specs and (self.chosen is None or not torch.equal(value, self.chosen.indices)):
            raise UnfiredIntervention(
                f"another hook changed the choice of layer {self.layer} after {self.choice.specs[0][1]} did"
            )
        self.indices = value
        self.kept = torch.ones_like(value, dtype=torch.bool) if self.chosen is None else self.chosen.kept
        claimed = torch.zeros_like(value, dtype=torch.bool)
        for i, spec in self.ablations:
            places = self.places[i]
            require_active(spec, self.layer, places, value, self.kept, may_be_nowhere=_is_continued(run))
            removed = removed_slots(spec, self.layer, places, value, self.kept)
            twice = (claimed & removed).nonzero()
            if len(twice):
                row, column, slot = twice[0].tolist()
                expert = ExpertName(self.layer, int(value[row, column, slot]))
                raise ValueError(f"{expert} is ablated by two specs at row {row}, position {column}")
            claimed |= removed
            self.removed[i] = removed
            n_shared = int(places.sum()) if spec.shared_at(self.layer) else 0
            self.receipt.add(i, self.layer, asked=int(removed.sum()) + n_shared)

    # ---- weights and outputs ----

    def _change_weights(
        self, value: Float[Tensor, "batch pos k"], hook: HookPoint
    ) -> Float[Tensor, "batch pos k"] | None:
        self._running()
        weights = value
        if self.chosen is not None and self.chosen.weights is not None:
            weights = self.chosen.weights.to(value.dtype)
        renormalizing = [(i, spec) for i, spec in self.ablations if spec.how == "renormalize"]
        if renormalizing:
            assert self.kept is not None
            removed = torch.stack([self.removed[i] for i, _ in renormalizing]).any(dim=0)
            emptied = (removed.any(dim=-1) & ~(self.kept & ~removed).any(dim=-1)).nonzero()
            if len(emptied):
                row, column = emptied[0].tolist()
                raise ValueError(
                    f"layer {self.layer}, row {row}, position {column}: renormalize needs an expert that stays, and "
                    f"{' and '.join(str(spec) for _, spec in renormalizing)} removes all"
                )
            # Where nothing is removed, weights stay to the bit.
            weights = torch.where(removed.any(dim=-1, keepdim=True), renormalized(weights, ~removed), weights)
            for i, _ in renormalizing:
                self.receipt.add(i, self.layer, fired=int(self.removed[i].sum()))
        return None if weights is value else weights

    def _change_outputs(
        self, value: Float[Tensor, "batch pos k d_model"], hook: HookPoint
    ) -> Float[Tensor, "batch pos k d_model"]:
        for i, spec in self.ablations:
            if spec.how in ("mean", "resample"):
                removed = self.removed[i]
                instead = self._instead(spec, self.indices[removed], removed)
                value = torch.where(removed[..., None], _placed(instead, removed, value), value)
                self.receipt.add(i, self.layer, fired=int(removed.sum()))
        return value

    def _zero_contributions(
        self, value: Float[Tensor, "batch pos k d_model"], hook: HookPoint
    ) -> Float[Tensor, "batch pos k d_model"]:
        for i, spec in self.ablations:
            if spec.how == "zero":
                value = value.masked_fill(self.removed[i][..., None], 0.0)
                self.receipt.add(i, self.layer, fired=int(self.removed[i].sum()))
        return value

    def _change_shared(
        self, value: Float[Tensor, "batch pos d_model"], hook: HookPoint
    ) -> Float[Tensor, "batch pos d_model"]:
        self._running()
        for i, spec in self.ablations:
            if spec.shared_at(self.layer):
                places = self.places[i]
                if spec.how == "zero":
                    value = value.masked_fill(places[..., None], 0.0)
                else:
                    shared = torch.full((int(places.sum()),), SHARED, device=value.device)
                    instead = self._instead(spec, shared, places)
                    value = torch.where(places[..., None], _placed(instead, places, value), value)
                self.receipt.add(i, self.layer, fired=int(places.sum()))
        return value

    def _instead(
        self, spec: Ablate, experts: Int[Tensor, " n"], where: Bool[Tensor, "batch pos *k"]
    ) -> Float[Tensor, "n d_model"]:
        """What stands in for the outputs of experts, which lie where the mask is true."""
        reference = spec.reference
        assert reference is not None
        if spec.how == "mean":
            return reference.mean_output(self.layer, experts)
        run = self._running()
        assert run.tokens is not None
        prefixes = prefix_hashes(run.tokens, run.real)
        prefixes = prefixes.view(*prefixes.shape, *[1] * (where.ndim - 2)).expand_as(where)[where]
        return reference.resampled_output(self.layer, experts, prefixes, spec.seed)


def _is_continued(run: Run) -> bool:
    """Whether it is a later step of a generation: one token, at which few experts are active."""
    return bool(run.n_past)


def _placed(
    values: Float[Tensor, "n d_model"], where: Bool[Tensor, "*place"], like: Float[Tensor, "*place d_model"]
) -> Float[Tensor, "*place d_model"]:
    """Values where the mask is true, in order, and 0 elsewhere."""
    out = torch.zeros_like(like)
    out[where] = values.to(like.dtype)
    return out
