"""What must hold of scores and measures whatever the tokens, weights and vectors: as properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing.attribution import router_logit_attrs
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.measures import MEASURES, SCALE_POWERS, head_lengths, normalised_lengths, score_measures
from moe_lens.routing.rank_shift import choice_of, rank_shift, ranks
from moe_lens.routing.readout import router_readout
from moe_lens.routing.senders import GRANULARITIES
from tests.families import prompts
from tests.routing_cases import cached_run

Load = Callable[[str], Any]

SEEDS = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def models(hooked: Load) -> list[HookedMoE]:
    """Kinds enough: a dense layer with a gated shared expert, latent attention with output biases, grouped queries."""
    return [hooked(v) for v in ("qwen2_moe_no_bias", "deepseek_v2_bias", "qwen3_moe")]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(scores: Tensor, norms: Tensor | None = None) -> dict[str, Tensor]:
    norms = torch.zeros(scores.shape[:-1]) if norms is None else norms
    values = score_measures(scores, norms)
    return {name: values[..., i, :] for i, name in enumerate(MEASURES)}


# ---- sums ----


@settings(max_examples=15, deadline=None)
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    length=st.integers(1, 10),
    side=st.sampled_from(["left", "right", "none"]),
)
def test_sums_close_whatever_the_tokens(
    models: list[HookedMoE], seed: int, batch: int, length: int, side: str
) -> None:
    tokens, mask = prompts(side if length > 3 else "none", seed=seed, batch=batch, length=length)
    for model in models:
        for by in GRANULARITIES:
            cache = cached_run(model, (tokens, mask), by)
            for receiver in model.cfg.moe_layers:
                attrs = router_logit_attrs(model, cache, receiver=receiver, by=by)
                assert attrs.completeness_error <= 1e-5
        results = routing_contributions(model, [(tokens, mask)], by=GRANULARITIES)
        for result in results.values():
            assert result.completeness_error <= 1e-5


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_parts_sum_to_wholes(models: list[HookedMoE], seed: int) -> None:
    """Source pairs to heads, heads and bias to attention layers, neurons to experts, experts and shared to layers."""
    batch = prompts("right", seed=seed, length=6)
    for model in models:
        receiver = model.cfg.moe_layers[-1]
        at = {
            by: router_logit_attrs(model, cached_run(model, batch, by), receiver=receiver, by=by)
            for by in GRANULARITIES
        }
        size = float(at["layer"].values.abs().max())

        def of(by: str, wanted: Callable[[str], bool]) -> Tensor:
            names = list(at[by].senders)  # noqa: B023
            rows = [i for i, name in enumerate(names) if wanted(name)]
            assert rows
            return at[by].values[rows].sum(dim=0)  # noqa: B023

        def close(one: Tensor, other: Tensor) -> None:
            torch.testing.assert_close(one, other, atol=1e-5 * size, rtol=1e-5)  # noqa: B023

        for layer in range(receiver + 1):
            for head in range(model.cfg.attention.n_heads):
                name = f"A{layer}H{head}"
                close(of("source", lambda n, p=name: n.startswith(f"{p}<-")), of("head", name.__eq__))
            close(
                of("head", lambda n, p=f"A{layer}": n.startswith((f"{p}H", f"{p}b"))),
                of("layer", f"A{layer}".__eq__),
            )
            if layer == receiver:
                continue
            close(of("neuron", lambda n, p=f"M{layer}": n.startswith(p)), of("layer", f"M{layer}".__eq__))
            close(of("expert", lambda n, p=f"M{layer}": n.startswith(p)), of("layer", f"M{layer}".__eq__))
            if layer in model.cfg.moe_layers:
                for name in [
                    *(f"M{layer}E{e}" for e in range(8)),
                    *([f"M{layer}S"] if model.cfg.shared else []),
                ]:
                    close(of("neuron", lambda n, p=name: n.startswith(f"{p}N")), of("expert", name.__eq__))


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, axis=st.sampled_from(["position", "offset"]), side=st.sampled_from(["left", "right"]))
def test_mean_scores_over_a_corpus_sum_to_wholes_too(
    models: list[HookedMoE], seed: int, axis: Any, side: str
) -> None:
    """The mean score is linear, so its means over documents of one length add up as scores do."""
    tokens, _ = prompts(seed=seed, batch=3, length=6)
    batch = tokens, torch.ones_like(tokens)
    batch[1][:, 0 if side == "left" else -1] = 0
    for model in models:
        got = routing_contributions(model, [batch], by=GRANULARITIES, source_axis=axis)
        for position in ("lead", "rest"):
            mean = {by: result.mean[position] for by, result in got.items()}
            size = np.nanmax(np.abs(mean["layer"]))

            def rows(by: str, prefix: str) -> np.ndarray:
                names = list(got[by].senders)  # noqa: B023
                return mean[by][[i for i, name in enumerate(names) if name.startswith(prefix)]].sum(axis=0)  # noqa: B023

            def close(one: np.ndarray, other: np.ndarray) -> None:
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * size)  # noqa: B023

            for layer in range(model.cfg.moe_layers[-1] + 1):
                for head in range(model.cfg.attention.n_heads):
                    close(rows("source", f"A{layer}H{head}<-"), rows("head", f"A{layer}H{head}"))
                close(rows("head", f"A{layer}"), rows("layer", f"A{layer}"))
                if layer < model.cfg.moe_layers[-1]:
                    close(rows("expert", f"M{layer}"), rows("layer", f"M{layer}"))
                    close(rows("neuron", f"M{layer}"), rows("layer", f"M{layer}"))
                    if layer in model.cfg.moe_layers:
                        for expert in range(8):
                            close(rows("neuron", f"M{layer}E{expert}N"), rows("expert", f"M{layer}E{expert}"))
            # And all of them to the mean logit: the same at every granularity.
            for by in GRANULARITIES:
                close(np.nansum(mean[by], axis=0), np.nansum(mean["layer"], axis=0))


# ---- measures ----


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, factor=st.floats(-8, 8).filter(lambda f: abs(f) > 1e-2), n_experts=st.integers(1, 70))
def test_variance_is_quadratic_and_the_others_linear(seed: int, factor: float, n_experts: int) -> None:
    scores, norms = draw(seed, 5, 2, n_experts), draw(seed + 1, 5, 2).abs()
    plain, scaled = measured(scores, norms), measured(factor * scores, abs(factor) * norms)
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled["variance"], factor**2 * plain["variance"], **close)
    torch.testing.assert_close(scaled["mean"], factor * plain["mean"], **close)
    torch.testing.assert_close(scaled["norm"], abs(factor) * plain["norm"], **close)
    aps, ans = ("aps", "ans") if factor > 0 else ("ans", "aps")  # a negative factor swaps them
    torch.testing.assert_close(scaled["aps"], factor * plain[aps], **close)
    torch.testing.assert_close(scaled["ans"], factor * plain[ans], **close)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, scale=st.floats(1e-2, 1e2))
def test_the_receiver_s_scale_comes_out_of_every_measure(seed: int, scale: float) -> None:
    """What `SCALE_POWERS` says: a measure of S / s is the measure of S over that power of s."""
    scores, norms = draw(seed, 4, 3, 16), draw(seed + 1, 4, 3).abs()
    before, after = score_measures(scores, norms), score_measures(scores / scale, norms / scale)
    for i, power in enumerate(SCALE_POWERS):
        torch.testing.assert_close(after[:, i] * scale**power, before[:, i], rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, shift=st.floats(-100, 100))
def test_a_score_that_all_experts_share_shifts_nothing(hooked: Load, seed: int, shift: float) -> None:
    scores = draw(seed, 5, 1, 8)
    constant = torch.full_like(scores, shift)
    alone, plain, shifted = measured(constant), measured(scores), measured(scores + constant)
    assert float(alone["variance"].abs().max()) <= (1e-6 * shift) ** 2
    torch.testing.assert_close(alone["mean"], constant[..., 0])
    torch.testing.assert_close(alone["aps"], constant[..., 0].clamp(min=0))
    torch.testing.assert_close(alone["ans"], constant[..., 0].clamp(max=0))
    torch.testing.assert_close(shifted["variance"], plain["variance"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shifted["mean"], plain["mean"] + shift, rtol=1e-4, atol=1e-4)
    exact, step = (scores * 8).round() / 8, torch.tensor(round(shift * 8) / 8)
    assert torch.equal(ranks(exact), ranks(exact - step))
    for variant in ("olmoe", "deepseek_v2_groups"):
        router = hooked(variant).cfg.router
        assert torch.equal(choice_of(exact, router).chosen, choice_of(exact - step, router).chosen)
        aarv, overlap, weight_change = rank_shift(exact, step.expand_as(exact), router)
        assert float(aarv.max()) == 0
        assert float(overlap.min()) == 1
        assert float(weight_change.max()) <= 1e-5


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, shift=st.floats(-50, 50))
def test_a_sender_that_all_experts_score_alike_has_no_variance(hooked: Load, seed: int, shift: float) -> None:
    """The same over a corpus: a vector that every readout row reads alike, written by an attention layer."""
    model = hooked("mixtral")
    receiver = model.cfg.moe_layers[-1]
    readout = router_readout(model, receiver).double()
    alike = torch.full((len(readout), 1), shift, dtype=torch.float64)
    written = torch.linalg.lstsq(readout, alike).solution[:, 0].float()
    with model.hooks([(f"blocks.{receiver}.hook_attn_out", lambda value, hook: 0 * value + written)]):
        got = routing_contributions(model, prompts(seed=seed)[0], receivers=[receiver], rank_shift=True)
    row, size = got.senders.index(f"A{receiver}"), max(abs(shift), 1e-3)
    for position in ("lead", "rest"):
        assert got.variance[position][row, 0] <= (1e-5 * size) ** 2 + 1e-12
        smaller = min(got.aps[position][row, 0], -got.ans[position][row, 0])
        assert 0 <= smaller <= 1e-5 * size
        assert got.weight_change[position][row, 0] <= 1e-4


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, n_experts=st.integers(1, 70), size=st.sampled_from([1e-4, 1.0, 1e4]))
def test_mean_is_aps_plus_ans_and_signs(seed: int, n_experts: int, size: float) -> None:
    got = measured(size * draw(seed, 6, 2, n_experts))
    torch.testing.assert_close(got["mean"], got["aps"] + got["ans"], rtol=1e-4, atol=1e-6 * size)
    assert (got["variance"] >= 0).all()
    assert (got["aps"] >= 0).all()
    assert (got["ans"] <= 0).all()


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_mean_is_aps_plus_ans_over_a_corpus(models: list[HookedMoE], seed: int) -> None:
    for model in models:
        for result in routing_contributions(model, [prompts("right", seed=seed)], by=GRANULARITIES).values():
            for read in (result.measure, result.when_active):
                aps, ans, mean, variance, norm = (read(m) for m in ("aps", "ans", "mean", "variance", "norm"))
                for position in ("lead", "rest"):
                    size = np.nanmax(aps[position])
                    np.testing.assert_allclose(
                        mean[position], aps[position] + ans[position], rtol=1e-4, atol=1e-6 * size
                    )
                    assert np.nanmin(variance[position]) >= 0
                    assert np.nanmin(norm[position]) >= 0
                    assert np.nanmin(aps[position]) >= 0
                    assert np.nanmax(ans[position]) <= 0


# ---- lengths and bounds ----


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n_experts=st.integers(2, 20), width=st.integers(1, 30), scale=st.floats(0.05, 20))
def test_a_variance_is_no_more_than_its_norm_allows(
    seed: int, n_experts: int, width: int, scale: float
) -> None:
    """Proposition 1 (iii): variance <= ||W diag(gamma)||_F^2 ||z||^2 / (N s^2), and <= ||W||_F^2 norm^2 / N."""
    router, gain, z = draw(seed, n_experts, width), draw(seed + 1, width), draw(seed + 2, 7, width)
    readout = router * gain
    scores = (z @ readout.T / scale)[:, None]
    norms = normalised_lengths(z, gain[None]) / scale
    got = measured(scores, norms)
    bound = readout.square().sum() * z.square().sum(-1) / (n_experts * scale**2)
    assert (got["variance"][:, 0] <= bound * (1 + 1e-5)).all()
    assert (
        got["variance"][:, 0] <= router.square().sum() * got["norm"][:, 0].square() / n_experts * (1 + 1e-5)
    ).all()
    centred = readout - readout.mean(dim=0)  # what all experts share adds nothing
    tighter = centred.square().sum() * z.square().sum(-1) / (n_experts * scale**2)
    assert (got["variance"][:, 0] <= tighter * (1 + 1e-4) + 1e-6 * bound).all()


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_over_a_corpus_no_variance_is_more_than_its_norm_allows(models: list[HookedMoE], seed: int) -> None:
    """At one token of one document: the mean is that token's."""
    for model in models:
        tokens, _ = prompts(seed=seed, batch=1, length=2)
        for result in routing_contributions(model, tokens, by=GRANULARITIES).values():
            for column, receiver in enumerate(model.cfg.moe_layers):
                router = model.blocks[receiver].mlp.router.weight.detach()
                most = float(router.square().sum()) / len(router)
                for position in ("lead", "rest"):
                    variance, norm = result.variance[position][:, column], result.norm[position][:, column]
                    there = ~np.isnan(variance)
                    assert (variance[there] <= most * norm[there] ** 2 * (1 + 1e-4) + 1e-12).all()


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_a_score_s_sign_is_an_angle_s(models: list[HookedMoE], seed: int) -> None:
    """Proposition 2: S_e = ||w_e|| ||gamma z / s|| cos(angle between them)."""
    batch = prompts(seed=seed, length=5)
    for model in models:
        receiver = model.cfg.moe_layers[-1]
        cache = cached_run(model, batch)
        attrs = router_logit_attrs(model, cache, receiver=receiver)
        router = model.blocks[receiver].mlp.router.weight.detach().double()
        gain = model.blocks[receiver].ln2.w.detach().double()
        scale = cache[f"blocks.{receiver}.ln2.hook_scale"].double()
        for row, group in enumerate(attrs.senders.groups):
            read = gain * cache[group.written_at].double() / scale
            cosine = torch.nn.functional.cosine_similarity(read[..., None, :], router, dim=-1)
            lengths = read.norm(dim=-1)[..., None] * router.norm(dim=-1)
            scores = attrs.values[row].double()
            assert (scores.abs() <= lengths * (1 + 1e-5)).all()
            torch.testing.assert_close(scores, lengths * cosine, rtol=1e-3, atol=1e-5)
            clear = cosine.abs() > 1e-4
            assert torch.equal(scores[clear].sign(), cosine[clear].sign())


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, n_heads=st.integers(1, 5))
def test_lengths_are_those_of_the_vectors(seed: int, n_heads: int) -> None:
    class Weights:
        W_O = draw(seed, n_heads, 6, 10)

    z, gains = draw(seed + 1, 4, n_heads, 6), draw(seed + 2, 3, 10)
    vectors = torch.einsum("thv,hvd->thd", z, Weights.W_O)
    expected = torch.stack([(gain * vectors).norm(dim=-1) for gain in gains], dim=-1)
    torch.testing.assert_close(head_lengths(Weights(), z, gains), expected)  # type: ignore[arg-type]
    torch.testing.assert_close(normalised_lengths(vectors, gains), expected)
    assert float(normalised_lengths(torch.zeros(2, 10), gains).max()) == 0


