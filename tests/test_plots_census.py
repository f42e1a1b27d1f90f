"""Figures of a census show its numbers, whichever way they are given, and say what and how many they are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from moe_lens import plots
from moe_lens.audit.census_table import Census, CensusWriter
from moe_lens.plots import style
from moe_lens.plots.census import LINEAR_BELOW

EVIL = "<b>zero</b>\n"
SHOWN = "&lt;b&gt;zero&lt;/b&gt;\\n"
N_DOCUMENTS, N_POSITIONS, LAYERS, K = 5, 6, (1, 2, 4), 3


def census_of(
    n_documents: int = N_DOCUMENTS, *, shared: bool = False, how: str = "zero", scope: str = "token"
) -> Census:
    """Changes of all sizes, larger for the heavier ranks and later layers; one is exactly zero."""
    rng = np.random.default_rng(0)
    with CensusWriter(None, {"model": "tiny", "how": how, "scope": scope}) as writer:
        for number in range(n_documents):
            ranks = np.arange(0 if shared else 1, K + 1)
            axes = np.meshgrid(np.arange(N_POSITIONS), LAYERS, ranks, indexing="ij")
            position, layer, rank = (axis.ravel() for axis in axes)
            size = 10.0 ** rng.uniform(-6, 1, len(rank)) * layer / (rank + 1)
            change = size * rng.choice([-1, 1, 1], len(rank))
            change[0] = 0.0
            columns = {
                "position": position,
                "layer": layer,
                "expert": np.where(rank == 0, -1, rank + 7),
                "rank": rank,
                "routing_weight": (1.0 / (1 + rank)).astype(np.float32),
                "gap_norm": size.astype(np.float32) * 2,
                "loss": np.ones(len(rank), np.float32),
                "delta_loss": change.astype(np.float32),
            }
            writer.add_document(number, columns)
        return writer.finish({})


@pytest.fixture(scope="module")
def census() -> Census:
    return census_of()


def traces(figure: go.Figure) -> list[Any]:
    return list(figure.data)  # type: ignore[arg-type]


def title(figure: go.Figure) -> str:
    heading = style.layout_of(figure).title
    return f"{heading.text} | {heading.subtitle.text}"


# ---- lines over layers ----


@pytest.mark.parametrize("column", ["delta_loss", "gap_norm", "routing_weight"])
def test_lines_by_rank_show_means_and_errors(census: Census, column: str) -> None:
    figure = plots.census_lines(census, column)
    frame = census.by_rank()
    assert [trace.name for trace in traces(figure)] == ["rank 1", "rank 2", "rank 3"]
    for rank, trace in enumerate(traces(figure), start=1):
        rows = frame[frame["rank"] == rank]
        np.testing.assert_array_equal(trace.x, [0, 1, 2])
        np.testing.assert_array_equal(trace.y, rows[column])
        np.testing.assert_array_equal(trace.error_y.array, rows[f"{column}_standard_error"])
        assert f"M4, rank {rank}<br>" in trace.text[2]
        assert f"{N_DOCUMENTS * N_POSITIONS} ablations" in trace.text[2]
    assert list(style.layout_of(figure).xaxis.ticktext) == ["M1", "M2", "M4"]
    unit = "nats" if column == "delta_loss" else "no unit"
    assert f"({unit})" in style.layout_of(figure).yaxis.title.text
    assert "270 ablations in 5 documents, with standard errors" in title(figure)
    assert "zero at one token; " in title(figure)
    # Whatever is drawn, bars included, lies within the axis.
    low, high = style.layout_of(figure).yaxis.range
    for trace in traces(figure):
        assert (np.asarray(trace.y) + trace.error_y.array).max() <= high
        assert (np.asarray(trace.y) - trace.error_y.array).min() >= low


@pytest.mark.parametrize(("statistic", "named"), [("p95", "95th"), ("p5", "5th"), ("median", "Median")])
def test_percentiles_have_no_errors(census: Census, statistic: Any, named: str) -> None:
    figure = plots.census_lines(census, statistic=statistic)
    frame = census.by_rank()
    for rank, trace in enumerate(traces(figure), start=1):
        np.testing.assert_array_equal(trace.y, frame[frame["rank"] == rank][f"delta_loss_{statistic}"])
        assert trace.error_y.array is None
        assert "±" not in trace.text[0]
    assert title(figure).startswith(f"{named} ")
    assert "standard errors" not in title(figure)


def test_one_line_over_all_ranks(census: Census) -> None:
    figure = plots.census_lines(census, "gap_norm", by="layer", scale="log")
    (trace,) = traces(figure)
    np.testing.assert_array_equal(trace.y, census.by_layer()["gap_norm"])
    assert style.layout_of(figure).yaxis.type == "log"
    assert style.layout_of(figure).showlegend is False
    assert style.layout_of(plots.census_lines(census)).showlegend is True


def test_a_frame_gives_the_same_lines(census: Census) -> None:
    shuffled = census.by_rank().sample(frac=1, random_state=0)
    for of_census, of_frame in (
        (plots.census_lines(census), plots.census_lines(shuffled)),
        (plots.census_lines(census, by="layer"), plots.census_lines(census.by_layer(), by="layer")),
    ):
        for mine, its in zip(traces(of_census), traces(of_frame), strict=True):
            np.testing.assert_array_equal(mine.x, its.x)
            np.testing.assert_array_equal(mine.y, its.y)
        # A frame does not know what was changed.
        assert title(of_frame) == title(of_census).replace("zero at one token; ", "")


def test_shared_experts_have_a_line_of_their_own() -> None:
    census = census_of(shared=True)
    lines = traces(plots.census_lines(census))
    assert [trace.name for trace in lines] == ["rank 1", "rank 2", "rank 3", "shared experts"]
    frame = census.by_rank()
    np.testing.assert_array_equal(lines[-1].y, frame[frame["rank"] == 0]["delta_loss"])
    assert [trace.line.dash for trace in lines] == ["solid", "solid", "solid", "dash"]
    assert len({trace.line.color for trace in lines}) == 4
    # By layer they do not count.
    assert "270 ablations" in title(plots.loss_change_distribution(census, by="layer"))
    assert "360 ablations" in title(plots.loss_change_distribution(census))


def test_one_document_has_no_errors() -> None:
    figure = plots.census_lines(census_of(1))
    assert "54 ablations in 1 document" in title(figure)
    assert "standard errors" not in title(figure)
    assert "±" not in traces(figure)[0].text[0]


def test_the_subtitle_says_what_was_changed() -> None:
    sequence = census_of(how=EVIL, scope="sequence")
    for figure in (plots.census_lines(sequence), plots.loss_change_distribution(sequence)):
        assert f"{SHOWN} wherever active; " in title(figure)


def test_lines_say_what_is_wrong(census: Census) -> None:
    for arguments, message in (
        (dict(column="loss"), "column must be one of delta_loss, gap_norm, routing_weight, not 'loss'"),
        (dict(statistic="p99"), "statistic must be one of mean, median, p5, p95, not 'p99'"),
        (dict(column="gap_norm", statistic="p95"), "of gap_norm there is the mean, and no p95"),
        (dict(by="expert"), "by must be layer or rank, not 'expert'"),
        (dict(scale="log"), "delta_loss has no log scale"),
        (dict(scale="square"), "scale must be linear or log"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.census_lines(census, **arguments)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"by='rank' shows a Census or its by_rank\(\), not a frame of layer"
    ):
        plots.census_lines(census.by_layer())
    with pytest.raises(ValueError, match=r"by='layer' shows a Census or its by_layer\(\)"):
        plots.census_lines(census.by_rank(), by="layer")
    with pytest.raises(ValueError, match="no rows to show"):
        plots.census_lines(census.by_rank().head(0))


# ---- the distribution ----


def sizes_of(places: np.ndarray) -> np.ndarray:
    """Where on the axis, back in nats."""
    return np.sign(places) * LINEAR_BELOW * (10.0 ** np.abs(places) - 1)


@pytest.mark.parametrize("by", ["rank", "layer"])
def test_distribution_counts_every_ablation_once(census: Census, by: Any) -> None:
    figure = plots.loss_change_distribution(census, by=by)
    rows = census.to_pandas()
    groups = sorted(rows[by].unique())
    assert len(traces(figure)) == len(groups)
    for group, trace in zip(groups, traces(figure), strict=True):
        changes = rows[rows[by] == group]["delta_loss"].to_numpy(float)
        centres, share = np.asarray(trace.x), np.asarray(trace.y)
        assert np.nansum(share) == pytest.approx(100)
        assert not (share == 0).any()  # an empty bin is blank: zero has no logarithm
        half = (centres[1] - centres[0]) / 2
        assert half == pytest.approx(0.25)  # few ablations, wide bins
        for low, high, s in zip(centres - half, centres + half, share, strict=True):
            inside = (changes >= sizes_of(low)) & (changes < sizes_of(high))
            assert np.nan_to_num(s) == pytest.approx(100 * inside.mean(), abs=1e-9)
    assert "270 ablations in 5 documents" in title(figure)
    layout = style.layout_of(figure)
    assert layout.yaxis.type == "log"
    np.testing.assert_allclose(
        sizes_of(np.array(layout.xaxis.tickvals)),
        [float(text.replace("−", "-")) for text in layout.xaxis.ticktext],
        rtol=1e-9,
        atol=1e-15,
    )
    low, high = layout.xaxis.range
    assert -low == high >= np.log10(1 + np.abs(rows["delta_loss"]).max() / LINEAR_BELOW)


def test_distribution_of_rows_and_layers(census: Census) -> None:
    rows = census.to_pandas()
    for one, other in (
        (plots.loss_change_distribution(rows), plots.loss_change_distribution(census)),
        (
            plots.loss_change_distribution(census, layers=(1, 4)),
            plots.loss_change_distribution(rows, layers=(1, 4)),
        ),
        (
            plots.loss_change_distribution(rows[rows.layer == 2]),  # type: ignore[arg-type]
            plots.loss_change_distribution(census, layers=2),
        ),
    ):
        for mine, its in zip(traces(one), traces(other), strict=True):
            np.testing.assert_array_equal(mine.x, its.x)
            np.testing.assert_array_equal(mine.y, its.y)
    assert "90 ablations" in title(plots.loss_change_distribution(census, layers=2))


@pytest.mark.parametrize(("n", "width"), [(3000, 0.1), (2999, 0.3), (500, 0.3), (499, 0.5)])
def test_bins_are_wider_where_there_are_few_ablations(n: int, width: float) -> None:
    """However wide they are, one bin is about zero, and none is lost."""
    changes = np.linspace(-1, 1, n)
    rows = pd.DataFrame({"layer": 0, "rank": 1, "delta_loss": changes})
    (trace,) = traces(plots.loss_change_distribution(rows))
    centres = np.asarray(trace.x)
    np.testing.assert_allclose(np.diff(centres), width)
    middle = len(centres) // 2
    assert centres[middle] == pytest.approx(0, abs=1e-12)
    assert np.nansum(trace.y) == pytest.approx(100)
    inside = np.abs(changes) <= sizes_of(np.array(width / 2))
    assert np.nan_to_num(trace.y[middle]) == pytest.approx(100 * inside.mean())


def test_distribution_of_nothing_but_zeros() -> None:
    rows = pd.DataFrame({"layer": [0, 0], "rank": [1, 2], "delta_loss": [0.0, 0.0]})
    for trace in traces(plots.loss_change_distribution(rows)):
        np.testing.assert_array_equal(trace.y, [np.nan, 100.0, np.nan])


def test_distribution_says_what_is_wrong(census: Census) -> None:
    with pytest.raises(ValueError, match="by must be layer or rank"):
        plots.loss_change_distribution(census, by="expert")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the frame has no rank"):
        plots.loss_change_distribution(census.to_pandas(["layer", "delta_loss"]))
    for given in (census, census.to_pandas()):
        with pytest.raises(ValueError, match="3"):
            plots.loss_change_distribution(given, layers=3)
    with pytest.raises(ValueError, match="no rows whose changes could be counted"):
        plots.loss_change_distribution(census.to_pandas().head(0))
