"""The published audit's numbers: complete, consistent with one another, and against the paper where it is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moe_lens.audit.metric_formulas import PAPER_METRICS
from moe_lens.audit.protocol_presets import AUDIT_PRESETS
from moe_lens.audit.published import (
    ALPHA_CONTROL,
    ALPHA_METRICS,
    CONTRADICTIONS,
    published_cells,
    published_progressive,
    published_redistribution,
)

COLUMNS = ["model", "table", "family", "metric", "layer", "n", "d", "p_t", "p_wilcoxon", "rho"]
NAMED = {contradiction.name: contradiction for contradiction in CONTRADICTIONS}


def one(model: str, metric: str, layer: int) -> pd.Series:
    cells = published_cells(model)
    found = cells[(cells["metric"] == metric) & (cells["layer"] == layer)]
    assert len(found) == 1
    return found.iloc[0]


def test_cells_are_60_and_15() -> None:
    cells = published_cells()
    assert list(cells.columns) == COLUMNS
    assert cells["family"].value_counts().to_dict() == {"metrics": 60, "control": 15}
    assert cells["table"].value_counts().to_dict() == {1: 20, 2: 20, 3: 20, 4: 5, 5: 5, 6: 5}
    assert not cells.duplicated(["model", "family", "metric", "layer"]).any()
    assert (cells["n"] == 200).all()
    for i, (model, preset) in enumerate(AUDIT_PRESETS.items()):
        of = published_cells(model)
        pd.testing.assert_frame_equal(of, published_cells(preset.model))
        assert set(of["table"]) == {1 + i, 4 + i}
        for (_, metric), rows in of.groupby(["family", "metric"]):
            assert metric in (*PAPER_METRICS, "routing_weight")
            assert tuple(rows["layer"]) == preset.layers
    with pytest.raises(ValueError, match="mixtral"):
        published_cells("mixtral")


def test_what_is_not_printed_is_nan() -> None:
    cells = published_cells()
    metrics, control = cells[cells["family"] == "metrics"], cells[cells["family"] == "control"]
    assert metrics["rho"].isna().all()
    assert metrics["p_wilcoxon"].notna().sum() == 1
    assert control.notna().all(axis=None)
    assert cells[["d", "p_t"]].notna().all(axis=None)


def test_p_follows_from_d() -> None:
    """t = d sqrt(n): a digit mistaken in either shows. d is rounded to 0.0005; p_t to 0.0005 or finer."""
    cells = published_cells()
    size, root = cells["d"].abs().to_numpy(), np.sqrt(cells["n"].to_numpy())
    high = 2 * stats.t.sf((size - 0.0006).clip(0) * root, 199) + 0.0006
    low = 2 * stats.t.sf((size + 0.0006) * root, 199) - 0.0006
    assert cells[(cells["p_t"] < low) | (cells["p_t"] > high)].empty


@pytest.mark.parametrize(
    ("model", "metric", "layer", "d", "p_t"),
    [
        ("olmoe", "utilization_rate", 0, -0.071, 0.319),
        ("olmoe", "activation_std", 11, 0.141, 0.048),
        ("qwen2_moe", "utilization_rate", 0, -0.131, 0.065),
        ("qwen2_moe", "activation_std", 23, 0.222, 0.002),
        ("deepseek_v2", "activation_norm", 1, 0.157, 0.028),
        ("deepseek_v2", "utilization_rate", 20, 0.163, 0.023),
        ("olmoe", "routing_weight", 15, 0.231, 0.0013),
        ("qwen2_moe", "routing_weight", 18, 0.124, 0.081),
        ("deepseek_v2", "routing_weight", 26, 0.098, 0.169),
    ],
)
def test_values(model: str, metric: str, layer: int, d: float, p_t: float) -> None:
    cell = one(model, metric, layer)
    assert (cell["d"], cell["p_t"]) == (d, p_t)


def test_signs_and_what_the_paper_counts() -> None:
    cells = published_cells()
    metrics = cells[cells["family"] == "metrics"]
    assert (metrics[metrics["p_t"] < 0.05].groupby("model").size().to_dict()) == {
        "olmoe": 1,
        "qwen2_moe": 2,
        "deepseek_v2": 3,
    }
    negative = (cells["d"] < 0).groupby(cells["table"]).sum()
    assert negative.to_dict() == {1: 9, 2: 3, 3: 4, 4: 1, 5: 1, 6: 0}
    assert metrics.loc[metrics["metric"] == "activation_norm", "d"].abs().max() == 0.157
    assert (one("olmoe", "routing_weight", 0)["rho"], one("qwen2_moe", "routing_weight", 23)["rho"]) == (
        -0.058,
        -0.011,
    )


def test_redistribution() -> None:
    frame = published_redistribution()
    assert list(frame.columns[:5]) == ["model", "table", "layer", "n_experts", "n_activations"]
    assert tuple(frame["layer"]) == AUDIT_PRESETS["qwen2_moe"].layers
    assert (frame["n_experts"] == 60).all()
    last = frame.iloc[-1]
    assert (last["mean_gap_norm"], last["rho_weight_gap"], last["rho_gap_compensation"]) == (
        0.440,
        0.744,
        0.282,
    )
    for pair in ("weight_gap", "gap_compensation"):
        rho = frame[f"rho_{pair}"].to_numpy()
        p = 2 * stats.t.sf(rho * np.sqrt(58 / (1 - rho**2)), 58)
        marks = [next((a for a in (0.001, 0.01, 0.05) if value < a), np.nan) for value in p]
        np.testing.assert_array_equal(frame[f"p_{pair}_below"], marks)


def test_progressive() -> None:
    frame = published_progressive()
    assert list(frame.columns) == ["model", "layer", "k", "n", "mean", "median", "p95"]
    assert len(frame) == 6 * 7
    assert (frame["n"] == 500).all()
    assert (frame["mean"] > 0).all()
    mean = frame.pivot(index="k", columns="layer", values="mean")
    assert mean.loc[[1, 2, 7], 15].tolist() == [0.082, 0.155, 0.431]
    assert mean.loc[7].tolist() == [0.028, 0.068, 0.020, 0.070, 0.083, 0.431]
    assert frame["median"].notna().equals(frame["k"] == 7)
    at_7 = frame[frame["k"] == 7].set_index("layer")
    assert (at_7["median"] < 0.02).all()
    assert (at_7.loc[15, "p95"], at_7["p95"].drop(15).max()) == (2.633, 0.709)


def test_contradictions_follow_from_the_tables() -> None:
    cells = published_cells()
    metrics = cells[cells["family"] == "metrics"]
    assert len(NAMED) == len(CONTRADICTIONS) == 5

    bound = NAMED["effect_size_bound"]
    assert bound.printed == tuple(metrics.loc[metrics["d"].abs() > bound.claimed[0], "d"]) == (0.222,)
    assert [(cell.model, cell.table, cell.metric, cell.layer) for cell in bound.cells] == [
        ("qwen2_moe", 2, "activation_std", 23)
    ]

    monotone = NAMED["monotone_control"]
    assert (
        monotone.printed == tuple(cells.loc[cells["table"] == 4, "d"]) == (-0.114, 0.095, 0.085, 0.164, 0.231)
    )
    assert (np.diff(monotone.printed) < 0).tolist() == [False, True, False, False]
    assert (np.diff(np.abs(monotone.printed)) < 0).tolist() == [True, True, False, False]

    none = NAMED["no_metric_at_threshold"]
    assert none.printed == tuple(metrics.loc[metrics["p_t"] < ALPHA_METRICS, "p_t"]) == (0.002,)

    rule = NAMED["agreement_rule"]
    assert rule.printed == (0.036, 0.019)
    for cell, alpha in zip(rule.cells, (ALPHA_METRICS, ALPHA_CONTROL), strict=True):
        assert cell.p_t < alpha < cell.p_wilcoxon < 0.05

    bold = NAMED["bold_control"]
    assert [(cell.table, cell.layer) for cell in bold.cells] == [(4, 11)]
    assert bold.printed == (0.022,)
    assert bold.printed[0] > bold.claimed[0] == ALPHA_CONTROL
