"""The figure of redistribution shows both chains of the table, with its intervals and marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from moe_lens import plots
from moe_lens.audit.redistribution import Redistribution
from moe_lens.plots import style

PAIRS = (("gap_norm", "relative_compensation"), ("routing_weight", "gap_norm"), ("routing_weight", "cosine"))
P = (0.2, 0.05, 0.049, 0.0099, 0.0009)
MARKS = ["", "", "*", "**", "***"]


def correlations_of(layers: Sequence[int] = range(5), seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    lines = []
    for layer, p in zip(layers, P, strict=False):
        for x, y in PAIRS:
            for given in ("", "gap_norm"):
                rho = rng.uniform(-0.5, 0.5)
                lines.append(
                    {"layer": layer, "x": x, "y": y, "given": given, "rho": rho, "p": p, "n_experts": 16}
                    | {
                        "low": rho - rng.uniform(0, 0.3),
                        "high": rho + rng.uniform(0, 0.3),
                        "mean_gap_norm": 0.1,
                    }
                )
    return pd.DataFrame(lines)


def redistribution_of(model: str, layers: Sequence[int] = range(5), seed: int = 0) -> Redistribution:
    return Redistribution(pd.DataFrame(), correlations_of(layers, seed), {"model": model})


def traces(figure: go.Figure) -> list[Any]:
    return list(figure.data)  # type: ignore[arg-type]


def lines_of(figure: go.Figure) -> list[Any]:
    return [trace for trace in traces(figure) if trace.customdata is not None]


def title(figure: go.Figure) -> str:
    heading = style.layout_of(figure).title
    return f"{heading.text} | {heading.subtitle.text}"


def test_chains_show_rho_with_interval_and_marks() -> None:
    frame = correlations_of().sample(frac=1.0, random_state=0)
    figure = plots.redistribution_chains(frame)
    drawn = traces(figure)
    assert [(trace.xaxis, trace.mode) for trace in drawn] == [
        ("x", "lines+markers"), ("x", "text"), ("x2", "lines+markers"), ("x2", "text"),
    ]  # fmt: skip
    for line, marks, (x, y) in zip(drawn[::2], drawn[1::2], (PAIRS[1], PAIRS[0]), strict=True):
        rows = frame.loc[line.customdata]
        assert set(zip(rows["x"], rows["y"], rows["given"], strict=True)) == {(x, y, "")}
        assert line.x.tolist() == rows["layer"].tolist() == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(line.y, rows["rho"])
        np.testing.assert_allclose(line.error_y.array, rows["high"] - rows["rho"])
        np.testing.assert_allclose(line.error_y.arrayminus, rows["rho"] - rows["low"])
        assert list(marks.text) == MARKS
        np.testing.assert_array_equal(marks.x, line.x)
        np.testing.assert_array_equal(marks.y, rows["high"])
        assert line.text[2].endswith(f"p = 0.049; 16 experts<br>row {rows.index[2]}")
        rho, low, high = (f"{rows[name].iloc[2]:+.3f}".replace("-", "−") for name in ("rho", "low", "high"))
        assert line.text[2].startswith(f"M2<br>rho = {rho} ({low} to {high})<br>")
    layout = style.layout_of(figure)
    assert [note.text for note in layout.annotations] == [
        "routing weight<br>and gap norm",
        "gap norm<br>and relative compensation",
    ]
    assert layout.xaxis.title.text == layout.xaxis2.title.text == "layer"
    assert not layout.showlegend
    assert (
        "10 correlations; bars: over documents drawn anew<br>"
        "stars: p over experts, uncorrected: * p < 0.05, ** 0.01, *** 0.001" in title(figure)
    )
    found = redistribution_of("a")
    of = [Redistribution(found.experts, found.correlations, {"model": m, "confidence": 0.9}) for m in "ab"]
    assert "; bars: 90% over documents" in title(plots.redistribution_chains(of))
    assert "; bars: 90% over documents" in title(plots.redistribution_chains(of[0]))
    assert "; bars: over documents" in title(plots.redistribution_chains([of[1], found]))


def test_chains_of_models() -> None:
    found = [redistribution_of("x/a", (0, 1, 4)), redistribution_of("x/b", (0, 2, 8), seed=1)]
    figure = plots.redistribution_chains(found)
    assert [(line.name, line.xaxis) for line in lines_of(figure)] == [
        ("a", "x"),
        ("b", "x"),
        ("a", "x2"),
        ("b", "x2"),
    ]
    assert [line.showlegend for line in lines_of(figure)] == [True, True, False, False]
    assert lines_of(figure)[0].x.tolist() == [0, 0.25, 1]
    assert lines_of(figure)[3].x.tolist() == [0, 0.25, 1]
    np.testing.assert_array_equal(
        lines_of(figure)[3].y,
        found[1].correlations.query("x == 'gap_norm' and y == 'relative_compensation' and given == ''")[
            "rho"
        ],
    )
    # Rows of a sequence are counted through.
    assert min(lines_of(figure)[3].customdata) >= len(found[0].correlations)
    assert "last layer" in style.layout_of(figure).xaxis.title.text
    labelled = pd.concat([found[0].correlations.assign(label="<i>"), found[1].correlations.assign(label="b")])
    names = [line.name for line in lines_of(plots.redistribution_chains(labelled))]
    assert names == ["&lt;i&gt;", "b"] * 2
    assert lines_of(plots.redistribution_chains(found[0]))[0].text[0].startswith("M0, a<br>")


def test_chains_with_gaps_and_of_other_tables() -> None:
    frame = correlations_of()
    of = (frame["x"] == "routing_weight") & (frame["y"] == "gap_norm") & (frame["given"] == "")
    frame.loc[of & (frame["layer"] == 4), ["rho", "p", "low", "high"]] = np.nan
    figure = plots.redistribution_chains(frame)
    assert "10 correlations; 1 without a value" in title(figure)
    assert np.isnan(traces(figure)[0].y).tolist() == [False] * 4 + [True]
    assert list(traces(figure)[1].text) == [*MARKS[:4], ""]
    assert np.isfinite(style.layout_of(figure).yaxis.range).all()
    with pytest.raises(ValueError, match="no rows of routing_weight and gap_norm with nothing given"):
        plots.redistribution_chains(frame[~of])
    with pytest.raises(ValueError, match="Redistributions is needed, and this frame has no p, low"):
        plots.redistribution_chains(frame.drop(columns=["p", "low"]))
    with pytest.raises(ValueError, match="no rows to show"):
        plots.redistribution_chains(frame.iloc[:0])
    with pytest.raises(ValueError, match="two rows have x gap_norm"):
        plots.redistribution_chains(pd.concat([frame, frame]))

    @dataclass
    class Other:
        provenance: dict[str, str]

    with pytest.raises(ValueError, match="needed, not Other"):
        plots.redistribution_chains(Other({}))  # type: ignore[arg-type]
