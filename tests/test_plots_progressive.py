"""Figures of progressive ablation and of route experiments show the numbers, and say what they are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from moe_lens import plots
from moe_lens.audit.progressive import Progressive, progressive
from moe_lens.interventions import RouteExperiment, rank_swaps, silence, top_k_sensitivity
from moe_lens.plots import style
from tests.families import prompts
from tests.routing_cases import corpus

EVIL = "<b>zero</b>\n"
SHOWN = "&lt;b&gt;zero&lt;/b&gt;\\n"


def traces(figure: go.Figure) -> list[Any]:
    return list(figure.data)  # type: ignore[arg-type]


def title(figure: go.Figure) -> str:
    heading = style.layout_of(figure).title
    return f"{heading.text} | {heading.subtitle.text}"


def annotations(figure: go.Figure) -> list[str]:
    return [note.text for note in style.layout_of(figure).annotations]


# ---- progressive ablation ----


@pytest.fixture(scope="module")
def table(hooked: Callable[[str], Any]) -> Progressive:
    tokens, mask = prompts("left", batch=4)
    return progressive(hooked("olmoe"), tokens, attention_mask=mask)


def test_lines_show_mean_median_and_percentile(table: Progressive) -> None:
    figure, frame = plots.progressive_lines(table), table.to_frame()
    layers = frame["layer"].unique().tolist()
    drawn = traces(figure)
    assert len(drawn) == 3 * len(layers)
    for layer, mean, middle, high in zip(layers, drawn[::3], drawn[1::3], drawn[2::3], strict=True):
        rows = frame[frame["layer"] == layer]
        assert mean.name == middle.name == high.name == f"M{layer}"
        assert (mean.xaxis, middle.xaxis, high.xaxis) == ("x", "x2", "x3")
        assert (mean.yaxis, middle.yaxis, high.yaxis) == ("y", "y2", "y3")
        assert [line.showlegend for line in (mean, middle, high)] == [True, False, False]
        np.testing.assert_array_equal(mean.x, rows["removed"])
        np.testing.assert_array_equal(mean.y, rows["delta_loss"])
        np.testing.assert_array_equal(mean.error_y.array, rows["delta_loss_standard_error"])
        np.testing.assert_array_equal(middle.y, rows["delta_loss_median"])
        assert middle.error_y.array is None
        np.testing.assert_array_equal(high.y, rows["delta_loss_p95"])
        assert mean.line.color == middle.line.color == high.line.color
        assert f"{rows['delta_loss'].iloc[0]:.4g} ± " in mean.text[0]
        assert f"median: {rows['delta_loss_median'].iloc[0]:.4g} nats" in middle.text[0]
        assert f"95th percentile: {rows['delta_loss_p95'].iloc[0]:.4g} nats" in high.text[0]
    assert len({trace.line.color for trace in drawn}) == len(layers)
    assert annotations(figure) == ["mean", "median", "95th percentile"]
    n_rows = int(frame["n_rows"].iloc[0])
    assert f"zero at one token; {n_rows} tokens in 4 documents, with standard errors" in title(figure)
    layout = style.layout_of(figure)
    columns = ("delta_loss", "delta_loss_median", "delta_loss_p95")
    for axis, column in zip((layout.yaxis, layout.yaxis2, layout.yaxis3), columns, strict=True):
        assert axis.range[0] <= frame[column].min()
        assert axis.range[1] >= frame[column].max()
    domains = [axis.domain for axis in (layout.xaxis, layout.xaxis2, layout.xaxis3)]
    assert domains[0][1] < domains[1][0] < domains[1][1] < domains[2][0]


def test_lines_of_some_layers_or_of_a_frame(table: Progressive) -> None:
    one = plots.progressive_lines(table, layers=1)
    assert {trace.name for trace in traces(one)} == {"M1"}
    assert not style.layout_of(one).showlegend
    some = plots.progressive_lines(table.to_frame(), layers=[2, 0])
    assert [trace.name for trace in traces(some)[::3]] == ["M0", "M2"]
    assert "at one token" not in title(some)
    odd = replace(table, provenance={**table.provenance, "how": EVIL})
    assert SHOWN in title(plots.progressive_lines(odd))
    with pytest.raises(ValueError, match="there is no layer 9; there are 0, 1, 2"):
        plots.progressive_lines(table, layers=9)
    with pytest.raises(ValueError, match="this has no removed, n_rows"):
        plots.progressive_lines(table.to_frame()[["layer"]])
    with pytest.raises(ValueError, match=r"this has no delta_loss_median$"):
        plots.progressive_lines(table.to_frame().drop(columns="delta_loss_median"))
    with pytest.raises(ValueError, match="no rows to show"):
        plots.progressive_lines(table.to_frame().iloc[:0])


def test_one_document_has_no_bars(hooked: Callable[[str], Any]) -> None:
    figure = plots.progressive_lines(progressive(hooked("olmoe"), prompts(batch=1)[0]))
    assert "standard errors" not in title(figure)
    assert "±" not in traces(figure)[0].text[0]
    assert not traces(figure)[0].error_y.array.any()


# ---- route experiments ----


@pytest.fixture(scope="module")
def experiment(hooked: Callable[[str], Any]) -> RouteExperiment:
    return top_k_sensitivity(hooked("qwen3_moe"), corpus("left"), (1, "all"))


@pytest.mark.parametrize("senders", ["mlp", "attention", None])
def test_maps_side_by_side(experiment: RouteExperiment, senders: str | None) -> None:
    figure = plots.route_maps(experiment, senders=senders)
    drawn = traces(figure)
    for heat, condition in zip(drawn, experiment.conditions.values(), strict=True):
        alone = traces(plots.stripes(condition.contributions, "variance", senders=senders))[0]
        np.testing.assert_array_equal(heat.z, alone.z)
        assert (heat.zmin, heat.zmax) == (drawn[0].zmin, drawn[0].zmax)
        assert list(heat.x) == list(alone.x)
    assert drawn[0].zmax == max(np.nanmax(heat.z) for heat in drawn)
    assert [heat.showscale for heat in drawn] == [False] * (len(drawn) - 1) + [True]
    assert len({heat.xaxis for heat in drawn}) == len(drawn)
    change = experiment.to_frame()["delta_loss"][1]
    names = annotations(figure)
    assert names[0] == "unchanged"
    assert names[1] == f"K = 1 (Δ {change:+.2g} nats)".replace("-", "−")
    assert "4 documents" in title(figure)


def test_differences_are_centred(experiment: RouteExperiment) -> None:
    drawn = traces(plots.route_maps(experiment, difference=True, senders=None))
    names = list(experiment.conditions)[1:]
    for heat, name in zip(drawn, names, strict=True):
        np.testing.assert_allclose(heat.z, experiment.difference(name).T)
        assert heat.zmin == -heat.zmax == drawn[0].zmin
        assert heat.zmid == 0
        assert "change %{z" in heat.hovertemplate
    assert drawn[0].zmax == max(np.nanmax(np.abs(heat.z)) for heat in drawn)


def test_signed_measures_and_logs(experiment: RouteExperiment) -> None:
    aps, ans = (traces(plots.route_maps(experiment, measure)) for measure in ("aps", "ans"))
    assert aps[0].zmax == ans[-1].zmax == -aps[0].zmin
    logs = traces(plots.route_maps(experiment, scale="log"))
    unchanged = experiment.unchanged.contributions
    alone = traces(plots.stripes(unchanged, "variance", senders="mlp", scale="log"))[0]
    np.testing.assert_array_equal(logs[0].z, alone.z)
    assert logs[0].zmin == pytest.approx(min(np.nanmin(heat.z) for heat in logs))
    for arguments, message in (
        ({"difference": True, "scale": "log"}, "differences have no log scale"),
        ({"measure": "aps", "scale": "log"}, "aps has no log scale"),
        ({"measure": "spread"}, "there is no measure 'spread'"),
        ({"position": "first"}, "position must be one of"),
        ({"senders": "M99"}, "M99"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.route_maps(experiment, **arguments)  # type: ignore[arg-type]


def test_panels_do_not_overlap(hooked: Callable[[str], Any]) -> None:
    model = hooked("olmoe")
    n = model.cfg.n_experts
    found = top_k_sensitivity(model, corpus("left"), range(1, n + 1))
    figure = plots.route_maps(found)
    layout = style.layout_of(figure)
    numbers = ["", *range(2, n + 2)]
    boxes = [(*layout[f"xaxis{i}"].domain, *layout[f"yaxis{i}"].domain) for i in numbers]
    for i, (left, right, low, high) in enumerate(boxes):
        assert 0 <= left < right <= 1 + 1e-9
        assert 0 <= low < high <= 1
        for left_, right_, low_, high_ in boxes[:i]:
            assert right_ <= left or right <= left_ or high_ <= low or high <= low_
    swapped = plots.route_maps(rank_swaps(model, corpus("left"), "last"))
    assert f"rank {model.cfg.top_k} -&gt; {n}" in annotations(swapped)[1]


def test_silenced_experts_stripe(hooked: Callable[[str], Any]) -> None:
    model, (tokens, mask) = hooked("olmoe"), prompts("left")
    layer = model.cfg.moe_layers[0]
    chosen = model.run_with_cache(tokens, attention_mask=mask)[1][f"blocks.{layer}.mlp.hook_expert_indices"]
    found = silence(model, [(tokens, mask)], f"M{layer}E{int(chosen[0, -1, 0])}")
    drawn = traces(plots.route_maps(found, difference=True))
    assert len(drawn) == 3
    # Outputs held: nothing but the expert's own layer changes.
    column = list(drawn[0].x).index(f"M{layer}")
    others = np.delete(drawn[0].z, column, axis=1)
    assert not np.nan_to_num(others).any()
    assert np.nan_to_num(drawn[0].z[:, column]).any()
