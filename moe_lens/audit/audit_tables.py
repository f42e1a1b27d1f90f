"""All numbers of one or more models' audits as tables: what a page shows is read off these, and they are saved.

Row numbers count from 0 within each table, over all models, and are those of the saved files: `audit:17` is row 17 of
`audit.parquet`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.audit.frame_file import read_frame, write_frame
from moe_lens.audit.model_audit import ModelAudit
from moe_lens.audit.noise import NoiseFloor
from moe_lens.audit.progressive import Progressive
from moe_lens.audit.published_beside import COLUMNS as PUBLISHED_COLUMNS
from moe_lens.audit.published_beside import Ours, beside_published, published_key

TABLES = ("verification", "audit", "progressive", "redistribution", "published")
"""Names of the tables, which are also those of their files."""


@dataclass(frozen=True, eq=False)
class AuditTables:
    """Tables with a column `label` that says of which model a row is.

    Attributes:
        verification: a row per check, of all models, also those that failed.
        audit: the rows of `Audit.cells`, of models that passed; as are all others.
        progressive: `scope`, `how`, and the rows of `Progressive.to_frame()`.
        redistribution: the rows of `Redistribution.correlations`.
        published: the published numbers beside ours; see `moe_lens.audit.published_beside`. Empty where none of the
            models is one that the published audit has.
        provenance: of each model, JSON data: `label`, `model`, `model_type`, `passed`, `verified` (`dtype`,
            `n_documents`, `n_tokens`), `audits`, `progressive` and `redistribution` (provenance of each).
    """

    verification: pd.DataFrame
    audit: pd.DataFrame
    progressive: pd.DataFrame
    redistribution: pd.DataFrame
    published: pd.DataFrame
    provenance: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, audits: Sequence[ModelAudit]) -> AuditTables:
        """The tables of some models.

        Raises:
            ValueError: no models, or two of one label.
        """
        labels = [one.label for one in audits]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(
                f"audits of one or more models are wanted, each with a label of its own, not {labels}"
            )
        passed = [one for one in audits if one.passed]
        tables = {
            "verification": _stacked((one.label, one.verification.to_frame()) for one in audits),
            "audit": _stacked((one.label, found.cells) for one in passed for found in one.audits),
            "progressive": _stacked(
                (one.label, _with_what(one.progressive)) for one in passed if one.progressive is not None
            ),
            "redistribution": _stacked(
                (one.label, one.redistribution.correlations)
                for one in passed
                if one.redistribution is not None
            ),
        }
        beside = [_beside(one, tables) for one in passed]
        filled = [frame for frame in beside if len(frame)]
        tables["published"] = (
            pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(PUBLISHED_COLUMNS))
        )
        return cls(**tables, provenance=tuple(map(_provenance, audits)))

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all models, in the order in which they were given."""
        return tuple(one["label"] for one in self.provenance)

    @property
    def passed(self) -> bool:
        """Whether all models passed verification."""
        return all(one["passed"] for one in self.provenance)

    @property
    def noise_criterion_met(self) -> bool:
        """Whether every census in half precision is about as exact as full forward passes are
        (`NoiseFloor.meets_criterion`). True where no noise floor was measured, as in float32."""
        found = [
            NoiseFloor.in_facts(audit.get("census")) for one in self.provenance for audit in one["audits"]
        ]
        return all(floor.meets_criterion for floor in found if floor is not None)

    def save(self, folder: str | Path) -> Path:
        """Write a Parquet file for each table into a folder that is there: `audit.parquet` and so on.

        Raises:
            FileNotFoundError: no such folder.
        """
        for name in TABLES:
            facts = {"provenance": list(self.provenance)} if name == "verification" else {}
            write_frame(Path(folder) / f"{name}.parquet", getattr(self, name), f"tables_{name}", facts)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> AuditTables:
        """What `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: one is something else.
        """
        read = {name: read_frame(Path(folder) / f"{name}.parquet", f"tables_{name}") for name in TABLES}
        provenance = tuple(read["verification"][1]["provenance"])
        return cls(**{name: frame for name, (frame, _) in read.items()}, provenance=provenance)


def _stacked(parts: Iterable[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """Frames below each other, each with its label in front, and rows counted through."""
    frames = [pd.concat({label: frame}, names=["label"]).reset_index(level=0) for label, frame in parts]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["label"])


def _with_what(found: Progressive) -> pd.DataFrame:
    """Its summary, with what was done."""
    frame = found.to_frame()
    frame.insert(0, "how", found.provenance["how"])
    frame.insert(0, "scope", found.provenance["scope"])
    return frame


def _beside(one: ModelAudit, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    key = published_key(one.model, one.model_type)
    if key is None:
        return pd.DataFrame()
    ours = {name: frame.loc[frame["label"] == one.label] for name, frame in tables.items()}
    # Of one label, the audits lie below each other in their order.
    ends = np.cumsum([0, *(len(found.cells) for found in one.audits)])
    return beside_published(
        one.label,
        key,
        [
            Ours(ours["audit"].iloc[start:end], found.provenance)
            for found, start, end in zip(one.audits, ends[:-1], ends[1:], strict=True)
        ],
        None if one.progressive is None else Ours(ours["progressive"], one.progressive.provenance),
        None if one.redistribution is None else Ours(ours["redistribution"], one.redistribution.provenance),
    )


def _provenance(one: ModelAudit) -> dict[str, Any]:
    return {
        "label": one.label,
        "model": one.model,
        "model_type": one.model_type,
        "passed": one.passed,
        "verified": {
            "dtype": str(one.verification.dtype).removeprefix("torch."),
            "n_documents": one.verification.n_documents,
            "n_tokens": one.verification.n_tokens,
        },
        "audits": [dict(found.provenance) for found in one.audits],
        "progressive": None if one.progressive is None else dict(one.progressive.provenance),
        "redistribution": None if one.redistribution is None else dict(one.redistribution.provenance),
    }
