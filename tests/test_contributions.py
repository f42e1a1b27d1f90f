"""Streaming measures against loops over tokens, senders and experts: every granularity, every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.routing.attribution import attribution_hooks, router_logit_attrs
from moe_lens.routing.contributions import contributions_of, routing_contributions
from moe_lens.routing.measures import MEASURES, RANK_MEASURES
from moe_lens.routing.senders import GRANULARITIES, ROUNDING
from moe_lens.routing.streaming import ContributionAccumulator
from tests.conftest import leftover_hooks
from tests.families import BOS, prompts
from tests.reference_routing import double
from tests.routing_cases import (
    VARIANTS,
    Slow,
    assert_close_results,
    assert_equals_the_slow_analysis,
    assert_same_results,
    cached_run,
    corpus,
)

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def slow(hf: Load) -> Callable[..., Slow]:
    """`slow(variant, padding)`: the reference's run of the corpus."""
    runs: dict[Any, Slow] = {}

    def run(variant: str, padding: str = "right", **settings: Any) -> Slow:
        key = (variant, padding, *settings.items())
        if key not in runs:
            runs[key] = Slow.of(hf(variant), corpus(padding, **settings))
        return runs[key]

    return run


def every(stride: int) -> Callable[[str], bool]:
    """Some of a granularity's neurons; all of everything else."""
    return lambda name: "N" not in name or int(name.rpartition("N")[2]) % stride == 0


# ---- against the slow reference ----


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_dense_loops(slow: Callable[..., Slow], model_of: Load, variant: str, by: str) -> None:
    model = model_of(variant)
    padding = ("left", "right")[(VARIANTS.index(variant) + GRANULARITIES.index(by)) % 2]
    expected = slow(variant, padding)
    got = routing_contributions(model, expected.batches, by=by)
    assert got.completeness_error <= 1e-5
    assert got.rounding_ratio is None
    assert got.measures == MEASURES
    assert got.by == by
    assert got.n_documents == {"lead": 5, "rest": 4}
    assert got.n_tokens["lead"] + got.n_tokens["rest"] == sum(int(m.sum()) for _, m in expected.batches)
    assert got.receivers == tuple(f"M{r}" for r in model.cfg.moe_layers)
    assert assert_equals_the_slow_analysis(got, expected, wanted=every(8)) > 0


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", ["olmoe_bias_odd_width", "qwen2_moe", "deepseek_v2", "deepseek_v2_bias"])
def test_sources_by_offset_equal_dense_loops(
    slow: Callable[..., Slow], model_of: Load, variant: str, padding: str
) -> None:
    expected = slow(variant, padding)
    got = routing_contributions(model_of(variant), expected.batches, by="source", source_axis="offset")
    assert got.completeness_error <= 1e-5
    assert "A0H0<-q-9" in got.senders
    assert "A0H0<-q-10" not in got.senders
    assert_equals_the_slow_analysis(got, expected, source_axis="offset")


def test_every_neuron_of_a_model(slow: Callable[..., Slow], model_of: Load) -> None:
    expected = slow("qwen2_moe_no_bias", "left")
    got = routing_contributions(model_of("qwen2_moe_no_bias"), expected.batches, by="neuron", receivers=[2])
    n_neurons = (8 * 32 + 48) + 96  # layer 1 is dense
    assert len(got.senders) == n_neurons + 4
    compared = assert_equals_the_slow_analysis(got, expected)
    assert compared == 4 * len(got.senders)


@pytest.mark.parametrize("experts", ["selected", [5, 0, 3]], ids=["selected", "listed"])
@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2_bias"])
def test_over_some_experts(
    slow: Callable[..., Slow], model_of: Load, variant: str, by: str, experts: Any
) -> None:
    padding = ("left", "right")[GRANULARITIES.index(by) % 2]
    expected = slow(variant, padding)
    got = routing_contributions(model_of(variant), expected.batches, by=by, experts=experts)
    assert got.completeness_error <= 1e-5
    assert got.provenance["experts"] == experts
    assert_equals_the_slow_analysis(got, expected, wanted=every(16), experts=experts)


