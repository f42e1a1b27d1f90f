"""Population metrics: against lists of what every token did, and what must hold whatever the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.audit.census import census
from moe_lens.audit.census_summary import clustered_mean
from moe_lens.audit.function_fingerprint import function_fingerprint
from moe_lens.audit.metric_statistics import ClusteredMeans, add_spread, variance
from moe_lens.audit.metric_table import MetricTable
from moe_lens.audit.metrics import (
    PAPER_METRICS,
    Estimate,
    ExpertStatistics,
    expert_metrics,
    forget_metric,
    metric,
    metric_names,
)
from moe_lens.interventions.expert_reference import expert_reference
from moe_lens.routing.documents import Moments
from moe_lens.routing.load import LoadCounter
from tests.families import PAD, hf_model, prompts
from tests.reference_metrics import Table, metrics_of, reference_metrics, weights_of
from tests.routing_cases import corpus

Load = Callable[[str], Any]

# One of each family, and what differs in kind: dense layers, groups with a factor, renormalised weights, odd widths.
VARIANTS = (
    "olmoe",
    "olmoe_gqa_clip",
    "olmoe_bias_odd_width",
    "qwen2_moe",
    "qwen2_moe_no_bias",
    "deepseek_v2",
    "deepseek_v2_groups",
    "qwen3_moe",
    "mixtral",
)
WITHOUT_REFERENCE = {"random"}
OVER_ACTIVE = {
    "activation_norm",
    "mean_routing_weight",
    "router_weighted_activation_norm",
    "mean_squared_activation_norm",
    "gate_entropy",
}
OVER_TOKENS = {
    "utilization_rate",
    "mean_gap_norm",
    "total_activation_norm",
    "weighted_utilization",
    "soft_routing_count",
}


def same(table: MetricTable, values: Table, errors: Table, tolerance: float) -> None:
    """To a tolerance relative to the largest of a metric in a layer, NaN at the same places."""
    assert set(table.metrics) - WITHOUT_REFERENCE == set(values)
    for name in values:
        for which, expected in ((table.values, values), (table.standard_errors, errors)):
            for place, layer in enumerate(table.layers):
                actual = which[name][place]
                there = np.array([expected[name][layer, e] for e in range(table.n_experts)])
                np.testing.assert_array_equal(np.isnan(actual), np.isnan(there), f"{name} of layer {layer}")
                size = max(np.nanmax(np.abs(there), initial=0.0), 1e-3)
                worst = np.nanmax(np.abs(actual - there), initial=0.0)
                assert worst <= tolerance * size, f"{name} of layer {layer}: {actual}, not {there}"


def same_tables(one: MetricTable, other: MetricTable, tolerance: float) -> None:
    """To a tolerance relative to the largest of a metric, NaN at the same places."""
    assert (one.metrics, one.layers, one.n_tokens) == (other.metrics, other.layers, other.n_tokens)
    assert np.array_equal(one.counts, other.counts)
    for name in one.metrics:
        # Cosines are of size 1, however small their mean.
        size = 1.0 if name == "output_similarity" else np.nanmax(np.abs(one.values[name]))
        for which in ("values", "standard_errors"):
            actual, expected = getattr(one, which)[name], getattr(other, which)[name]
            np.testing.assert_allclose(
                actual, expected, rtol=0, atol=tolerance * size, err_msg=f"{which} {name}"
            )


@pytest.fixture
def registered() -> Iterator[Callable[..., Any]]:
    """`registered(name, formula, ...)`: a metric that is gone after the test."""
    names = []

    def add(name: str, formula: Callable[[ExpertStatistics], Any], **more: Any) -> None:
        metric(name, **more)(formula)
        names.append(name)

    yield add
    for name in names:
        if name in metric_names():
            forget_metric(name)


# ---- against the reference ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_every_metric_is_the_reference_s(hf: Load, model_of: Load, variant: str, padding: str) -> None:
    """Five documents in two batches, one of a single token."""
    batches = corpus(padding)
    table = expert_metrics(model_of(variant), batches)
    values, errors = reference_metrics(hf(variant), batches)
    same(table, values, errors, 2e-5)
    assert table.n_tokens == sum(int(mask.sum()) for _, mask in batches)
    assert table.n_documents == 5
    assert table.layers == tuple(weights_of(hf(variant)))


def test_bfloat16_is_accumulated_in_float64(checkpoint: Load) -> None:
    """Every number that the model has in bfloat16 goes into float64 sums: the metrics are those of its own cache."""
    batches = corpus("right")
    model = HookedMoE.from_pretrained(
        checkpoint("olmoe_bf16"), dtype=torch.bfloat16, verbose=False, device="cpu"
    )
    table = expert_metrics(model, batches)
    caches = []
    for tokens, mask in batches:
        with torch.no_grad():
            # Only of the MoE layers: whoever listens to the attention gets another kernel.
            _, cache = model.run_with_cache(
                tokens,
                attention_mask=mask,
                names_filter=lambda name: ".mlp.hook_" in name,
                return_cache_object=False,
            )
        caches.append(cache)
    theirs = hf_model(checkpoint("olmoe_bf16"), torch.bfloat16)
    weights = {
        layer: {name: matrix.double() for name, matrix in of.items()}
        for layer, of in weights_of(theirs).items()
    }
    same(table, *metrics_of(caches, [mask for _, mask in batches], weights), 1e-9)
    assert table.provenance["dtype"] == "bfloat16"


def test_bfloat16_is_near_float32(checkpoint: Load, hooked: Load) -> None:
    """A choice may fall otherwise here and there; the metrics are about the same."""
    batches = [prompts("right", seed=seed, batch=8, length=24) for seed in range(2)]
    model = HookedMoE.from_pretrained(
        checkpoint("olmoe_bf16"), dtype=torch.bfloat16, verbose=False, device="cpu"
    )
    half, whole = expert_metrics(model, batches), expert_metrics(hooked("olmoe_bf16"), batches)
    for name in (*OVER_ACTIVE, *OVER_TOKENS, "activation_std"):
        np.testing.assert_allclose(half.values[name], whole.values[name], rtol=0.1, atol=0.02, err_msg=name)


def test_neither_batch_size_nor_padding_matters(model_of: Load) -> None:
    """The same documents with padding on either side, one at a time, and all together."""
    model = model_of("qwen2_moe")
    left, right = (prompts(padding, batch=5, length=16) for padding in ("left", "right"))
    # The same tokens, moved to the other end.
    tokens, mask = right
    moved = left[0].clone()
    for row in range(5):
        moved[row][left[1][row].bool()] = tokens[row][mask[row].bool()]
    whole = expert_metrics(model, tokens, attention_mask=mask)
    for other in (
        expert_metrics(model, tokens, attention_mask=mask, batch_size=2),
        expert_metrics(model, moved, attention_mask=left[1]),
        expert_metrics(model, [row[real.bool()][None] for row, real in zip(tokens, mask, strict=True)]),
    ):
        same_tables(whole, other, 1e-6)
        assert other.provenance["fingerprint"] == whole.provenance["fingerprint"]


def test_more_padding_changes_nothing(model_of: Load) -> None:
    """Over 60% padding, as in the published batches."""
    model, (tokens, mask) = model_of("deepseek_v2"), prompts("right", batch=3, length=9)
    wide = torch.full((3, 30), PAD)
    wide[:, :9] = tokens
    wide_mask = torch.zeros_like(wide)
    wide_mask[:, :9] = mask
    same_tables(
        expert_metrics(model, tokens, attention_mask=mask),
        expert_metrics(model, wide, attention_mask=wide_mask),
        1e-6,
    )


# ---- what must hold ----


@pytest.mark.parametrize("variant", ["olmoe", "qwen2_moe_no_bias", "deepseek_v2_groups", "mixtral"])
def test_shares_and_sums(model_of: Load, variant: str) -> None:
    model = model_of(variant)
    table = expert_metrics(model, corpus())
    np.testing.assert_allclose(table.values["utilization_rate"].sum(axis=1), model.cfg.top_k)
    np.testing.assert_allclose(table.values["soft_routing_count"].sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(table.values["utilization_rate"], table.counts / table.n_tokens)
    rates = table.values["utilization_rate"]
    for name, conditional in (
        ("mean_gap_norm", "router_weighted_activation_norm"),
        ("total_activation_norm", "activation_norm"),
        ("weighted_utilization", "mean_routing_weight"),
    ):
        np.testing.assert_allclose(
            table.values[name], rates * np.nan_to_num(table.values[conditional]), rtol=1e-5
        )
    if model.cfg.router.renormalize:
        total = model.cfg.router.scaling_factor
        np.testing.assert_allclose(table.values["weighted_utilization"].sum(axis=1), total, rtol=1e-5)
    assert (table.values["routing_entropy"] <= 1e-12).all()
    for name in ("output_similarity", "random"):
        assert (np.abs(np.nan_to_num(table.values[name])) <= 1 + 1e-12).all()


@pytest.mark.parametrize("factor", [0.5, -3.0])
def test_a_larger_expert_has_larger_metrics(hooked: Load, factor: float) -> None:
    """W_down of one expert of the last layer, times a factor: outputs are scaled, choices and weights stay."""
    model, (tokens, mask) = copy.deepcopy(hooked("olmoe")), prompts("right", batch=4, length=12)
    layer, expert = model.cfg.moe_layers[-1], 3
    before = expert_metrics(model, tokens, attention_mask=mask, layers=layer)
    with torch.no_grad():
        model.blocks[layer].mlp.experts.W_down[expert] *= factor
    after = expert_metrics(model, tokens, attention_mask=mask, layers=layer)
    size = abs(factor)
    powers = {
        "activation_norm": 1,
        "activation_std": 1,
        "router_weighted_activation_norm": 1,
        "mean_gap_norm": 1,
        "total_activation_norm": 1,
        "max_activation": 1,
        "down_projection_norm": 1,
        "mean_squared_activation_norm": 2,
    }
    assert before.counts[0, expert] > 1
    for name in before.metrics:
        was, now = before.values[name][0], after.values[name][0]
        others = np.arange(model.cfg.n_experts) != expert
        if name != "output_similarity":
            np.testing.assert_allclose(now[others], was[others], rtol=1e-6, err_msg=name)
        if name in powers:
            np.testing.assert_allclose(
                now[expert], was[expert] * size ** powers[name], rtol=1e-5, err_msg=name
            )
        elif name == "output_similarity":
            np.testing.assert_allclose(now[expert], was[expert] * np.sign(factor), rtol=1e-5)
        elif name != "expert_weight_norm":
            np.testing.assert_allclose(now[expert], was[expert], rtol=1e-6, err_msg=name)
    assert before.provenance["weights"] != after.provenance["weights"]


def test_metrics_agree_with_what_else_measures_them(model_of: Load) -> None:
    """Load, mean outputs and the census's rows are the same quantities."""
    model, (tokens, mask) = model_of("qwen3_moe"), prompts("right", batch=3, length=10)
    table = expert_metrics(model, tokens, attention_mask=mask)
    counter = LoadCounter(model)
    with counter.listening(tokens, mask.bool()), torch.no_grad():
        model(tokens, attention_mask=mask)
    np.testing.assert_allclose(table.values["utilization_rate"], counter.result().shares)
    reference = expert_reference(model, tokens, attention_mask=mask)
    for place, layer in enumerate(table.layers):
        assert np.array_equal(table.counts[place], reference.count[layer].numpy())

    # The census leaves out each document's last token, so the metrics are of documents without it.
    rows = census(model, tokens, attention_mask=mask).to_pandas()
    shorter = mask.clone()
    for row in range(3):
        shorter[row, int(mask[row].nonzero().max())] = 0
    table = expert_metrics(model, tokens, attention_mask=shorter)
    for key, of in rows.groupby(["layer", "expert"]):
        layer, expert = np.array(key).tolist()
        place = table.layer_index(layer)
        assert table.counts[place, expert] == len(of)
        for name, column in (
            ("router_weighted_activation_norm", "gap_norm"),
            ("mean_routing_weight", "routing_weight"),
        ):
            ordered = of.sort_values("document", kind="stable")
            starts = np.unique(ordered["document"], return_index=True)[1]
            mean, error = clustered_mean(ordered[column].to_numpy(np.float64), starts)
            np.testing.assert_allclose(table.values[name][place, expert], mean, rtol=1e-5)
            np.testing.assert_allclose(
                table.standard_errors[name][place, expert], error, rtol=1e-3, atol=1e-7
            )


