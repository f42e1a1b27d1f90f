"""The reference interventions against what is still more obvious: transformers with hooks on its modules, and hands.

On transformers' side a forward hook on the router returns other experts or weights, one on the module of experts adds
a difference, a weight is set to zero; rules of choice are checked on numbers that can be followed by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import prompts
from tests.reference import assert_same, reference_cache, reference_run
from tests.reference_census import expert_means, expert_outputs
from tests.reference_choice import Facts, applied, choose, facts_of, ranking
from tests.reference_interventions import (
    SHARED,
    Place,
    ablated_run,
    ablation_edits,
    forbidden_run,
    forced_run,
    real_places,
    swapped_run,
    together,
    top_k_run,
)
from tests.transformers_hooks import PLACES, VARIANTS, WITH_SHARED, expert_alone, on_gate, transformers_logits

# --- experts of a run ----------------------------------------------------------------------------------------


def active(model: Any, tokens: Tensor, mask: Tensor, layer: int, place: Place) -> list[int]:
    return reference_cache(model, tokens, mask)[f"blocks.{layer}.mlp.hook_expert_indices"][place].tolist()


def some_removed(
    model: Any, tokens: Tensor, mask: Tensor, layer: int, ranks: Any = (1, 2)
) -> set[tuple[int, int, int]]:
    """The expert of one rank, and of another at the next place, alternating."""
    return {
        (*place, active(model, tokens, mask, layer, place)[ranks[number % len(ranks)] - 1])
        for number, place in enumerate(PLACES)
    }


def middle_layer(model: Any) -> int:
    """A layer with experts that is not the last."""
    return facts_of(model).moe_layers[-2]


# --- the rule, by hand --------------------------------------------------------------------------------------


def facts(**changes: Any) -> Facts:
    plain = dict(n_experts=6, top_k=2, renormalise=False, scaling=1.0, n_groups=1, groups_chosen=1)
    return Facts(**{**plain, **changes}, moe_layers=(0,), shared=False)


PROBABILITIES = torch.tensor([0.10, 0.25, 0.05, 0.15, 0.05, 0.40])


def test_choice_without_groups() -> None:
    """5, 1, 3, 0 are the heaviest; then 2 before 4, which is as heavy."""
    rule = facts()
    assert choose(PROBABILITIES, rule) == [5, 1]
    assert choose(PROBABILITIES, rule, k=1) == [5]
    assert choose(PROBABILITIES, rule, k=5) == [5, 1, 3, 0, 2]
    assert choose(PROBABILITIES, rule, excluded=[1]) == [5, 3]
    assert choose(PROBABILITIES, rule, excluded=[5, 3]) == [1, 0]
    assert choose(PROBABILITIES, rule, excluded=[0, 2, 4]) == [5, 1]
    assert choose(PROBABILITIES, rule, forced=[2]) == [5, 2]
    assert choose(PROBABILITIES, rule, forced=[4, 0]) == [0, 4]
    assert choose(PROBABILITIES, rule, forced=[1]) == [5, 1]
    assert choose(PROBABILITIES, rule, k=3, forced=[2], excluded=[5]) == [1, 3, 2]
    assert ranking(PROBABILITIES, [5, 1], rule) == [5, 1, 3, 0, 2, 4]


def test_choice_within_groups() -> None:
    """Groups (0, 1), (2, 3), (4, 5) with best 0.25, 0.15, 0.40: the outer two are chosen."""
    rule = facts(top_k=3, n_groups=3, groups_chosen=2)
    assert choose(PROBABILITIES, rule) == [5, 1, 0]  # not 3
    assert choose(PROBABILITIES, rule, excluded=[1]) == [
        5,
        3,
        2,
    ]  # 0.10 for the first group: the second is better
    assert choose(PROBABILITIES, rule, excluded=[5]) == [1, 3, 0]  # 0.05 for the third
    assert choose(PROBABILITIES, rule, excluded=[0]) == [5, 1, 4]  # the groups stay
    assert choose(PROBABILITIES, rule, excluded=[2, 3]) == [5, 1, 0]  # a group without members
    assert choose(PROBABILITIES, rule, forced=[2]) == [
        5,
        1,
        2,
    ]  # from outside; the others are from the same two
    assert choose(PROBABILITIES, rule, forced=[2, 3]) == [5, 3, 2]
    assert ranking(PROBABILITIES, [5, 1, 0], rule) == [5, 1, 0, 4, 3, 2]


def test_choices_that_cannot_be() -> None:
    """Too few may be chosen, too many are forced, one is both."""
    rule = facts(top_k=3, n_groups=3, groups_chosen=1)
    with pytest.raises(AssertionError, match="only 2 experts"):
        choose(PROBABILITIES, rule)
    with pytest.raises(AssertionError, match="3 experts are forced into 2 places"):
        choose(PROBABILITIES, facts(), forced=[1, 2, 3])
    with pytest.raises(AssertionError, match=r"both excluded and forced: \[2\]"):
        choose(PROBABILITIES, facts(), forced=[2], excluded=[2])


def test_weights_by_hand() -> None:
    """Probabilities as they are; a factor; over their sum. Whatever the order."""

    def close(weights: Tensor, expected: list[float]) -> None:
        torch.testing.assert_close(weights, torch.tensor(expected))

    close(applied(PROBABILITIES, [5, 3], facts()), [0.40, 0.15])
    close(applied(PROBABILITIES, [3, 5], facts(scaling=2.5)), [0.375, 1.0])
    close(applied(PROBABILITIES, [0, 5], facts(renormalise=True)), [0.2, 0.8])
    close(applied(PROBABILITIES, [4], facts(renormalise=True)), [1.0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rule_is_the_models(hf: Any, variant: str) -> None:
    """Unchanged, it chooses what the model chooses with the model's weights, and nothing changes in a run."""
    model = hf(variant)
    tokens, mask = prompts("left")
    cache = reference_cache(model, tokens, mask)
    rule = facts_of(model)
    for layer in rule.moe_layers:
        at = f"blocks.{layer}.mlp."
        for place in real_places(tokens, mask):
            probabilities = cache[at + "hook_expert_weights"][place]
            chosen = choose(probabilities, rule)
            assert chosen == cache[at + "hook_expert_indices"][place].tolist()
            assert_same(applied(probabilities, chosen, rule), cache[at + "hook_routing_weights"][place])
    _, again = top_k_run(model, tokens, mask, rule.top_k)
    for name, value in cache.items():
        assert_same(again[name], value, name)