@pytest.mark.parametrize("experts", ["all", "selected"])
@pytest.mark.parametrize("axis", ["position", "offset"])
def test_sources_with_everything_at_once(
    slow: Callable[..., Slow], model_of: Load, axis: Any, experts: Any
) -> None:
    expected = slow("qwen3_moe_dense_bias", "left")
    got = routing_contributions(
        model_of("qwen3_moe_dense_bias"),
        expected.batches,
        by="source",
        source_axis=axis,
        experts=experts,
        rank_shift=True,
        receivers=[2],
        max_positions=13,
    )
    assert got.measures == (*MEASURES, *RANK_MEASURES)
    assert_equals_the_slow_analysis(
        got, expected, source_axis=axis, experts=None if experts == "all" else experts
    )
    # No document is 12 tokens long: nothing is said of that position.
    row = got.senders.index("A1H2<-12" if axis == "position" else "A1H2<-q-12")
    for position in ("lead", "rest"):
        assert got.documents_with(position)[row] == 0
        assert np.isnan(got.variance[position][row]).all()


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2_groups"])
def test_rank_shift_equals_dense_loops(
    slow: Callable[..., Slow], model_of: Load, variant: str, by: str
) -> None:
    expected = slow(variant, "left")
    got = routing_contributions(model_of(variant), expected.batches, by=by, rank_shift=True, receivers=[1, 2])
    assert got.measures == (*MEASURES, *RANK_MEASURES)
    assert_equals_the_slow_analysis(got, expected, wanted=every(16), receivers=[2])
    for position in ("lead", "rest"):
        assert np.nanmin(got.aarv[position]) >= 0
        assert np.nanmax(got.overlap[position]) <= 1
        assert np.nanmin(got.overlap[position]) >= 0
        assert np.nanmin(got.weight_change[position]) >= 0
    plain = routing_contributions(model_of(variant), expected.batches, by=by, receivers=[1, 2])
    for measure in MEASURES:
        for position in ("lead", "rest"):
            np.testing.assert_allclose(
                got.measure(measure)[position], plain.measure(measure)[position], rtol=1e-4, atol=1e-7
            )


def test_an_expert_that_is_not_chosen_moves_nothing(model_of: Load) -> None:
    model = model_of("olmoe")
    tokens, _ = prompts(batch=1, length=2)
    got = routing_contributions(model, tokens, by="expert", rank_shift=True, receivers=[2])
    chosen = set(model.routing(tokens).query("layer == 0 and position == 0")["expert"])
    for expert in range(8):
        row = got.senders.index(f"M0E{expert}")
        if expert not in chosen:
            shares = [got.measure(m)["lead"][row, 0] for m in (*MEASURES, *RANK_MEASURES)]
            assert shares == [0, 0, 0, 0, 0, 0, 1, 0]
            assert np.isnan(got.when_active("overlap")["lead"][row, 0])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("by", "axis"), [*((by, "position") for by in GRANULARITIES), ("source", "offset")])
def test_without_bos(slow: Callable[..., Slow], model_of: Load, by: str, padding: str, axis: Any) -> None:
    """Documents of the first batch begin with BOS (one is nothing else); those of the second do not."""
    expected = slow("qwen2_moe", padding, bos_in_first=True)
    model = model_of("qwen2_moe")
    how = dict(by=by, source_axis=axis, receivers=[2])
    got = routing_contributions(model, expected.batches, bos_is_lead=False, **how)
    assert got.n_documents == {"lead": 4, "rest": 4}
    assert got.provenance["lead_token"] == f"the first token after BOS (token {BOS}), which is left out"
    assert_equals_the_slow_analysis(got, expected, wanted=every(16), source_axis=axis, skip_bos=(True, False))
    kept = routing_contributions(model, expected.batches, **how)
    assert kept.provenance["lead_token"] == "the first token of a document"
    assert_equals_the_slow_analysis(kept, expected, wanted=every(32), source_axis=axis)


