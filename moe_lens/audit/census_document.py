"""The rows of one document: every active expert changed at every position that has a next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.branches import Change, single_slots
from moe_lens.interventions.clean_run import CleanRun, MoEValues
from moe_lens.interventions.expert_outputs import SHARED
from moe_lens.interventions.first_order import direct, direct_before_scale, first_order, loss_gradients
from moe_lens.interventions.outcomes import LogitDifference, Outcome, outcome_names
from moe_lens.interventions.replay import Branches, Replayed, replay
from moe_lens.interventions.sequence import everywhere, later_losses

Scope = Literal["token", "sequence"]
Predictor = Literal["first_order", "direct"]
CensusOutcome = Outcome | Literal["later_loss"]
SCOPES: tuple[Scope, ...] = ("token", "sequence")
PREDICTORS: tuple[Predictor, ...] = ("first_order", "direct")

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What is changed and what is read, the same for every document.

    Attributes:
        layers: MoE layers, rising.
        change: how an expert is changed.
        scope: at one position, or at every position where it is active.
        shared: whether the shared experts have rows too.
        outcomes: beside the loss.
        predictors: beside the outcomes.
        null_branch: whether changes are counted from a branch that changes nothing, and its own change is a column.
        memory_budget: bytes.
    """

    layers: tuple[int, ...]
    change: Change
    scope: Scope
    shared: bool
    outcomes: tuple[CensusOutcome, ...]
    predictors: tuple[Predictor, ...]
    null_branch: bool
    memory_budget: int

    @property
    def read(self) -> list[Outcome]:
        """The outcomes that are read where the loss is."""
        return [outcome for outcome in self.outcomes if outcome != "later_loss"]

    @property
    def columns(self) -> list[str]:
        """The names of what is measured beside the columns that every census has. A divergence is from the clean
        prediction and so is a change itself; of other outcomes the change is kept."""
        names = [
            f"delta_{outcome_names([outcome])[0]}" if isinstance(outcome, LogitDifference) else str(outcome)
            for outcome in self.read
        ]
        later = ["delta_later_loss"] if "later_loss" in self.outcomes else []
        null = ["null_delta_loss"] if self.null_branch else []
        return [*names, *later, *self.predictors, *null]


def rows_of(clean: CleanRun, rows: Int[Tensor, " n"], settings: Settings) -> Columns:
    """The census of some tokens of a document.

    Args:
        clean: the document.
        rows: its tokens that have a next one and are measured, as places among them, ascending.

    Raises:
        FloatingPointError: something is NaN or infinite; its place is named.
    """
    gradients = (
        loss_gradients(clean, rows, settings.memory_budget) if "first_order" in settings.predictors else None
    )
    layers: dict[int, Columns] = {}

    def measured(values: MoEValues) -> None:
        layers[values.layer] = of_layer(clean, values, rows, gradients, settings)

    if settings.scope == "token":
        _at_one_token(clean, rows, settings, layers, measured)
    else:
        for layer in settings.layers:
            values = clean.moe(layer)
            measured(values)
            layers[layer] |= _at_every_token(clean, values, rows, settings)
    return joined_layers(layers, settings)


def joined_layers(layers: Mapping[int, Columns], settings: Settings) -> Columns:
    """The columns of all layers, one layer's rows after another's, on the CPU."""
    return {
        name: torch.cat([layers[layer][name].flatten() for layer in settings.layers]).cpu()
        for name in layers[settings.layers[0]]
    }


def of_layer(
    clean: CleanRun,
    values: MoEValues,
    rows: Int[Tensor, " n"],
    gradients: Tensor | None,
    settings: Settings,
    *,
    is_finished: bool = True,
) -> Columns:
    """What a layer's clean run says of each slot, `[n, slot]`; the shared experts are the last slot.

    Args:
        is_finished: whether the clean run is known to its end. Otherwise the column `loss` is NaN, and `direct` lacks
            the final norm's scale (`direct_before_scale`).
    """
    indices, weights = values.indices[rows], values.weights[rows].float()
    ranks = torch.arange(1, indices.shape[1] + 1, device=rows.device).expand_as(indices)
    predicted: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name in settings.predictors:
        if name == "first_order":
            assert gradients is not None
            predicted[name] = first_order(gradients, values, rows)
        else:
            predicted[name] = (direct if is_finished else direct_before_scale)(clean, values, rows)
    if settings.shared:
        gate = values.shared_gate[rows][:, None]
        indices = torch.cat((indices, torch.full_like(indices[:, :1], SHARED)), dim=1)
        weights = torch.cat((weights, gate), dim=1)
        ranks = torch.cat((ranks, torch.zeros_like(ranks[:, :1])), dim=1)
    columns = {
        "position": clean.columns[rows][:, None].expand_as(indices),
        "layer": torch.full_like(indices, values.layer),
        "expert": indices,
        "rank": ranks,
        "routing_weight": weights,
        "loss": clean.loss[rows][:, None].expand_as(indices),
    }
    for name, (of_slots, of_shared) in predicted.items():
        if settings.shared:
            assert of_shared is not None
            of_slots = torch.cat((of_slots, of_shared[:, None]), dim=1)
        broken = (~of_slots.isfinite()).nonzero()
        if len(broken):
            row, slot = broken[0].tolist()
            raise FloatingPointError(
                f"{name} is {float(of_slots[row, slot])} at position {int(clean.columns[rows[row]])}, layer "
                f"{values.layer}, expert {int(indices[row, slot])}"
            )
        columns[name] = of_slots
    return columns


