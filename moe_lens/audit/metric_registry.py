"""The registry of population metrics: names for functions of the statistics, and the check of what they give.

@metric("busy_and_large", source="ours")
def busy_and_large(statistics):
    return statistics.over_tokens("output_norm").value
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from moe_lens.audit.function_fingerprint import function_fingerprint
from moe_lens.audit.metric_statistics import Estimate, ExpertStatistics

Formula = Callable[[ExpertStatistics], Any]

_METRICS: dict[str, Metric] = {}
_RESERVED = ("layer", "expert", "count")


@dataclass(frozen=True)
class Metric:
    """One metric: `formula(statistics)` is an array `[layer, expert]`, or an `Estimate` where it has standard errors.

    `may_be_nan`: whether it may be NaN for an expert that is active; for one that never is, every metric may.
    `higher_is_more_important`: what its source claims; False where a low value marks the experts that matter.
    """

    name: str
    formula: Formula
    source: str = ""
    may_be_nan: bool = False
    higher_is_more_important: bool = True

    @property
    def definition(self) -> str:
        """The formula's docstring, and the source."""
        text = " ".join((inspect.getdoc(self.formula) or "no description").split())
        return f"{text} Source: {self.source}." if self.source else text

    @property
    def fingerprint(self) -> str:
        """A short hash of the formula's code, other once that is changed, and the same in every process. It does not
        see a change in what the code calls: see `moe_lens.audit.function_fingerprint`."""
        return function_fingerprint(self.formula)

    def of(self, statistics: ExpertStatistics) -> Estimate:
        """Its values, float64; standard errors NaN where it has none.

        Raises:
            ValueError: another shape than `[layer, expert]`; a NaN for an expert that was active; an infinity.
        """
        found = self.formula(statistics)
        value, error = found if isinstance(found, Estimate) else (found, None)
        whose = f"metric {self.name!r}"
        value = checked_values(value, statistics, whose, may_be_nan=self.may_be_nan)
        if error is None:
            return Estimate(value, np.full_like(value, np.nan))
        return Estimate(
            value, checked_values(error, statistics, f"{whose}'s standard error", may_be_nan=True)
        )


def metric(
    name: str,
    *,
    source: str = "",
    may_be_nan: bool = False,
    higher_is_more_important: bool = True,
    replace: bool = False,
) -> Callable[[Formula], Formula]:
    """Register a function of `ExpertStatistics` as a metric, which `expert_metrics` then computes with the others.

    Args:
        name: a Python identifier: it names a column.
        source: where the definition comes from; the function's docstring says the formula.
        may_be_nan: whether NaN is a value also for an expert that is active.
        higher_is_more_important: False where the metric claims that a low value marks the experts that matter. The
            values stay what the formula gives; an audit ranks by what is claimed.
        replace: whether a metric of this name may be there already.

    Raises:
        ValueError: the name is taken, or can be no column.
    """
    check_name(name)
    if name in _METRICS and not replace:
        raise ValueError(
            f"there is a metric {name!r} already ({_METRICS[name].formula.__module__}); take another name, or "
            f"replace=True"
        )

    def register(formula: Formula) -> Formula:
        if not callable(formula):
            raise TypeError(f"a metric is a function of the statistics, not {type(formula).__name__}")
        _METRICS[name] = Metric(name, formula, source, may_be_nan, higher_is_more_important)
        return formula

    return register


def metric_names() -> tuple[str, ...]:
    """All metrics there are, in the order in which they were registered."""
    return tuple(_METRICS)


def find_metrics(names: Sequence[str] | str | None) -> tuple[Metric, ...]:
    """Metrics by name, None being all.

    Raises:
        ValueError: an unknown name, one that comes twice, or none.
    """
    chosen = metric_names() if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        if name not in _METRICS:
            raise ValueError(f"there is no metric {name!r}; there are {', '.join(_METRICS)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"metrics must be one or more names, each once, not {list(chosen)}")
    return tuple(_METRICS[name] for name in chosen)


def forget_metric(name: str) -> None:
    """Take a metric out of the registry.

    Raises:
        ValueError: there is none of this name.
    """
    find_metrics(name)
    del _METRICS[name]


def check_name(name: str) -> None:
    """Whether a name can be a column of a table of metrics.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a metric's name must be a Python identifier, not {name!r}")
    if name in _RESERVED or name.endswith("_standard_error"):
        raise ValueError(f"{name!r} names another column of the table; a metric needs a name of its own")


def checked_values(
    given: Any, of: Any, whose: str, *, may_be_nan: bool = False
) -> Float[np.ndarray, "layer expert"]:
    """Values `[layer, expert]` in float64, a copy.

    Args:
        given: anything numpy makes an array of, or a tensor.
        of: what they are of, with `layers` and the tokens at which each expert is active (`count` or `counts`).
        whose: for the error.
        may_be_nan: of an expert that is active; of one that never is, NaN is no error.

    Raises:
        ValueError: no numbers; another shape; a NaN or an infinity where there should be none.
    """
    counts = of.count if isinstance(of, ExpertStatistics) else of.counts
    given = given.detach().cpu().double().numpy() if hasattr(given, "detach") else given
    try:
        values = np.array(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{whose} is no array of numbers: {error}") from None
    if values.shape != counts.shape:
        raise ValueError(
            f"{whose} has shape {list(values.shape)}, and it must be [layer, expert] = {list(counts.shape)}"
        )
    wrong = np.isinf(values) if may_be_nan else np.isinf(values) | (np.isnan(values) & (counts > 0))
    if wrong.any():
        place, expert = np.argwhere(wrong)[0]
        raise ValueError(
            f"{whose} is {values[place, expert]} for M{of.layers[place]}E{expert}, which is active at "
            f"{counts[place, expert]:,} tokens"
        )
    return values
