"""The published audit's numbers beside one's own, with what each is of.

A number is compared with the one that is computed as it was: d with d, the published p of a paired t-test with the one
that takes positions for independent, and so on. What still differs is said in every row, of both sides:

definition    of what experts are ranked by, or of what is averaged and correlated
statistic     how the number is computed of that: which standard deviation, what becomes of differences that are zero
scope         where experts are taken away, and how
sampling      how many positions, how they were drawn, and what becomes of experts that tie
corpus        which text, and the precision of the model's numbers

Where our audit compares the means of several experts at either end, it is another experiment than the published one,
which compares single experts; then tables 1 to 6 have no number of ours beside them.

Of the published side, what goes beyond the paper was read in its released code,
https://github.com/callmeloui/observational_metrics, commit 04a5aef: `per_token_ablation_olmoe.py` and
`per_token_ablation_deepseek.py` (tables 1 and 3), `validation_qwen.py` (2 and 5), `routing_weight_control_olmoe.py` and
`routing_weight_control_deepseek.py` (4 and 6), `redistribution_qwen.py` (7), `progressive_ablation_olmoe.py` (8 and 9).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_lens.audit.protocol_presets import (
    AUDIT_PRESETS,
    PROGRESSIVE_PRESET,
    REDISTRIBUTION_PRESETS,
    AuditPreset,
)
from moe_lens.audit.published import published_cells, published_progressive, published_redistribution
from moe_lens.audit.released_metrics import RELEASED

SIDES = ("definition", "statistic", "scope", "sampling", "corpus")
"""What is said of the published number (`published_definition` and so on) and of ours (`ours_definition`)."""

COLUMNS = (
    "label", "table", "family", "metric", "layer", "removed", "quantity", "published", "ours", "ours_row",
    "published_n", "ours_n", *(f"{side}_{name}" for name in SIDES for side in ("published", "ours")),
)  # fmt: skip
"""Of `beside_published`:

label, table            of the model, and of the paper
family, metric, layer   of the cell; `family` is metrics, control, progressive or redistribution
removed                 k of progressive removal, else 0
quantity                d, p_t, p_wilcoxon, rho, mean, median, p95 or mean_gap_norm
published, ours         the number; ours is NaN where there is none
ours_row                the row of ours in its own table (`audit:17`), empty where there is none
published_n, ours_n     positions that the number is of (ours: pairs, without those that were left out); of table 7,
                        tokens; 0 where there is no number of ours
..._definition, ...     `SIDES`, in words. Those of ours are empty where there is none; where there is one that is of
                        another experiment, `ours_definition` says that
