"""Streaming variance, APS and ANS against loops over tokens and experts; expert load; the mean over documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing.contributions import MEASURES, ContributionAccumulator, routing_contributions
from moe_lens.routing.documents import DocumentMean
from moe_lens.routing.load import LoadCounter
from moe_lens.routing.senders import ROUNDING
from tests.families import prompts
from tests.reference import reference_run
from tests.reference_routing import dense_scores, document_means

VARIANTS = ("olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe_dense_bias", "mixtral")


def load(checkpoint: Callable[[str], Path], variant: str, dtype: torch.dtype = torch.float32) -> HookedMoE:
    return HookedMoE.from_pretrained(checkpoint(variant), dtype=dtype, verbose=False)


def corpus(padding: str) -> list[tuple[Tensor, Tensor]]:
    """Five documents in two batches of unlike lengths; one document is a single token."""
    first, first_mask = prompts(padding, batch=3, length=8)
    second, second_mask = prompts(padding, seed=1, batch=2, length=11)
    first_mask[2] = 0
    first_mask[2, 0 if padding == "right" else -1] = 1
    return [(first, first_mask), (second, second_mask)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_dense_loops(
    checkpoint: Callable[[str], Path], hf: Callable[[str], Any], variant: str, padding: str
) -> None:
    model, batches = load(checkpoint, variant), corpus(padding)
    got = routing_contributions(model, batches)
    assert got.completeness_error <= 1e-5
    assert got.rounding_ratio is None
    assert got.n_documents == {"lead": 5, "rest": 4}
    assert got.n_tokens["lead"] + got.n_tokens["rest"] == sum(int(mask.sum()) for _, mask in batches)

    with torch.no_grad():
        runs = [reference_run(hf(variant), tokens, mask)[1] for tokens, mask in batches]
    for column, receiver in enumerate(model.cfg.moe_layers):
        assert got.receivers[column] == f"M{receiver}"
        scores = [dense_scores(hf(variant), values, receiver) for values in runs]
        for row, sender in enumerate(got.senders):
            for position in ("lead", "rest"):
                cells = [got.measure(m)[position][row, column] for m in MEASURES]
                errors = [got.standard_errors[m][position][row, column] for m in MEASURES]
                if sender not in scores[0]:
                    assert np.isnan([*cells, *errors]).all(), (sender, receiver)
                    continue
                documents = np.concatenate(
                    [
                        document_means(s[sender], mask, position)
                        for s, (_, mask) in zip(scores, batches, strict=True)
                    ]
                )
                np.testing.assert_allclose(cells, documents.mean(axis=0), rtol=2e-4, atol=1e-6)
                expected_errors = documents.std(axis=0, ddof=1) / np.sqrt(len(documents))
                np.testing.assert_allclose(errors, expected_errors, rtol=1e-3, atol=1e-6)


def test_batching_and_padding_side_do_not_matter(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint, "qwen3_moe")
    tokens, _ = prompts(batch=4, length=10)
    mask = torch.ones_like(tokens)
    mask[1, 6:], mask[3, 3:] = 0, 0
    together = routing_contributions(model, [(tokens, mask)])
    alone = [(row[real.bool()][None], None) for row, real in zip(tokens, mask, strict=True)]
    apart = routing_contributions(model, alone)
    for measure in MEASURES:
        for position in ("lead", "rest"):
            np.testing.assert_allclose(
                together.measure(measure)[position], apart.measure(measure)[position], rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_closes_with_rounding_as_a_sender(
    checkpoint: Callable[[str], Path], variant: str
) -> None:
    half, full = load(checkpoint, variant, torch.bfloat16), load(checkpoint, variant)
    batches = corpus("right")
    got, expected = routing_contributions(half, batches), routing_contributions(full, batches)
    assert got.completeness_error <= 1e-5
    assert got.rounding_ratio is not None
    assert got.rounding_ratio <= 1
    assert got.senders == (*expected.senders, ROUNDING)
    rounding = got.variance["rest"][-1]
    assert np.isfinite(rounding).all()
    assert (rounding < 1e-3 * np.nanmax(got.variance["rest"], axis=0)).all()
    np.testing.assert_allclose(got.variance["rest"][0], expected.variance["rest"][0], rtol=0.1)


def test_some_receivers_only(checkpoint: Callable[[str], Path]) -> None:
    model, batches = load(checkpoint, "olmoe"), corpus("right")
    everything = routing_contributions(model, batches)
    some = routing_contributions(model, batches, receivers=[1])
    assert some.receivers == ("M1",)
    assert some.senders == ("embed", "A0", "M0", "A1")
    np.testing.assert_allclose(some.variance["rest"][:, 0], everything.variance["rest"][:4, 1], rtol=1e-6)


def test_the_completeness_error_can_fail(checkpoint: Callable[[str], Path]) -> None:
    """A sender that writes more than its hook point shows is seen."""
    model = load(checkpoint, "olmoe")
    written, stream = (model.hook_dict[f"blocks.1.{point}"] for point in ("hook_mlp_out", "hook_resid_mid"))
    true_forward = written.forward
    written.forward = lambda value: 1.001 * true_forward(value)  # type: ignore[method-assign]
    hooked = routing_contributions(model, corpus("right"))
    assert hooked.completeness_error <= 1e-5  # what the hook point hands on is what it showed
    written.forward = true_forward  # type: ignore[method-assign]

    true_stream = stream.forward
    stream.forward = lambda value: true_stream(value) + 0.01  # type: ignore[method-assign]
    assert routing_contributions(model, corpus("right")).completeness_error > 1e-4


# ---- properties ----


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Path]) -> HookedMoE:
    return load(checkpoint, "mixtral")


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_a_score_that_all_experts_share_has_no_variance(tiny: HookedMoE, shift: float, seed: int) -> None:
    """A vector that every readout row scores alike: it promotes (or inhibits) all experts, and favours none."""
    receiver = tiny.cfg.moe_layers[-1]
    readout = ContributionAccumulator(tiny)._readouts[-1].double()
    alike = torch.linalg.lstsq(readout, torch.full((len(readout), 1), shift, dtype=torch.float64)).solution
    written = alike[:, 0].float()
    tokens, _ = prompts(seed=seed)
    with tiny.hooks([(f"blocks.{receiver}.hook_attn_out", lambda value, hook: 0 * value + written)]):
        got = routing_contributions(tiny, [(tokens, None)], receivers=[receiver])
    row = got.senders.index(f"A{receiver}")
    size = max(abs(shift), 1e-3)
    for position in ("lead", "rest"):
        assert got.variance[position][row, 0] <= (1e-5 * size) ** 2 + 1e-12
        positive, negative = got.aps[position][row, 0], got.ans[position][row, 0]
        assert (positive >= 0 and abs(negative) <= 1e-5 * size) or (
            negative <= 0 and abs(positive) <= 1e-5 * size
        )


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(-8, 8).filter(lambda f: abs(f) > 1e-2), seed=st.integers(0, 1000))
def test_variance_is_quadratic_and_scores_are_linear(tiny: HookedMoE, factor: float, seed: int) -> None:
    """A sender times f, with the receiver's scale held: variance times f^2; a negative f swaps APS and ANS."""
    receiver = tiny.cfg.moe_layers[-1]
    tokens, _ = prompts(seed=seed)
    scale = (f"blocks.{receiver}.ln2.hook_scale", lambda value, hook: torch.ones_like(value))
    sender = (f"blocks.{receiver}.hook_attn_out", lambda value, hook: factor * value)

    def measured(hooks: list[Any]) -> list[float]:
        with tiny.hooks(hooks):
            got = routing_contributions(tiny, [(tokens, None)], receivers=[receiver])
        row = got.senders.index(f"A{receiver}")
        return [got.measure(m)["rest"][row, 0] for m in MEASURES]

    variance, aps, ans = measured([scale])
    scaled_variance, scaled_aps, scaled_ans = measured([scale, sender])
    if factor < 0:
        aps, ans = ans, aps
    np.testing.assert_allclose(scaled_variance, factor**2 * variance, rtol=1e-4)
    np.testing.assert_allclose([scaled_aps, scaled_ans], [factor * aps, factor * ans], rtol=1e-4, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40),
    cut=st.integers(0, 40),
    offset=st.just(1e8),
)
def test_document_mean_is_numpy_s(values: list[float], cut: int, offset: float) -> None:
    mean, whole = DocumentMean((1,)), np.array(values)[:, None] + offset
    mean.add(whole[:cut])
    mean.add(whole[cut:])
    assert mean.count == len(values)
    np.testing.assert_allclose(mean.mean, whole.mean(axis=0), rtol=1e-12)
    expected = whole.std(axis=0, ddof=1) / np.sqrt(len(values))
    np.testing.assert_allclose(mean.standard_error, expected, rtol=1e-6, atol=1e-6)