def test_an_expert_that_is_never_active(model_of: Load) -> None:
    """Two tokens: some experts are not chosen. Their means are NaN, their count 0, what is over all tokens 0."""
    table = expert_metrics(model_of("mixtral"), torch.tensor([[5, 9]]))
    never = table.counts == 0
    assert never.any()
    assert not never.all()
    for name in (*OVER_ACTIVE, "max_activation", "output_similarity", "activation_std"):
        assert np.isnan(table.values[name][never]).all(), name
    for name in ("utilization_rate", "mean_gap_norm", "total_activation_norm", "weighted_utilization"):
        assert (table.values[name][never] == 0).all(), name
    for name in (
        "soft_routing_count",
        "router_row_norm",
        "expert_weight_norm",
        "down_projection_norm",
        "random",
    ):
        assert np.isfinite(table.values[name]).all(), name
    # Active once: a mean, and no spread.
    once = table.counts == 1
    assert once.any()
    assert np.isnan(table.values["activation_std"][once]).all()
    # One document: no standard errors.
    assert all(np.isnan(errors).all() for errors in table.standard_errors.values())


def test_which_metrics_have_standard_errors(model_of: Load) -> None:
    table = expert_metrics(model_of("olmoe"), [prompts(seed=seed, batch=4, length=16) for seed in range(2)])
    assert (table.counts > 0).all()
    for name in table.metrics:
        has = np.isfinite(table.standard_errors[name])
        assert has.all() if name in OVER_ACTIVE | OVER_TOKENS else not has.any(), name
    assert {*OVER_ACTIVE, *OVER_TOKENS} <= set(table.metrics)


