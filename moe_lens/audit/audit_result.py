"""What an audit found: a row for every cell, with what it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.audit.frame_file import read_frame, write_frame
from moe_lens.audit.metric_comparison import EMPTY


@dataclass(frozen=True, eq=False)
class Audit:
    """Is any metric valid? `audit` makes one.

    Attributes:
        cells: one row per (family, metric, layer); `moe_lens.audit.protocol` says what the columns are.
        provenance: model, weights (fingerprint), scope, how, settings, same_corpus (whether the metrics are of the
            census's tokens), census and metric_table (theirs, whole), versions.
    """

    cells: pd.DataFrame
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        of, cells = self.provenance, self.cells
        parts = []
        for family in cells["family"].unique():
            counts = cells.loc[cells["family"] == family, "verdict"].value_counts()
            parts.append(f"{family}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
        n = of["settings"]["n"]
        return (
            f"<Audit of {of['model']}: {len(cells)} cells, scope {of['scope']}, {of['how']}, "
            f"{'all positions' if n is None else f'{n:,} positions a cell'}"
            f"{'' if of['census_finished'] else ', of an unfinished census'}; {'; '.join(parts)}>"
        )

    def to_frame(self) -> pd.DataFrame:
        """A copy of `cells`."""
        return self.cells.copy()

    def verdicts(self) -> pd.DataFrame:
        """Verdicts by (family, metric) and layer, metrics in the order in which they were asked for."""
        index = ["family", "metric"]
        table = self.cells.pivot(index=index, columns="layer", values="verdict")
        return table.loc[list(self.cells[index].drop_duplicates().itertuples(index=False, name=None))]

    def odds(self) -> pd.DataFrame:
        """Posterior probabilities by (family, metric) and layer, in the order of `verdicts`, with the empty model, in
        which no metric says anything, first among the metrics: with it their columns sum to 1. A control's is against
        the empty model alone, which has the rest."""
        index = ["family", "metric"]
        metrics = self.cells.loc[self.cells["family"] == "metrics"]
        empty = metrics.assign(metric=EMPTY, posterior=metrics["posterior_empty"])
        cells = pd.concat([empty.drop_duplicates(["layer"]), self.cells])
        table = cells.pivot(index=index, columns="layer", values="posterior")
        return table.loc[list(cells[index].drop_duplicates().itertuples(index=False, name=None))]

    def save(self, path: str | Path) -> Path:
        """Write everything to one Parquet file, whole or not at all.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        return write_frame(path, self.cells, "audit", {"provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """What `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or of another format.
        """
        cells, facts = read_frame(path, "audit")
        return cls(cells, facts["provenance"])
