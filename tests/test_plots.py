"""Figures show the numbers of their results, leave blank what has no value, and show every label as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from scipy.stats import spearmanr

from moe_lens import plots
from moe_lens.plots import style, values
from moe_lens.plots.labels import label_points
from moe_lens.plots.stripes import MOST_SENDERS
from moe_lens.plots.tokens import MOST_CATEGORIES, principal_components
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.measures import MEASURES, RANK_MEASURES
from moe_lens.routing.result import RoutingContributions
from tests.families import prompts

EVIL = "<b>a</b><br>&lt;script&gt;<a href='x'>\n"
SHOWN = "&lt;b&gt;a&lt;/b&gt;&lt;br&gt;&amp;lt;script&amp;gt;&lt;a href='x'&gt;\\n"

Results = dict[str, RoutingContributions]


@pytest.fixture(scope="module")
def of(hooked: Callable[[str], Any]) -> Callable[[str], Results]:
    """`of(variant)`: results by layer, head, expert and source, with rank shift where it is quick."""
    made: dict[str, Results] = {}

    def run(variant: str) -> Results:
        if variant not in made:
            model, tokens = hooked(variant), prompts(batch=3, length=7)[0]
            made[variant] = routing_contributions(
                model, tokens, by=["layer", "head", "expert"], rank_shift=True
            ) | {"source": routing_contributions(model, tokens, by="source")}
        return made[variant]

    return run


def only(figure: go.Figure) -> Any:
    """Its first trace, which type checkers know nothing of."""
    return figure.data[0]  # type: ignore[index]


def title(figure: go.Figure) -> str:
    heading = style.layout_of(figure).title
    return f"{heading.text} | {heading.subtitle.text}"


def annotations(figure: go.Figure) -> list[str]:
    return [note.text for note in style.layout_of(figure).annotations]


def with_values(
    result: RoutingContributions, measure: str, new: Callable[[np.ndarray], np.ndarray]
) -> RoutingContributions:
    """The result with other means of one measure."""
    index = result.measures.index(measure)
    moments = {}
    for key, groups in result.moments.items():
        moments[key] = []
        for group in groups:
            mean = group.mean.clone()
            mean[index] = torch.from_numpy(new(mean[index].numpy()))
            moments[key].append(replace_mean(group, mean))
    return replace(result, moments=moments)


def replace_mean(moments: Any, mean: torch.Tensor) -> Any:
    return type(moments).of(moments.count, mean, moments.squares)


# ---- stripes ----


@pytest.mark.parametrize("position", ["lead", "rest"])
@pytest.mark.parametrize("measure", [*MEASURES, *RANK_MEASURES])
def test_stripes_show_the_numbers(of: Callable[[str], Results], measure: str, position: str) -> None:
    result = of("olmoe")["layer"]
    heat = only(plots.stripes(result, measure, position))
    np.testing.assert_array_equal(heat.z, result.measure(measure)[position].T)
    np.testing.assert_array_equal(heat.customdata[..., 0], heat.z)
    np.testing.assert_array_equal(heat.customdata[..., 1], result.standard_error(measure)[position].T)
    assert np.isnan(heat.z).any()
    assert list(heat.x) == list(result.senders)
    assert list(heat.y) == list(result.receivers)
    shown = heat.z[~np.isnan(heat.z)]
    assert shown.max() <= heat.zmax
    assert shown.min() >= heat.zmin - 1e-12
    if measure in ("aps", "ans", "mean"):
        assert heat.zmid == 0
        assert heat.zmin == -heat.zmax
    elif measure == "overlap":
        assert heat.zmax == 1
        assert heat.colorscale[-1][1] == style.SEQUENTIAL[0][1]
    else:
        assert heat.zmin == 0


def test_aps_and_ans_share_their_colours(of: Callable[[str], Results]) -> None:
    result = of("olmoe")["layer"]
    aps, ans = (only(plots.stripes(result, measure, senders="mlp")) for measure in ("aps", "ans"))
    assert aps.zmax == ans.zmax == max(np.nanmax(aps.z), -np.nanmin(ans.z))


def test_log_stripes(of: Callable[[str], Results]) -> None:
    result = of("olmoe")["layer"]
    figure = plots.stripes(result, "norm", scale="log")
    assert len(figure.data) == 1  # type: ignore[arg-type]
    np.testing.assert_allclose(only(figure).z, np.log10(result.norm["rest"].T))
    np.testing.assert_array_equal(only(figure).customdata[..., 0], result.norm["rest"].T)
    assert only(figure).zmin == pytest.approx(np.nanmin(only(figure).z))
    assert only(figure).zmax == pytest.approx(np.nanmax(only(figure).z))

    nearly_zero = with_values(result, "norm", lambda norm: np.where(norm < np.median(norm), 0.0, norm))
    zeros: Any
    heat, zeros = plots.stripes(nearly_zero, "norm", scale="log").data  # type: ignore[misc]
    is_zero = nearly_zero.norm["rest"].T == 0
    assert is_zero.any()
    np.testing.assert_array_equal(~np.isnan(zeros.z), is_zero)
    assert np.isnan(heat.z[is_zero]).all()
    assert np.isfinite([heat.zmin, heat.zmax]).all()
    assert "no logarithm" in zeros.hovertemplate

    for measure in ("aps", "ans", "mean", "overlap"):
        with pytest.raises(ValueError, match=f"{measure} has no log scale"):
            plots.stripes(result, measure, scale="log")
    with pytest.raises(ValueError, match="scale must be linear or log, not 'square'"):
        plots.stripes(result, "norm", scale="square")  # type: ignore[arg-type]


def test_rounding_does_not_stretch_a_log_scale(checkpoint: Callable[[str], Any]) -> None:
    from moe_lens import HookedMoE

    half = HookedMoE.from_pretrained(checkpoint("olmoe_bf16"), device="cpu", verbose=False)
    result = routing_contributions(
        half, ["The router sends every token to the experts that score it highest."]
    )
    variance = result.variance["rest"]
    others = variance[:-1][variance[:-1] > 0]
    assert result.senders[-1] == "rounding"
    assert np.nanmax(variance[-1]) < others.min()
    heat = plots.stripes(result, "variance", scale="log").data[0]  # type: ignore[attr-defined]
    assert heat.zmin == pytest.approx(np.log10(others.min()))
    assert heat.zmax == pytest.approx(np.log10(others.max()))
    alone = plots.stripes(result, "variance", scale="log", senders="rounding").data[0]  # type: ignore[attr-defined]
    assert alone.zmax == pytest.approx(np.log10(np.nanmax(variance[-1])))


def test_some_senders(of: Callable[[str], Results]) -> None:
    layer, head = of("qwen2_moe")["layer"], of("qwen2_moe")["head"]
    assert list(only(plots.stripes(layer, "variance", senders="attention")).x) == ["A0", "A1", "A2"]
    assert list(only(plots.stripes(layer, "variance", senders="mlp")).x) == ["M0", "M1"]
    heat = only(plots.stripes(head, "aps", senders=["A1", "embed", "A1H2"]))
    assert list(heat.x) == ["A1H0", "A1H1", "A1H2", "A1H3", "embed"]
    np.testing.assert_array_equal(heat.z[:, 2], head.aps["rest"][head.senders.index("A1H2")])
    active = only(plots.stripes(of("qwen2_moe")["expert"], "variance", senders="M0", when_active=True))
    experts = of("qwen2_moe")["expert"]
    np.testing.assert_array_equal(
        active.z, experts.when_active("variance")["rest"][experts.senders.slice_of("M0")].T
    )


def test_stripes_errors(of: Callable[[str], Results]) -> None:
    result = of("olmoe")["layer"]
    with pytest.raises(ValueError, match="position must be one of lead, rest, not 'middle'"):
        plots.stripes(result, "aps", "middle")
    with pytest.raises(ValueError, match="there is no measure 'size' here; the measures are variance"):
        plots.stripes(result, "size")
    with pytest.raises(ValueError, match="there is no sender 'A9'"):
        plots.stripes(result, "aps", senders=["A9"])
    with pytest.raises(ValueError, match="there are no senders that were asked for"):
        plots.stripes(result, "aps", senders=[])


def test_too_many_senders(hooked: Callable[[str], Any]) -> None:
    tokens = prompts(batch=1, length=60)[0]
    many = routing_contributions(hooked("olmoe"), tokens, by="source")
    assert len(many.senders) > MOST_SENDERS
    with pytest.raises(ValueError, match=r"contributions.top\(receiver\).*expert_lines"):
        plots.stripes(many, "variance")
    plots.stripes(many, "variance", senders="mlp")


# ---- heads and sources ----


def test_head_maps(of: Callable[[str], Results]) -> None:
    result = of("qwen3_moe_dense_bias")["head"]
    assert "A0bias" in result.senders
    table, errors = result.ans["rest"], result.standard_error("ans")["rest"]
    heat = only(plots.head_map(result, "ans", "M1"))
    own = plots.own_block_head_map(result, "ans")
    assert list(heat.y) == list(only(own).y) == ["A0", "A1", "A2"]
    for layer in range(3):
        for head in range(4):
            row = result.senders.index(f"A{layer}H{head}")
            np.testing.assert_array_equal(heat.z[layer, head], table[row, result.receiver_index(1)])
            assert np.isnan(heat.z[layer, head]) == (layer > 1)
            if layer == 0:  # a dense layer: its block has no router
                assert np.isnan(only(own).z[layer, head])
                continue
            column = result.receiver_index(layer)
            np.testing.assert_array_equal(
                only(own).customdata[layer, head], [table[row, column], errors[row, column]]
            )
            assert only(own).text[layer][head] == f"A{layer}H{head} → router of M{layer}"
    assert "blank: no router of that block here (A0)" in title(own)
    assert heat.zmin == -heat.zmax
    with pytest.raises(ValueError, match="there is no receiver 'M0'; there are M1, M2"):
        plots.head_map(result, "ans", "M0")
    for draw in (lambda r: plots.head_map(r, "ans", 1), lambda r: plots.own_block_head_map(r, "ans")):
        with pytest.raises(ValueError, match=r"by='head'.*this one is by='layer'"):
            draw(of("qwen3_moe_dense_bias")["layer"])


def test_source_maps() -> None:
    scores, weights = np.random.default_rng(0).random((2, 3, 4))
    scores[2] = np.nan
    figure = plots.source_maps(scores, weights, query=EVIL, key="key", receiver=1)
    left, right = figure.data  # type: ignore[misc]
    np.testing.assert_array_equal(left.z, scores)  # type: ignore[union-attr]
    np.testing.assert_array_equal(right.z, weights)  # type: ignore[union-attr]
    assert SHOWN in title(figure)
    assert annotations(figure) == ["Variance of scores at the router of M1", "Attention weight"]
    with pytest.raises(ValueError, match=r"must be \[layer, head\]"):
        plots.source_maps(scores, weights[:2], query="", key="", receiver=1)


@pytest.mark.parametrize("axis", ["position", "offset"])
def test_source_heatmap(hooked: Callable[[str], Any], axis: Any) -> None:
    tokens = prompts(batch=3, length=7)[0]
    result = routing_contributions(hooked("olmoe"), tokens, by="source", source_axis=axis)
    table = result.when_active("aps")["rest"]
    mark = {"position": "<-", "offset": "<-q-"}[axis]
    layer = plots.source_heatmap(result, "A1", "M2", "aps")
    head = plots.source_heatmap(result, "A1H3", measure="aps")
    for source in range(7):
        for h in range(4):
            row = result.senders.index(f"A1H{h}{mark}{source}")
            np.testing.assert_array_equal(only(layer).z[h, source], table[row, 2])
        np.testing.assert_array_equal(only(head).z[:, source], table[row])
    assert np.isnan(only(head).z[0]).all()
    assert ("back" in style.layout_of(layer).xaxis.title.text) == (axis == "offset")
    assert len(only(plots.source_heatmap(result, "A1H3", 2)).z) == 1
    for sender, receiver, message in (
        ("A9", 1, "there is no attention layer 'A9'; there are A0, A1, A2"),
        ("A1H4", 1, "there is no head 'A1H4'; A1 has A1H0 to A1H3"),
        ("A1H", 1, "there is no head 'A1H'"),
        ("A1", None, "name the receiver"),
        ("A1", 0, "name a receiver that comes after it"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.source_heatmap(result, sender, receiver)


# ---- experts ----


@pytest.mark.parametrize("measure", ["variance", "ans", "overlap"])
def test_expert_lines(of: Callable[[str], Results], measure: str) -> None:
    result = of("qwen2_moe")["expert"]
    table = result.measure(measure)["rest"]
    figure = plots.expert_lines(result, measure=measure, label=3)
    experts = [name for name in result.senders if name.startswith("M")]
    assert len(experts) == 2 * (8 + 1)  # with the shared ones
    sizes = {
        name: np.nanmax(values.influence(measure, table[result.senders.index(name)])) for name in experts
    }
    named = sorted(experts, key=lambda name: -sizes[name])[:3]
    grey, *lines = figure.data  # type: ignore[misc]
    grey_line: Any = grey
    assert [line.name for line in lines] == named  # type: ignore[union-attr]
    assert annotations(figure) == named
    for line in lines:
        coloured: Any = line
        row = table[result.senders.index(coloured.name)]
        np.testing.assert_array_equal(coloured.y, row[~np.isnan(row)])
        np.testing.assert_array_equal(coloured.x, np.flatnonzero(~np.isnan(row)))
    # The others are one trace, a gap after each; their numbers are all there.
    heights = np.asarray(grey_line.y, dtype=float)
    assert np.isnan(heights).sum() == len(experts) - 3
    others = np.stack([table[result.senders.index(name)] for name in experts if name not in named])
    np.testing.assert_allclose(heights[~np.isnan(heights)], others[~np.isnan(others)], rtol=1e-6)
    columns = np.nonzero(~np.isnan(others))[1]
    np.testing.assert_array_equal(np.asarray(grey_line.x)[~np.isnan(heights)], columns)


def test_expert_lines_on_a_log_scale(of: Callable[[str], Results]) -> None:
    result = of("olmoe")["expert"]
    axis = style.layout_of(plots.expert_lines(result, scale="log", when_active=True)).yaxis
    assert axis.type == "log"
    shown = result.when_active("variance")["rest"][1:]
    assert axis.range[1] > np.log10(
        np.nanmax([shown[i] for i, s in enumerate(result.senders[1:]) if "E" in s])
    )
    assert annotations(plots.expert_lines(result, label=0)) == []
    with pytest.raises(ValueError, match="ans has no log scale"):
        plots.expert_lines(result, measure="ans", scale="log")
    with pytest.raises(ValueError, match=r"by='expert'.*this one is by='layer'"):
        plots.expert_lines(of("olmoe")["layer"])


def test_names_do_not_lie_on_each_other() -> None:
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1]))
    style.lay_out(figure, "", "", "")
    style.fit_axis(figure.update_yaxes, np.array([0.0, 1.0]), "linear")
    label_points(
        figure, [(0.5, 0.5, f"M1E{i}", style.INK) for i in range(8)] + [(1.0, 0.5, "edge", style.INK)]
    )
    *crowd, edge = style.layout_of(figure).annotations
    shifts = sorted(note.ay for note in crowd)
    assert min(np.diff(shifts)) >= 14
    assert crowd[0].ay == -14
    assert (crowd[0].xanchor, edge.xanchor) == ("left", "right")


def test_embedding_line(of: Callable[[str], Results]) -> None:
    result = of("olmoe")["layer"]
    line = only(plots.embedding_line(result, measure="aps", position="lead"))
    np.testing.assert_array_equal(line.y, result.aps["lead"][0])
    np.testing.assert_array_equal(line.error_y.array, result.standard_error("aps")["lead"][0])
    two = plots.embedding_line(result, senders=["embed", "M1"], scale="log")
    late: Any = two.data[1]  # type: ignore[index]
    assert list(late.x) == [2]
    with pytest.raises(ValueError, match="there is no sender 'M9'"):
        plots.embedding_line(result, senders="M9")


def test_rank_correlation(of: Callable[[str], Results]) -> None:
    result = of("olmoe")["expert"]
    figure = plots.rank_correlation(result, "M0", "M2")
    rows = [result.senders.index(f"M0E{i}") for i in range(8)]
    variance, aarv = result.variance["rest"][rows, 2], result.aarv["rest"][rows, 2]
    np.testing.assert_array_equal(only(figure).x, variance)
    np.testing.assert_array_equal(only(figure).y, aarv)
    found: Any = spearmanr(variance, aarv)
    assert f"ρ = {found.statistic:.3f}".replace("-", "−") in title(figure)
    assert f"M0E{variance.argmax()}" in annotations(figure)
    still = with_values(result, "aarv", np.zeros_like)
    assert "undefined" in title(plots.rank_correlation(still, "M0", "M2"))
    with pytest.raises(ValueError, match="M1 does not read M1"):
        plots.rank_correlation(result, "M1", "M1")
    with pytest.raises(ValueError, match="there is no MoE layer 'A0' that sends; there are M0, M1"):
        plots.rank_correlation(result, "A0", "M1")


def test_rank_correlation_needs_rank_shift(hooked: Callable[[str], Any]) -> None:
    without = routing_contributions(hooked("mixtral"), prompts()[0], by="expert")
    with pytest.raises(ValueError, match="rank_shift=True measures it"):
        plots.rank_correlation(without, "M0", "M1")


# ---- one decision, and tokens ----


def test_waterfall() -> None:
    parts = np.array([0.5, -4.0, 1.0, 3.0, -0.25])
    labels = ["a", EVIL, "c", EVIL, "e"]
    figure = plots.waterfall(
        labels, parts, total=parts.sum(), n=3, title=EVIL, unit="<i>u</i>", threshold=1.5
    )
    bars = only(figure)
    np.testing.assert_allclose(bars.x, [-4.0, 3.0, 1.0, 0.25, 0.25])
    assert bars.measure == ("relative",) * 4 + ("total",)
    ticks = style.layout_of(figure).yaxis.ticktext
    assert ticks == (SHOWN, SHOWN, "c", "all others (2)", "total")
    assert list(bars.y) == [0, 1, 2, 3, 4]  # two parts of one label stay two bars
    assert title(figure).startswith(SHOWN)
    assert annotations(figure) == ["threshold: 1.5"]
    assert style.layout_of(figure).xaxis.range[0] < -4 < 1.5 < style.layout_of(figure).xaxis.range[1]

    given = only(plots.waterfall(labels, parts, total=0.25, n=3, order="given", title=""))
    np.testing.assert_allclose(given.x, [-4.0, 1.0, 3.0, 0.25, 0.25])
    whole = only(plots.waterfall(labels, parts, total=0.25, title=""))
    assert len(whole.x) == 6
    for changes, message in (
        (dict(total=1.0), "sum to 0.25, not to the total 1: give every part"),
        (dict(labels=labels[1:]), "4 labels"),
        (dict(n=0), "must be positive"),
        (dict(order="name"), "order must be size or given"),
        (dict(values=[np.nan] * 5), "must be finite"),
    ):
        arguments: Any = dict(labels=labels, values=parts, total=0.25, title="") | changes
        with pytest.raises(ValueError, match=message):
            plots.waterfall(**arguments)


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1] + 7


def test_principal_components(scores: np.ndarray) -> None:
    flat, shares = principal_components(scores)
    centred = scores - scores.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(flat), np.abs(left[:, :2] * sizes[:2]))
    np.testing.assert_allclose(shares, (sizes**2 / (sizes**2).sum())[:2])
    np.testing.assert_allclose(shares, flat.var(axis=0) / centred.var(axis=0).sum())
    # Of the two signs always the same, in whatever order the tokens come.
    np.testing.assert_allclose(principal_components(scores[::-1])[0][::-1], flat)
    for component in (0, 1):
        loadings = centred.T @ flat[:, component]
        assert loadings[np.abs(loadings).argmax()] > 0
    same, none = principal_components(np.ones((3, 2)))
    assert not same.any()
    assert not none.any()


def test_token_projection(scores: np.ndarray) -> None:
    labels = [EVIL] * 40
    flat, shares = principal_components(scores)
    plain = plots.token_projection(scores, labels)
    np.testing.assert_array_equal(only(plain).x, flat[:, 0])
    np.testing.assert_array_equal(only(plain).y, flat[:, 1])
    assert f"{shares[0]:.1%}" in style.layout_of(plain).xaxis.title.text
    assert set(only(plain).text) == {SHOWN}

    numbers = plots.token_projection(
        scores, labels, color=np.arange(40), color_name=EVIL, lead=np.arange(40) < 4
    )
    np.testing.assert_array_equal(only(numbers).marker.color, np.arange(40))
    assert only(numbers).marker.colorbar.title.text == SHOWN
    ring: Any = numbers.data[1]  # type: ignore[index]
    np.testing.assert_array_equal(ring.x, flat[:4, 0])
    assert ring.name == "lead token (4)"


def test_categories(scores: np.ndarray) -> None:
    # 14 categories: twelve of three tokens or more, two of two.
    categories = [f"<i>{i}</i>" for i in [*range(12)] * 3] + ["x", "x", "y", "y"]
    figure = plots.token_projection(scores, ["t"] * 40, color=categories)
    names = [trace.name for trace in figure.data]  # type: ignore[union-attr]
    assert len(names) == MOST_CATEGORIES + 1
    assert names[0] == "other: 2 categories (4)"
    assert only(figure).marker.color == style.GREY
    assert list(only(figure).customdata) == ["x", "x", "y", "y"]
    assert sorted(names[1:]) == sorted(f"&lt;i&gt;{i}&lt;/i&gt; (3)" for i in range(12))
    assert sum(len(trace.x) for trace in figure.data) == 40  # type: ignore[union-attr]


def test_token_projection_errors(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="40 tokens and 1 of labels"):
        plots.token_projection(scores, ["a"])
    with pytest.raises(ValueError, match="40 tokens and 2 of color"):
        plots.token_projection(scores, ["a"] * 40, color=["a", "b"])
    with pytest.raises(ValueError, match=r"finite \[token, feature\]"):
        plots.token_projection(scores * np.nan, ["a"] * 40)
    with pytest.raises(ValueError, match="method must be pca or tsne, not 'umap'"):
        plots.token_projection(scores, ["a"] * 40, method="umap")  # type: ignore[arg-type]


def test_tsne(scores: np.ndarray) -> None:
    pytest.importorskip("sklearn")
    first, again = (only(plots.token_projection(scores, ["a"] * 40, method="tsne", seed=3)) for _ in range(2))
    np.testing.assert_array_equal(first.x, again.x)
    assert np.ptp(first.x) > 0
    assert len(only(plots.token_projection(scores[:5], ["a"] * 5, method="tsne")).x) == 5
    with pytest.raises(ValueError, match="at least four tokens"):
        plots.token_projection(scores[:3], ["a"] * 3, method="tsne")


def test_tsne_names_its_remedy(scores: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r"pip install 'moe-lens\[tsne\]'"):
        plots.token_projection(scores, ["a"] * 40, method="tsne")


# ---- style ----


def test_literal() -> None:
    assert plots.literal(EVIL) == SHOWN
    assert plots.literal(" the\t\u200b") == " the\\t\\u200b"
    assert plots.literal("naïve → ε") == "naïve → ε"
    assert plots.literal(3) == "3"


@pytest.mark.parametrize(("low", "high"), [(1e-9, 1.0), (0.02, 0.9), (3.0, 4.0), (3.1, 3.2), (1e-30, 1e3)])
def test_log_ticks(low: float, high: float) -> None:
    places, texts = style.log_ticks(low, high)
    assert 1 <= len(places) == len(texts) <= 9
    assert places == sorted(places)
    assert np.log10(low) - 1e-6 <= places[0] <= places[-1] <= np.log10(high) + 1e-6


def test_every_measure_has_a_name_and_a_unit() -> None:
    assert set(plots.MEASURE_NAMES) == set(plots.UNITS) == {*MEASURES, *RANK_MEASURES}
    assert all(values.unit(measure) for measure in plots.UNITS)