def test_random_is_drawn_by_seed_and_layer(model_of: Load) -> None:
    model, tokens = model_of("olmoe"), torch.tensor([[5, 9, 7]])
    first = expert_metrics(model, tokens, metrics="random")
    again = expert_metrics(model, tokens, metrics="random", layers=[2])
    other = expert_metrics(model, tokens, metrics="random", seed=1)
    assert np.array_equal(first.values["random"][2], again.values["random"][0])
    assert not np.isin(first.values["random"], other.values["random"]).any()
    assert len(np.unique(first.values["random"])) == first.values["random"].size


def test_layers_and_metrics_can_be_chosen(model_of: Load) -> None:
    model, batches = model_of("deepseek_v2"), corpus()
    whole = expert_metrics(model, batches)
    some = expert_metrics(model, batches, layers=2, metrics=["max_activation", "gate_entropy"])
    assert whole.metrics == metric_names()
    assert whole.metrics[:4] == PAPER_METRICS
    assert whole.layers == (1, 2)
    assert some.layers == (2,)
    assert some.metrics == ("max_activation", "gate_entropy")
    for name in some.metrics:
        assert np.array_equal(some.values[name][0], whole.values[name][whole.layer_index(2)])


def test_hooks_on_the_model_are_measured_and_said(model_of: Load) -> None:
    model, tokens = model_of("olmoe"), torch.tensor([[5, 9, 7, 8]])
    plain = expert_metrics(model, tokens)
    assert plain.provenance["edited"] == []
    point = "blocks.1.mlp.hook_expert_out"
    with model.hooks([(point, lambda value, hook: 2 * value)]):
        edited = expert_metrics(model, tokens, layers=1)
    assert edited.provenance["edited"] == [point]
    for name, factor in (("activation_norm", 2), ("mean_gap_norm", 2), ("mean_routing_weight", 1)):
        np.testing.assert_allclose(edited.values[name][0], factor * plain.values[name][1], rtol=1e-6)


