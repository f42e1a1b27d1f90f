"""What attribution patching estimated, and by how much it missed what was measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import spearmanr

MEASURED = ("all", "largest", "random")


@dataclass(frozen=True, eq=False)
class AttributionPatching:
    """The estimated effect of patching every sender, and the exact one of some.

    All effects are in the metric's units: the patched run's metric minus the unpatched one's.

    Attributes:
        senders: names along the first axis: `A3H5`, `M3E9`, `M3S`.
        layers: each sender's.
        positions: columns of the batch along the second axis; None where it is one number for all of them together.
        attributions: the estimates.
        exact: by activation patching; NaN where it was not measured.
        measured: why it was: `all`, `largest`, `random`; `no difference` where the sender writes the same in both runs,
            so that the effect is 0 without a run; empty where it was not.
        baseline: the metric of the run that is patched, unpatched.
        other_metric: of the run that the patches are from.
        direction: the run that is patched, `corrupted` or `clean`.
    """

    senders: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    attributions: Float[np.ndarray, "sender pos"]
    exact: Float[np.ndarray, "sender pos"]
    measured: np.ndarray
    baseline: float
    other_metric: float
    direction: str

    def __repr__(self) -> str:
        places = "" if self.positions is None else f" at {len(self.positions)} positions"
        n_exact = int(np.isin(self.measured, MEASURED).sum())
        return (
            f"<AttributionPatching of {len(self.senders)} senders{places} in the {self.direction} run: metric "
            f"{self.baseline:.4g}, {self.other_metric:.4g} in the other run; {n_exact} measured exactly>"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per sender (and position): columns `sender`, `layer`, `position` (if by position), `attribution`,
        `exact` (NaN where not measured), `error` (attribution minus exact) and `measured` (why it was)."""
        n = self.attributions.shape[1]
        columns: dict[str, object] = {
            "sender": np.repeat(np.array(self.senders), n),
            "layer": np.repeat(np.array(self.layers), n),
        }
        if self.positions is not None:
            columns["position"] = np.tile(np.array(self.positions), len(self.senders))
        return pd.DataFrame(
            columns
            | {
                "attribution": self.attributions.ravel(),
                "exact": self.exact.ravel(),
                "error": (self.attributions - self.exact).ravel(),
                "measured": self.measured.ravel(),
            }
        )

    def errors(self) -> pd.DataFrame:
        """How well the estimates agree with what was measured, over the senders that write otherwise in the two runs.

        Returns:
            One row for each reason to measure (`all`, or `largest` and `random`), columns:
            `n`; `mean_absolute` and `largest_absolute` error, in the metric's units; `relative`, ||attribution -
            exact|| / ||exact||; `pearson` and `spearman` correlation; `same_sign`, the share that agrees in sign.
            The largest were picked by the estimate itself, so that their correlation is no other senders'; only the
            random ones stand for the rest. A correlation of fewer than 3, or of what does not vary, is NaN.

        Raises:
            ValueError: nothing was measured.
        """
        rows = []
        for reason in MEASURED:
            chosen = self.measured == reason
            if chosen.any():
                rows.append({"measured": reason, **_agreement(self.attributions[chosen], self.exact[chosen])})
        if not rows:
            raise ValueError("no effect was measured: give exact='all' or a number, and runs that differ")
        return pd.DataFrame(rows).set_index("measured")


def _agreement(
    estimate: Float[np.ndarray, " sender"], exact: Float[np.ndarray, " sender"]
) -> dict[str, float]:
    error, size = np.abs(estimate - exact), float(np.linalg.norm(exact))
    varies = len(exact) > 2 and np.ptp(exact) > 0 and np.ptp(estimate) > 0
    return {
        "n": len(exact),
        "mean_absolute": float(error.mean()),
        "largest_absolute": float(error.max()),
        "relative": float(np.linalg.norm(estimate - exact)) / size if size else float("nan"),
        "pearson": float(np.corrcoef(estimate, exact)[0, 1]) if varies else float("nan"),
        "spearman": float(spearmanr(estimate, exact).statistic) if varies else float("nan"),  # type: ignore[union-attr]
        "same_sign": float((np.sign(estimate) == np.sign(exact)).mean()),
    }