def test_one_document_has_no_standard_error(tiny: HookedMoE) -> None:
    got = routing_contributions(tiny, [(prompts(batch=1)[0], None)])
    assert np.isfinite(got.variance["rest"][0]).all()
    assert np.isnan(got.standard_errors["variance"]["rest"]).all()


# ---- the frame, other listeners, errors ----


def test_frame_holds_every_cell_that_has_a_value(tiny: HookedMoE) -> None:
    got = routing_contributions(tiny, corpus("right"))
    frame = got.to_frame()
    assert len(frame) == 2 * int((~np.isnan(got.variance["rest"])).sum())
    row = frame.query("position == 'rest' and sender == 'M0' and receiver == 'M1'")
    sender, receiver = got.senders.index("M0"), got.receivers.index("M1")
    assert row["aps"].tolist() == [got.aps["rest"][sender, receiver]]
    assert row["ans_standard_error"].tolist() == [got.standard_errors["ans"]["rest"][sender, receiver]]
    with pytest.raises(ValueError, match="the measures are variance, aps, ans"):
        got.measure("norm")


def test_caching_in_the_same_pass_and_nothing_left_behind(tiny: HookedMoE) -> None:
    tokens, _ = prompts()
    accumulator = ContributionAccumulator(tiny)
    with torch.no_grad(), accumulator.listening(tokens, None):
        _, cache = tiny.run_with_cache(tokens, names_filter="blocks.1.mlp.hook_router_logits")
    assert "blocks.1.mlp.hook_router_logits" in cache
    direct = routing_contributions(tiny, [(tokens, None)])
    np.testing.assert_array_equal(accumulator.result().variance["rest"], direct.variance["rest"])
    assert not any(point.is_listened_to for point in tiny.hook_dict.values())


