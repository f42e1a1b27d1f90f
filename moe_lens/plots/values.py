"""What a figure reads of a result: the table of one measure, its names, and whether it is the right kind of table."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from moe_lens.plots.style import (
    SEQUENTIAL,
    Scale,
    check_scale,
    colorbar,
    diverging,
    largest,
    log_ticks,
    sequential,
)
from moe_lens.routing.measures import UNITS
from moe_lens.routing.result import RoutingContributions

MEASURE_NAMES = {
    "variance": "Variance over experts",
    "aps": "Average positive score (APS)",
    "ans": "Average negative score (ANS)",
    "mean": "Mean over experts",
    "norm": "Norm of what the router reads",
    "aarv": "Average absolute rank variation (AARV)",
    "overlap": "Overlap of the top-K without the sender",
    "weight_change": "Change of routing weights",
}
POSITION_NAMES = {"lead": "lead token", "rest": "all tokens but the lead"}
_SHORT_NAMES = {
    "variance": "variance over experts",
    "aps": "APS",
    "ans": "ANS",
    "mean": "mean over experts",
    "norm": "norm",
    "aarv": "AARV",
    "overlap": "overlap",
    "weight_change": "change",
}
LOG_MEASURES = ("variance", "norm", "aarv", "weight_change")
"""Never negative, and 0 where a sender does nothing."""

Table = Float[np.ndarray, "sender receiver"]


def check_by(contributions: RoutingContributions, by: str, figure: str) -> None:
    """Raises:
    ValueError: the result is of another granularity.
    """
    if contributions.by != by:
        raise ValueError(
            f"{figure} shows a result of routing_contributions(..., by={by!r}); this one is by={contributions.by!r}"
        )


def table(
    contributions: RoutingContributions, measure: str, position: str, when_active: bool = False
) -> tuple[Table, Table]:
    """A measure's means and their standard errors.

    Raises:
        ValueError: no such measure or position; those there are, are named.
    """
    values = (contributions.when_active if when_active else contributions.measure)(measure)
    if position not in values:
        raise ValueError(f"position must be one of {', '.join(values)}, not {position!r}")
    return values[position], contributions.standard_error(measure, when_active=when_active)[position]


def unit(measure: str) -> str:
    """A measure's unit, in words where it has none."""
    return UNITS[measure] or "no unit"


def with_unit(measure: str) -> str:
    """For an axis."""
    return f"{_SHORT_NAMES[measure]} ({unit(measure)})"


def of_tokens(position: str, when_active: bool = False) -> str:
    """For a title: which tokens the means are over."""
    return POSITION_NAMES[position] + (", where the sender is active" if when_active else "")


def influence(measure: str, values: np.ndarray) -> np.ndarray:
    """How far each value is from that of a sender that does nothing."""
    return 1 - values if measure == "overlap" else np.abs(values)


def check_log(measure: str, scale: str) -> None:
    """Raises:
    ValueError: a logarithm of a measure that has none.
    """
    check_scale(scale)
    if scale == "log" and measure not in LOG_MEASURES:
        raise ValueError(
            f"{measure} has no log scale: that is for measures which are never negative and count from zero "
            f"({', '.join(LOG_MEASURES)})"
        )


def colours(measure: str, cells: np.ndarray, partner: np.ndarray | None, scale: Scale) -> dict[str, Any]:
    """Colours and their bar for cells of a measure; `partner` are the same cells of the measure that shares them.

    The colour scale is centred on zero for APS, ANS and mean, and begins at what a sender that does nothing has for
    the others: at 0, or for the overlap at 1.
    """
    check_log(measure, scale)
    if scale == "log":
        positive = cells[cells > 0]
        low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
        low = min(low, high / 1.01)
        places, texts = log_ticks(low, high)
        bar = colorbar(unit(measure), tickvals=places, ticktext=texts)
        return dict(colorscale=SEQUENTIAL, zmin=np.log10(low), zmax=np.log10(high), colorbar=bar)
    bar = colorbar(unit(measure) if measure != "overlap" else "share")
    if measure in ("aps", "ans", "mean"):
        shared = diverging(cells) if partner is None else diverging(cells, partner)
        return shared | dict(colorbar=bar)
    if measure == "overlap":
        return dict(
            colorscale=[[1 - place, colour] for place, colour in reversed(SEQUENTIAL)],
            zmin=1 - largest(1 - cells),
            zmax=1.0,
            colorbar=bar,
        )
    return sequential(cells) | dict(colorbar=bar)


def partner_of(measure: str) -> str | None:
    """APS and ANS share a colour scale, so that their colours compare."""
    return {"aps": "ans", "ans": "aps"}.get(measure)
