"""Slow, obvious implementations of the census and of what predicts it: one full forward pass per ablation.

A *row* is a dict: `document` (the row of the batch), `position` (the column of the batch), `layer`, `expert`, and what
was measured there. There is one for each real token whose next column is a real token, and each expert chosen
there. Nothing of moe_lens is imported here.

    rows = census_rows(hf_model, tokens, mask, layers=[1], how="zero", scope="token")
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.reference import Cache, reference_cache, reference_run
from tests.reference_choice import facts_of
from tests.reference_interventions import SHARED, Others, Removed, Vectors, ablated_run, real_places

Row = dict[str, Any]


# --- losses and experts of a run ----------------------------------------------------------------------------


def losses_of(logits: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """`[b, p]` float64, nats: minus the log probability of the next token; NaN where one of the two is padding."""
    real = set(real_places(tokens, mask))
    losses = torch.full(tokens.shape, math.nan, dtype=torch.float64)
    for row, column in real:
        if (row, column + 1) in real:
            log_probabilities = logits[row, column].double().log_softmax(-1)
            losses[row, column] = -log_probabilities[tokens[row, column + 1]]
    return losses


def experts_at(cache: Cache, layer: int, row: int, column: int, shared: bool) -> list[tuple[int, int, float]]:
    """(expert, rank, weight) of those active at a token, heaviest first, then, if asked for, of the shared experts.

    Their rank is 0, their weight that of their own gate, 1 if they have none.
    """
    at = f"blocks.{layer}.mlp."
    indices = cache[at + "hook_expert_indices"][row, column].tolist()
    weights = cache[at + "hook_routing_weights"][row, column].tolist()
    active = [(expert, slot + 1, weights[slot]) for slot, expert in enumerate(indices)]
    if shared:
        gate = cache.get(at + "hook_shared_gate")
        active.append((SHARED, 0, 1.0 if gate is None else gate[row, column].item()))
    return active


def measured_places(tokens: Tensor, mask: Tensor | None) -> list[tuple[int, int]]:
    """The real tokens whose next column is a real token, row by row."""
    real = real_places(tokens, mask)
    return [(row, column) for row, column in real if (row, column + 1) in real]


def expert_outputs(hf_model: Any, tokens: Tensor, mask: Tensor | None, layer: int) -> dict[Any, Tensor]:
    """`{(row, column, expert): E_i(x)}`, before the weight, where it is active; -1 is what the shared experts add."""
    at, cache = f"blocks.{layer}.mlp.", reference_cache(hf_model, tokens, mask)
    outputs = {}
    for row, column in real_places(tokens, mask):
        for slot, expert in enumerate(cache[at + "hook_expert_indices"][row, column].tolist()):
            outputs[row, column, expert] = cache[at + "hook_expert_out"][row, column, slot]
        if facts_of(hf_model).shared:
            outputs[row, column, SHARED] = cache[at + "hook_shared_out"][row, column]
    return outputs


def expert_means(
    hf_model: Any, tokens: Tensor, mask: Tensor | None, layers: Iterable[int]
) -> dict[tuple[int, int], Tensor]:
    """`{(layer, expert): mean E_i(x)}` over the real tokens where it is active; no entry where it is nowhere."""
    means = {}
    for layer in layers:
        outputs = expert_outputs(hf_model, tokens, mask, layer)
        for expert in range(SHARED, facts_of(hf_model).n_experts):
            of_expert = [vector for (_, _, other), vector in outputs.items() if other == expert]
            if of_expert:
                mean = torch.stack(of_expert).double().mean(0)
                means[layer, expert] = mean.to(of_expert[0])
    return means


# --- the census ---------------------------------------------------------------------------------------------


@torch.no_grad()
def census_rows(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    *,
    layers: Iterable[int] | None = None,
    how: str = "zero",
    scope: str = "token",
    means: Vectors | None = None,
    others: Mapping[int, Others] | None = None,
    shared: bool = False,
) -> list[Row]:
    """What becomes of the output and of the loss at each token without each of its experts.

    Args:
        layers: all with experts, if None.
        scope: "token", the expert is removed at this token; "sequence", at every token of the document where it is
            active.
        means: for "mean", see `expert_means`.
        others: for "resample", `{layer: {(row, column, expert): vector}}`.
        shared: rows for the shared experts too, as expert -1 (how: zero, mean or resample).

    Returns:
        Rows with `rank` (1 is the heaviest; 0: shared), `routing_weight`, `gap_norm` (the length of the change of the
        layer's output), `loss` (clean), `delta_loss`, `kl` (of the clean predictions to the others), and `later_loss`,
        the mean change of the losses after this one in the document, NaN if there is none. Nats.
    """
    assert scope in ("token", "sequence"), scope
    clean_logits, clean = reference_run(hf_model, tokens, mask)
    clean_losses = losses_of(clean_logits, tokens, mask)
    rows = []
    for layer in facts_of(hf_model).moe_layers if layers is None else layers:
        for row, column in measured_places(tokens, mask):
            for expert, rank, weight in experts_at(clean, layer, row, column, shared):
                where = [(row, column)]
                if scope == "sequence":
                    where = [
                        place
                        for place in real_places(tokens, mask)
                        if place[0] == row
                        and expert in [other for other, *_ in experts_at(clean, layer, *place, shared)]
                    ]
                logits, cache = ablated_run(
                    hf_model,
                    tokens,
                    mask,
                    layer,
                    {(*place, expert) for place in where},
                    how,
                    means=means,
                    others=None if others is None else others[layer],
                )
                rows.append(
                    dict(document=row, position=column, layer=layer, expert=expert, rank=rank)
                    | dict(routing_weight=weight, gap_norm=gap_norm(clean, cache, layer, row, column))
                    | changes(clean_logits, clean_losses, logits, tokens, mask, row, column)
                )
    return rows


def gap_norm(clean: Cache, cache: Cache, layer: int, row: int, column: int) -> float:
    """The length of the change of a layer's output at a token."""
    name = f"blocks.{layer}.hook_mlp_out"
    return float((clean[name][row, column].double() - cache[name][row, column].double()).norm())


def changes(
    clean_logits: Tensor,
    clean_losses: Tensor,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    row: int,
    column: int,
) -> Row:
    """Loss, its change, the divergence of the predictions at a token, and the mean change of the later losses."""
    change = losses_of(logits, tokens, mask) - clean_losses
    before = clean_logits[row, column].double().log_softmax(-1)
    after = logits[row, column].double().log_softmax(-1)
    later = [float(value) for value in change[row, column + 1 :] if not value.isnan()]
    return dict(
        loss=float(clean_losses[row, column]),
        delta_loss=float(change[row, column]),
        kl=float((before.exp() * (before - after)).sum()),
        later_loss=sum(later) / len(later) if later else math.nan,
    )


@torch.no_grad()
def cumulative_rows(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    *,
    layers: Iterable[int] | None = None,
    how: str = "zero",
    scope: str = "token",
    means: Vectors | None = None,
    others: Mapping[int, Others] | None = None,
    ks: Iterable[int] | None = None,
) -> list[Row]:
    """What becomes of each token without its k heaviest experts together, k from 1 to one less than are chosen.

    Rows have `removed` (k) in place of an expert, and the columns of the census that are not about one expert. Scope
    "sequence": every token of the document loses its own k heaviest.
    """
    assert scope in ("token", "sequence"), scope
    facts = facts_of(hf_model)
    clean_logits, clean = reference_run(hf_model, tokens, mask)
    clean_losses = losses_of(clean_logits, tokens, mask)
    rows = []
    for layer in facts.moe_layers if layers is None else layers:
        for row, column in measured_places(tokens, mask):
            for k in range(1, facts.top_k) if ks is None else ks:
                of_document = [place for place in real_places(tokens, mask) if place[0] == row]
                removed: Removed = {
                    (*place, expert)
                    for place in (of_document if scope == "sequence" else [(row, column)])
                    for expert, rank, _ in experts_at(clean, layer, *place, False)
                    if rank <= k
                }
                logits, cache = ablated_run(
                    hf_model,
                    tokens,
                    mask,
                    layer,
                    removed,
                    how,
                    means=means,
                    others=None if others is None else others[layer],
                )
                rows.append(
                    dict(document=row, position=column, layer=layer, removed=k)
                    | dict(gap_norm=gap_norm(clean, cache, layer, row, column))
                    | changes(clean_logits, clean_losses, logits, tokens, mask, row, column)
                )
    return rows


# --- predictors ---------------------------------------------------------------------------------------------


def contribution(cache: Cache, layer: int, row: int, column: int, rank: int) -> Tensor:
    """`[d]`: what the expert of that rank (0: the shared experts) adds to a layer's output at a token."""
    at = f"blocks.{layer}.mlp."
    if rank == 0:
        return cache[at + "hook_shared_out"][row, column]
    return cache[at + "hook_expert_contrib"][row, column, rank - 1]


def first_order_rows(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    *,
    layers: Iterable[int] | None = None,
    shared: bool = False,
) -> list[Row]:
    """Rows with `first_order`, minus <dL_t/dc_t, c_t>: the change of the loss at t to first order in the contribution.

    One backward pass for the loss of each token, of that loss alone.
    """
    layers = list(facts_of(hf_model).moe_layers if layers is None else layers)
    nothing: Cache = {}  # zeros that were added to the contributions, so that there is something to derive by

    def add_nothing(name: str) -> Any:
        def edit(value: Tensor) -> Tensor:
            nothing[name] = torch.zeros_like(value, requires_grad=True)
            return value + nothing[name]

        return edit

    kinds = ["hook_expert_contrib", *(["hook_shared_out"] if shared else [])]
    names = [f"blocks.{layer}.mlp.{kind}" for layer in layers for kind in kinds]
    logits, cache = reference_run(hf_model, tokens, mask, {name: add_nothing(name) for name in names})
    losses = losses_of(logits, tokens, mask)
    slopes = {
        place: dict(
            zip(
                names,
                torch.autograd.grad(losses[place], [nothing[name] for name in names], retain_graph=True),
                strict=True,
            )
        )
        for place in measured_places(tokens, mask)
    }
    rows = []
    for layer in layers:
        for row, column in measured_places(tokens, mask):
            for expert, rank, _ in experts_at(cache, layer, row, column, shared):
                slope = contribution(slopes[row, column], layer, row, column, rank)
                written = contribution(cache, layer, row, column, rank)
                first_order = -float((slope.double() * written.detach().double()).sum())
                rows.append(
                    dict(document=row, position=column, layer=layer, expert=expert, rank=rank)
                    | dict(first_order=first_order)
                )
    return rows


@torch.no_grad()
def direct_rows(
    hf_model: Any,
    tokens: Tensor,
    mask: Tensor | None,
    *,
    layers: Iterable[int] | None = None,
    shared: bool = False,
) -> list[Row]:
    """Rows with `direct`, logits: what a contribution adds to the logit of the next token, less the mean of all logits.

    The final norm divides by the scale of the whole stream.
    """
    cache = reference_cache(hf_model, tokens, mask)
    gain, unembed = (
        hf_model.model.norm.weight.double(),
        hf_model.lm_head.weight.double(),
    )  # [d], [vocabulary, d]
    rows = []
    for layer in facts_of(hf_model).moe_layers if layers is None else layers:
        for row, column in measured_places(tokens, mask):
            for expert, rank, _ in experts_at(cache, layer, row, column, shared):
                written = contribution(cache, layer, row, column, rank).double()
                logits = unembed @ (gain * written / cache["ln_final.hook_scale"][row, column].double())
                direct = logits[tokens[row, column + 1]] - logits.mean()
                rows.append(
                    dict(document=row, position=column, layer=layer, expert=expert, rank=rank)
                    | dict(direct=float(direct))
                )
    return rows
