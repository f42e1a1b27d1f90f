"""The published audit's numbers beside one's own, with what each is of.

A number is compared with the one that is computed as it was: d with d, the published p of a paired t-test with the one
that takes positions for independent, and so on. What still differs (definition, scope, sampling) is said in every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.audit.protocol_presets import AUDIT_PRESETS, PROGRESSIVE_PRESET, REDISTRIBUTION_PRESETS
from moe_lens.audit.published import published_cells, published_progressive, published_redistribution
from moe_lens.audit.released_metrics import RELEASED

COLUMNS = (
    "label", "table", "family", "metric", "layer", "removed", "quantity", "published", "ours", "ours_row",
    "published_definition", "ours_definition", "published_scope", "ours_scope", "published_sampling", "ours_sampling",
)  # fmt: skip
"""Of `beside_published`: `removed` is k of progressive removal, else 0; `ours_row` is the row of ours in its own table
(`audit:17`), empty where there is none."""

_QUANTITIES = {"d": "d", "p_t": "p_t_plain", "p_wilcoxon": "p_wilcoxon_plain", "rho": "rho"}
"""Of published cells, and the column of `Audit.cells` that is computed in the same way."""
_SCOPE = "the paper: at the one position; its released code: at every position of the text"
_ROUTING_WEIGHT = "routing weight of the expert at the position"
_IN_THE_PAPER = {
    "mean_routing_weight": "the paper: mean routing weight over the tokens that select the expert"
}
"""Of the four metrics, what the paper says beyond the name."""
_CONTROL_DRAWN = (
    "with replacement: a line uniformly, then a position of it but the first and the last, uniformly"
)
"""The control's positions, in the released code of all three models; those of the metrics are in `AUDIT_PRESETS`."""


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
    audit: pd.DataFrame,
    progressive: pd.DataFrame,
    redistribution: pd.DataFrame,
    definitions: Mapping[str, str],
) -> pd.DataFrame:
    """A row for every published number of a model and every audit of ours that has its cell, and one row where none
    has.

    Args:
        label: of the model.
        key: of `AUDIT_PRESETS`.
        audit, progressive, redistribution: its rows of `AuditTables`, with the index that they are saved under.
        definitions: of our metrics, in words.

    Returns:
        The columns are `COLUMNS`. Ours is NaN where there is none.
    """
    lines = [
        *_cells(key, audit, definitions),
        *_progressive(key, progressive),
        *_redistribution(key, redistribution),
    ]
    return pd.DataFrame([{"label": label, **line} for line in lines], columns=list(COLUMNS))