def test_texts_are_documents(model_of: Load) -> None:
    model, texts = model_of("olmoe"), ["The router sends every token", "to the experts"]
    table = expert_metrics(model, texts)
    tokens, mask = model.tokenize(texts, prepend_bos=True)
    same_tables(table, expert_metrics(model, tokens, attention_mask=mask), 1e-6)
    assert table.provenance["corpus"].startswith("2 texts given by the caller")


# ---- the accumulators ----


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 4)), min_size=1, max_size=30),
    cut=st.integers(0, 5),
    offset=st.sampled_from([0.0, 1e7]),
)
def test_clustered_means_are_the_census_s(rows: list[tuple[float, int]], cut: int, offset: float) -> None:
    """In two lots of documents, with a mean that may be large beside the spread."""
    values, documents = np.array([value for value, _ in rows]) + offset, np.array([d for _, d in rows])
    means = ClusteredMeans(1, 1, torch.device("cpu"))
    for lot in (range(cut), range(cut, 5)):
        if len(lot):
            counts = torch.tensor([[float((documents == d).sum())] for d in lot], dtype=torch.float64)
            sums = torch.tensor([[values[documents == d].sum()] for d in lot], dtype=torch.float64)
            means.add(sums[None], counts)
    order = np.argsort(documents, kind="stable")
    starts = np.unique(documents[order], return_index=True)[1]
    mean, error = clustered_mean(values[order], starts)
    found, its_error = (float(part[0, 0]) for part in means.estimates())
    np.testing.assert_allclose(found, mean, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(its_error, error, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 2)), min_size=1, max_size=30),
    cut=st.integers(0, 30),
)
def test_spreads_are_numpy_s(rows: list[tuple[float, int]], cut: int) -> None:
    moments = Moments(1, 1, 3)
    for lot in (rows[:cut], rows[cut:]):
        values = torch.tensor([value for value, _ in lot], dtype=torch.float64) + 1e6
        experts = torch.tensor([expert for _, expert in lot], dtype=torch.long)
        add_spread(moments, values, experts, torch.bincount(experts, minlength=3).double())
    for expert in range(3):
        values = np.array([value for value, of in rows if of == expert]) + 1e6
        for ddof in (0, 1):
            found = float(variance(moments, ddof)[expert])
            if len(values) <= ddof:
                assert np.isnan(found)
            else:
                np.testing.assert_allclose(found, values.var(ddof=ddof), rtol=1e-6, atol=1e-6)


