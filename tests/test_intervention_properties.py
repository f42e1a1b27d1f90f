"""What holds of interventions whatever the numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.config import RouterConfig
from moe_lens.interventions import Ablate, ForbidExperts, ForceExperts, RouterOnly, SwapRanks, TopK
from moe_lens.interventions.changed_routing import choose, ranking, renormalized, weights_of
from moe_lens.model.moe import applied_weights, eligible_probabilities
from tests.families import prompts
from tests.intervention_cases import clean_run, run
from tests.reference import assert_same

few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)


@st.composite
def routers(draw: Any) -> tuple[RouterConfig, Tensor]:
    """A router's rule, and probabilities `[1, 3, expert]` with ties among them."""
    n_groups = draw(st.sampled_from([1, 1, 2, 4]))
    top_k_groups = draw(st.integers(1, n_groups))
    n_experts = 8
    k = draw(st.integers(1, min(6, top_k_groups * n_experts // n_groups)))
    logits = torch.randn(1, 3, n_experts, generator=torch.Generator().manual_seed(draw(seeds)))
    if draw(st.booleans()):
        logits = (logits * 2).round() / 2
    return (
        RouterConfig(
            n_experts, k, draw(st.booleans()), draw(st.sampled_from([1.0, 2.5])), n_groups, top_k_groups
        ),
        logits.softmax(-1),
    )


# --- the arithmetic -----------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 9))
def test_renormalize_keeps_sums(seed: int, k: int) -> None:
    """And proportions; what is removed is zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(5, k, generator=generator) + 1e-3
    kept = torch.rand(5, k, generator=generator) < 0.5
    kept[:, 0] = True
    new = renormalized(weights, kept)
    torch.testing.assert_close(new.sum(-1), weights.sum(-1))
    assert (new[~kept] == 0).all()
    torch.testing.assert_close(new / new[:, :1], torch.where(kept, weights / weights[:, :1], 0.0))
    assert renormalized(weights.bfloat16(), kept).dtype == torch.bfloat16


@given(routers(), st.sets(st.integers(0, 7), max_size=4))
def test_excluding_is_removing_from_the_probabilities(case: Any, excluded: set[int]) -> None:
    """Those left are chosen as if the others had never been; where too few are left it raises."""
    router, probabilities = case
    mask = torch.zeros_like(probabilities, dtype=torch.bool)
    mask[..., list(excluded)] = True
    without = probabilities.masked_fill(mask, -torch.inf)
    left = eligible_probabilities(without, router)
    if int((left > -torch.inf).sum(-1).min()) < router.top_k:
        with pytest.raises(ValueError, match="experts remain to be chosen from"):
            choose(probabilities, router, k=router.top_k, excluded=mask)
        return
    indices = choose(probabilities, router, k=router.top_k, excluded=mask)
    assert not torch.isin(indices, torch.tensor(sorted(excluded), dtype=torch.long)).any()
    # The same probabilities, as experts that are tied may stand for each other.
    assert torch.equal(probabilities.gather(-1, indices), left.topk(router.top_k).values)


@given(routers(), st.integers(0, 7))
def test_forcing(case: Any, expert: int) -> None:
    """It is in, heaviest come first, and the others are the best of the rest."""
    router, probabilities = case
    clean = choose(probabilities, router, k=router.top_k)
    forced = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, clean, True)
    again = choose(probabilities, router, k=router.top_k, forced=forced)
    assert torch.equal(again.sort(-1).values, clean.sort(-1).values)
    mask = (torch.arange(8) == expert).expand_as(probabilities)
    new = choose(probabilities, router, k=router.top_k, forced=mask)
    assert (new == expert).any(-1).all()
    heavy = probabilities.gather(-1, new)
    assert (heavy[..., 1:] <= heavy[..., :-1]).all()
    others = eligible_probabilities(probabilities, router).masked_fill(mask, -torch.inf)
    rest = heavy[new != expert].view(1, 3, router.top_k - 1)
    assert torch.equal(rest, others.topk(router.top_k - 1).values)


@given(routers())
def test_ranking(case: Any) -> None:
    """Every expert once: the choice, then those that the router may choose, then the others, each by probability."""
    router, probabilities = case
    indices = choose(probabilities, router, k=router.top_k)
    order = ranking(probabilities, indices, router)
    assert torch.equal(order.sort(-1).values, torch.arange(8).expand_as(order))
    k = router.top_k
    assert torch.equal(order[..., :k].sort(-1).values, indices.sort(-1).values)
    eligible = (eligible_probabilities(probabilities, router) > -torch.inf).gather(-1, order)
    assert (eligible[..., 1:] <= eligible[..., :-1]).all()
    sorted_by = probabilities.gather(-1, order) + 2.0 * eligible
    assert (sorted_by[..., k + 1 :] <= sorted_by[..., k:-1]).all()


@given(routers(), st.integers(1, 6))
def test_slots_to_spare_change_no_weight(case: Any, kept: int) -> None:
    router, probabilities = case
    wide = probabilities.topk(6).indices
    mask = (torch.arange(6) < kept).expand_as(wide)
    weights = weights_of(probabilities, wide, mask, router)
    torch.testing.assert_close(weights[..., :kept], applied_weights(probabilities, wide[..., :kept], router))
    assert (weights[..., kept:] == 0).all()


# --- whole runs ---------------------------------------------------------------------------------------------

VARIANTS = st.sampled_from(["olmoe", "mixtral", "qwen2_moe", "deepseek_v2_groups", "qwen3_moe"])


@few
@given(VARIANTS, seeds)
def test_empty_changes_are_identities(model_of: Any, variant: str, seed: int) -> None:
    """The model's own top-k, forcing who is chosen, forbidding who is not: to the bit."""
    model, (tokens, mask) = model_of(variant), prompts("left", seed=seed, length=6)
    logits, cache = clean_run(model, tokens, mask)
    layer = model.cfg.moe_layers[-1]
    place = torch.zeros(2, 6, dtype=torch.bool)
    place[1, 5] = True
    chosen = cache[f"blocks.{layer}.mlp.hook_expert_indices"][1, 5].tolist()
    idle = next(expert for expert in range(8) if expert not in chosen)
    for spec in (
        TopK(model.cfg.top_k),
        ForceExperts(chosen, layers=layer, pos=place),
        ForbidExperts(idle, layers=layer, pos=place, inactive="allow"),
        Ablate(idle, layers=layer, pos=place, inactive="allow"),
        Ablate(idle, layers=layer, pos=place, inactive="allow", how="reroute"),
        Ablate(idle, layers=layer, pos=place, inactive="allow", how="renormalize"),
        Ablate(chosen, layers=layer, pos=place, all_but=True),
    ):
        actual, _, receipt = run(model, tokens, mask, spec)
        assert torch.equal(actual, logits), spec
        assert receipt.asked == receipt.fired


@few
@given(VARIANTS, seeds, st.data())
def test_zero_of_disjoint_sets_composes(model_of: Any, variant: str, seed: int, data: Any) -> None:
    """Two specs are one with both, in either order."""
    model, (tokens, mask) = model_of(variant), prompts("right", seed=seed, length=6)
    layer = model.cfg.moe_layers[0]
    experts = data.draw(st.permutations(range(8)))
    cut = data.draw(st.integers(1, 6))
    where: Any = dict(layers=layer, inactive="allow")
    first, second = Ablate(experts[:cut], **where), Ablate(experts[cut:7], **where)
    both = run(model, tokens, mask, first, second)[0]
    assert torch.equal(both, run(model, tokens, mask, second, first)[0])
    assert torch.equal(both, run(model, tokens, mask, Ablate(experts[:7], **where))[0])


@few
@given(seeds, st.permutations(range(6)))
def test_the_order_of_specs_does_not_matter(model_of: Any, seed: int, order: list[int]) -> None:
    model, (tokens, mask) = model_of("qwen2_moe"), prompts("left", seed=seed, length=6)
    specs = [
        TopK(4, layers=1),
        ForceExperts("M1E3", pos=-1),
        ForbidExperts("M1E5", inactive="allow"),
        Ablate(ranks=2, layers=1, how="renormalize"),
        Ablate("M1S"),
        RouterOnly("A0", 2),
    ]
    expected = run(model, tokens, mask, *specs)
    actual = run(model, tokens, mask, *(specs[i] for i in order))
    assert torch.equal(actual[0], expected[0])
    assert actual[2].asked == expected[2].asked


@few
@given(VARIANTS, seeds)
def test_rerouting_is_forbidding_where_it_is_active(model_of: Any, variant: str, seed: int) -> None:
    model, (tokens, mask) = model_of(variant), prompts("left", seed=seed, length=6)
    layer = model.cfg.moe_layers[0]
    reroute = Ablate(6, layers=layer, how="reroute", inactive="allow")
    forbid = ForbidExperts(6, layers=layer, inactive="allow")
    assert torch.equal(run(model, tokens, mask, reroute)[0], run(model, tokens, mask, forbid)[0])


@few
@given(seeds, st.integers(1, 4), st.integers(5, 8))
def test_a_swap_to_a_slot_keeps_the_weights(model_of: Any, seed: int, i: int, j: int) -> None:
    model, (tokens, mask) = model_of("olmoe"), prompts("left", seed=seed, length=6)
    name = "blocks.1.mlp.hook_routing_weights"
    swapped = run(model, tokens, mask, SwapRanks(i, j, layers=1, weights="slot"))[1][name]
    assert_same(swapped, clean_run(model, tokens, mask)[1][name])
    from_the_end = run(model, tokens, mask, SwapRanks(i, j - 9, layers=1, weights="slot"))[1][name]
    assert torch.equal(from_the_end, swapped)


# --- specs as data ------------------------------------------------------------------------------------------

positions = st.one_of(
    st.none(),
    st.integers(-9, 9),
    st.lists(st.integers(-9, 9), min_size=1, max_size=3),
    st.lists(st.lists(st.just(True), min_size=2, max_size=2), min_size=1, max_size=3),
)
names = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 99)).map(lambda pair: f"M{pair[0]}E{pair[1]}"),
    min_size=1,
    max_size=3,
    unique=True,
)


