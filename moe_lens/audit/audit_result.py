"""What an audit found: a row for every cell, with what it is of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.routing.storage import whole_or_not

_FORMAT = 1
_METADATA = b"moe_lens_audit"


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

    def save(self, path: str | Path) -> Path:
        """Write everything to one Parquet file, whole or not at all.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        facts = json.dumps({"format": _FORMAT, "provenance": dict(self.provenance)})
        table = pa.Table.from_pandas(self.cells, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: facts})
        with whole_or_not(path) as unfinished:
            pq.write_table(table, unfinished)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """What `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or of another format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path.name} is no file of an audit: {error!r}") from error
        found = (table.schema.metadata or {}).get(_METADATA)
        facts = {} if found is None else json.loads(found)
        if facts.get("format") != _FORMAT:
            what = "no file of an audit" if found is None else f"an audit of format {facts.get('format')!r}"
            raise ValueError(f"{path.name} is {what}")
        return cls(table.to_pandas(), facts["provenance"])
