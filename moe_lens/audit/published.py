"""The numbers of the published audit, as data: what one's own audit is laid beside.

    ours = audit(table, metric_table, metrics=preset.metrics, layers=preset.layers, n=preset.n).cells
    beside = ours.merge(published_cells("olmoe"), on=["family", "metric", "layer"], suffixes=("", "_published"))

Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
(arXiv:2606.10703v1, CC BY 4.0), tables 1 to 9, every number as it is printed. Models are named as in
`AUDIT_PRESETS`, which has the settings; layers are counted from 0.

Definitions. At a position, the active routed experts are ranked; the loss of the next token is taken with the first
zeroed and with the last zeroed, each less the loss of the whole model. d is Cohen's d of the paired difference, first
minus last; p_t is of a paired t-test, p_wilcoxon of a signed-rank test. In the released code the standard deviation of
d has ddof 0 in tables 1 and 3 (numpy's default) and ddof 1 in tables 2 and 4 to 6, the signed-rank test drops
differences of zero before ranking (scipy's `zero_method="wilcox"`), and experts that tie are ordered as the sort leaves
them. `moe_lens.audit.published_beside` says of every number how it differs from ours.

Scope and sampling. n = 200 positions of WikiText-2's test split for each cell of tables 1 to 6. The paper speaks of
ablation at the position; its released code zeroes the expert at every position of the text
(https://github.com/callmeloui/observational_metrics). Experts that all tokens share are left alone.

Left out. Appendix A.1 announces p_wilcoxon for tables 1 to 3, but the text (HTML version) has none of them; section 3
gives one, of `activation_std` in Qwen's layer 23. The others are NaN here. Figures are not here either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from moe_lens.audit.protocol_presets import AUDIT_PRESETS, PROGRESSIVE_PRESET, REDISTRIBUTION_PRESETS
from moe_lens.audit.protocol_table import Family

N_POSITIONS = 200
"""Of each cell of tables 1 to 6."""

ALPHA_METRICS, ALPHA_CONTROL = 0.05 / 20, 0.05 / 5
"""The paper's thresholds after Bonferroni's correction, for each model: 20 cells of metrics, 5 of the control."""


@dataclass(frozen=True)
class PublishedCell:
    """A metric, or the control, at a layer.

    Attributes:
        model: a key of `AUDIT_PRESETS`.
        table: in the paper.
        family: `metrics` (tables 1 to 3) or `control` (tables 4 to 6), as in `Audit.cells`.
        metric: one of `PAPER_METRICS`, or `routing_weight`: the control, the weight at the position itself.
        layer: counted from 0, dense ones included.
        n: positions.
        d: Cohen's d of the paired differences.
        p_t: of the paired t-test, uncorrected.
        p_wilcoxon: of the signed-rank test, uncorrected; NaN where it is not printed.
        rho: Spearman's, of the ratio of the two routing weights and the paired difference; NaN but for the control.
    """

    model: str
    table: int
    family: Family
    metric: str
    layer: int
    n: int
    d: float
    p_t: float
    p_wilcoxon: float
    rho: float


@dataclass(frozen=True)
class Contradiction:
    """A statement of the paper, and the cells of its own tables that say otherwise.

    Attributes:
        name: short.
        said: a few of the paper's words.
        where: it says so.
        claimed: the numbers that the statement rests on: a bound or thresholds; none where it is about an order.
        column: of `published_cells`, which the statement is about.
        cells: those that speak against it, by layer.
        why: in words.
    """

    name: str
    said: str
    where: str
    claimed: tuple[float, ...]
    column: str
    cells: tuple[PublishedCell, ...]
    why: str

    @property
    def printed(self) -> tuple[float, ...]:
        """What the tables have in that column, cell by cell."""
        return tuple(getattr(cell, self.column) for cell in self.cells)


# ---- tables 1 to 3: the metrics ----

# By model the table, by metric d and p_t at the layers of the model's preset.
_METRICS = {
    "olmoe": (
        1,
        {
            "utilization_rate": ((-0.071, -0.027, 0.029, 0.066, 0.051), (0.319, 0.702, 0.687, 0.351, 0.476)),
            "activation_norm": ((-0.095, 0.119, 0.075, 0.136, 0.033), (0.182, 0.094, 0.293, 0.057, 0.640)),
            "mean_routing_weight": (
                (0.048, -0.093, 0.072, -0.036, -0.095),
                (0.500, 0.189, 0.312, 0.611, 0.179),
            ),
            "activation_std": ((-0.034, 0.030, -0.098, 0.141, -0.020), (0.634, 0.669, 0.169, 0.048, 0.777)),
        },
    ),
    "qwen2_moe": (
        2,
        {
            "utilization_rate": ((-0.131, 0.012, 0.111, 0.009, -0.001), (0.065, 0.861, 0.118, 0.903, 0.993)),
            "activation_norm": ((0.019, 0.053, 0.110, 0.045, 0.092), (0.786, 0.454, 0.120, 0.526, 0.194)),
            "mean_routing_weight": (
                (0.021, 0.018, -0.006, 0.129, 0.035),
                (0.772, 0.798, 0.934, 0.070, 0.620),
            ),
            "activation_std": ((0.067, 0.046, 0.081, 0.149, 0.222), (0.343, 0.515, 0.252, 0.036, 0.002)),
        },
    ),
    "deepseek_v2": (
        3,
        {
            "utilization_rate": ((-0.039, 0.044, 0.115, 0.163, 0.143), (0.581, 0.533, 0.105, 0.023, 0.045)),
            "activation_norm": ((0.157, 0.040, 0.097, 0.006, 0.084), (0.028, 0.576, 0.172, 0.937, 0.235)),
            "mean_routing_weight": (
                (-0.007, -0.070, 0.097, -0.014, 0.035),
                (0.926, 0.327, 0.174, 0.849, 0.621),
            ),
            "activation_std": ((0.101, 0.064, 0.043, 0.050, 0.064), (0.156, 0.369, 0.545, 0.483, 0.370)),
        },
    ),
}

# Section 3, in words; the tables print none.
_WILCOXON = {("qwen2_moe", "activation_std", 23): 0.036}


# ---- tables 4 to 6: the control ----

# By model the table; then d, p_t, p_wilcoxon and rho at the layers of the model's preset.
_CONTROL = {
    "olmoe": (
        4,
        (-0.114, 0.095, 0.085, 0.164, 0.231),
        (0.107, 0.180, 0.233, 0.022, 0.0013),
        (0.217, 0.799, 0.227, 0.015, 0.019),
        (-0.058, 0.019, 0.196, 0.084, 0.199),
    ),
    "qwen2_moe": (
        5,
        (0.014, -0.031, 0.114, 0.124, 0.112),
        (0.840, 0.659, 0.110, 0.081, 0.116),
        (0.385, 0.589, 0.308, 0.922, 0.199),
        (-0.084, 0.043, -0.036, 0.082, -0.011),
    ),
    "deepseek_v2": (
        6,
        (0.075, 0.078, 0.068, 0.068, 0.098),
        (0.293, 0.273, 0.336, 0.335, 0.169),
        (0.390, 0.508, 0.460, 0.085, 0.466),
        (0.090, -0.070, 0.051, -0.001, -0.018),
    ),
}


def _all_cells() -> Iterator[PublishedCell]:
    for model, (table, by_metric) in _METRICS.items():
        for metric, (d, p_t) in by_metric.items():
            for layer, effect, p in zip(AUDIT_PRESETS[model].layers, d, p_t, strict=True):
                p_wilcoxon = _WILCOXON.get((model, metric, layer), math.nan)
                yield PublishedCell(
                    model, table, "metrics", metric, layer, N_POSITIONS, effect, p, p_wilcoxon, math.nan
                )
    for model, (table, *columns) in _CONTROL.items():
        for layer, *values in zip(AUDIT_PRESETS[model].layers, *columns, strict=True):
            yield PublishedCell(model, table, "control", "routing_weight", layer, N_POSITIONS, *values)


CELLS = tuple(_all_cells())
"""Tables 1 to 6, in the order of the tables, their rows and their layers: 60 cells of metrics, 15 of the control."""


def published_cells(model: str | None = None) -> pd.DataFrame:
    """Tables 1 to 6: a row per (model, family, metric, layer), with the attributes of `PublishedCell` as columns.

    n = 200 positions of WikiText-2's test split in each; the released code zeroes at every position of the text.

    Args:
        model: a key of `AUDIT_PRESETS`, or that model's name on the hub; None is all three.
    """
    if model is None:
        return pd.DataFrame(CELLS)
    keys = [key for key, preset in AUDIT_PRESETS.items() if model in (key, preset.model)]
    if not keys:
        raise ValueError(f"the published audit has no {model!r}, but {', '.join(AUDIT_PRESETS)}")
    return pd.DataFrame([cell for cell in CELLS if cell.model == keys[0]])


# ---- table 7: redistribution ----

_REDISTRIBUTION = {
    "mean_gap_norm": (0.011, 0.122, 0.090, 0.239, 0.440),
    "rho_weight_gap": (0.558, 0.638, 0.632, 0.596, 0.744),
    "p_weight_gap_below": (0.001, 0.001, 0.001, 0.001, 0.001),
    "rho_gap_compensation": (0.076, 0.394, 0.388, 0.349, 0.282),
    "p_gap_compensation_below": (math.nan, 0.01, 0.01, 0.01, 0.05),
}


def published_redistribution() -> pd.DataFrame:
    """Table 7: Qwen1.5-MoE's redistribution, a row per layer.

    Columns:
        model, table, layer
        n_experts: 60, the routed ones, over which both correlations are taken.
        n_activations: 34,016, for each layer: the paper says token-level activations of experts; the released results
            have it as `n_tokens`, of which each has 4.
        mean_gap_norm: over experts, of the L2 distance between the layer's output and that without the expert.
        rho_weight_gap: Spearman's, routing weight and gap norm.
        rho_gap_compensation: Spearman's, gap norm and relative compensation.
        p_weight_gap_below, p_gap_compensation_below: what the table's marks say that p is below; NaN where it has no
            mark (appendix A.3 gives p = 0.563 for the one such).

    In the released code (`redistribution_qwen.py`) an expert that is never active counts as 0. Its routing weights keep
    the rows of padding tokens, which its outputs have lost (`flatten_with_mask` masks three-dimensional tensors, and
    the router's output has two), and both are read by row number: after the first padded line, the tokens at which an
    expert counts as active are others than those whose outputs are compared. The released results look like it: in
    layer 23 experts 5 and 21 are active at 12,611 tokens each, and the gap norms' standard deviations are several times
    their means.
    """
    layers = list(REDISTRIBUTION_PRESETS["qwen2_moe"].layers)
    first = {"model": "qwen2_moe", "table": 7, "layer": layers, "n_experts": 60, "n_activations": 34_016}
    return pd.DataFrame({**first, **_REDISTRIBUTION})


# ---- tables 8 and 9: progressive ----

# A line for each k, from 1 to 7; at the layers of the preset.
_MEAN = (
    (0.009, 0.018, 0.009, 0.015, 0.029, 0.082),
    (0.013, 0.031, 0.016, 0.028, 0.060, 0.155),
    (0.016, 0.035, 0.010, 0.045, 0.061, 0.214),
    (0.019, 0.051, 0.022, 0.054, 0.073, 0.290),
    (0.029, 0.058, 0.022, 0.061, 0.080, 0.354),
    (0.021, 0.058, 0.025, 0.062, 0.078, 0.403),
    (0.028, 0.068, 0.020, 0.070, 0.083, 0.431),
)
_MEDIAN_AT_7 = (0.000, 0.003, 0.001, 0.008, 0.012, 0.018)
_P95_AT_7 = (0.433, 0.398, 0.473, 0.641, 0.709, 2.633)


def published_progressive() -> pd.DataFrame:
    """Tables 8 and 9: OLMoE's change of loss without the k heaviest of a position's 8 experts, by layer, then k.

    n = 500 positions of WikiText-2's test split for each (layer, k); nats of the next token's loss, less that of the
    whole model.

    Columns:
        model, layer, k, n
        mean: table 8.
        median, p95: table 9, which has them for k = 7 alone; NaN elsewhere.
    """
    lines = []
    for i, layer in enumerate(PROGRESSIVE_PRESET.layers):
        for k, means in zip(PROGRESSIVE_PRESET.removed, _MEAN, strict=True):
            tail = (_MEDIAN_AT_7[i], _P95_AT_7[i]) if k == 7 else (math.nan, math.nan)
            lines.append(("olmoe", layer, k, PROGRESSIVE_PRESET.n, means[i], *tail))
    return pd.DataFrame(lines, columns=["model", "layer", "k", "n", "mean", "median", "p95"])


# ---- where the paper contradicts itself ----


def _cells(model: str, metric: str, *layers: int) -> tuple[PublishedCell, ...]:
    return tuple(
        cell
        for cell in CELLS
        if (cell.model, cell.metric) == (model, metric) and (not layers or cell.layer in layers)
    )


_QWEN_STD = _cells("qwen2_moe", "activation_std", 23)
_OLMOE_CONTROL = _cells("olmoe", "routing_weight")

CONTRADICTIONS = (
    Contradiction(
        "effect_size_bound",
        "below Cohen's d=0.17 across all 60",
        "abstract, sections 1 and 3",
        (0.17,),
        "d",
        _QWEN_STD,
        "table 2 has a larger d, the largest of the 60",
    ),
    Contradiction(
        "monotone_control",
        "grows monotonically with depth",
        "section 3, of OLMoE's control",
        (),
        "d",
        _OLMOE_CONTROL,
        "table 4 falls from layer 4 to layer 7; without signs, from layer 0 to layer 4 and on to layer 7",
    ),
    Contradiction(
        "no_metric_at_threshold",
        "no cell reaches Bonferroni significance",
        "appendix A.1; section 3 likewise",
        (ALPHA_METRICS,),
        "p_t",
        _QWEN_STD,
        "its p_t in table 2 is below the threshold; section 3 says so too, and drops the cell for its p_wilcoxon",
    ),
    Contradiction(
        "agreement_rule",
        "any cell where t and Wilcoxon disagree",
        "section 2, of what is noise",
        (ALPHA_METRICS, ALPHA_CONTROL),
        "p_wilcoxon",
        (*_QWEN_STD, *_cells("olmoe", "routing_weight", 15)),
        "in both, p_t is below the family's threshold and p_wilcoxon between it and 0.05: the first is called noise, "
        "the second is the audit's one finding",
    ),
    Contradiction(
        "bold_control",
        "Cells in bold reach Bonferroni significance",
        "appendix A.2",
        (ALPHA_CONTROL,),
        "p_t",
        _cells("olmoe", "routing_weight", 11),
        "bold in table 4, with p_t above the threshold",
    ),
)
"""Statements beside the cells that speak against them, both as published."""