def test_clear_errors(checkpoint: Callable[[str], Path], tiny: HookedMoE) -> None:
    tokens, _ = prompts()
    with pytest.raises(ValueError, match="receiver 0 is no MoE layer"):
        routing_contributions(load(checkpoint, "deepseek_v2"), [(tokens, None)], receivers=[0, 1])
    with pytest.raises(ValueError, match="rising order"):
        routing_contributions(tiny, [(tokens, None)], receivers=[1, 0])
    with pytest.raises(ValueError, match="available: 'layer'"):
        routing_contributions(tiny, [(tokens, None)], by="head")
    with pytest.raises(ValueError, match="no batches"):
        routing_contributions(tiny, [])
    with pytest.raises(ValueError, match="one document a row"):
        routing_contributions(tiny, [(tokens[0], None)])

    accumulator = ContributionAccumulator(tiny)
    with pytest.raises(RuntimeError, match="one whole forward pass"), accumulator.listening(tokens, None):
        pass
    with (
        pytest.raises(ValueError, match="not finite"),
        tiny.hooks([("blocks.0.hook_mlp_out", lambda value, hook: value * float("nan"))]),
    ):
        routing_contributions(tiny, [(tokens, None)])


def test_padding_may_hold_anything(tiny: HookedMoE) -> None:
    """Values at padded positions, finite or not, are read by nobody."""
    tokens, mask = prompts("right")
    clean = routing_contributions(tiny, [(tokens, mask)])

    def spoil(value: Tensor, hook: Any) -> Tensor:
        return value.masked_fill(mask[:, :, None] == 0, float("inf"))

    with tiny.hooks([("blocks.1.hook_attn_out", spoil)]):
        spoilt = routing_contributions(tiny, [(tokens, mask)])
    np.testing.assert_array_equal(clean.variance["rest"], spoilt.variance["rest"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_counts_real_tokens(checkpoint: Callable[[str], Path], variant: str) -> None:
    model = load(checkpoint, variant)
    counter = LoadCounter(model)
    counts = np.zeros((len(model.cfg.moe_layers), model.cfg.n_experts))
    for tokens, mask in corpus("right"):
        with counter.listening(tokens, mask):
            model(tokens, attention_mask=mask, return_type=None)
        table = model.routing(tokens, attention_mask=mask)
        for layer, expert in zip(table["layer"], table["expert"], strict=True):
            counts[model.cfg.moe_layers.index(layer), expert] += 1
    load_ = counter.result()
    np.testing.assert_allclose(load_.shares, counts / load_.n_tokens)
    np.testing.assert_allclose(load_.shares.sum(axis=1), model.cfg.top_k)
    assert load_.uniform == model.cfg.top_k / model.cfg.n_experts
    frame = load_.to_frame()
    assert float(frame["share"].to_numpy().sum()) == pytest.approx(
        model.cfg.top_k * len(model.cfg.moe_layers)
    )


def test_load_clear_errors(tiny: HookedMoE) -> None:
    with pytest.raises(ValueError, match="no tokens were counted"):
        LoadCounter(tiny).result()
    with (
        pytest.raises(RuntimeError, match="whole forward pass"),
        LoadCounter(tiny).listening(prompts()[0], None),
    ):
        pass