# ---- half precision ----


@pytest.fixture(scope="module")
def half(checkpoint: Load) -> Callable[[str], HookedMoE]:
    models: dict[str, HookedMoE] = {}

    def load(variant: str) -> HookedMoE:
        if variant not in models:
            models[variant] = HookedMoE.from_pretrained(
                checkpoint(variant), dtype=torch.bfloat16, device="cpu", verbose=False
            )
        return models[variant]

    return load


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_closes_with_rounding_as_a_sender(
    half: Callable[[str], HookedMoE], model_of: Load, variant: str
) -> None:
    batches = corpus("right")
    got = routing_contributions(half(variant), batches, by=GRANULARITIES)
    expected = routing_contributions(model_of(variant), batches, by=GRANULARITIES)
    for by, result in got.items():
        assert result.completeness_error <= 1e-5
        assert result.rounding_ratio is not None
        assert 0 < result.rounding_ratio <= 1
        assert list(result.senders) == [*expected[by].senders, ROUNDING]
        rounding = result.variance["rest"][-1]
        assert np.isfinite(rounding).all()
        largest = np.nanmax(result.variance["rest"][:1], axis=0)
        assert (rounding < 1e-2 * largest).all()
        np.testing.assert_allclose(result.variance["rest"][0], expected[by].variance["rest"][0], rtol=0.1)
        active = result.documents_with("rest", when_active=True)
        assert active[-1] == 4


@pytest.mark.parametrize("experts", ["all", "selected", [1, 6]], ids=str)
@pytest.mark.parametrize("by", GRANULARITIES)
def test_half_precision_measures_what_attribution_says(
    half: Callable[[str], HookedMoE], by: str, experts: Any
) -> None:
    """Rounding included: every sender's mean over a document is that of its dense scores."""
    model, batch = half("qwen2_moe"), prompts("right", batch=1, length=6)
    got = routing_contributions(
        model, [batch], by=by, experts=experts, rank_shift=not isinstance(experts, list)
    )
    cache = cached_run(model, batch, by)
    n_real = int(batch[1].sum())
    for column, receiver in enumerate(model.cfg.moe_layers):
        attrs = router_logit_attrs(model, cache, receiver=receiver, by=by)
        scores = double(attrs.values)[:, 0, 1:n_real]
        if experts == "selected":
            with torch.no_grad():
                _, chosen = model.run_with_cache(
                    batch[0],
                    attention_mask=batch[1],
                    names_filter=f"blocks.{receiver}.mlp.hook_expert_indices",
                )
            index = chosen[f"blocks.{receiver}.mlp.hook_expert_indices"][0, 1:n_real].numpy()
            scores = np.take_along_axis(scores, index[None].repeat(len(scores), axis=0), axis=-1)
        elif isinstance(experts, list):
            scores = scores[..., experts]
        expected = {
            "variance": scores.var(axis=-1),
            "aps": scores.clip(min=0).mean(axis=-1),
            "ans": scores.clip(max=0).mean(axis=-1),
            "mean": scores.mean(axis=-1),
        }
        present = {name: place for place, name in enumerate(attrs.senders)}
        for measure, values in expected.items():
            size = np.abs(values).max()
            means = got.measure(measure)["rest"][:, column]
            for row, name in enumerate(got.senders):
                # A document shorter than the batch is wide has no such sources.
                if name in present and not np.isnan(means[row]):
                    np.testing.assert_allclose(
                        means[row], values[present[name]].mean(), rtol=1e-3, atol=1e-5 * size, err_msg=name
                    )
            assert not np.isnan(means[-1])


# ---- what must not matter ----


