"""What becomes of a router's choice without a sender: against sorted lists, under every family's own rule."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.routing.attribution import router_logit_attrs
from moe_lens.routing.rank_shift import RankShift, choice_of, rank_shift, ranks
from moe_lens.routing.senders import GRANULARITIES
from tests.families import FAMILIES, VARIANTS, prompts, variant_config
from tests.reference import reference_run
from tests.reference_rank_shift import chosen_experts, rank_shift_of, rank_shifts, ranks_of, weights_of
from tests.routing_cases import cached_run

Load = Callable[[str], Any]

# Every rule: raw, renormalised and scaled weights, group-limited top-k.
RULES = (*FAMILIES, "olmoe_gqa_clip", "deepseek_v2_groups", "deepseek_v2_two_dense", "qwen3_moe_dense_bias")


def some_logits(n_tokens: int, *, ties: bool, seed: int = 0) -> torch.Tensor:
    """Of 8 experts; with ties, several are equal at most tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n_tokens, 8, generator=generator)
    return (2 * logits).round() / 2 if ties else logits


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_ranks_are_those_of_a_sorted_list(ties: bool) -> None:
    logits = some_logits(200, ties=ties)
    assert ranks(logits).tolist() == [ranks_of(token.tolist()) for token in logits]


def test_ties_go_to_the_lower_index() -> None:
    assert ranks(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0])).tolist() == [3, 1, 4, 2, 5]
    assert ranks(torch.zeros(70)).tolist() == list(range(1, 71))


@pytest.mark.parametrize("variant", RULES)
def test_the_choice_is_the_family_s(model_of: Load, variant: str) -> None:
    model, config = model_of(variant), variant_config(variant)
    # Ties between groups may be settled either way: there is no such rule to follow.
    for ties in (False, True) if model.cfg.router.n_groups == 1 else (False,):
        logits = some_logits(200, ties=ties)
        chosen, weights, _ = choice_of(logits.view(10, 20, 8), model.cfg.router)
        assert chosen.shape == weights.shape == (10, 20, 8)
        for token, got, weight in zip(logits, chosen.view(-1, 8), weights.view(-1, 8), strict=True):
            assert got.nonzero()[:, 0].tolist() == sorted(chosen_experts(token.tolist(), config))
            np.testing.assert_allclose(weight, weights_of(token.tolist(), config), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", [name for name, v in VARIANTS.items() if v.dtype == torch.float32])
def test_the_choice_is_the_model_s(model_of: Load, variant: str) -> None:
    """For the logits of a run, `choice_of` gives the experts and weights that the router applied."""
    model = model_of(variant)
    points = [
        f"blocks.{layer}.mlp.{point}"
        for layer in model.cfg.moe_layers
        for point in ("hook_router_logits", "hook_expert_indices", "hook_routing_weights")
    ]
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts(length=20)[0], names_filter=points)
    for layer in model.cfg.moe_layers:
        logits, indices, applied = (cache[f"blocks.{layer}.mlp.{p.split('.')[-1]}"] for p in points[:3])
        chosen, weights, _ = choice_of(logits, model.cfg.router)
        expected = torch.zeros_like(logits).scatter_(-1, indices, applied)
        assert torch.equal(chosen, expected > 0)
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    ("variant", "ties"),
    # Ties between groups may be settled either way.
    [(v, ties) for v in RULES for ties in (False, True) if not (ties and v == "deepseek_v2_groups")],
)
def test_equal_to_sorted_lists(model_of: Load, variant: str, ties: bool) -> None:
    router, config = model_of(variant).cfg.router, variant_config(variant)
    logits, scores = some_logits(300, ties=ties), some_logits(300, ties=ties, seed=1)
    got = rank_shift(logits, scores, router)
    assert isinstance(got, RankShift)
    for token in range(300):
        expected = rank_shift_of(logits[token].tolist(), scores[token].tolist(), config)
        np.testing.assert_allclose([float(measure[token]) for measure in got], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe", "deepseek_v2_groups"])
def test_of_every_sender_at_every_token(hf: Load, model_of: Load, variant: str, by: str) -> None:
    """Ranks, choice and weights without each sender's dense scores; near ties are not compared."""
    model, batch = model_of(variant), prompts("left", length=6)
    receiver = model.cfg.moe_layers[1]
    attrs = router_logit_attrs(model, cached_run(model, batch, by), receiver=receiver, by=by)
    got = rank_shift(attrs.logits, attrs.values, model.cfg.router)
    with torch.no_grad():
        _, values = reference_run(hf(variant), *batch)
    expected = rank_shifts(hf(variant), values, receiver, by)
    left = (attrs.logits - attrs.values).sort(dim=-1).values
    clear = ((left[..., 1:] - left[..., :-1]).min(dim=-1).values > 1e-4).numpy()
    assert clear.mean() > 0.95
    for row, name in enumerate(attrs.senders):
        for measure, tokens in expected[name].items():
            ours = getattr(got, measure)[row].numpy()[clear[row]]
            np.testing.assert_allclose(
                ours, tokens[clear[row]], rtol=1e-4, atol=1e-5, err_msg=f"{measure} {name}"
            )


def test_shapes_broadcast(model_of: Load) -> None:
    router = model_of("olmoe").cfg.router
    logits, scores = torch.randn(2, 5, 8), torch.randn(7, 2, 5, 8)
    together = rank_shift(logits, scores, router)
    for measure in together:
        assert measure.shape == (7, 2, 5)
    for i in range(7):
        for one, whole in zip(rank_shift(logits, scores[i], router), together, strict=True):
            assert torch.equal(one, whole[i])


def test_by_hand(model_of: Load) -> None:
    """Top-4 of 8. The best expert loses its score and falls to the last place; those below it move up."""
    router = model_of("olmoe").cfg.router
    logits = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    scores = torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0])
    aarv, overlap, weight_change = rank_shift(logits, scores, router)
    assert float(aarv) == (7 + 1 + 1 + 1) / 4
    assert float(overlap) == 0.75
    before, after = logits.softmax(-1), (logits - scores).softmax(-1)
    expected = before[0] + (after - before)[1:4].abs().sum() + after[4]
    assert float(weight_change) == pytest.approx(float(expected))