@st.composite
def specs(draw: Any) -> Any:
    pos, named = draw(positions), draw(names)
    layers = draw(st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)))
    i, j = draw(st.integers(1, 9)), draw(st.integers(-9, 9))
    return draw(
        st.sampled_from(
            [
                Ablate(named, pos=pos),
                Ablate(named, pos=pos, how="reroute", inactive="allow"),
                Ablate(named, pos=pos, all_but=True),
                Ablate(ranks=i, layers=layers, pos=pos, how="renormalize"),
                ForceExperts(named, pos=pos),
                ForbidExperts(named, pos=pos),
                SwapRanks(i, j, layers=layers, pos=pos, weights="slot"),
                TopK(i, layers=layers, pos=pos),
                RouterOnly(named[0], layers, pos=pos, hold_outputs=True),
            ]
        )
    )


@given(specs(), st.integers(-9, 9))
def test_specs_are_data(spec: Any, column: int) -> None:
    """Equal copies, usable as keys, and what is written can be read again."""
    same = dataclasses.replace(spec)
    assert same == spec
    assert hash(same) == hash(spec)
    assert {spec: 1}[same] == 1
    moved = dataclasses.replace(spec, pos=column)
    assert moved.pos == column
    assert (moved == spec) == (spec.pos == column)
    assert dataclasses.replace(moved, pos=spec.pos) == spec
    assert eval(str(moved)) == moved