# ---- over a corpus, by editing what a sender writes ----


@settings(max_examples=10, deadline=None)
@given(
    factor=st.floats(-8, 8).filter(lambda f: abs(f) > 1e-2),
    seed=SEEDS,
    side=st.sampled_from(["left", "right"]),
)
def test_a_sender_times_a_factor(hooked: Load, factor: float, seed: int, side: str) -> None:
    """With the receiver's scale held: variance times f^2, the others times f; a negative f swaps APS and ANS."""
    model = hooked("mixtral")
    receiver = model.cfg.moe_layers[-1]
    batch = prompts(side, seed=seed)
    held = (f"blocks.{receiver}.ln2.hook_scale", lambda value, hook: torch.ones_like(value))
    edits = {
        "head": (f"blocks.{receiver}.attn.hook_z", f"A{receiver}H2"),
        "layer": (f"blocks.{receiver}.hook_attn_out", f"A{receiver}"),
        "expert": (f"blocks.{receiver - 1}.mlp.hook_expert_contrib", f"M{receiver - 1}E1"),
    }
    for by, (point, name) in edits.items():

        def values(*more: Any, by: str = by, name: str = name) -> np.ndarray:
            with model.hooks([held, *more]):
                got = routing_contributions(model, [batch], by=by, receivers=[receiver])
            row = got.senders.index(name)
            return np.array([got.measure(m)["rest"][row, 0] for m in MEASURES])

        variance, aps, ans, mean, norm = values()
        if factor < 0:
            aps, ans = ans, aps
        expected = [factor**2 * variance, factor * aps, factor * ans, factor * mean, abs(factor) * norm]
        got = values((point, lambda value, hook: factor * value))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
