"""Figures of audits show the table's numbers, each traceable to its row, and say what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from moe_lens import plots
from moe_lens.audit.audit_result import Audit
from moe_lens.audit.published import published_cells
from moe_lens.plots import style

EVIL = "<b>zero</b>\n"
SHOWN = "&lt;b&gt;zero&lt;/b&gt;\\n"
VERDICTS = ("equivalent", "valid", "inverted", "disagreement", "inconclusive")
METRICS, CONTROLS = ("activation_norm", "random"), ("routing_weight", "first_order")
OLMOE, QWEN = "allenai/OLMoE-1B-7B-0924", "Qwen/Qwen1.5-MoE-A2.7B"


def cells_of(
    model: str = "mini", layers: Sequence[int] = (0, 1, 3), *, seed: int = 0, **of: str
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    lines = []
    for family, metrics in (("metrics", METRICS), ("control", CONTROLS)):
        for metric in metrics:
            for layer in layers:
                d = rng.normal(0.3 if family == "control" else 0.0, 0.1)
                lines.append(
                    {"model": model, "scope": "token", "how": "zero", **of}
                    | {"family": family, "metric": metric, "layer": layer}
                    | {"d": d, "d_low": d - rng.uniform(0.1, 0.2), "d_high": d + rng.uniform(0.1, 0.2)}
                    | {"p_t_holm": rng.random(), "p_wilcoxon_holm": rng.random()}
                    | {"n_pairs": 200 + layer, "n_documents": 40, "verdict": VERDICTS[len(lines) % 5]}
                )
    return pd.DataFrame(lines)


def audit_of(weights: str = "abc", smallest_effect: float = 0.2, **of: Any) -> Audit:
    provenance = {"model": "mini", "weights": weights, "settings": {"smallest_effect": smallest_effect}}
    return Audit(cells_of(**of), provenance)


def without(cells: pd.DataFrame, row: int) -> pd.DataFrame:
    """With a cell that has no test."""
    columns = ["d", "d_low", "d_high", "p_t_holm", "p_wilcoxon_holm"]
    found = cells.copy()
    found.loc[row, columns] = np.nan
    found.loc[row, "verdict"] = "inconclusive"
    return found


def traces(figure: go.Figure) -> list[Any]:
    return list(figure.data)  # type: ignore[arg-type]


def marks(figure: go.Figure) -> list[Any]:
    """Traces of rows of the table."""
    return [trace for trace in traces(figure) if trace.customdata is not None]


def title(figure: go.Figure) -> str:
    heading = style.layout_of(figure).title
    return f"{heading.text} | {heading.subtitle.text}"


def shapes(figure: go.Figure, kind: str) -> list[Any]:
    return [shape for shape in style.layout_of(figure).shapes if shape.type == kind]


def assert_interval(bars: Any, rows: pd.DataFrame) -> None:
    np.testing.assert_allclose(bars.array, rows["d_high"] - rows["d"])
    np.testing.assert_allclose(bars.arrayminus, rows["d"] - rows["d_low"])


# ---- every cell ----


def test_forest_shows_every_cell_once_with_its_interval() -> None:
    cells = cells_of().set_index(np.arange(12) + 100)
    figure = plots.effect_forest(cells)
    drawn = marks(figure)
    assert sorted(row for trace in drawn for row in trace.customdata) == cells.index.tolist()
    names = set()
    for verdict in VERDICTS:
        of = cells.loc[cells["verdict"] == verdict, "family"]
        controls = int((of == "control").sum())
        names.add(f"{verdict} ({len(of) - controls}{f'; controls: {controls}' if controls else ''})")
    assert {trace.name for trace in drawn} == names
    assert any("controls" in name for name in names)
    for trace in drawn:
        rows = cells.loc[trace.customdata]
        assert set(rows["verdict"]) == {trace.legendgroup}
        np.testing.assert_array_equal(trace.x, rows["d"])
        assert_interval(trace.error_x, rows)
        for index, row, text in zip(rows.index, rows.to_dict("records"), trace.text, strict=True):
            d, low, high = (f"{row[name]:+.3f}".replace("-", "−") for name in ("d", "d_low", "d_high"))
            assert text == (
                f"{row['metric']}, M{row['layer']}, mini<br>d = {d} ({low} to {high})<br>"
                f"{row['verdict']}; p (Holm) {row['p_t_holm']:.2g} by t, {row['p_wilcoxon_holm']:.2g} by ranks<br>"
                f"{200 + row['layer']} pairs in 40 documents<br>row {index}"
            )
    # Never by colour alone.
    assert len({trace.marker.symbol for trace in drawn}) == len({trace.marker.color for trace in drawn}) == 5
    assert (
        "12 cells: 2 metrics, 2 controls; layers from the top down<br>bars: 95%; “equivalent” goes by 90%"
        in title(figure)
    )
    low, high = style.layout_of(figure).xaxis.range
    assert low <= cells["d_low"].min()
    assert high >= cells["d_high"].max()


def places(figure: go.Figure) -> dict[int, float]:
    return {row: y for trace in marks(figure) for row, y in zip(trace.customdata, trace.y, strict=True)}


def test_forest_has_rows_of_metrics_with_controls_apart() -> None:
    cells = cells_of().sample(frac=1.0, random_state=0)
    figure = plots.effect_forest(cells)
    layout = style.layout_of(figure)
    centres = dict(zip(layout.yaxis.ticktext, layout.yaxis.tickvals, strict=True))
    assert layout.yaxis.range[0] > layout.yaxis.range[1] == 0  # from the top down
    y = places(figure)
    for metric, rows in cells.groupby("metric"):
        found = [y[row] for row in rows.sort_values("layer").index]
        assert np.mean(found) == pytest.approx(centres[str(metric)])
        np.testing.assert_allclose(np.diff(found), 1)
    assert max(centres[name] for name in CONTROLS) < min(centres[name] for name in METRICS)
    within = abs(centres[CONTROLS[0]] - centres[CONTROLS[1]])
    between = min(centres[name] for name in METRICS) - max(centres[name] for name in CONTROLS)
    assert between > within + 1
    rows = [(shape.y0, shape.y1) for shape in shapes(figure, "line")]
    assert len(rows) == 3
    assert all(start == end and not any(abs(start - at) < 0.5 for at in y.values()) for start, end in rows)


def test_forest_has_a_panel_for_each_model() -> None:
    cells = pd.concat([cells_of(OLMOE, (0, 4, 7)), cells_of(QWEN, (0, 6), seed=1)], ignore_index=True)
    figure = plots.effect_forest(cells)
    for trace in marks(figure):
        models = set(cells.loc[trace.customdata, "model"])
        assert models == {OLMOE if trace.xaxis == "x" else QWEN}
    names = [note.text for note in style.layout_of(figure).annotations]
    assert "OLMoE-1B-7B-0924<br>layers 0, 4, 7" in names
    assert "Qwen1.5-MoE-A2.7B<br>layers 0, 6" in names
    of_groups = {group: [t.showlegend for t in marks(figure) if t.legendgroup == group] for group in VERDICTS}
    assert all(sum(shown) == 1 for shown in of_groups.values())
    # The middle of fewer layers is that of more.
    y, layout = places(figure), style.layout_of(figure)
    for label, at in zip(layout.yaxis.ticktext, layout.yaxis.tickvals, strict=True):
        rows = cells.index[(cells["metric"] == label) & (cells["model"] == QWEN)]
        assert np.mean([y[row] for row in rows]) == pytest.approx(at)
    assert layout.xaxis.range == layout.xaxis2.range


def test_forest_bands_and_lines() -> None:
    cells = pd.concat([cells_of("a"), cells_of("b", seed=1)], ignore_index=True)
    metrics = cells.loc[cells["family"] == "metrics", "d"]
    # Of all models and metrics, whatever is shown.
    for shown in (
        plots.effect_forest(cells),
        plots.effect_forest(cells, family="control"),
        plots.effect_forest(cells, metrics="random"),
    ):
        bands = shapes(shown, "rect")
        assert [(band.x0, band.x1) for band in bands] == [(metrics.min(), metrics.max())] * 2
        assert [band.xref for band in bands] == ["x", "x2"]
    assert not shapes(plots.effect_forest(cells[cells["family"] == "control"]), "rect")

    def lines(figure: go.Figure) -> list[set[float]]:
        found = [trace for trace in traces(figure) if trace.line.dash == "dash"]
        return [{x for x in trace.x if x is not None} for trace in found]

    assert lines(plots.effect_forest(cells)) == [{-0.1, 0.1}] * 2
    assert lines(plots.effect_forest(cells, smallest_effect=0.3)) == [{-0.3, 0.3}] * 2
    assert lines(plots.effect_forest(cells, smallest_effect=0)) == []
    assert lines(plots.effect_forest(audit_of())) == [{-0.2, 0.2}]
    unlike = [audit_of(model="a"), audit_of(model="b", smallest_effect=0.1)]
    with pytest.raises(ValueError, match=r"smallest effects are 0\.1, 0\.2: give smallest_effect="):
        plots.effect_forest(unlike)
    assert len(lines(plots.effect_forest(unlike, smallest_effect=0.1))) == 2
    with pytest.raises(ValueError, match="smallest_effect=-1 must be"):
        plots.effect_forest(cells, smallest_effect=-1)


def test_forest_marks_metrics_that_claim_most_for_low_values() -> None:
    cells = cells_of()
    low = cells.assign(higher_is_more_important=cells["metric"] != "random")
    names = style.layout_of(plots.effect_forest(low)).yaxis.ticktext
    assert "random (low)" in names
    assert sum("(low)" in name for name in names) == 1
    assert not any("(low)" in name for name in style.layout_of(plots.effect_forest(cells)).yaxis.ticktext)


def test_forest_has_room_for_its_legend_where_it_is_narrow() -> None:
    """With one entry a line. 16 for another line of subtitle, 20 a line of the legend, 30 for two of panel names."""
    cells = cells_of()
    layout = style.layout_of(plots.effect_forest(cells))
    assert layout.margin.t == 70 + 16 + 20 * 7 + 30
    assert layout.legend.y == pytest.approx(1 - 78 / layout.height)
    one = style.layout_of(plots.effect_forest(cells.assign(verdict="valid"), smallest_effect=0))
    assert one.margin.t == 70 + 16 + 20 * 2 + 30


def test_forest_of_some() -> None:
    cells = cells_of()
    rows = {row for trace in marks(plots.effect_forest(cells, family="control")) for row in trace.customdata}
    assert set(cells.loc[sorted(rows), "family"]) == {"control"}
    assert len(rows) == 6
    of_controls = {trace.name: len(trace.x) for trace in marks(plots.effect_forest(cells, family="control"))}
    assert all(name.endswith(f" ({n})") for name, n in of_controls.items())
    one = plots.effect_forest(cells, metrics=["random", "first_order"])
    assert set(style.layout_of(one).yaxis.ticktext) == {"random", "first_order"}
    with pytest.raises(
        ValueError, match="there is no metric 'norm'; there are activation_norm, random, routing_weight"
    ):
        plots.effect_forest(cells, metrics="norm")
    with pytest.raises(ValueError, match="no metric 'random'; there are routing_weight, first_order"):
        plots.effect_forest(cells, metrics="random", family="control")
    with pytest.raises(ValueError, match="no metric is asked for"):
        plots.effect_forest(cells, metrics=[])
    with pytest.raises(ValueError, match="family must be metrics or control, not 'other'"):
        plots.effect_forest(cells, family="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no cells of family 'control'"):
        plots.effect_forest(cells[cells["family"] == "metrics"], family="control")
    with pytest.raises(ValueError, match=r"a verdict is one of equivalent, .* not 'maybe'"):
        plots.effect_forest(cells.assign(verdict="maybe"))


def test_cells_without_a_test_are_counted() -> None:
    cells = without(without(cells_of(), 2), 7)
    figure = plots.effect_forest(cells)
    assert "; 2 without a test<br>" in title(figure)
    of_row = {row: x for trace in marks(figure) for row, x in zip(trace.customdata, trace.x, strict=True)}
    assert np.isnan([of_row[2], of_row[7]]).all()
    low, high = style.layout_of(figure).xaxis.range
    assert np.isfinite([low, high]).all()
    assert "without" not in title(plots.effect_forest(cells, metrics="first_order"))


# ---- what may be given ----


@pytest.mark.parametrize("plot", [plots.effect_forest, plots.control_lines])
def test_wrong_tables(plot: Any) -> None:
    with pytest.raises(ValueError, match=r"an Audit, its cells or .* this frame has no d_low, verdict"):
        plot(cells_of().drop(columns=["d_low", "verdict"]))
    with pytest.raises(ValueError, match="no rows to show"):
        plot(cells_of().iloc[:0])
    with pytest.raises(ValueError, match="sequence of Audits is needed, not str"):
        plot("mini")
    with pytest.raises(ValueError, match="sequence is empty"):
        plot([])
    with pytest.raises(
        ValueError, match=r"two rows have label mini, .* metric activation_norm, layer 0; a column label="
    ):
        plot(pd.concat([cells_of(), cells_of()]))


def test_labels_tell_models_and_runs_apart() -> None:
    def names(cells: Any) -> list[str]:
        figure = plots.effect_forest(cells, smallest_effect=0)
        return [note.text.split("<br>")[0] for note in style.layout_of(figure).annotations[1:]]

    token, sequence = audit_of(), audit_of(scope="sequence", seed=1)
    assert names(token) == ["mini"]
    assert names([token, sequence]) == ["mini, token", "mini, sequence"]
    assert names([token, audit_of(how="mean"), audit_of(model="b")]) == [
        "mini, zero",
        "mini, mean",
        "b, zero",
    ]
    assert names(pd.concat([cells_of("x/a"), cells_of("y/a")])) == ["x/a", "y/a"]
    assert names(cells_of().assign(label=EVIL)) == [SHOWN]
    assert names(cells_of().assign(label=EVIL).drop(columns="model")) == [SHOWN]
    # The rows of a sequence are counted through.
    figure = plots.effect_forest([token, sequence], smallest_effect=0)
    assert {row for trace in marks(figure) if trace.xaxis == "x2" for row in trace.customdata} == {
        *range(12, 24)
    }
    evil = cells_of().assign(metric=EVIL, label=EVIL)[:1]
    figure = plots.effect_forest(evil)
    assert style.layout_of(figure).yaxis.ticktext == (SHOWN,)
    assert marks(figure)[0].text[0].startswith(f"{SHOWN}, M0, {SHOWN}<br>")


# ---- the control ----


def bands_of(figure: go.Figure) -> list[Any]:
    return [trace for trace in traces(figure) if trace.fill == "toself"]


def test_control_against_layers() -> None:
    cells = cells_of().sample(frac=1.0, random_state=1)
    figure = plots.control_lines(cells)
    (line,), (band,) = marks(figure), bands_of(figure)
    rows = cells.loc[line.customdata]
    assert set(rows["metric"]) == {"routing_weight"}
    assert line.x.tolist() == rows["layer"].tolist() == [0, 1, 3]
    np.testing.assert_array_equal(line.y, rows["d"])
    assert_interval(line.error_y, rows)
    assert list(band.x) == [0, 1, 3, 3, 1, 0, None]
    np.testing.assert_allclose(list(band.y[:-1]), [*rows["d_high"], *rows["d_low"][::-1]])
    layout = style.layout_of(figure)
    assert layout.xaxis.title.text == "layer"
    assert list(layout.xaxis.tickvals) == [0, 1, 3]
    metrics = cells.loc[cells["family"] == "metrics", "d"]
    (grey,) = shapes(figure, "rect")
    assert (grey.y0, grey.y1) == (metrics.min(), metrics.max())
    assert f"{metrics.min():+.3f} to {metrics.max():+.3f}".replace("-", "−") in grey.name
    assert "3 cells; in grey the range of 6 cells of metrics" in title(figure)
    assert layout.yaxis.range[0] <= min(rows["d_low"].min(), metrics.min())
    assert layout.yaxis.range[1] >= max(rows["d_high"].max(), metrics.max())
    other = plots.control_lines(cells, control="first_order")
    assert set(cells.loc[marks(other)[0].customdata, "metric"]) == {"first_order"}
    assert title(other).startswith("Effect of the first-order attribution as a ranking, by depth")
    with pytest.raises(ValueError, match=r"no control 'random'; it has (first_order|routing_weight), "):
        plots.control_lines(cells, control="random")
    alone = plots.control_lines(cells[cells["family"] == "control"])
    assert not shapes(alone, "rect")
    assert "grey" not in title(alone)


def test_control_with_gaps() -> None:
    cells = without(cells_of(layers=(0, 1, 2, 3, 4)), 12)
    assert (cells.loc[12, "metric"], cells.loc[12, "layer"]) == ("routing_weight", 2)
    figure = plots.control_lines(cells)
    assert "; 1 without a test" in title(figure)
    assert np.isnan(marks(figure)[0].y).tolist() == [False, False, True, False, False]
    assert list(bands_of(figure)[0].x) == [0, 1, 1, 0, None, 3, 4, 4, 3, None]


def test_controls_of_models_of_unlike_depth() -> None:
    cells = pd.concat([cells_of(OLMOE, (0, 4, 15)), cells_of(QWEN, (0, 6, 23), seed=1)], ignore_index=True)
    figure = plots.control_lines(cells)
    first, second = marks(figure)
    np.testing.assert_allclose(first.x, [0, 4 / 15, 1])
    np.testing.assert_allclose(second.x, [0, 6 / 23, 1])
    assert "routing_weight, M6, Qwen1.5-MoE-A2.7B" in second.text[1]
    assert "last layer" in style.layout_of(figure).xaxis.title.text
    assert (first.line.color, first.marker.symbol) != (second.line.color, second.marker.symbol)
    assert (first.name, second.name) == ("OLMoE-1B-7B-0924", "Qwen1.5-MoE-A2.7B")
    same = pd.concat([cells_of("a", (0, 1, 7)), cells_of("b", (0, 4, 7))])
    assert marks(plots.control_lines(same))[1].x.tolist() == [0, 4, 7]


def test_published_control_beside_ours() -> None:
    cells = cells_of(OLMOE, (0, 4, 7, 11))
    published = published_cells()
    figure = plots.control_lines(cells, published=published)
    ours, *theirs = marks(figure)
    assert len(theirs) == 3
    for trace, model, last in zip(theirs, ("olmoe", "qwen2_moe", "deepseek_v2"), (15, 23, 26), strict=True):
        rows = published[(published["model"] == model) & (published["family"] == "control")]
        np.testing.assert_array_equal(trace.y, rows["d"])
        np.testing.assert_allclose(trace.x, rows["layer"] / last)
        assert trace.marker.symbol.endswith("-open")
        assert (trace.marker.color == ours.line.color) == (model == "olmoe")
        assert trace.error_y.array is None
    # By the last layer of the model, which the published table has here, and not ours.
    np.testing.assert_allclose(ours.x, np.array([0, 4, 7, 11]) / 15)
    legend = [trace.name for trace in traces(figure) if trace.showlegend is not False and trace.name]
    assert legend == ["OLMoE-1B-7B-0924", "published, n = 200"]
    reach = style.layout_of(figure).yaxis.range
    assert reach[0] <= -0.114
    one = plots.control_lines(cells, published=published_cells("olmoe"))
    assert marks(one)[1].x.tolist() == [0, 4, 7, 11, 15]
    # Published numbers are not of the grey range.
    assert shapes(one, "rect")[0].y1 == cells.loc[cells["family"] == "metrics", "d"].max()
    named = published_cells("olmoe").assign(label="ours")
    same = plots.control_lines(cells.assign(label="ours"), published=named)
    assert marks(same)[0].line.color == marks(same)[1].marker.color
    with pytest.raises(ValueError, match="published has no control 'first_order'; it has routing_weight"):
        plots.control_lines(cells, control="first_order", published=published)
    with pytest.raises(ValueError, match=r"as published_cells\(\) has them, and this has no n$"):
        plots.control_lines(cells, published=published.drop(columns="n"))


# ---- the two scopes ----


def test_scopes_are_matched_by_cell() -> None:
    token = cells_of()
    sequence = cells_of(scope="sequence", seed=1).sample(frac=1.0, random_state=2)
    figure = plots.scope_pairs(token, sequence)
    metrics, control = marks(figure)
    for trace, family in ((metrics, "metrics"), (control, "control")):
        ours, theirs = (table.loc[trace.customdata[:, i]] for i, table in enumerate((token, sequence)))
        key = ["family", "metric", "layer"]
        assert ours[key].to_numpy().tolist() == theirs[key].to_numpy().tolist()
        assert set(ours["family"]) == {family}
        assert len(ours) == 6
        np.testing.assert_array_equal(trace.x, ours["d"])
        np.testing.assert_array_equal(trace.y, theirs["d"])
        assert_interval(trace.error_x, ours)
        assert_interval(trace.error_y, theirs)
        assert f"row {theirs.index[0]}" in trace.text[0]
    assert metrics.marker.symbol != control.marker.symbol
    layout = style.layout_of(figure)
    assert layout.xaxis.range == layout.yaxis.range
    both = pd.concat([token, sequence])
    assert layout.xaxis.range[0] <= both["d_low"].min()
    assert layout.xaxis.range[1] >= both["d_high"].max()
    diagonal = traces(figure)[0]
    assert list(diagonal.x) == list(diagonal.y) == list(layout.xaxis.range)
    assert title(figure).endswith("12 cells")
    assert title(plots.scope_pairs(without(token, 0), sequence)).endswith("12 cells; 1 without a test")
    of_audits = plots.scope_pairs(audit_of(), audit_of(scope="sequence"))
    assert len(marks(of_audits)) == 2


def test_scopes_that_do_not_belong_together() -> None:
    token, sequence = cells_of(), cells_of(scope="sequence")
    with pytest.raises(ValueError, match="token= needs cells of scope 'token', not 'sequence'"):
        plots.scope_pairs(sequence, token)
    with pytest.raises(ValueError, match=r"only token has random at layer 3 of mini; layers= and metrics="):
        plots.scope_pairs(token, sequence.drop(index=5))
    with pytest.raises(ValueError, match=r"only sequence has activation_norm at layer 3 of mini and 3 more;"):
        plots.scope_pairs(token[token["layer"] < 3], sequence)
    with pytest.raises(ValueError, match=r"no cell in common: token is of mini, sequence of b"):
        plots.scope_pairs(token, cells_of("b", scope="sequence"))
    with pytest.raises(ValueError, match=r"the same weights, not abc \(token\) and def \(sequence\)"):
        plots.scope_pairs(audit_of(), audit_of("def", scope="sequence"))
    with pytest.raises(ValueError, match="this frame has no scope"):
        plots.scope_pairs(token.drop(columns="scope"), sequence)
    twice = pd.concat([token.assign(label="a"), token.assign(label="b")])
    with pytest.raises(ValueError, match="token= has more than one row of some model"):
        plots.scope_pairs(twice, sequence)
    common = plots.scope_pairs(token, sequence.drop(index=5), layers=[0, 1])
    assert sum(len(trace.x) for trace in marks(common)) == 8
    common = plots.scope_pairs(token, sequence.drop(index=5), metrics="activation_norm")
    assert sum(len(trace.x) for trace in marks(common)) == 3
    with pytest.raises(ValueError, match="there is no layer 9; there are 0, 1, 3"):
        plots.scope_pairs(token, sequence, layers=9)