def _at_one_token(
    clean: CleanRun,
    rows: Int[Tensor, " n"],
    settings: Settings,
    layers: dict[int, Columns],
    measured: Callable[[MoEValues], None],
) -> None:
    branches = token_branches(settings, clean.model.cfg.top_k, rows.device)
    result = replay(
        clean,
        branches,
        rows=rows,
        change=settings.change,
        outcomes=settings.read,
        null_branch=settings.null_branch,
        memory_budget=settings.memory_budget,
        on_layer=measured,
    )
    add_changes(clean, rows, settings, result, layers)
    if "later_loss" not in settings.outcomes:
        return
    for of in branches:
        # Computed once more, because those of all layers together are large.
        values = clean.moe(of.layer)
        layers[of.layer]["delta_later_loss"] = torch.stack(
            [_later(clean, values, row, of.removed, of.shared_removed, settings) for row in rows.tolist()]
        )


def token_branches(settings: Settings, k: int, device: torch.device) -> list[Branches]:
    """Of each layer: every slot changed alone, and the shared experts where they have rows."""
    removed = single_slots(k, device)
    shared_removed = None
    if settings.shared:
        removed = torch.cat((removed, torch.zeros_like(removed[:1])))
        shared_removed = torch.arange(len(removed), device=device) == k
    return [Branches(layer, removed, shared_removed) for layer in settings.layers]


def add_changes(
    clean: CleanRun,
    rows: Int[Tensor, " n"],
    settings: Settings,
    result: Replayed,
    layers: dict[int, Columns],
) -> None:
    """Add the columns of what came of `token_branches`."""
    for i, layer in enumerate(settings.layers):
        layers[layer]["gap_norm"] = result.gap_norm[i]
        layers[layer]["delta_loss"] = result.delta_loss[i]
        if result.null is not None:
            null = (result.null["loss"][i] - result.clean_loss)[:, None]
            layers[layer]["null_delta_loss"] = null.expand_as(result.gap_norm[i])
        layers[layer] |= _changes(clean, rows, settings.read, result, i)


def _later(
    clean: CleanRun,
    values: MoEValues,
    row: int,
    removed: Bool[Tensor, "branch k"],
    shared_removed: Bool[Tensor, " branch"] | None,
    settings: Settings,
) -> Float[Tensor, " branch"]:
    """The mean changes of the later losses, counted from a null branch where there is one."""
    if not settings.null_branch:
        return later_losses(
            clean, values, row, removed, settings.change, shared_removed, settings.memory_budget
        )
    with_null = torch.cat((removed, torch.zeros_like(removed[:1])))
    if shared_removed is not None:
        shared_removed = torch.cat((shared_removed, torch.zeros_like(shared_removed[:1])))
    changes = later_losses(
        clean, values, row, with_null, settings.change, shared_removed, settings.memory_budget
    )
    return changes[:-1] - changes[-1]


def _changes(
    clean: CleanRun, rows: Int[Tensor, " n"], read: Sequence[Outcome], result: Replayed, i: int
) -> Columns:
    """The columns of the outcomes beside the loss."""
    columns = {}
    for outcome in read:
        if isinstance(outcome, LogitDifference):
            null = result.null
            before = logit_difference(clean, rows, outcome) if null is None else null[outcome.name][i]
            columns[f"delta_{outcome.name}"] = result.outcomes[outcome.name][i] - before[:, None]
        else:
            columns[outcome] = result.outcomes[outcome][i]
    return columns


@torch.no_grad()
def logit_difference(clean: CleanRun, rows: Int[Tensor, " n"], outcome: LogitDifference) -> Tensor:
    """Of the clean run; logits."""
    model = clean.model
    normalized = model.ln_final(clean.final[rows][:, None])[:, 0]
    pair = model.unembed.weight[torch.tensor([outcome.correct, outcome.incorrect], device=rows.device)]
    correct, incorrect = (normalized @ pair.T).float().unbind(dim=-1)
    return correct - incorrect


def _at_every_token(
    clean: CleanRun, values: MoEValues, rows: Int[Tensor, " n"], settings: Settings
) -> Columns:
    """Read, at every token, what became of it when an expert that is active there was changed everywhere."""
    active = values.indices[rows]
    experts = active.unique()
    if settings.shared:
        active = torch.cat((active, torch.full_like(active[:, :1], SHARED)), dim=1)
        experts = torch.cat((experts, experts.new_tensor([SHARED])))
    if settings.null_branch:
        # An expert that there is not is active nowhere: a pass in which nothing is changed.
        experts = torch.cat((experts, experts.new_tensor([clean.model.cfg.n_experts])))
    read, gap = everywhere(
        clean, values, experts, rows, settings.change, settings.read, settings.memory_budget
    )
    before = {name: value[:, -1:] for name, value in read.items()} if settings.null_branch else {}
    clean_loss = clean.loss[rows][:, None]
    is_slot = rearrange(active, "n k -> n k 1") == repeat(experts, "expert -> 1 1 expert")
    slot = is_slot.long().argmax(dim=-1)
    columns = {
        "gap_norm": gap.gather(1, slot),
        "delta_loss": read["loss"].gather(1, slot) - before.get("loss", clean_loss),
    }
    if settings.null_branch:
        columns["null_delta_loss"] = (before["loss"] - clean_loss).expand_as(slot)
    for outcome in settings.read:
        if isinstance(outcome, LogitDifference):
            base = before.get(outcome.name)
            base = logit_difference(clean, rows, outcome)[:, None] if base is None else base
            columns[f"delta_{outcome.name}"] = read[outcome.name].gather(1, slot) - base
        else:
            columns[outcome] = read[outcome].gather(1, slot)
    return columns