"""


@dataclass(frozen=True, eq=False)
class Ours:
    """A result of ours.

    Attributes:
        rows: of `AuditTables`, with the index that they are saved under.
        provenance: of the result.
    """

    rows: pd.DataFrame
    provenance: Mapping[str, Any]


def published_key(model: str, model_type: str) -> str | None:
    """Under which name the published audit has a model: a key of `AUDIT_PRESETS`, or None.

    A model is known by the last part of its name, so that a local copy in a folder of that name is taken for it.
    """
    preset = AUDIT_PRESETS.get(model_type)
    if preset is None:
        return None
    ours, theirs = (name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (model, preset.model))
    return model_type if ours == theirs else None


def beside_published(
    label: str,
    key: str,
    audits: Sequence[Ours] = (),
    progressive: Ours | None = None,
    redistribution: Ours | None = None,
) -> pd.DataFrame:
    """A row for every published number of a model and every audit of ours that has its cell, and one row where none
    has.

    Args:
        label: of the model.
        key: of `AUDIT_PRESETS`.
        audits, progressive, redistribution: of this model, what there is.

    Returns:
        The columns are `COLUMNS`. Ours is NaN where there is none.
    """
    lines = [
        *_cells(key, audits),
        *_progressive(key, progressive),
        *_redistribution(key, redistribution),
    ]
    return pd.DataFrame([{"label": label, **line} for line in lines], columns=list(COLUMNS))


_NONE = {"ours": math.nan, "ours_row": "", "ours_n": 0, **{f"ours_{name}": "" for name in SIDES}}


def _corpus(preset: AuditPreset, precision: str) -> str:
    lines = preset.corpus
    which = f"lines of more than {lines.longer_than} characters"
    which += "" if lines.min_tokens is None else f" and at least {lines.min_tokens} tokens"
    which += "" if lines.first is None else f", the first {lines.first}"
    return f"WikiText-2's raw test split: {which}, cut to {lines.max_tokens} tokens; {precision} in its released code"


_DRAWN = ", drawn uniformly without replacement"
"""Our positions, where they are a sample."""


def _ours_corpus(provenance: Mapping[str, Any]) -> str:
    return f"{provenance['corpus']}; {provenance['dtype']}"


# ---- tables 1 to 6 ----

_QUANTITIES = {"d": "d", "p_t": "p_t_plain", "p_wilcoxon": "p_wilcoxon_plain", "rho": "rho"}
"""Of published cells, and the column of `Audit.cells` that is computed in the same way."""
_PRECISION = {"olmoe": "float32", "qwen2_moe": "bfloat16", "deepseek_v2": "float16"}
"""Of the weights, in the released scripts for tables 1 to 6. The appendix says no more than "half-precision" and
"fp32" of tolerances."""
_SCOPE = "set to zero; the paper: at the one position; its released code: at every position of the text"
_ROUTING_WEIGHT = "routing weight of the expert at the position"
_IN_THE_PAPER = {
    "mean_routing_weight": "the paper: mean routing weight over the tokens that select the expert"
}
"""Of the four metrics, what the paper says beyond the name."""
_CONTROL_DRAWN = (
    "with replacement: a line uniformly, then a position of it but the first and the last, uniformly"
)
"""The control's positions, in the released code of all three models; those of the metrics are in `AUDIT_PRESETS`."""
_TIES = "where experts tie, whichever its sort puts first or last is taken"
_ALL_BUT_EQUAL = "; positions whose weights differ by less than 1e-6 are not drawn"
"""Only the control of DeepSeek's."""
_DDOF_0, _DDOF_1 = (
    "mean over standard deviation with ddof 0 (numpy's default), as its released code has it: sqrt(n / (n - 1)) times "
    "that with ddof 1, 0.25% more at n = 200",
    "mean over standard deviation with ddof 1",
)
_RELEASED_DDOF_0 = ("olmoe", "deepseek_v2")
"""Whose scripts for the metrics divide by numpy's `diffs.std()`. Qwen's, and those of all controls, say `ddof=1`."""
_PAIRED_T = "paired t-test, positions taken for independent"
_ZERO = "signed-rank test, positions taken for independent; differences of exactly zero are"
_RATIO = "Spearman's correlation of the ratio of the two routing weights with the difference of the losses"


def _published_statistic(key: str, family: str, quantity: str) -> str:
    d = (
        _DDOF_0
        if family == "metrics" and key in _RELEASED_DDOF_0
        else f"{_DDOF_1}, as its released code has it"
    )
    return {
        "d": d,
        "p_t": _PAIRED_T,
        "p_wilcoxon": f"{_ZERO} dropped before ranking (scipy's zero_method 'wilcox' in its released code)",
        "rho": _RATIO,
    }[quantity]


_OURS_STATISTIC = {
    "d": _DDOF_1,
    "p_t": _PAIRED_T,
    "p_wilcoxon": f"{_ZERO} ranked with the others and then dropped (Pratt), which may differ from 'wilcox' where "
    "there are any",
    "rho": _RATIO,
}