# ---- a metric of one's own ----


def test_a_user_s_metric_is_computed_with_the_others(model_of: Load, registered: Callable[..., Any]) -> None:
    def busy(statistics: ExpertStatistics) -> Any:
        """g_i squared, almost."""
        return statistics.over_tokens("routing_weight").value ** 2

    registered("busy", busy, source="a test")
    registered(
        "selected_mean",
        lambda statistics: statistics.when_active("probability"),
        higher_is_more_important=False,
    )
    table = expert_metrics(model_of("olmoe"), corpus())
    np.testing.assert_allclose(table.values["busy"], table.values["weighted_utilization"] ** 2)
    assert np.isnan(table.standard_errors["busy"]).all()
    assert np.isfinite(table.standard_errors["selected_mean"]).any()
    assert table.provenance["definitions"]["busy"] == "g_i squared, almost. Source: a test."
    assert table.provenance["definitions"]["selected_mean"] == "no description"
    assert table.provenance["functions"]["busy"] == function_fingerprint(busy)
    assert set(table.provenance["functions"]) == set(table.metrics)
    assert table.higher_is_more_important("busy")
    assert not table.higher_is_more_important("selected_mean")
    assert np.nanmin(table.values["selected_mean"]) > 0


def test_the_registry_s_refusals(registered: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="there is a metric 'activation_norm' already"):
        metric("activation_norm")(lambda statistics: None)
    for name in ("my metric", "", "layer", "count", "x_standard_error"):
        with pytest.raises(ValueError, match=r"identifier|another column"):
            metric(name)
    with pytest.raises(TypeError, match="a metric is a function"):
        metric("mine")(3)  # type: ignore[arg-type]
    registered("mine", lambda statistics: 1)
    with pytest.raises(ValueError, match="already"):
        metric("mine")
    registered("mine", lambda statistics: 2, replace=True)
    with pytest.raises(ValueError, match="no metric 'nothing'"):
        forget_metric("nothing")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda s: s.count[0], r"metric 'mine' has shape \[8\], and it must be \[layer, expert\] = \[3, 8\]"),
        (lambda s: 1.0, r"shape \[\]"),
        (lambda s: "many", "no array of numbers"),
        (
            lambda s: np.where(s.count > 0, np.nan, 0.0),
            r"metric 'mine' is nan for M0E\d, which is active at \d+ tokens",
        ),
        (lambda s: np.full(s.count.shape, np.inf), "is inf"),
        (lambda s: Estimate(s.count, np.zeros(2)), "'mine''s standard error has shape"),
        (
            lambda s: s.when_active("speed"),
            "there is no quantity 'speed'; there are selected, routing_weight",
        ),
        (lambda s: s.over_tokens("speed"), "there is no quantity 'speed'"),
    ],
)
def test_a_user_s_metric_that_is_wrong_raises(
    model_of: Load, registered: Callable[..., Any], formula: Any, message: str
) -> None:
    registered("mine", formula)
    with pytest.raises(ValueError, match=message):
        expert_metrics(model_of("olmoe"), corpus(), metrics="mine")


