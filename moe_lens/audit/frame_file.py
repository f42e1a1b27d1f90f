"""A table with what it is of, in one Parquet file that is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.routing.storage import whole_or_not

_FORMAT = 1


def write_frame(path: str | Path, frame: pd.DataFrame, kind: str, facts: Mapping[str, Any]) -> Path:
    """Write a table.

    Args:
        kind: what it is, a word: `audit`. `read_frame` asks for it.
        facts: JSON data that belongs to it, in the file's metadata.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    text = json.dumps({"format": _FORMAT, **facts})
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _key(kind): text.encode()})
    with whole_or_not(path) as unfinished:
        pq.write_table(table, unfinished)
    return Path(path)


def read_frame(path: str | Path, kind: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What `write_frame` wrote: the table, and the facts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, of another kind, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no file of {_named(kind)}: {error!r}") from error
    found = (table.schema.metadata or {}).get(_key(kind))
    facts = {} if found is None else json.loads(found)
    if facts.get("format") != _FORMAT:
        what = f"no file of {_named(kind)}" if found is None else f"{kind} of format {facts.get('format')!r}"
        raise ValueError(f"{path.name} is {what}")
    del facts["format"]
    return table.to_pandas(), facts


def _key(kind: str) -> bytes:
    return f"moe_lens_{kind}".encode()


def _named(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
