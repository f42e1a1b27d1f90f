"""The audit's table: a line for every cell, corrected within families, with verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from moe_lens.audit.corrections import benjamini_hochberg, bonferroni, holm, verdict
from moe_lens.audit.paired_tests import PairedTest
from moe_lens.audit.protocol_cells import Beyond, Pairs
from moe_lens.audit.protocol_odds import Odds

Family = Literal["metrics", "control"]


@dataclass(frozen=True, eq=False)
class Cell:
    """A metric, or a control, at a layer; `test` is None where there are fewer than two pairs."""

    family: Family
    metric: str
    layer: int
    n_positions: int
    pairs: Pairs
    test: PairedTest | None
    beyond: Beyond
    odds: Odds
    higher_is_more_important: bool = True

    @property
    def corrected_with(self) -> str:
        """All metrics are one family; each control is one."""
        return "" if self.family == "metrics" else self.metric

    def line(self) -> dict[str, Any]:
        """Its row, before what knows of other cells."""
        is_ratio = (self.family, self.metric) == ("control", "routing_weight")
        return {
            "family": self.family,
            "metric": self.metric,
            "higher_is_more_important": self.higher_is_more_important,
            "layer": self.layer,
            "n_positions": self.n_positions,
            "n_undefined": self.pairs.n_undefined,
            "n_ties": self.pairs.n_ties,
            **_of_test(self.pairs, self.test),
            "rho": _rho(self.pairs) if is_ratio else np.nan,
            **_of_beyond(self.beyond),
            **dict(zip(_OF_ODDS, self.odds, strict=True)),
        }


def table_of(cells: Sequence[Cell], of: Mapping[str, str], alpha: float) -> pd.DataFrame:
    """All cells, by family and metric in the order in which these come first, then by layer.

    Args:
        cells: of all layers.
        of: columns that are the same for all: model, scope, how, as_released.
        alpha: of the verdicts.
    """
    tests = [cell.test for cell in cells]
    families = np.array([cell.corrected_with for cell in cells])
    corrected = {
        name: _corrected(correction, tests, p, families) for name, (correction, p) in _CORRECTED.items()
    }
    lines = []
    for i, (cell, test) in enumerate(zip(cells, tests, strict=True)):
        line = {**of, **cell.line(), "n_family": int((families == families[i]).sum())}
        line |= {name: float(values[i]) for name, values in corrected.items()}
        line["verdict"] = "inconclusive"
        if test is not None:
            line["verdict"] = verdict(
                test, line["p_t_holm"], line["p_wilcoxon_holm"], n_tests=line["n_family"], alpha=alpha
            )
        lines.append(line)
    asked = [*dict.fromkeys((cell.family, cell.metric) for cell in cells)]
    lines.sort(key=lambda line: (asked.index((line["family"], line["metric"])), line["layer"]))
    return pd.DataFrame(lines, columns=_COLUMNS)


_CORRECTED: dict[str, tuple[Callable[..., np.ndarray], str]] = {
    "p_t_holm": (holm, "p_t"),
    "p_wilcoxon_holm": (holm, "p_wilcoxon"),
    "p_bh": (benjamini_hochberg, "p_t"),
    "p_t_bonferroni": (bonferroni, "p_t"),
    "p_t_plain_bonferroni": (bonferroni, "p_t_plain"),
    "p_tost_holm": (holm, "p_tost"),
}


def _corrected(
    correction: Callable[..., np.ndarray],
    tests: Sequence[PairedTest | None],
    p: str,
    families: np.ndarray,
) -> Float[np.ndarray, " cell"]:
    """Cells without a test count, as p = 1, and have none corrected."""
    values = np.array([1.0 if test is None else getattr(test, p) for test in tests])
    corrected = np.empty_like(values)
    for family in np.unique(families):
        within = families == family
        corrected[within] = correction(values[within])
    return np.where([test is None for test in tests], np.nan, corrected)


# In the order of `Odds`.
_OF_ODDS = [
    "rank_slope", "rank_slope_standard_error", "rank_r_squared", "log_odds", "posterior", "posterior_empty",
    "odds_design_effect", "n_odds_rows",
]  # fmt: skip

_COLUMNS = [
    "model", "scope", "how", "as_released", "family", "metric", "higher_is_more_important", "layer",
    "n_positions", "n_undefined", "n_ties", "n_pairs", "n_documents", "n_zero",
    "high_delta_loss", "low_delta_loss", "mean_difference", "standard_error",
    "d", "d_standard_error", "d_low", "d_high", "t", "df", "p_t", "p_wilcoxon", "rank_biserial",
    "t_plain", "p_t_plain", "p_wilcoxon_plain",
    "log_bayes_factor", "bayes_factor", "p_tost", "n_effective", "detectable_d",
    "n_family", "p_t_holm", "p_wilcoxon_holm", "p_bh", "p_t_bonferroni", "p_t_plain_bonferroni", "p_tost_holm",
    "verdict",
    "rho", "spearman", "spearman_standard_error", "kendall", "kendall_standard_error", "n_correlations",
    "pruning_gain", "pruning_gain_standard_error", "random_delta_loss", "lowest_delta_loss", "best_delta_loss",
    *_OF_ODDS,
]  # fmt: skip

_OF_TEST = {
    "n_zero": "n_zero",
    "mean_difference": "mean_difference",
    "standard_error": "standard_error",
    "d": "cohens_d",
    "d_standard_error": "d_standard_error",
    "t": "t",
    "df": "df",
    "p_t": "p_t",
    "p_wilcoxon": "p_wilcoxon",
    "rank_biserial": "rank_biserial",
    "t_plain": "t_plain",
    "p_t_plain": "p_t_plain",
    "p_wilcoxon_plain": "p_wilcoxon_plain",
    "log_bayes_factor": "log_bayes_factor",
    "bayes_factor": "bayes_factor",
    "p_tost": "p_tost",
    "n_effective": "n_effective",
    "detectable_d": "detectable_d",
}
_COUNTS = ("n_zero", "df")


def _of_test(pairs: Pairs, test: PairedTest | None) -> dict[str, Any]:
    n = len(pairs.high)
    line: dict[str, Any] = {
        "n_pairs": n,
        "n_documents": len(np.unique(pairs.document)),
        "high_delta_loss": float(pairs.high.mean()) if n else np.nan,
        "low_delta_loss": float(pairs.low.mean()) if n else np.nan,
    }
    line["d_low"], line["d_high"] = (np.nan, np.nan) if test is None else test.d_ci
    for column, attribute in _OF_TEST.items():
        nothing = 0 if column in _COUNTS else np.nan
        line[column] = nothing if test is None else getattr(test, attribute)
    return line


def _rho(pairs: Pairs) -> float:
    difference = pairs.high - pairs.low
    if len(difference) < 2 or np.ptp(difference) == 0 or (pairs.ratio == pairs.ratio[0]).all():
        return np.nan
    return float(np.asarray(stats.spearmanr(pairs.ratio, difference))[0])


def _of_beyond(beyond: Beyond) -> dict[str, Any]:
    return {
        "spearman": beyond.spearman.value,
        "spearman_standard_error": beyond.spearman.standard_error,
        "kendall": beyond.kendall.value,
        "kendall_standard_error": beyond.kendall.standard_error,
        "n_correlations": beyond.spearman.n,
        "pruning_gain": beyond.pruning_gain.value,
        "pruning_gain_standard_error": beyond.pruning_gain.standard_error,
        "random_delta_loss": beyond.random,
        "lowest_delta_loss": beyond.lowest,
        "best_delta_loss": beyond.best,
    }
