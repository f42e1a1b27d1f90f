"""The reference census and its predictors against transformers, whose routers' weights are changed by hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.families import prompts
from tests.reference import assert_same, reference_loss_per_token
from tests.reference_census import (
    census_rows,
    cumulative_rows,
    direct_rows,
    expert_means,
    expert_outputs,
    first_order_rows,
    losses_of,
    measured_places,
)
from tests.reference_choice import facts_of
from tests.reference_interventions import SHARED, Place, real_places
from tests.transformers_hooks import VARIANTS, WITH_SHARED, expert_alone, forward_hooks, on_gate

Hooks = list[tuple[Any, Callable[..., Any]]]


def batch(padding: str) -> tuple[Tensor, Tensor]:
    """Two documents of six tokens less one and less three."""
    return prompts(padding, length=6)


def transformers_run(
    model: Any, tokens: Tensor, mask: Tensor, layer: int, *hooks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Its logits, the output of one MoE layer, and that layer's input, all `[b, p, ...]`."""
    seen: list[Tensor] = []
    listen = model.model.layers[layer].mlp, lambda module, args, output: seen.extend([output, args[0]])
    with forward_hooks(*hooks, listen), torch.no_grad():
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
    return logits, seen[0], seen[1]


def scale_expert(model: Any, layer: int, tokens: Tensor, places: list[Place], expert: int, by: Any) -> Hooks:
    """Hooks that multiply the weight of one expert at some places, or what the shared experts add there."""
    mlp = model.model.layers[layer].mlp
    if expert == SHARED:

        def on_layer(module: Any, args: Any, output: Tensor) -> Tensor:
            added = torch.zeros_like(output)
            for place in places:
                added[place] = (by - 1) * expert_alone(mlp, args[0][place], SHARED)
            return output + added

        return [(mlp, on_layer)]

    def change(place: Place, _: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(experts == expert, by * weights, weights), experts

    return [on_gate(model, layer, tokens, places, change)]


def close(actual: float, expected: float, name: str) -> None:
    """To 1e-5 of the larger, or of 1; NaN where the other is."""
    assert math.isclose(actual, expected, rel_tol=1e-5, abs_tol=1e-5) or (
        math.isnan(actual) and math.isnan(expected)
    ), f"{name}: {actual}, not {expected}"


# --- losses and rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_losses(hf: Any, padding: str) -> None:
    """The same numbers as the reference of the loss, and NaN in the last column."""
    model, (tokens, mask) = hf("olmoe"), prompts(padding)
    with torch.no_grad():
        losses = losses_of(model(tokens, attention_mask=mask, use_cache=False).logits, tokens, mask)
    expected = reference_loss_per_token(model, tokens, mask)
    assert torch.equal(losses[:, :-1].isnan(), expected.isnan())
    assert losses[:, -1].isnan().all()
    assert_same(losses[:, :-1].nan_to_num(), expected.double().nan_to_num())


def test_which_rows(hf: Any) -> None:
    """Counted on fingers: 4 and 2 tokens with a next one, two layers, two experts, heaviest first."""
    model = hf("mixtral")
    for padding, first_columns in (("left", [1, 3]), ("right", [0, 0])):
        tokens, mask = batch(padding)
        rows = census_rows(model, tokens, mask, layers=[0, 1])
        places = [(0, first_columns[0] + n) for n in range(4)] + [(1, first_columns[1] + n) for n in range(2)]
        assert measured_places(tokens, mask) == places
        assert [(row["layer"], row["document"], row["position"], row["rank"]) for row in rows] == [
            (layer, *place, rank) for layer in (0, 1) for place in places for rank in (1, 2)
        ]
        last = {(0, first_columns[0] + 3), (1, first_columns[1] + 1)}  # no later token has a next one
        for row in rows:
            assert math.isnan(row["later_loss"]) == ((row["document"], row["position"]) in last)


@pytest.mark.parametrize(("scope", "padding"), [("token", "left"), ("sequence", "right")])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_census_is_transformers_without_the_expert(hf: Any, variant: str, padding: str, scope: str) -> None:
    """Each number of each row of a layer, from transformers with that expert's weight set to zero."""
    model, (tokens, mask) = hf(variant), batch(padding)
    layer = facts_of(model).moe_layers[-2]
    rows = census_rows(model, tokens, mask, layers=[layer], scope=scope, shared=variant in WITH_SHARED)
    clean, clean_out, x = transformers_run(model, tokens, mask, layer)
    _, weights, experts = model.model.layers[layer].mlp.gate.forward(x.flatten(0, 1))
    assert any(row["expert"] == SHARED for row in rows) == (variant in WITH_SHARED)

    for row in rows:
        place = row["document"], row["position"]
        changed = [place]
        if scope == "sequence":  # setting a weight that is not there changes nothing, so: the whole document
            changed = [other for other in real_places(tokens, mask) if other[0] == place[0]]
        hooks = scale_expert(model, layer, tokens, changed, row["expert"], 0.0)
        logits, out, _ = transformers_run(model, tokens, mask, layer, *hooks)
        token = place[0] * tokens.shape[1] + place[1]
        if row["expert"] == SHARED:
            assert row["rank"] == 0
            gate = getattr(model.model.layers[layer].mlp, "shared_expert_gate", None)
            close(row["routing_weight"], 1.0 if gate is None else float(gate(x[place]).sigmoid()), "gate")
        else:
            weight = weights[token][experts[token] == row["expert"]]
            close(row["routing_weight"], float(weight), "weight")
            assert row["rank"] == 1 + int((weights[token] > weight).sum())
        close(row["gap_norm"], float((clean_out - out)[place].norm()), "gap norm")

        def loss(logits: Tensor, document: int, position: int) -> float:
            return float(F.cross_entropy(logits[document, position], tokens[document, position + 1]))

        close(row["loss"], loss(clean, *place), "loss")
        close(row["delta_loss"], loss(logits, *place) - loss(clean, *place), "delta loss")
        divergence = F.kl_div(
            logits[place].log_softmax(-1), clean[place].log_softmax(-1), log_target=True, reduction="sum"
        )
        close(row["kl"], float(divergence), "kl")
        later = [
            loss(logits, *other) - loss(clean, *other)
            for other in measured_places(tokens, mask)
            if other[0] == place[0] and other[1] > place[1]
        ]
        close(row["later_loss"], float(torch.tensor(later).mean()), "later loss")


@pytest.mark.parametrize("how", ["renormalize", "reroute", "mean", "resample"])
@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2_groups", "qwen3_moe", "mixtral"])
def test_ways_of_removing(hf: Any, variant: str, how: str) -> None:
    """Every way reaches the run; the gap is what that way makes of the layer's output, by hand where it is short."""
    model, (tokens, mask) = hf(variant), batch("left")
    layer = facts_of(model).moe_layers[-2]
    means = expert_means(model, tokens, mask, [layer])
    outputs = expert_outputs(model, tokens, mask, layer)
    others = {key: outputs[max(k for k in outputs if k[2] == key[2])] for key in outputs}
    shared = how in ("mean", "resample") and variant in WITH_SHARED
    rows = census_rows(
        model, tokens, mask, layers=[layer], how=how, means=means, others={layer: others}, shared=shared
    )
    zeroed = census_rows(model, tokens, mask, layers=[layer], shared=shared)
    for row, zero in zip(rows, zeroed, strict=True):
        key = (row["document"], row["position"], row["expert"])
        assert (row["expert"], row["loss"], row["rank"]) == (zero["expert"], zero["loss"], zero["rank"])
        if how in ("mean", "resample"):
            new = means[layer, key[2]] if how == "mean" else others[key]
            weight = 1.0 if row["expert"] == SHARED else row["routing_weight"]
            close(row["gap_norm"], weight * float((new - outputs[key]).norm()), how)
        elif how == "renormalize":
            of_token = [r for r in rows if (r["document"], r["position"]) == key[:2]]
            total = sum(r["routing_weight"] for r in of_token)
            grow = total / (total - row["routing_weight"]) - 1
            gap = -row["routing_weight"] * outputs[key]
            for other in of_token:
                if other["expert"] != row["expert"]:
                    gap = gap + grow * other["routing_weight"] * outputs[*key[:2], other["expert"]]
            close(row["gap_norm"], float(gap.norm()), how)
        else:
            assert row["gap_norm"] > 0
            assert row["delta_loss"] != zero["delta_loss"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_means_and_outputs(hf: Any, variant: str) -> None:
    """Each expert of transformers alone, at each real token that its router sends there."""
    model, (tokens, mask) = hf(variant), prompts("right")
    layer = facts_of(model).moe_layers[-1]
    mlp = model.model.layers[layer].mlp
    _, _, x = transformers_run(model, tokens, mask, layer)
    experts = mlp.gate.forward(x.flatten(0, 1))[2].view(*tokens.shape, -1)
    outputs = expert_outputs(model, tokens, mask, layer)
    means = expert_means(model, tokens, mask, [layer])
    expected: dict[int, list[Tensor]] = {}
    for place in real_places(tokens, mask):
        here = experts[place].tolist() + ([SHARED] if variant in WITH_SHARED else [])
        for expert in here:
            alone = expert_alone(mlp, x[place], expert).detach()
            assert_same(outputs[*place, expert], alone)
            expected.setdefault(expert, []).append(alone)
        assert len([key for key in outputs if key[:2] == place]) == len(here)
    assert {expert for _, expert in means} == set(expected)
    for expert, vectors in expected.items():
        assert_same(means[layer, expert], torch.stack(vectors).mean(0))


# --- several experts together -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2_groups", "qwen3_moe"])
def test_the_heaviest_together(hf: Any, variant: str, scope: str) -> None:
    """Transformers with the k largest weights set to zero; the first of them is the census's."""
    model, (tokens, mask) = hf(variant), batch("left")
    rule = facts_of(model)
    layer = rule.moe_layers[0]
    rows = cumulative_rows(model, tokens, mask, layers=[layer], scope=scope)
    assert [row["removed"] for row in rows[: rule.top_k - 1]] == list(range(1, rule.top_k))
    assert len(rows) == 6 * (rule.top_k - 1)
    clean, clean_out, _ = transformers_run(model, tokens, mask, layer)
    for row in rows:
        place = row["document"], row["position"]
        places = [p for p in real_places(tokens, mask) if p == place or scope == "sequence"]

        def change(
            _: Place, __: Tensor, weights: Tensor, experts: Tensor, k: int = row["removed"]
        ) -> tuple[Tensor, Tensor]:
            return weights * (torch.arange(len(weights)) >= k), experts

        hook = on_gate(model, layer, tokens, places, change)
        logits, out, _ = transformers_run(model, tokens, mask, layer, hook)
        losses = losses_of(logits, tokens, mask) - losses_of(clean, tokens, mask)
        close(row["delta_loss"], float(losses[place]), "delta loss")
        close(row["gap_norm"], float((out - clean_out)[place].norm()), "gap norm")
    if scope == "token":
        first = [row for row in census_rows(model, tokens, mask, layers=[layer]) if row["rank"] == 1]
        for one, row in zip(first, [row for row in rows if row["removed"] == 1], strict=True):
            assert all(row[name] == one[name] for name in ("loss", "delta_loss", "kl", "gap_norm"))


# --- predictors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_order_is_the_slope_of_transformers_loss(hf: Any, variant: str) -> None:
    """Of the loss at a token, by the factor on one contribution there: at 1, towards less. The summed loss has
    another slope."""
    model, (tokens, mask) = hf(variant), batch("right")
    layers = facts_of(model).moe_layers[-2:]
    shared = variant in WITH_SHARED
    rows = first_order_rows(model, tokens, mask, layers=layers, shared=shared)
    per_token = facts_of(model).top_k + shared
    assert len(rows) == 2 * 6 * per_token
    summed_is_another = 0.0
    for row in rows[::3]:
        place = row["document"], row["position"]
        factor = torch.ones((), requires_grad=True)
        hooks = scale_expert(model, row["layer"], tokens, [place], row["expert"], factor)
        with forward_hooks(*hooks):
            losses = losses_of(model(tokens, attention_mask=mask, use_cache=False).logits, tokens, mask)
        (slope,) = torch.autograd.grad(losses[place], factor, retain_graph=True)
        close(row["first_order"], -float(slope), "first order")
        (summed,) = torch.autograd.grad(losses.nansum(), factor)
        summed_is_another = max(summed_is_another, abs(float(summed - slope)))
    assert summed_is_another > 1e-3


def test_first_order_is_the_change_for_a_small_part(hf: Any) -> None:
    """A hundredth of a contribution taken away, and a hundredth added: a hundredth of the first order, each way."""
    model, (tokens, mask) = hf("qwen3_moe"), batch("left")
    for row in first_order_rows(model, tokens, mask, layers=[1]):
        place, change = (row["document"], row["position"]), {}
        for by in (0.99, 1.01):
            hooks = scale_expert(model, 1, tokens, [place], row["expert"], by)
            change[by] = losses_of(transformers_run(model, tokens, mask, 1, *hooks)[0], tokens, mask)[place]
        measured = float(change[0.99] - change[1.01]) / 0.02
        assert abs(measured - row["first_order"]) < 1e-3 + 1e-2 * abs(measured)


@pytest.mark.parametrize("variant", [*VARIANTS, "deepseek_v2_bias"])
@torch.no_grad()
def test_direct_parts_sum_to_the_logit(hf: Any, variant: str) -> None:
    """All parts of the last layer, and the stream before it, make the next token's logit less the mean logit."""
    model, (tokens, mask) = hf(variant), batch("left")
    layer = facts_of(model).moe_layers[-1]
    assert layer == len(model.model.layers) - 1
    rows = direct_rows(model, tokens, mask, layers=[layer], shared=facts_of(model).shared)
    before: list[Tensor] = []
    streams: list[Tensor] = []
    norm_before, last = model.model.layers[layer].post_attention_layernorm, model.model.norm
    with (
        forward_hooks(
            (norm_before, lambda module, args, output: before.append(args[0])),
            (last, lambda module, args, output: streams.append(args[0])),
        ),
    ):
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
    for place in measured_places(tokens, mask):
        parts = [row["direct"] for row in rows if (row["document"], row["position"]) == place]
        next_token = tokens[place[0], place[1] + 1]
        stream = streams[0][place]
        scale = (stream.pow(2).mean() + model.config.rms_norm_eps).sqrt()
        read = model.lm_head.weight @ (last.weight * before[0][place] / scale)
        expected = logits[place][next_token] - logits[place].mean()
        close(sum(parts) + float(read[next_token] - read.mean()), float(expected), "sum of parts")
        assert max(abs(part) for part in parts) > 1e-3
