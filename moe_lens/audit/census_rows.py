"""What a row of a census is: its columns, and what the rows of a document must be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import numpy as np
from torch import Tensor

from moe_lens.routing.arguments import few

COLUMNS: Mapping[str, np.dtype] = MappingProxyType(
    {
        "document": np.dtype(np.int32),
        "position": np.dtype(np.int32),  # the column in the document
        "layer": np.dtype(np.int16),
        "expert": np.dtype(np.int16),  # -1: the shared experts
        "rank": np.dtype(np.int16),  # 1: the heaviest; 0: the shared experts
        "routing_weight": np.dtype(np.float32),
        "gap_norm": np.dtype(np.float32),
        "loss": np.dtype(np.float32),
        "delta_loss": np.dtype(np.float32),
    }
)
"""The columns that every census has. What else is measured is float32."""

Columns = dict[str, np.ndarray]
"""Arrays of equal length, by the column's name."""

_SMALLEST = {"position": 0, "layer": 0, "expert": -1, "rank": 0}


def dtypes_with(extra: Collection[str]) -> dict[str, np.dtype]:
    """The columns of a census that has these too.

    Raises:
        ValueError: a name that is no text, is there twice, or is one that every census has.
    """
    names = [extra] if isinstance(extra, str) else list(extra)
    wrong = [name for name in names if not isinstance(name, str) or not name or name in COLUMNS]
    if wrong or len(set(names)) < len(names):
        raise ValueError(
            f"extra columns need names of their own, other than {', '.join(COLUMNS)}; not {names!r}"
        )
    return {**COLUMNS, **dict.fromkeys(names, np.dtype(np.float32))}


def rows_of_document(
    document: int,
    columns: Mapping[str, np.ndarray | Tensor],
    dtypes: Mapping[str, np.dtype],
    may_be_nan: Collection[str] = (),
) -> Columns:
    """A document's rows in the types of a census, by layer, then position, then rank.

    Raises:
        ValueError: columns that are missing or unknown, of unlike lengths, or of another kind of number; a number that
            its column cannot hold; a rank or an expert that a position has twice at a layer.
    """
    lacking = [name for name in dtypes if name != "document" and name not in columns]
    unknown = [name for name in columns if name not in dtypes or name == "document"]
    if lacking or unknown:
        raise ValueError(
            f"document {document}: "
            + "; ".join(
                f"{what} {', '.join(map(repr, names))}"
                for what, names in (("it lacks the column", lacking), ("there is no column", unknown))
                if names
            )
            + f"; its columns must be {', '.join(name for name in dtypes if name != 'document')}"
        )
    rows = {}
    for name, dtype in dtypes.items():
        if name != "document":
            rows[name] = _as_dtype(columns[name], dtype, f"document {document}: {name}", name in may_be_nan)
    lengths = {name: len(values) for name, values in rows.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"document {document}: its columns must be equally long, not {lengths}")
    n_rows = next(iter(lengths.values()))
    if n_rows:
        rows = _in_order(document, rows)
    return {"document": np.full(n_rows, document, COLUMNS["document"]), **rows}


def _as_dtype(column: np.ndarray | Tensor, dtype: np.dtype, what: str, may_be_nan: bool) -> np.ndarray:
    """The same numbers; never wrapped around, never cut off."""
    if isinstance(column, Tensor):
        # numpy has no bfloat16.
        values = (column.detach().float() if column.is_floating_point() else column.detach()).cpu().numpy()
    else:
        values = np.asarray(column)
    if values.ndim != 1:
        raise ValueError(f"{what} must be [row], not {list(values.shape)}")
    if dtype.kind == "f":
        if values.dtype.kind != "f":
            raise ValueError(f"{what} must be floating-point numbers, not {values.dtype}")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is refused
            cast = values.astype(dtype)
        wrong = np.isinf(cast) if may_be_nan else ~np.isfinite(cast)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"{what} is {values[row]} at row {row}, and must be finite")
        return cast
    if values.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers, not {values.dtype}")
    if len(values):
        smallest = _SMALLEST[what.rpartition(" ")[2]]
        for value in (int(values.min()), int(values.max())):
            if not smallest <= value <= np.iinfo(dtype).max:
                raise ValueError(f"{what} is {value}, and must be {smallest} to {np.iinfo(dtype).max:,}")
    return values.astype(dtype)


def _in_order(document: int, rows: Columns) -> Columns:
    shared = rows["expert"] == -1
    if not np.array_equal(shared, rows["rank"] == 0):
        row = int((shared != (rows["rank"] == 0)).argmax())
        raise ValueError(
            f"document {document}: expert {rows['expert'][row]} has rank {rows['rank'][row]} at row {row}; rank 0 is "
            f"that of expert -1, the shared experts, and of no other"
        )
    # 15, 31 and 16 bits of one number, which sorts like the three.
    place = (rows["layer"].astype(np.int64) << 47) | (rows["position"].astype(np.int64) << 16)
    for name in ("expert", "rank"):
        key = place | (rows[name].astype(np.int64) + 1)
        order = np.argsort(key, kind="stable")
        twice = np.flatnonzero(np.diff(key[order]) == 0)
        if len(twice):
            row = order[twice[0]]
            raise ValueError(
                f"document {document}: position {rows['position'][row]} has {name} {rows[name][row]} twice at layer "
                f"{rows['layer'][row]}"
            )
    return {name: values[order] for name, values in rows.items()}


def those_there(wanted: Collection[object], there: Collection[object], what: str) -> None:
    """Raises:
    ValueError: one of those wanted is not there; those that are, are named.
    """
    unknown = [item for item in wanted if item not in there]
    if unknown:
        raise ValueError(
            f"this census has no {what} {few([repr(item) for item in unknown])}; it has {few(list(there)) or 'none'}"
        )