# ---- properties ----


@pytest.fixture(scope="module")
def routers(hooked: Load) -> list[Any]:
    return [hooked(variant).cfg.router for variant in RULES]


# Multiples of 1/8: sums and differences of them are exact, so that equal ones stay equal.
EIGHTHS = st.integers(-80, 80).map(lambda n: n / 8)
TOKEN = st.lists(EIGHTHS, min_size=8, max_size=8)


@settings(max_examples=60, deadline=None)
@given(logits=TOKEN)
def test_ranks_are_a_permutation(logits: list[float]) -> None:
    got = ranks(torch.tensor(logits)).tolist()
    assert sorted(got) == list(range(1, 9))
    for i in range(8):
        for j in range(8):
            if logits[i] > logits[j] or (logits[i] == logits[j] and i < j):
                assert got[i] < got[j]


@settings(max_examples=40, deadline=None)
@given(logits=TOKEN, constant=EIGHTHS)
def test_what_all_experts_share_moves_nothing(
    routers: list[Any], logits: list[float], constant: float
) -> None:
    for router in routers:
        for shared in (0.0, constant):
            aarv, overlap, weight_change = rank_shift(torch.tensor(logits), torch.full((8,), shared), router)
            assert (float(aarv), float(overlap)) == (0, 1)
            assert float(weight_change) == pytest.approx(0, abs=1e-5)
            if shared == 0:
                assert float(weight_change) == 0


@settings(max_examples=40, deadline=None)
@given(logits=TOKEN, scores=TOKEN)
def test_bounds_and_symmetry(routers: list[Any], logits: list[float], scores: list[float]) -> None:
    before, change = torch.tensor(logits), torch.tensor(scores)
    for router in routers:
        aarv, overlap, weight_change = map(float, rank_shift(before, change, router))
        assert 0 <= aarv <= 7
        assert 0 <= overlap <= 1
        assert overlap * router.top_k == pytest.approx(round(overlap * router.top_k))
        assert 0 <= weight_change <= 2 * router.scaling_factor + 1e-5
        # Adding the scores back undoes it: the same experts are shared, and the weights differ by as much.
        back = rank_shift(before - change, -change, router)
        assert float(back.overlap) == overlap
        assert float(back.weight_change) == pytest.approx(weight_change, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(logits=TOKEN, scores=TOKEN, constant=EIGHTHS)
def test_a_shift_of_logits_or_scores_changes_nothing(
    routers: list[Any], logits: list[float], scores: list[float], constant: float
) -> None:
    before, change = torch.tensor(logits), torch.tensor(scores)
    for router in routers:
        plain = rank_shift(before, change, router)
        for other in (
            rank_shift(before + constant, change, router),
            rank_shift(before, change + constant, router),
        ):
            for one, two in zip(plain, other, strict=True):
                assert float(one) == pytest.approx(float(two), abs=1e-5)


def test_near_equal_logits_are_ranked_by_logit_not_by_probability(model_of: Load) -> None:
    """Their probabilities round to the same number; the higher logit is chosen all the same."""
    router = model_of("mixtral").cfg.router
    logits = torch.tensor([0.0, 0.0, 0.0, 20.0, -40.0, -30.0, 1e-8, 0.0])
    assert torch.equal(logits.softmax(-1)[6], logits.softmax(-1)[0])
    chosen = choice_of(logits, router).chosen
    assert chosen.nonzero()[:, 0].tolist() == [3, 6]


def test_a_config_without_groups_needs_none() -> None:
    config = SimpleNamespace(
        n_experts=8, top_k=2, n_groups=1, top_k_groups=1, renormalize=True, scaling_factor=1.0
    )
    _, weights, _ = choice_of(some_logits(5, ties=False), config)  # type: ignore[arg-type]
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