# --- ablation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("how", ["zero", "renormalize"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_and_renormalize(hf: Any, variant: str, how: str, padding: str) -> None:
    """Transformers with those weights set to zero; and the others scaled to the same sum."""
    model, (tokens, mask) = hf(variant), prompts(padding)
    layer = middle_layer(model)
    removed = some_removed(model, tokens, mask, layer)

    def change(place: Place, _: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        left = torch.where(torch.tensor([(*place, int(e)) in removed for e in experts]), 0.0, weights)
        return (left if how == "zero" else left / left.sum() * weights.sum()), experts

    expected = transformers_logits(model, tokens, mask, on_gate(model, layer, tokens, PLACES, change))
    logits, cache = ablated_run(model, tokens, mask, layer, removed, how)
    assert_same(logits[mask.bool()], expected)
    clean_logits, clean = reference_run(model, tokens, mask)
    assert (logits - clean_logits).abs().amax(-1)[[0, 1], [5, 4]].min() > 1e-3
    name = f"blocks.{layer}.mlp.hook_routing_weights"
    assert_same(cache[name].sum(-1), clean[name].sum(-1))  # zero leaves the weights, renormalize their sum
    assert torch.equal(cache[name], clean[name]) == (how == "zero")


@pytest.mark.parametrize("variant", VARIANTS)
def test_reroute(hf: Any, variant: str) -> None:
    """A router that hates an expert at a token: its logit there is -10,000, so that it has no probability.

    The others' probabilities are larger by 1 / (1 - its own); where the router does not renormalise, that is undone.
    """
    model, (tokens, mask) = hf(variant), prompts("left", batch=3, length=12)
    layer = middle_layer(model)
    rank = {
        place: 1 + number % facts_of(model).top_k for number, place in enumerate(real_places(tokens, mask))
    }
    clean = reference_cache(model, tokens, mask)[f"blocks.{layer}.mlp.hook_expert_indices"]
    removed = {(*place, int(clean[place][rank[place] - 1])) for place in rank}
    gate = model.model.layers[layer].mlp.gate

    def hook(module: Any, args: Any, output: Any) -> Any:
        states, (logits, weights, experts) = args[0].reshape(-1, args[0].shape[-1]), output
        weights, experts, kept = weights.clone(), experts.clone(), gate.weight.data
        for row, column, expert in removed:
            token = row * tokens.shape[1] + column
            x = states[token : token + 1]
            gate.weight.data = kept.clone()
            gate.weight.data[expert] = -10_000 * x[0] / x[0].pow(2).sum()
            _, new_weights, new_experts = gate.forward(x)
            gate.weight.data = kept
            own = logits[token].float().softmax(-1)[expert]
            weights[token] = new_weights[0] * (1.0 if facts_of(model).renormalise else 1 - own)
            experts[token] = new_experts[0]
        return logits, weights, experts

    expected = transformers_logits(model, tokens, mask, (gate, hook))
    logits, cache = ablated_run(model, tokens, mask, layer, removed, "reroute")
    assert_same(logits[mask.bool()], expected)
    indices = cache[f"blocks.{layer}.mlp.hook_expert_indices"]
    for row, column, expert in removed:
        left = set(clean[row, column].tolist()) - {expert}
        new = indices[row, column].tolist()
        assert expert not in new
        assert variant == "deepseek_v2_groups" or left < set(new)
    if variant == "deepseek_v2_groups":  # here groups were formed anew, and also others than the next came in
        assert any(len(set(indices[p].tolist()) - set(clean[p].tolist())) > 1 for p in rank)


@pytest.mark.parametrize("how", ["zero", "renormalize", "reroute", "mean", "resample"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_active_is_not_missed(hf: Any, variant: str, how: str) -> None:
    """Nothing removed, or experts where they are not chosen, each alone or all together: no value changes."""
    model, (tokens, mask) = hf(variant), prompts("left")
    layer = middle_layer(model)
    clean = reference_cache(model, tokens, mask)
    chosen = clean[f"blocks.{layer}.mlp.hook_expert_indices"]
    idle = {(*place, e) for place in PLACES for e in range(8) if e not in chosen[place].tolist()}
    alone = [{one} for one in idle if one[:2] == PLACES[1]] if how == "reroute" else []
    for removed in [set(), idle, *alone]:
        _, cache = ablated_run(model, tokens, mask, layer, removed, how, means={}, others={})
        for name, value in clean.items():
            assert_same(cache[name], value, name)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_outputs(hf: Any, variant: str, how: str, padding: str) -> None:
    """Transformers' layer, plus weight times the difference of outputs; of the shared experts too."""
    model, (tokens, mask) = hf(variant), prompts(padding)
    layer = middle_layer(model)
    mlp = model.model.layers[layer].mlp
    removed = some_removed(model, tokens, mask, layer)
    if variant in WITH_SHARED:
        removed |= {(*PLACES[0], SHARED), (*PLACES[2], SHARED)}
    means = expert_means(model, tokens, mask, [layer])
    outputs = expert_outputs(model, tokens, mask, layer)
    others = {
        key: next(v for k, v in outputs.items() if k[2] == key[2] and k[:2] != key[:2]) for key in removed
    }
    new = {"zero": lambda key: 0.0, "mean": lambda key: means[layer, key[2]], "resample": others.get}[how]
    weights: dict[tuple[int, ...], Tensor] = {}

    def on_router(module: Any, args: Any, output: Any) -> None:
        for row, column, expert in removed:
            token = row * tokens.shape[1] + column
            slots = output[2][token].tolist()
            weights[row, column, expert] = (
                torch.ones(()) if expert == SHARED else output[1][token][slots.index(expert)]
            )

    def on_layer(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for key in removed:
            old = expert_alone(mlp, args[0][key[:2]], key[2])
            output[key[:2]] += weights[key] * (new(key) - old)
        return output

    expected = transformers_logits(model, tokens, mask, (mlp.gate, on_router), (mlp, on_layer))
    logits, _ = ablated_run(model, tokens, mask, layer, removed, how, means=means, others=others)
    assert_same(logits[mask.bool()], expected)
    for one in removed:  # each of them matters
        alone, _ = ablated_run(model, tokens, mask, layer, removed - {one}, how, means=means, others=others)
        assert (alone - logits).abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_everywhere_is_a_matrix_of_zeros(hf: Any, variant: str) -> None:
    """Expert 6 of every layer, or the shared experts, write nothing: transformers with their weights set to zero."""
    model, (tokens, mask) = hf(variant), prompts("right")
    rule = facts_of(model)
    for expert in [6, SHARED] if rule.shared else [6]:
        everywhere = {(*place, expert) for place in real_places(tokens, mask)}
        edits = [ablation_edits(layer, everywhere, rule, "zero") for layer in rule.moe_layers]
        with torch.no_grad():
            logits, _ = reference_run(model, tokens, mask, together(*edits))
        matrices = []
        for layer in rule.moe_layers:
            mlp = model.model.layers[layer].mlp
            shared = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)
            if expert == SHARED:
                assert shared is not None
                matrices.append(shared.down_proj.weight.data)
            else:
                matrices.append(mlp.experts.down_proj.data[expert])
        kept = [matrix.clone() for matrix in matrices]
        try:
            for matrix in matrices:
                matrix.zero_()
            expected = transformers_logits(model, tokens, mask)
        finally:
            for matrix, values in zip(matrices, kept, strict=True):
                matrix.copy_(values)
        assert_same(logits[mask.bool()], expected)
        assert not torch.equal(expected, transformers_logits(model, tokens, mask))


@pytest.mark.parametrize("how", ["zero", "renormalize", "reroute"])
def test_removed_by_rank_in_this_very_run(hf: Any, how: str) -> None:
    """The heaviest of two layers in succession: the second layer's is that of the run without the first's."""
    model, (tokens, mask) = hf("qwen2_moe"), prompts("left", batch=4)
    rule, places = facts_of(model), real_places(tokens, mask)

    def heaviest(row: int, column: int, chosen: list[int]) -> list[int]:
        return chosen[:1] if (row, column) in places else []

    def heaviest_of(layer: int, values: dict[str, Tensor]) -> set[tuple[int, int, int]]:
        indices = values[f"blocks.{layer}.mlp.hook_expert_indices"]
        return {(*place, int(indices[place][0])) for place in places}

    clean = reference_cache(model, tokens, mask)
    first_set = heaviest_of(0, clean)
    first = ablation_edits(0, first_set, rule, how)
    with torch.no_grad():
        second_set = heaviest_of(1, reference_run(model, tokens, mask, first)[1])
        second = ablation_edits(1, second_set, rule, how)
        expected, _ = reference_run(model, tokens, mask, together(first, second))
        by_rank = [ablation_edits(layer, heaviest, rule, how) for layer in (0, 1)]
        logits, _ = reference_run(model, tokens, mask, together(*by_rank))
    assert_same(logits, expected)
    assert second_set != heaviest_of(1, clean)


# --- another choice -----------------------------------------------------------------------------------------


def weighed(model: Any, probabilities: Tensor, experts: Tensor) -> Tensor:
    """The family's weights, in one line per family."""
    weights, name = probabilities[experts], model.config.model_type
    if name == "deepseek_v2":
        return weights * model.config.routed_scaling_factor
    return weights / weights.sum() if name == "mixtral" or model.config.norm_topk_prob else weights


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", ["forced", "forbidden", "swapped_own", "swapped_slot", "wider", "narrower"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "deepseek_v2_groups"])
def test_other_choices(hf: Any, variant: str, kind: str, everywhere: bool) -> None:
    """Transformers, whose router's answer is replaced by top-k of scores that were raised, lowered or exchanged."""
    model, (tokens, mask) = hf(variant), prompts("left")
    rule = facts_of(model)
    k = rule.top_k
    layers = list(rule.moe_layers) if everywhere else [middle_layer(model)]
    places = real_places(tokens, mask) if everywhere else PLACES
    where: Any = dict(layers=None if everywhere else layers[0], places=None if everywhere else PLACES)

    def change(place: Place, p: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        scores, order = p.clone(), p.argsort(descending=True)
        if kind == "forced":
            scores[[1, 6]] += 1
        elif kind == "forbidden":
            scores[[1, 6]] = -1
        elif kind.startswith("swapped"):
            scores[order[1]], scores[order[-1]] = p[order[-1]].item(), p[order[1]].item()
        new = scores.topk({"wider": k + 2, "narrower": k - 1}.get(kind, k)).indices
        return weights if kind == "swapped_slot" else weighed(model, p, new), new

    runs = {
        "forced": lambda: forced_run(model, tokens, mask, [1, 6], **where),
        "forbidden": lambda: forbidden_run(model, tokens, mask, [1, 6], **where),
        "swapped_own": lambda: swapped_run(model, tokens, mask, 2, -1, **where),
        "swapped_slot": lambda: swapped_run(model, tokens, mask, 2, -1, **where, weights="slot"),
        "wider": lambda: top_k_run(model, tokens, mask, k + 2, **where),
        "narrower": lambda: top_k_run(model, tokens, mask, k - 1, **where),
    }
    hooks = [on_gate(model, layer, tokens, places, change) for layer in layers]
    logits, _ = runs[kind]()
    assert_same(logits[mask.bool()], transformers_logits(model, tokens, mask, *hooks))
    assert (logits[mask.bool()] - transformers_logits(model, tokens, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_top_k_is_that_of_transformers(hf: Any, variant: str) -> None:
    """Its routers hold the number as an attribute; so group-limited ones are covered too."""
    model, (tokens, mask) = hf(variant), prompts("left")
    rule = facts_of(model)
    gates = [model.model.layers[layer].mlp.gate for layer in rule.moe_layers]
    for k in (1, rule.top_k - 1, rule.top_k + 1):
        try:
            for gate in gates:
                gate.top_k = k
            expected = transformers_logits(model, tokens, mask)
        finally:
            for gate in gates:
                gate.top_k = rule.top_k
        assert_same(top_k_run(model, tokens, mask, k)[0][mask.bool()], expected, f"top-{k}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_choices_that_change_nothing(hf: Any, variant: str) -> None:
    """To force what was chosen, and to forbid what was not."""
    model, (tokens, mask) = hf(variant), prompts("left")
    layer, place = middle_layer(model), PLACES[1]
    clean_logits, _ = reference_run(model, tokens, mask)
    chosen = active(model, tokens, mask, layer, place)
    for number in range(len(chosen) + 1):
        assert_same(forced_run(model, tokens, mask, chosen[number:], layer, [place])[0], clean_logits)
    idle = [expert for expert in range(8) if expert not in chosen]
    for number in range(len(idle) + 1):
        assert_same(forbidden_run(model, tokens, mask, idle[:number], layer, [place])[0], clean_logits)


def test_the_slots_of_a_swap(hf: Any) -> None:
    """The one that comes stands where the other stood, and takes its weight, or brings its own."""
    model, (tokens, mask) = hf("olmoe"), prompts()
    at, place = "blocks.1.mlp.", (1, 4)
    clean = reference_cache(model, tokens, mask)
    probabilities = clean[at + "hook_expert_weights"][place]
    order = probabilities.argsort(descending=True).tolist()
    for weights in ("own", "slot"):
        _, cache = swapped_run(model, tokens, mask, 2, 6, 1, [place], weights=weights)
        assert cache[at + "hook_expert_indices"][place].tolist() == [order[0], order[5], *order[2:4]]
        expected = clean[at + "hook_routing_weights"][place].clone()
        if weights == "own":
            expected[1] = probabilities[order[5]]
        assert_same(cache[at + "hook_routing_weights"][place], expected)
    with pytest.raises(AssertionError, match="ranks 2 and 3"):
        swapped_run(model, tokens, mask, 2, 3)