def _cells(key: str, audits: Sequence[Ours]) -> Iterator[dict[str, Any]]:
    for cell in published_cells(key).to_dict("records"):
        control = cell["family"] == "control"
        found = [
            (one.provenance, number, row)
            for one in audits
            for number, row in _rows_of(
                one.rows, **{name: cell[name] for name in ("family", "metric", "layer")}
            )
            # The definitions of metrics make no difference to a control, which is the census's alone.
            if not (control and row["as_released"])
        ]
        same = [one for one in found if _compared(one[0]) == 1]
        for quantity, column in _QUANTITIES.items():
            if math.isnan(cell[quantity]):
                continue
            line = {
                **{name: cell[name] for name in ("table", "family", "metric", "layer")},
                "removed": 0,
                "quantity": quantity,
                "published": cell[quantity],
                "published_n": cell["n"],
                "published_statistic": _published_statistic(key, cell["family"], quantity),
                **_published_cell(key, cell),
            }
            for provenance, number, row in same:
                yield {
                    **line,
                    "ours": float(row[column]),
                    "ours_row": f"audit:{number}",
                    "ours_n": int(row["n_pairs"]),
                    "ours_statistic": _OURS_STATISTIC[quantity],
                    **_ours_cell(provenance, row),
                }
            if not same:
                several = sorted({_compared(provenance) for provenance, _, _ in found})
                yield {**line, **_NONE, "ours_definition": _another_experiment(several) if several else ""}


def _rows_of(rows: pd.DataFrame, **values: Any) -> Iterator[tuple[Any, dict[Any, Any]]]:
    """Those that have these values, each with the number that it is saved under."""
    for name, value in values.items():
        rows = rows.loc[rows[name] == value]
    yield from zip(rows.index, rows.to_dict("records"), strict=True)


def _compared(provenance: Mapping[str, Any]) -> int:
    """How many experts at either end."""
    return int(provenance["settings"]["compare"])


def _another_experiment(compared: Sequence[int]) -> str:
    most = " or ".join(map(str, compared))
    return (
        f"no number of ours: our audit compares the mean of the {most} highest experts with that of the lowest, and "
        f"the published one a single expert with another, which is another experiment"
    )


def _published_cell(key: str, cell: Mapping[Any, Any]) -> dict[str, str]:
    preset, definition = AUDIT_PRESETS[key], _ROUTING_WEIGHT
    drawn, ties = _CONTROL_DRAWN, _TIES + (_ALL_BUT_EQUAL if key == "deepseek_v2" else "")
    if cell["family"] == "metrics":
        drawn, ties = preset.drawn, _TIES
        in_the_paper = _IN_THE_PAPER.get(cell["metric"], "the paper names it")
        definition = f"{in_the_paper}; its released code: {RELEASED[key].definitions[cell['metric']]}"
    return {
        "published_definition": definition,
        "published_scope": _SCOPE,
        "published_sampling": f"n = {cell['n']}, drawn {drawn}; {ties}",
        "published_corpus": _corpus(preset, _PRECISION[key]),
    }


def _ours_cell(provenance: Mapping[str, Any], row: Mapping[Any, Any]) -> dict[str, str]:
    table, census = provenance["metric_table"], provenance["census"]
    sampled = census.get("sample") is not None or provenance["settings"].get("n") is not None
    drawn = _DRAWN if sampled else ""
    definition = _ROUTING_WEIGHT
    if row["family"] == "metrics":
        definition = (
            f"as released: {RELEASED[row['as_released']].definitions[row['metric']]}"
            if row["as_released"]
            else (table or {"definitions": {}})["definitions"].get(row["metric"], "")
        )
    return {
        "ours_definition": definition,
        "ours_scope": f"{row['scope']}, {row['how']}",
        "ours_sampling": f"{int(row['n_pairs']):,} pairs of {int(row['n_positions']):,} positions "
        f"({int(row['n_ties']):,} tied, {int(row['n_undefined']):,} undefined left out){drawn}",
        "ours_corpus": _ours_corpus(census),
    }


# ---- tables 8 and 9 ----

_TAILS = {
    "mean": ("delta_loss", "mean over positions"),
    "median": ("delta_loss_median", "median over positions"),
    "p95": ("delta_loss_p95", "95th percentile over positions"),
}
"""Of the published quantities, the column of ours, and what it is."""