def test_a_user_s_metric_may_be_nan_where_never_active(
    model_of: Load, registered: Callable[..., Any]
) -> None:
    registered("mine", lambda s: torch.as_tensor(np.where(s.count > 0, 1.0, np.nan)))
    registered("spotty", lambda s: np.full(s.count.shape, np.nan), may_be_nan=True)
    table = expert_metrics(model_of("mixtral"), torch.tensor([[5, 9]]), metrics=["mine", "spotty"])
    assert np.array_equal(np.isnan(table.values["mine"]), table.counts == 0)
    assert (table.counts == 0).any()
    assert np.isnan(table.values["spotty"]).all()


# ---- errors ----


def test_errors_name_what_would_be_right(model_of: Load) -> None:
    model, tokens = model_of("deepseek_v2"), torch.tensor([[5, 9, 7]])
    with pytest.raises(ValueError, match="no metric 'norm'; there are utilization_rate, activation_norm"):
        expert_metrics(model, tokens, metrics=["norm"])
    for names in ([], ["random", "random"]):
        with pytest.raises(ValueError, match="one or more names, each once"):
            expert_metrics(model, tokens, metrics=names)
    with pytest.raises(ValueError, match=r"layer 0 is no MoE layer; .* has MoE layers 1, 2"):
        expert_metrics(model, tokens, layers=0)
    with pytest.raises(ValueError, match="no MoE layer is asked for"):
        expert_metrics(model, tokens, layers=[])
    with pytest.raises(ValueError, match="no batches"):
        expert_metrics(model, [])
    with pytest.raises(ValueError, match="seed"):
        expert_metrics(model, tokens, seed=-1)


@pytest.mark.parametrize(
    "point", ["hook_expert_out", "hook_expert_weights", "hook_routing_weights", "hook_expert_contrib"]
)
def test_what_is_not_finite_raises(model_of: Load, point: str) -> None:
    """At a real token; at padding it is nobody's business."""
    model, (tokens, mask) = model_of("olmoe"), prompts("right", batch=2, length=6)
    name = f"blocks.2.mlp.{point}"

    def spoil(row: int, column: int) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[row, column] = torch.nan
            return value

        return [(name, hook)]

    with (
        model.hooks(spoil(1, 2)),
        pytest.raises(ValueError, match=f"{name} holds a value that is not finite, at row 1, position 2"),
    ):
        expert_metrics(model, tokens, attention_mask=mask)
    assert torch.is_grad_enabled()
    with model.hooks(spoil(1, 5)):
        spoiled = expert_metrics(model, tokens, attention_mask=mask)
    same_tables(spoiled, expert_metrics(model, tokens, attention_mask=mask), 1e-9)