def _cells(key: str, audit: pd.DataFrame, definitions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    if audit.empty:
        audit = pd.DataFrame(columns=["family", "metric", "layer", "as_released"])
    for cell in published_cells(key).to_dict("records"):
        control = cell["family"] == "control"
        same = (
            (audit["family"] == cell["family"])
            & (audit["metric"] == cell["metric"])
            & (audit["layer"] == cell["layer"])
        )
        for quantity, column in _QUANTITIES.items():
            if math.isnan(cell[quantity]):
                continue
            line = {
                "table": cell["table"],
                "family": cell["family"],
                "metric": cell["metric"],
                "layer": cell["layer"],
                "removed": 0,
                "quantity": quantity,
                "published": cell[quantity],
                "published_definition": _ROUTING_WEIGHT
                if control
                else _published_definition(key, cell["metric"]),
                "published_scope": _SCOPE,
                "published_sampling": f"n = {cell['n']}, drawn "
                f"{_CONTROL_DRAWN if control else AUDIT_PRESETS[key].drawn}",
            }
            # `as_released` makes no difference to a control, which is the census's alone.
            ours = audit.loc[same & (audit["as_released"] == "")] if control else audit.loc[same]
            if ours.empty:
                yield {**line, **_NONE}
            for number, row in zip(ours.index, ours.to_dict("records"), strict=True):
                yield {
                    **line,
                    "ours": float(row[column]),
                    "ours_row": f"audit:{number}",
                    "ours_definition": _ours(row, definitions),
                    "ours_scope": f"{row['scope']}, {row['how']}",
                    "ours_sampling": f"{int(row['n_positions']):,} positions",
                }


_NONE = {"ours": math.nan, "ours_row": "", "ours_definition": "", "ours_scope": "", "ours_sampling": ""}


def _published_definition(key: str, metric: str) -> str:
    said = _IN_THE_PAPER.get(metric, "the paper names it")
    return f"{said}; its released code: {RELEASED[key].definitions[metric]}"


def _ours(row: Mapping[Any, Any], definitions: Mapping[str, str]) -> str:
    if row["family"] == "control":
        return _ROUTING_WEIGHT
    if row["as_released"]:
        return f"as released: {RELEASED[row['as_released']].definitions[row['metric']]}"
    return definitions.get(row["metric"], "")


def _progressive(key: str, ours: pd.DataFrame) -> Iterator[dict[str, Any]]:
    columns = {"mean": "delta_loss", "median": "delta_loss_median", "p95": "delta_loss_p95"}
    published = published_progressive()
    for cell in published.loc[published["model"] == key].to_dict("records"):
        for quantity, column in columns.items():
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
                "published_definition": "change of the loss without the k heaviest active experts, nats",
                "published_scope": _SCOPE,
                "published_sampling": f"n = {cell['n']}, {PROGRESSIVE_PRESET.drawn}",
            }
            same = (
                (ours["layer"] == cell["layer"]) & (ours["removed"] == cell["k"])
                if len(ours)
                else np.zeros(0, bool)
            )
            yield {**line, **_row(ours.loc[same], "progressive", column, line["published_definition"])}


_CORRELATIONS = {
    "rho_weight_gap": ("routing_weight", "gap_norm", "rho"),
    "rho_gap_compensation": ("gap_norm", "relative_compensation", "rho"),
    "mean_gap_norm": ("routing_weight", "gap_norm", "mean_gap_norm"),
}


def _redistribution(key: str, ours: pd.DataFrame) -> Iterator[dict[str, Any]]:
    published = published_redistribution()
    for cell in published.loc[published["model"] == key].to_dict("records"):
        for quantity, (x, y, column) in _CORRELATIONS.items():
            definition = (
                "mean over experts of the mean gap norm"
                if column == "mean_gap_norm"
                else f"Spearman's correlation of {x} and {y} across experts"
            )
            line = {
                "table": 7,
                "family": "redistribution",
                "metric": f"{x}, {y}" if column == "rho" else column,
                "layer": cell["layer"],
                "removed": 0,
                "quantity": column,
                "published": cell[quantity],
                "published_definition": definition,
                "published_scope": "one forward pass",
                "published_sampling": f"{cell['n_activations']:,} activations; "
                f"{REDISTRIBUTION_PRESETS[key].drawn} tokens of the lines",
            }
            same = (
                (ours["layer"] == cell["layer"]) & (ours["x"] == x) & (ours["y"] == y) & (ours["given"] == "")
                if len(ours)
                else np.zeros(0, bool)
            )
            yield {**line, **_row(ours.loc[same], "redistribution", column, definition)}


def _row(ours: pd.DataFrame, table: str, column: str, definition: str) -> dict[str, Any]:
    if ours.empty:
        return dict(_NONE)
    number, row = ours.index[0], ours.to_dict("records")[0]
    n = row["n_rows"] if table == "progressive" else row["n_experts"]
    return {
        "ours": float(row[column]),
        "ours_row": f"{table}:{number}",
        "ours_definition": definition,
        "ours_scope": f"{row['scope']}, {row['how']}" if table == "progressive" else "one forward pass",
        "ours_sampling": f"{int(n):,} {'positions' if table == 'progressive' else 'experts'}",
    }