def _ours_drawn(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return ""
    most = "" if sample.get("per_document") is None else f", at most {sample['per_document']} of a document"
    return f"{_DRAWN}{most}"


def _progressive(key: str, ours: Ours | None) -> Iterator[dict[str, Any]]:
    definition = "change of the loss without the k heaviest active experts, nats"
    published = published_progressive()
    drawn = _ours_drawn(None if ours is None else ours.provenance.get("sample"))
    for cell in published.loc[published["model"] == key].to_dict("records"):
        found = [] if ours is None else list(_rows_of(ours.rows, layer=cell["layer"], removed=cell["k"]))
        for quantity, (column, statistic) in _TAILS.items():
            if math.isnan(cell[quantity]):
                continue
            line = {
                "table": 8 if quantity == "mean" else 9,
                "family": "progressive",
                "metric": "delta_loss",
                "layer": cell["layer"],
                "removed": cell["k"],
                "quantity": quantity,
                "published": cell[quantity],
                "published_n": cell["n"],
                "published_definition": definition,
                "published_statistic": statistic,
                "published_scope": _SCOPE,
                "published_sampling": f"n = {cell['n']}, {PROGRESSIVE_PRESET.drawn}",
                "published_corpus": _corpus(PROGRESSIVE_PRESET, "float16 (float32 without CUDA)"),
            }
            if ours is None or not found:
                yield {**line, **_NONE}
                continue
            number, row = found[0]
            yield {
                **line,
                "ours": float(row[column]),
                "ours_row": f"progressive:{number}",
                "ours_n": int(row["n_rows"]),
                "ours_definition": definition,
                "ours_statistic": statistic,
                "ours_scope": f"{row['scope']}, {row['how']}",
                "ours_sampling": f"{int(row['n_rows']):,} positions{drawn}",
                "ours_corpus": _ours_corpus(ours.provenance),
            }


# ---- table 7 ----

_CORRELATIONS = {
    "rho_weight_gap": ("routing_weight", "gap_norm", "rho"),
    "rho_gap_compensation": ("gap_norm", "relative_compensation", "rho"),
    "mean_gap_norm": ("routing_weight", "gap_norm", "mean_gap_norm"),
}
_NEVER_ACTIVE = "experts that are never active"
_ROWS_APART = (
    "its released code drops padding from the layer's outputs but not from the routing (its flatten_with_mask masks "
    "three dimensions only, and the router's output has two), and pairs the two by row, so that after the first padded "
    "line an output stands beside another token's routing"
)


def _redistribution(key: str, ours: Ours | None) -> Iterator[dict[str, Any]]:
    published = published_redistribution()
    for cell in published.loc[published["model"] == key].to_dict("records"):
        for quantity, (x, y, column) in _CORRELATIONS.items():
            definition = (
                "mean over experts of the mean gap norm over tokens"
                if column == "mean_gap_norm"
                else f"{x} and {y}, each averaged over an expert's tokens"
            )
            statistic = "mean" if column == "mean_gap_norm" else "Spearman's correlation across experts"
            n = cell["n_activations"]
            line = {
                "table": 7,
                "family": "redistribution",
                "metric": f"{x}, {y}" if column == "rho" else column,
                "layer": cell["layer"],
                "removed": 0,
                "quantity": column,
                "published": cell[quantity],
                "published_n": n,
                "published_definition": definition,
                "published_statistic": f"{statistic}; {_NEVER_ACTIVE} count as 0 in its released code",
                "published_scope": "one forward pass",
                "published_sampling": f"{cell['n_experts']} experts; the paper: {n:,} activations; in its released "
                f"results that is the number of tokens; {REDISTRIBUTION_PRESETS[key].drawn} tokens of the lines; "
                + _ROWS_APART,
                "published_corpus": _corpus(REDISTRIBUTION_PRESETS[key], "bfloat16"),
            }
            found = [] if ours is None else list(_rows_of(ours.rows, layer=cell["layer"], x=x, y=y, given=""))
            if ours is None or not found:
                yield {**line, **_NONE}
                continue
            number, row = found[0]
            n_tokens = int(ours.provenance["n_tokens"])
            yield {
                **line,
                "ours": float(row[column]),
                "ours_row": f"redistribution:{number}",
                "ours_n": n_tokens,
                "ours_definition": definition,
                "ours_statistic": f"{statistic}; {_NEVER_ACTIVE} are left out",
                "ours_scope": "one forward pass",
                "ours_sampling": f"{int(row['n_experts']):,} experts; {n_tokens:,} tokens, all of the corpus",
                "ours_corpus": _ours_corpus(ours.provenance),
            }
