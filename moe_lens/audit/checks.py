"""The checks of a verification, each comparing two things of which neither was made from the other.

In half precision two right implementations differ by rounding, and where an expert at the border flips they
differ a lot at that token: there the typical token decides, not the worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.replay import Branches, replay
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.loss import mean_loss
from moe_lens.routing.attribution import attribution_hooks, router_logit_attrs

POSITIONS_NEEDED = 100
"""Positions with a loss, without which distinct losses and medians say nothing."""

_ABLATED_DOCUMENTS = 4


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what is checked.
        value: what was measured, in `unit`.
        rule: how value and tolerance compare when it passes; NaN never passes.
        meaning: what it says about the model, in one sentence.
    """

    name: str
    value: float
    rule: Literal["<=", ">", "=="]
    tolerance: float
    unit: str
    meaning: str

    @property
    def passed(self) -> bool:
        compare = {"<=": self.value <= self.tolerance, ">": self.value > self.tolerance}
        return bool(compare.get(self.rule, self.value == self.tolerance))


@dataclass(frozen=True)
class Run:
    """What one implementation says about the tokens; losses in nats, NaN where there is no next token."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Float[Tensor, "batch pos_minus_1"]
    mean_loss: float
    router_logits: dict[int, Float[Tensor, "batch pos expert"]]


def our_run(model: HookedMoE, tokens: Tensor, mask: Tensor | None) -> Run:
    """Logits, losses and router logits of the hooked model."""
    names = {layer: f"blocks.{layer}.mlp.hook_router_logits" for layer in model.cfg.moe_layers}
    (logits, loss), cache = model.run_with_cache(
        tokens,
        attention_mask=mask,
        names_filter=list(names.values()),
        return_type="both",
        loss_per_token=True,
    )
    router_logits = {layer: cache[name].float() for layer, name in names.items()}
    mean = float(mean_loss(loss, mask))
    return Run(logits, loss, mean, router_logits)


def their_run(
    model: HookedMoE,
    reference: Any,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    has_next: Bool[Tensor, "batch pos_minus_1"],
) -> Run:
    """transformers' logits, losses and router logits. A gate's logits are made from what it is given, because
    what it returns differs from family to family."""
    router_logits: dict[int, Tensor] = {}

    def gate_sees(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(gate: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].reshape(*tokens.shape, -1)
            router_logits[layer] = F.linear(x.float(), gate.weight.float())  # type: ignore[arg-type,operator]

        return keep

    handles = [
        reference.model.layers[layer].mlp.gate.register_forward_pre_hook(gate_sees(layer))
        for layer in model.cfg.moe_layers
    ]
    labels = torch.full_like(tokens, -100)
    # A document's first token is predicted from padding where that lies on the left: that is no loss.
    labels[:, 1:] = torch.where(has_next, tokens[:, 1:], -100)
    try:
        out = reference(
            input_ids=tokens,
            attention_mask=real.long(),
            labels=labels,
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    loss = F.cross_entropy(out.logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
    return Run(out.logits, loss.masked_fill(~has_next, torch.nan), float(out.loss), router_logits)


def finite_numbers(ours: Run, theirs: Run, real: Bool[Tensor, "batch pos"]) -> Check:
    """No NaN and no infinity in the logits of real tokens."""
    bad = sum(int((~run.logits[real].isfinite()).sum()) for run in (ours, theirs))
    return Check(
        "finite numbers",
        bad,
        "==",
        0,
        "logits",
        "No logit of either model is NaN or infinite at a real token.",
    )


def same_model(model: HookedMoE, ours: Run, theirs: Run, real: Tensor, has_next: Tensor) -> Iterator[Check]:
    """Losses, logits and router logits are those of transformers."""
    half = model.cfg.dtype in (torch.bfloat16, torch.float16)
    yield Check(
        "mean loss",
        abs(ours.mean_loss - theirs.mean_loss),
        "<=",
        1e-2 if half else 1e-4,
        "nats",
        "The mean next-token loss is the one that transformers reports on the same tokens.",
    )
    gaps = (ours.loss - theirs.loss)[has_next].abs()
    yield Check(
        "loss of each token",
        float(gaps.median() if half else gaps.max()),
        "<=",
        2e-2 if half else 1e-4,
        "nats",
        "The median token's loss is transformers' up to rounding."
        if half
        else "No token's loss differs from transformers'.",
    )
    tolerance = 0.1 if half else 2e-5
    yield Check(
        "logits",
        _relative_rms(ours.logits[real], theirs.logits[real]),
        "<=",
        tolerance,
        "relative",
        "Next-token logits are transformers' (root mean square of the gap over that of the logits).",
    )
    yield Check(
        "router logits",
        max(
            _relative_rms(ours.router_logits[r][real], theirs.router_logits[r][real])
            for r in theirs.router_logits
        ),
        "<=",
        tolerance,
        "relative",
        "Every router scores the experts as transformers' does (worst layer).",
    )


def _relative_rms(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.float()
    return float((got.float() - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())


def distinct_losses(losses: Float[Tensor, " position"]) -> Check:
    """Losses are per token, not one number repeated."""
    n = losses[:POSITIONS_NEEDED].unique().numel()
    return Check(
        "distinct losses",
        n,
        ">",
        POSITIONS_NEEDED / 2,
        f"of {POSITIONS_NEEDED}",
        "Losses are per token: over half of a hundred positions have a loss of their own.",
    )


def ablated_experts(
    model: HookedMoE, tokens: Tensor, real: Tensor, ours: Run, theirs: Run
) -> Iterator[Check]:
    """Zero one expert at one position of each of a few documents, in every MoE layer, by hooked full forward passes;
    then the same by exact replay. Which expert is active there is transformers' word: the one its router scores highest
    always is, the lowest never."""
    documents = (~ours.loss.isnan()).any(dim=1).nonzero()[:_ABLATED_DOCUMENTS, 0]
    tokens, real, losses = tokens[documents], real[documents], ours.loss[documents]
    rows = torch.arange(len(tokens), device=tokens.device)
    # The worst-predicted token: a loss of nearly zero has no room to move.
    positions = losses.nan_to_num(nan=-1.0).argmax(dim=1)
    clean = model(tokens, attention_mask=real, return_type="loss", loss_per_token=True)

    active, moved, disturbed = [], [], []
    for layer in model.cfg.moe_layers:
        scores = theirs.router_logits[layer][documents, positions]
        active.append(scores.argmax(dim=-1))
        for experts, changes in ((active[-1], moved), (scores.argmin(dim=-1), disturbed)):
            with _zeroed(model, layer, positions, experts):
                loss = model(tokens, attention_mask=real, return_type="loss", loss_per_token=True)
            change = loss - clean
            changes.append(change[rows, positions] if changes is moved else change.nan_to_num(nan=0.0))
    yield Check(
        "active expert ablated",
        float(torch.stack(moved).abs().min()),
        ">",
        0,
        "nats",
        "Zeroing an active expert at one token moves the loss there, in every MoE layer (smallest change).",
    )
    yield Check(
        "inactive expert ablated",
        float(torch.stack(disturbed).abs().max()),
        "==",
        0,
        "nats",
        "Zeroing an expert that the token does not use changes no loss at all, in any MoE layer.",
    )
    yield _same_by_replay(model, tokens, real, positions, torch.stack(active), torch.stack(moved))


def _same_by_replay(
    model: HookedMoE,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    positions: Int[Tensor, " batch"],
    experts: Int[Tensor, "layer batch"],
    changes: Float[Tensor, "layer batch"],
) -> Check:
    """Whether replay, run as the census runs it, gives the changes of the loss that full passes gave.

    In float32 every gap counts, and 1e-4 nats are allowed. In half precision the median gap counts, and the larger of
    2e-2 nats and half the median |change| of the full passes is allowed: rounding is largest at worst-predicted tokens,
    and a replay that removes nothing is off by the whole change, one with the other sign by twice that.
    """
    half = model.cfg.dtype in (torch.bfloat16, torch.float16)
    meaning = (
        "Exact single-token replay, the census's, gives the median ablation's full-pass loss change up to rounding."
        if half
        else "Exact single-token replay, the census's, gives every ablation the loss change of a hooked full pass."
    )
    try:
        gaps = (_replayed(model, tokens, real, positions, experts) - changes).abs()
        value = float(gaps.median() if half else gaps.max())
    except (ValueError, FloatingPointError) as error:
        # It does not run on a model that carries hooks, for one. Whoever reads the table shall see why.
        value, meaning = math.nan, f"Exact single-token replay could not be run: {error}"
    # What a wrong replay is off by grows with the changes, as rounding does: half of them tells the two apart.
    tolerance = max(2e-2, float(changes.abs().median()) / 2) if half else 1e-4
    return Check("replay", value, "<=", tolerance, "nats", meaning)


def _replayed(
    model: HookedMoE, tokens: Tensor, real: Tensor, positions: Tensor, experts: Int[Tensor, "layer batch"]
) -> Float[Tensor, "layer batch"]:
    """The change of each document's loss at its position, nats, when each layer's expert is zeroed there."""
    changes = []
    for document, mask, position, of_layers in zip(tokens, real, positions, experts.T, strict=True):
        clean = CleanRun.of(model, document, mask)
        rows = (clean.columns == position).nonzero()[:, 0]
        branches = []
        for layer, expert in zip(model.cfg.moe_layers, of_layers, strict=True):
            is_expert = clean.moe(layer).indices[rows] == expert
            branches.append(Branches(layer, is_expert[:, None]))
        found = replay(clean, branches, rows=rows, null_branch=model.cfg.dtype != torch.float32)
        changes.append(torch.cat([change[0] for change in found.delta_loss]))
    return torch.stack(changes, dim=1)


@contextmanager
def _zeroed(
    model: HookedMoE, layer: int, positions: Int[Tensor, " batch"], experts: Int[Tensor, " batch"]
) -> Iterator[None]:
    """Each row's expert contributes nothing at that row's position; other slots and weights are untouched."""
    chosen: list[Int[Tensor, "batch pos k"]] = []

    def zero(contrib: Float[Tensor, "batch pos k d"], hook: Any) -> Float[Tensor, "batch pos k d"]:
        at_position = torch.arange(contrib.shape[1], device=contrib.device) == positions[:, None]
        is_expert = chosen[-1] == experts[:, None, None]
        return contrib.masked_fill((at_position[:, :, None] & is_expert)[..., None], 0.0)

    mlp = f"blocks.{layer}.mlp"
    hooks = [
        (f"{mlp}.hook_expert_indices", lambda value, hook: chosen.append(value)),
        (f"{mlp}.hook_expert_contrib", zero),
    ]
    with model.hooks(hooks):
        yield


def nothing_left(before: Tensor, after: Tensor, left_on: int) -> Iterator[Check]:
    """Interventions are over when they are over."""
    yield Check(
        "loss after interventions",
        float((after - before).abs().max()),
        "<=",
        1e-3,
        "nats",
        "After the ablations every token's loss is what it was before them.",
    )
    yield Check(
        "hooks left on",
        left_on,
        "==",
        0,
        "hook points",
        "No hook point is still listened to, before or after the interventions.",
    )


def decomposition(model: HookedMoE, tokens: Tensor, mask: Tensor | None) -> Iterator[Check]:
    """The sums of the by-layer decomposition close at every receiver."""
    receivers = model.cfg.moe_layers
    names = attribution_hooks(model, receivers)
    _, cache = model.run_with_cache(
        tokens, attention_mask=mask, names_filter=names, stop_at_layer=receivers[-1] + 1
    )
    attributions = [router_logit_attrs(model, cache, receiver=receiver) for receiver in receivers]
    errors = [attrs.completeness_error for attrs in attributions]
    ratios = [attrs.rounding_ratio for attrs in attributions if attrs.rounding_ratio is not None]
    yield Check(
        "decomposition",
        max(errors),
        "<=",
        1e-5,
        "relative",
        "Every router's logits are the sum of what embedding, attention and MoE layers wrote (worst layer).",
    )
    if ratios:
        yield Check(
            "rounding",
            max(ratios),
            "<=",
            1,
            "of its bound",
            "What the stream holds beyond that sum is no more than its additions can have rounded off.",
        )
