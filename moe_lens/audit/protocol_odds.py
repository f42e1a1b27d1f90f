"""The metrics of a layer against each other: `compare_metrics` on the rows that all of them have.

Models whose odds are taken must be of the same data. So the rows are those of positions at which every metric of the
family has a value for every active expert: one metric without a value for a common expert costs all of them its
positions, and one without any leaves no comparison (`audit(metrics=...)` leaves such a metric out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from moe_lens.audit.metric_comparison import compare_metrics
from moe_lens.audit.protocol_cells import LayerRows, Order


class Odds(NamedTuple):
    """What a comparison says of one of its metrics; see `moe_lens.audit.metric_comparison`.

    Attributes:
        slope: of delta_loss on the within-token rank: nats from the token's lowest expert to its highest.
        standard_error: of the slope, clustered by document; infinite where the metric ties at every token.
        r_squared: share of the variance within documents.
        log_odds: natural log Bayes factor against the empty model.
        posterior: among the empty model and all metrics that were compared; posterior_empty is the empty model's.
        design_effect: rows per independent row; of the comparison, not of this metric.
        n_rows: (position, active expert) that it is of.
    """

    slope: float
    standard_error: float
    r_squared: float
    log_odds: float
    posterior: float
    posterior_empty: float
    design_effect: float
    n_rows: int


def odds_between(rows: LayerRows, of_experts: Mapping[str, Float[np.ndarray, " expert"]]) -> dict[str, Odds]:
    """Of metrics that have a value per expert, all against each other and the empty model.

    Args:
        rows: the positions of the comparison; those where a metric has no value for an active expert are left out.
        of_experts: for each metric, its values at this layer, NaN where there is none.
    """
    if not of_experts:
        return {}
    has_value = np.logical_and.reduce([~np.isnan(values) for values in of_experts.values()])
    kept = np.flatnonzero(np.logical_and.reduce(has_value[rows.expert], axis=0))
    if len(kept) < rows.n_positions:
        rows = rows.at(kept)
    return _odds(rows, {name: (values, rows.expert) for name, values in of_experts.items()})


def odds_alone(rows: LayerRows, name: str) -> Odds:
    """Of one of the columns of `rows`, a value per expert and token, against the empty model alone."""
    return _odds(rows, {name: (rows.columns[name], None)})[name]


def _odds(rows: LayerRows, values: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> dict[str, Odds]:
    n_rows = rows.delta_loss.size
    # Two active experts or more at each of two positions or more are more rows than documents + 1.
    if len(np.unique(rows.document)) < 2:
        nothing = Odds(np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, n_rows)
        return dict.fromkeys(values, nothing)
    found = compare_metrics(
        rows.delta_loss.ravel(), _Ranks(values), np.broadcast_to(rows.document, rows.delta_loss.shape).ravel()
    )
    empty, *lines = found.table.to_dict("records")
    return {
        line["metric"]: Odds(
            slope=line["slope"],
            standard_error=line["standard_error"],
            r_squared=line["r_squared"],
            log_odds=line["log_bayes_factor"],
            posterior=line["posterior"],
            posterior_empty=empty["posterior"],
            design_effect=found.design_effect,
            n_rows=n_rows,
        )
        for line in lines
    }


class _Ranks(Mapping[str, Float[np.ndarray, " row"]]):
    """Within-token ranks of each metric, made when they are asked for: those of all at once would be large."""

    def __init__(self, values: Mapping[str, tuple[np.ndarray, np.ndarray | None]]):
        self.values_at = values

    def __getitem__(self, name: str) -> Float[np.ndarray, " row"]:
        values, expert = self.values_at[name]
        return within_position_rank(values if expert is None else values[expert]).ravel()

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_at)

    def __len__(self) -> int:
        return len(self.values_at)


def within_position_rank(values: Float[np.ndarray, "slot position"]) -> Float[np.ndarray, "slot position"]:
    """`within_token_rank` of values that lie by slot: from -1/2 for the lowest of a position to 1/2 for its highest."""
    return Order.of(values).scores / 2 / (len(values) - 1)
