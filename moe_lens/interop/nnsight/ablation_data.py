"""Specs as plain data that travels, and what a layer's refusal means.

Everything that can be known before the model runs is made here, of the objects that `moe_lens.interventions` makes for
a HookedMoE: what contradicts what, where a spec acts, which vectors may stand in for an output.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.interventions.contradictions import chooses
from moe_lens.interventions.expert_reference import SHARED, prefix_hashes
from moe_lens.interventions.hooks import Interventions
from moe_lens.interventions.spec import (
    Ablate,
    ForbidExperts,
    ForceExperts,
    NamedExperts,
    Spec,
    SwapRanks,
    TopK,
)
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.moe import applied_weights
from moe_lens.model.observers import Run

_KINDS = {Ablate: "ablate", ForceExperts: "force", ForbidExperts: "forbid", SwapRanks: "swap", TopK: "top_k"}


class Vectors:
    """The vectors that stand in for experts' outputs in any of the ablations, each kept once.

    Args:
        run: whose tokens are told apart by what comes before them.
        dtype: the model's.
    """

    def __init__(self, run: Run, dtype: torch.dtype):
        assert run.tokens is not None
        self.run, self.dtype = run, dtype
        self.prefixes = prefix_hashes(run.tokens, run.real)
        self._rows: dict[int, dict[tuple[int, int, int], int]] = {}
        self._vectors: dict[int, list[Tensor]] = {}

    def rows(
        self, spec: Ablate, layer: int, experts: list[int], places: Bool[Tensor, "batch pos"]
    ) -> Int[Tensor, "place expert"]:
        """The rows of `tables()[layer]` for some experts at some places: one row for all places where all are alike.

        -1 where the reference has no output of the expert at another prefix.
        """
        reference = spec.reference
        assert reference is not None
        columns = torch.tensor(experts, dtype=torch.long)
        if spec.how == "mean":
            draws, stock = torch.zeros(1, len(experts), dtype=torch.long), None
        else:
            prefixes = self.prefixes[places][:, None].expand(-1, len(experts))
            draws = reference.draws(layer, columns.expand_as(prefixes), prefixes, spec.seed).cpu()
            stock = reference.samples[layer]
        rows = torch.full_like(draws, -1, dtype=torch.int32)
        known = self._rows.setdefault(layer, {})
        vectors = self._vectors.setdefault(layer, [])
        for column, expert in enumerate(experts):
            for draw in draws[:, column].unique().tolist():
                if draw < 0:
                    continue
                key = (id(reference), expert, SHARED if stock is None else draw)
                if key not in known:
                    vector = (
                        reference.mean_output(layer, columns[column])
                        if stock is None
                        else stock[expert, draw]
                    )
                    known[key] = len(vectors)
                    vectors.append(vector.to("cpu", self.dtype))
                rows[draws[:, column] == draw, column] = known[key]
        return rows

    def tables(self) -> dict[int, Tensor]:
        """By layer, `[row, d_model]`."""
        return {layer: torch.stack(vectors) for layer, vectors in self._vectors.items() if vectors}


def layers_of(interventions: Interventions, vectors: Vectors) -> list[dict[str, Any]]:
    """The layers that are acted on, and their specs, as `shipped.ablations.run_ablated` takes them.

    Args:
        interventions: which were told of the run (`begin`).

    Raises:
        ValueError: the reference has no output for the shared experts at another prefix.
    """
    return [
        {
            "layer": layer,
            "specs": [
                _spec_data(number, spec, layer, hooks.places[number], interventions.model, vectors)
                for number, spec in hooks.specs
            ],
        }
        for layer, hooks in interventions.layers.items()
    ]


def _spec_data(
    number: int,
    spec: Spec,
    layer: int,
    places: Bool[Tensor, "batch pos"],
    structure: HookedMoE,
    vectors: Vectors,
) -> dict[str, Any]:
    """One spec at one layer. What another kind has no use for is empty."""
    named = isinstance(spec, NamedExperts)
    ablate = spec if isinstance(spec, Ablate) else None
    by_slot = ablate is not None and bool(ablate.ranks or ablate.all_but)
    data = {
        "number": number,
        "kind": _KINDS[type(spec)],
        "chooses": chooses(spec),
        "places": None if spec.pos is None else places.flatten().nonzero().flatten().tolist(),
        "experts": list(spec.routed_at(layer)) if named else [],
        "ranks": [] if ablate is None else list(ablate.ranks),
        "all_but": ablate is not None and ablate.all_but,
        "how": None if ablate is None else ablate.how,
        "shared": ablate is not None and ablate.shared_at(layer),
        # Whether the experts are removed from the choice by their names, active or not.
        "by_name": isinstance(spec, ForbidExperts) or (ablate is not None and not by_slot),
        "active": _must_be_active(spec) if named and not by_slot else None,
        "rows": None,
        "columns": None,
    }
    if isinstance(spec, TopK):
        data["k"] = spec.k
    if isinstance(spec, SwapRanks):
        data |= {"i": spec.i, "j": spec.rank_in(structure.cfg.n_experts), "weights": spec.weights}
    if ablate is not None and ablate.reference is not None:
        columns = data["experts"]
        if by_slot:
            # Which these are, only the run knows; an expert that the reference never met raises where it is removed.
            met = (ablate.reference.count[layer][: structure.cfg.n_experts] > 0).nonzero().flatten().tolist()
            columns = [expert for expert in met if expert not in data["experts"]]
        if data["shared"]:
            columns = [*columns, SHARED]
        rows = vectors.rows(ablate, layer, columns, places)
        if data["shared"] and bool((rows[:, -1] < 0).any()):
            prefixes = vectors.prefixes[places]
            # It raises: there is none to put in its place.
            ablate.reference.resampled_output(layer, torch.full_like(prefixes, SHARED), prefixes, ablate.seed)
        data |= {"rows": rows, "columns": columns}
    return data


def _must_be_active(spec: NamedExperts) -> str | None:
    if isinstance(spec, ForceExperts):
        return None
    if spec.must_be_active:
        return "everywhere"
    return "somewhere" if spec.inactive is None else None


def explain_refusal(interventions: Interventions, run: Run, refused: dict[str, Any]) -> NoReturn:
    """Raise what a HookedMoE raises where a layer cannot be changed as asked, from what the layer's router did.

    Args:
        interventions: which were told of the run.
        refused: see `shipped.ablations.run_ablated`.

    Raises:
        UnfiredIntervention: a named expert is not active where it has to be.
        ValueError: too few experts remain to be chosen from; one is forced and excluded, or ablated by two specs;
            `renormalize` keeps none; the reference has nothing to put in an expert's place.
    """
    structure, layer = interventions.model, interventions.layers[refused["layer"]]

    def seen(point: str, value: Tensor) -> Tensor:
        """The layer's hooks at a point, given what was there."""
        for name, hook in (*layer.edits(), *layer.witnesses()):
            if name.endswith(point):
                made = hook(value, hook=structure.hook_dict[name])
                value = value if made is None else made
        return value

    weights = refused["weights"]
    with structure.observed(run):
        if "probabilities" in refused:
            seen("hook_expert_weights", refused["probabilities"])
        indices = seen("hook_expert_indices", refused["indices"])
        if "probabilities" in refused:
            weights = applied_weights(refused["probabilities"], indices, structure.cfg.router)
        seen("hook_routing_weights", weights)
        seen("hook_expert_out", torch.zeros(*indices.shape, structure.cfg.d_model))
    raise RuntimeError(
        f"layer {layer.layer} refused {', '.join(str(spec) for _, spec in layer.specs)} for no reason that is known"
    )