@pytest.mark.parametrize("by", GRANULARITIES)
@pytest.mark.parametrize("variant", ["qwen2_moe_no_bias", "deepseek_v2_bias"])
def test_batching_and_padding_side_do_not_matter(model_of: Load, variant: str, by: str) -> None:
    model = model_of(variant)
    tokens, _ = prompts(batch=4, length=10)
    lengths = [10, 6, 1, 3]
    documents = [row[:n] for row, n in zip(tokens, lengths, strict=True)]

    def padded(rows: list[Tensor], side: str, width: int) -> tuple[Tensor, Tensor]:
        out, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            if side == "both":
                place = slice(1, 1 + len(row))
            out[i, place], mask[i, place] = row, 1
        return out, mask.long()

    how = dict(by=by, max_positions=10 if by == "source" else None)
    alone = routing_contributions(model, [(row[None], None) for row in documents], **how)
    for batches in (
        [padded(documents, "right", 10)],
        [padded(documents[:1], "right", 10), padded(documents[1:], "right", 14)],
    ):
        assert_close_results(routing_contributions(model, batches, **how), alone, rtol=1e-4, atol=1e-5)
    # Positions are counted from the left edge, so here the scores differ; which tokens count does not.
    for side in ("left", "both"):
        other = routing_contributions(model, [padded(documents, side, 12)], **how)
        assert other.n_tokens == alone.n_tokens
        for position in ("lead", "rest"):
            np.testing.assert_array_equal(other.documents_with(position), alone.documents_with(position))
        assert np.isfinite(other.variance["rest"]).sum() == np.isfinite(alone.variance["rest"]).sum()
        np.testing.assert_allclose(other.variance["rest"][0], alone.variance["rest"][0], rtol=0.5)


@pytest.mark.parametrize("axis", ["position", "offset"])
def test_several_granularities_in_one_pass_are_those_one_by_one(model_of: Load, axis: Any) -> None:
    model, batches = model_of("deepseek_v2"), corpus("left")
    how = dict(source_axis=axis, max_positions=11)
    together = routing_contributions(model, batches, by=GRANULARITIES, **how)
    assert list(together) == list(GRANULARITIES)
    # Sources listen to the pattern, for which attention is written out: so that it is for the others too.
    patterns = [(f"blocks.{layer}.attn.hook_pattern", lambda value, hook: None) for layer in range(3)]
    for by, result in together.items():
        with model.hooks(patterns):
            assert_same_results(result, routing_contributions(model, batches, by=by, **how))
        alone = routing_contributions(model, batches, by=by, **how)
        assert_close_results(result, alone, rtol=1e-4, atol=1e-5)
    backwards = routing_contributions(model, batches, by=GRANULARITIES[::-1], **how)
    assert list(backwards) == list(GRANULARITIES[::-1])
    for by, result in together.items():
        assert_same_results(result, backwards[by])


@pytest.mark.parametrize("by", GRANULARITIES)
def test_some_receivers_only(model_of: Load, by: str) -> None:
    model, batches = model_of("olmoe"), corpus()
    everything = routing_contributions(model, batches, by=by)
    for receivers in ([1], [0, 2], [2]):
        some = routing_contributions(model, batches, by=by, receivers=receivers)
        assert some.receivers == tuple(f"M{r}" for r in receivers)
        kept = [everything.senders.index(name) for name in some.senders]
        assert kept == list(range(len(kept)))  # those that come after the last receiver are not there
        for measure in MEASURES:
            for position in ("lead", "rest"):
                np.testing.assert_allclose(
                    some.measure(measure)[position],
                    everything.measure(measure)[position][kept][:, receivers],
                    rtol=1e-5,
                    atol=1e-8,
                )
    assert list(routing_contributions(model, batches, receivers=[1]).senders) == ["embed", "A0", "M0", "A1"]


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(experts="selected"),
        dict(experts=[1, 2]),
        dict(rank_shift=True),
        dict(source_axis="offset"),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_padding_may_hold_anything(
    model_of: Load, half: Callable[[str], HookedMoE], how: dict[str, Any], precision: str
) -> None:
    """Values at padded positions, finite or not, are read by nobody.

    The accumulator alone sees them: the model's own attention would not bear 0 times infinity.
    """
    model = model_of("qwen2_moe_no_bias") if precision == "float32" else half("qwen2_moe_no_bias")
    tokens, mask = prompts("right")
    padded, kept = mask == 0, {}

    def spoil(value: Tensor, hook: Any) -> Tensor | None:
        kept[hook.name] = value
        if not value.is_floating_point():
            return None
        if hook.name.endswith("hook_pattern"):
            where = padded[:, None, :, None] | padded[:, None, None, :]
        else:
            where = padded.view(*padded.shape, *[1] * (value.ndim - 2))
        return value.masked_fill(where, torch.inf)

    def restore(value: Tensor, hook: Any) -> Tensor:
        return kept[hook.name]

    def measured(spoilt: bool) -> dict[str, Any]:
        accumulator = ContributionAccumulator(model, by=GRANULARITIES, max_positions=9, **how)
        names = {name for by in GRANULARITIES for name in attribution_hooks(model, [0, 2], by=by)}
        if precision == "bfloat16":  # what a source's stream is made of is checked by the test below
            names = {name for name in names if not name.endswith(("hook_v", "hook_pattern"))}
        before, after = ([(name, edit) for name in names] if spoilt else [] for edit in (spoil, restore))
        with torch.no_grad(), model.hooks(before), accumulator.listening(tokens, mask), model.hooks(after):
            model(tokens, attention_mask=mask)
        return contributions_of(accumulator)

    clean, spoilt = measured(False), measured(True)
    assert len(kept) > 20
    for by in GRANULARITIES:
        assert_same_results(clean[by], spoilt[by])


def test_a_rounding_that_is_not_finite_raises(half: Callable[[str], HookedMoE]) -> None:
    """The scores are finite, and the stream that rounding is taken from is not: no number may come of it."""
    model = half("olmoe")
    tokens, mask = prompts("right")
    kept = {}

    def spoil(value: Tensor, hook: Any) -> Tensor:
        kept[hook.name] = value
        return value.masked_fill((mask == 0)[:, :, None, None], torch.inf)

    point = "blocks.0.attn.hook_v"
    accumulator = ContributionAccumulator(model, by="source", max_positions=9)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="not finite; nothing of it was added"),
        model.hooks([(point, spoil)]),
        accumulator.listening(tokens, mask),
        model.hooks([(point, lambda value, hook: kept[hook.name])]),
    ):
        model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="no batches"):
        contributions_of(accumulator)


def test_padding_of_the_model_may_hold_anything(model_of: Load) -> None:
    model, batch = model_of("mixtral"), prompts("right")

    def spoil(value: Tensor, hook: Any) -> Tensor:
        return value.masked_fill(batch[1][:, :, None] == 0, torch.inf)

    clean = routing_contributions(model, [batch], by=GRANULARITIES)
    with model.hooks([("blocks.1.hook_attn_out", spoil)]):  # the last layer
        spoilt = routing_contributions(model, [batch], by=GRANULARITIES)
    for by in ("layer", "expert", "neuron"):
        assert_same_results(clean[by], spoilt[by])


def test_caching_in_the_same_pass_and_nothing_left_behind(model_of: Load) -> None:
    model = model_of("mixtral")
    tokens, _ = prompts()
    accumulator = ContributionAccumulator(model, by=GRANULARITIES, max_positions=9)
    with torch.no_grad(), accumulator.listening(tokens, None):
        _, cache = model.run_with_cache(tokens, names_filter="blocks.1.mlp.hook_router_logits")
    assert "blocks.1.mlp.hook_router_logits" in cache
    direct = routing_contributions(model, [(tokens, None)], by=GRANULARITIES)
    for by, result in contributions_of(accumulator).items():
        assert_same_results(result, direct[by])
    assert leftover_hooks(model) == []
    assert not any(point.is_listened_to for point in model.hook_dict.values())


def test_a_caller_s_hooks_stay_and_are_seen(model_of: Load) -> None:
    model, (tokens, _) = model_of("olmoe"), prompts()
    with model.hooks([("blocks.0.mlp.hook_expert_contrib", lambda value, hook: 2 * value)]):
        edited = routing_contributions(model, tokens, by="expert")
        assert len(model.hook_dict["blocks.0.mlp.hook_expert_contrib"].fwd_hooks) == 1
    plain = routing_contributions(model, tokens, by="expert")
    assert edited.completeness_error <= 1e-5
    row = plain.senders.slice_of("M0")
    ratio = np.nanmean(edited.variance["rest"][row, 1] / plain.variance["rest"][row, 1])
    assert 1.2 < ratio <= 4  # the stream's scale grows with it


def test_gradients_are_not_kept(model_of: Load) -> None:
    model, (tokens, _) = model_of("olmoe"), prompts()
    accumulator = ContributionAccumulator(model, by=GRANULARITIES, max_positions=9)
    with accumulator.listening(tokens, None):  # a forward pass with gradients
        assert model(tokens).requires_grad
    result = contributions_of(accumulator)
    for tally in result.values():
        assert not any(m.mean.requires_grad for groups in tally.moments.values() for m in groups)
    direct = routing_contributions(model, tokens, by="layer")
    np.testing.assert_allclose(result["layer"].variance["rest"], direct.variance["rest"], rtol=1e-6)


# ---- the check can fail ----


@pytest.mark.parametrize("by", GRANULARITIES)
def test_the_completeness_error_can_fail(model_of: Load, half: Callable[[str], HookedMoE], by: str) -> None:
    for model in (model_of("olmoe"), half("olmoe")):
        stream = model.hook_dict["blocks.1.hook_resid_mid"]
        true_stream = stream.forward
        stream.forward = lambda value, true=true_stream: true(value) + 0.5
        try:
            # In half precision the bound on what heads round is wide, and not exceeded many times here.
            if model.cfg.dtype == torch.float32 or by not in ("head", "source"):
                with pytest.raises(
                    ValueError, match=rf"by {by} are not what the routers read.*allow_incomplete"
                ):
                    routing_contributions(model, corpus(), by=by)
            got = routing_contributions(model, corpus(), by=by, allow_incomplete=True)
        finally:
            del stream.forward
        assert not got.closes
        if model.cfg.dtype == torch.float32:
            assert got.completeness_error > 1e-3
        else:
            assert got.completeness_error <= 1e-5
            assert got.rounding_ratio is not None
            assert got.rounding_ratio > 1
        again = routing_contributions(model, corpus(), by=by)
        assert again.closes
        assert again.completeness_error <= 1e-5


@pytest.mark.parametrize(
    ("by", "hook"),
    [
        ("head", "blocks.0.attn.hook_z"),
        ("source", "blocks.0.attn.hook_v"),
        ("expert", "blocks.0.mlp.hook_expert_contrib"),
        ("expert", "blocks.0.mlp.hook_shared_out"),
        ("neuron", "blocks.0.mlp.hook_expert_post"),
        ("neuron", "blocks.0.mlp.hook_shared_post"),
    ],
)
def test_parts_that_are_not_what_was_written_are_seen(model_of: Load, by: str, hook: str) -> None:
    """What a component writes is edited behind its parts: they no longer sum to it."""
    model = model_of("qwen2_moe")
    layer_out = "blocks.0.hook_attn_out" if ".attn." in hook else "blocks.0.hook_mlp_out"
    with model.hooks([(layer_out, lambda value, hook: 1.01 * value)]):
        with pytest.raises(ValueError, match="are not what the routers read"):
            routing_contributions(model, corpus(), by=by)
        got = routing_contributions(model, corpus(), by=by, allow_incomplete=True)
        assert got.completeness_error > 1e-4
        assert got.provenance["edited"] == [layer_out]
        assert routing_contributions(model, corpus(), by="layer").completeness_error <= 1e-5
    with model.hooks([(hook, lambda value, hook: 1.01 * value)]):
        assert routing_contributions(model, corpus(), by=by).completeness_error <= 1e-5
