"""Shards of a census: the rows of a run of documents, in memory or in a Parquet file, each there whole or not at all.

A folder holds `rows-<first document>-<one past the last>.parquet` files, whose documents follow one another once the
census is finished, and until then may leave gaps for what other processes do; and `_census.json`, which says of which
run they are, and at the end what came of it. Every shard says of which run it is
too, so that none of another slips in. Within a shard the rows are by layer, so that a layer can be read alone; within
a layer they are in the order of the table. Readers of Parquet folders skip names that begin with `_` or `.`, so they
can read a finished census too.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.audit.census_rows import Columns, dtypes_with
from moe_lens.routing.folder_lock import LOCK
from moe_lens.routing.storage import sync_folder, whole_or_not

FORMAT = 1
HEADER = "_census.json"
_SHARD = re.compile(r"rows-(\d{8,})-(\d{8,})\.parquet")
_UNFINISHED = re.compile(rf"\.({_SHARD.pattern}|{re.escape(HEADER)})\.unfinished")
_METADATA = b"moe_lens_census"
_ROWS_PER_GROUP = 2**16
_REMEDY = "delete it, and the run that left it does its documents again"


@dataclass(frozen=True)
class Shard:
    """The rows of documents `first` to `end` (one past the last).

    Attributes:
        rows: how many there are of each layer, in ascending order.
        source: the rows, or the file that holds them.
    """

    first: int
    end: int
    rows: Mapping[int, int]
    source: Path | Columns

    @classmethod
    def of(cls, first: int, end: int, documents: Sequence[Columns], dtypes: Mapping[str, np.dtype]) -> Shard:
        """Of the rows of these documents, each by layer."""
        whole = {
            name: np.concatenate([np.empty(0, dtype), *(document[name] for document in documents)])
            for name, dtype in dtypes.items()
        }
        by_layer = np.argsort(whole["layer"], kind="stable")
        layers, counts = np.unique(whole["layer"], return_counts=True)
        return cls(
            first,
            end,
            dict(zip(layers.tolist(), counts.tolist(), strict=True)),
            {name: values[by_layer] for name, values in whole.items()},
        )

    def n_rows(self, layers: Collection[int] | None = None) -> int:
        return sum(n for layer, n in self.rows.items() if layers is None or layer in layers)

    def read(self, columns: Sequence[str], layers: Collection[int] | None = None) -> Columns:
        """Columns of these layers' rows (None: all), a document after the other."""
        several = sum(layers is None or layer in layers for layer in self.rows) > 1
        if several:
            rows = self._by_layer([*dict.fromkeys(["document", *columns])], layers)
            order = np.argsort(rows["document"], kind="stable")
            return {name: rows[name][order] for name in columns}
        return self._by_layer(columns, layers)

    def _by_layer(self, columns: Sequence[str], layers: Collection[int] | None) -> Columns:
        wanted = np.repeat([layers is None or layer in layers for layer in self.rows], [*self.rows.values()])
        wanted = wanted.astype(bool)  # of no rows, it is none of booleans
        if not isinstance(self.source, Path):
            held = {name: self.source[name] for name in columns}
        else:
            with _reading(self.source), pq.ParquetFile(self.source, page_checksum_verification=True) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                parts = np.split(wanted, np.cumsum(sizes)[:-1])
                groups = [i for i, part in enumerate(parts) if part.any()]
                table = file.read_row_groups(groups, columns=[*columns])
                held = {name: table[name].to_numpy() for name in columns}
                wanted = np.concatenate([np.empty(0, bool), *(parts[i] for i in groups)])
        return held if wanted.all() else {name: values[wanted] for name, values in held.items()}

    def written(self, folder: Path, identity: Mapping[str, Any]) -> Shard:
        """This shard in a file of the folder, under its name only once it is whole and on the disk."""
        assert not isinstance(self.source, Path)
        path = shard_path(folder, self.first, self.end)
        dtypes = {name: values.dtype for name, values in self.source.items()}
        facts = {
            "format": FORMAT, "identity": identity,
            "first": self.first, "end": self.end, "n_rows": self.n_rows(), "rows": [*self.rows.items()],
        }  # fmt: skip
        schema = _schema(dtypes)
        integers = [name for name, dtype in dtypes.items() if dtype.kind == "i"]
        rows = pa.table([pa.array(values) for values in self.source.values()], schema=schema)
        with (
            whole_or_not(path) as unfinished,
            pq.ParquetWriter(
                unfinished,
                schema,
                compression="zstd",
                use_dictionary=integers,  # pyright: ignore[reportArgumentType]
                # Of floating-point numbers the bytes of each place go together; a loss that is repeated packs well too.
                column_encoding={name: "BYTE_STREAM_SPLIT" for name in dtypes if name not in integers},
                write_statistics=integers,  # pyright: ignore[reportArgumentType]
                write_page_checksum=True,
                store_schema=False,
            ) as file,
        ):
            file.write_table(rows, row_group_size=_ROWS_PER_GROUP)
            file.add_key_value_metadata({_METADATA: json.dumps(facts)})
        sync_folder(folder)
        return Shard(self.first, self.end, self.rows, path)


def shard_path(folder: Path, first: int, end: int) -> Path:
    """The file of the documents `first` to `end` (one past the last)."""
    return folder / f"rows-{first:08d}-{end:08d}.parquet"


def _schema(dtypes: Mapping[str, np.dtype]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, pa.from_numpy_dtype(dtype), nullable=False) for name, dtype in dtypes.items()]
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a shard is read is that shard's fault."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"the shard {str(path)!r} is gone") from None
    except Exception as error:
        raise ValueError(f"the shard {str(path)!r} is damaged: {error!r}; {_REMEDY}") from error


# ---- folders of shards ----


def json_data(what: str, data: Mapping[str, Any], *, nan: bool = True) -> dict[str, Any]:
    """As it comes back from a file.

    Raises:
        ValueError: something in it is no JSON data; what, is named.
    """
    for name, value in data.items():
        try:
            json.dumps({name: value}, allow_nan=nan)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}[{name!r}] is no JSON data: {error}") from None
    return json.loads(json.dumps(dict(data)))


def shards_in(folder: Path, identity: Mapping[str, Any]) -> list[Shard]:
    """The shards of a folder, in the order of their documents; some may be missing between them.

    Raises:
        ValueError: one is damaged, or of another run, or has documents of the one before.
    """
    ranges = []
    for path in folder.glob("rows-*"):
        match = _SHARD.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{str(path)!r} is no shard of a census")
        ranges.append((int(match[1]), int(match[2]), path))
    shards, next_document = [], 0
    for first, end, path in sorted(ranges):
        if first < next_document:
            raise ValueError(f"{str(path)!r} has documents of {str(shards[-1].source)!r} once more")
        shards.append(_opened(path, first, end, identity))
        next_document = end
    return shards


def require_no_gap(shards: Sequence[Shard], where: str) -> None:
    """Raises:
    ValueError: documents are missing between shards, or before the first.
    """
    next_document = 0
    for shard in shards:
        if shard.first > next_document:
            raise ValueError(
                f"the documents {next_document} to {shard.first - 1} are missing in {where}, and those after them are "
                f"there"
            )
        next_document = shard.end


def _opened(path: Path, first: int, end: int, identity: Mapping[str, Any]) -> Shard:
    with _reading(path), pq.ParquetFile(path) as file:
        facts = json.loads((file.metadata.metadata or {})[_METADATA])
        schema, n_rows = file.schema_arrow.remove_metadata(), file.metadata.num_rows
        rows, its = {layer: n for layer, n in facts["rows"]}, facts["identity"]
        if facts["format"] != FORMAT:
            raise ValueError(f"it is of format {facts['format']}, not {FORMAT}")
        if (facts["first"], facts["end"]) != (first, end) or not first < end:
            raise ValueError(f"it holds the documents {facts['first']} to {facts['end'] - 1}")
    difference = difference_of(its, identity)
    if difference:
        raise ValueError(f"the shard {str(path)!r} is of another run: {difference}")
    with _reading(path):
        if not n_rows == facts["n_rows"] == sum(rows.values()) or [*rows] != sorted(rows):
            raise ValueError(f"it has {n_rows} rows where {facts['n_rows']} were written")
        if not schema.equals(_schema(dtypes_with(identity["extra_columns"]))):
            raise ValueError(f"its columns are {schema.names}")
    return Shard(first, end, rows, path)


def difference_of(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first thing in which a run is another than it was; nothing where it is the same."""
    for name in [*now, *(saved.keys() - now.keys())]:
        if saved.get(name) != now.get(name) or (name in saved) != (name in now):
            return f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
    return ""


def write_header(
    folder: Path,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    shards: Sequence[Shard] = (),
) -> None:
    """Say of which run a folder's shards are; with facts, that it is finished, and what its files are."""
    header: dict[str, Any] = {"format": FORMAT, "identity": identity, "finished": facts is not None}
    if facts is not None:
        header |= {"facts": facts, "shards": sums_of(shards)}
    with whole_or_not(folder / HEADER) as unfinished:
        unfinished.write_text(json.dumps(header, indent=1) + "\n")
    sync_folder(folder)


def read_header(folder: Path) -> dict[str, Any]:
    """What `write_header` wrote: `identity`, `finished`, and of a finished census `facts` and the sums of its
    `shards`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another format.
    """
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"there is no census in {str(folder)!r}: it has no {HEADER}")
    try:
        header = json.loads(path.read_text())
        if header["format"] != FORMAT:
            raise ValueError(f"it is of format {header['format']}, not {FORMAT}")
        dtypes_with(header["identity"]["extra_columns"])
        if header["finished"]:
            dict(header["facts"], **header["shards"])
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {error!r}; delete it, and the run that left it writes it again"
        ) from error
    return header


def sums_of(shards: Sequence[Shard]) -> dict[str, list[int]]:
    """Size and CRC-32 of each shard's file."""
    sums = {}
    for shard in shards:
        assert isinstance(shard.source, Path)
        size = crc = 0
        with open(shard.source, "rb") as file:
            while block := file.read(2**20):
                size, crc = size + len(block), zlib.crc32(block, crc)
        sums[shard.source.name] = [size, crc]
    return sums


def require_readable(shards: Sequence[Shard]) -> None:
    """Read all numbers of some shards, as they are held against the checksums of their pages.

    Raises:
        ValueError: one is damaged.
    """
    for shard in shards:
        assert isinstance(shard.source, Path)
        with _reading(shard.source), pq.ParquetFile(shard.source, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)


def require_sums(folder: Path, shards: Sequence[Shard], expected: Mapping[str, Sequence[int]]) -> None:
    """Raises:
    ValueError: the shards are not those that were there when the census was finished.
    """
    names = {shard.source.name for shard in shards if isinstance(shard.source, Path)}
    for name in sorted(names ^ expected.keys()):
        problem = (
            f"is missing; delete {HEADER}, and the run that left it does what is missing again"
            if name in expected
            else "came after the census was finished"
        )
        raise ValueError(f"the shard {str(folder / name)!r} {problem}")
    for name, found in sums_of(shards).items():
        if found != list(expected[name]):
            raise ValueError(
                f"the shard {str(folder / name)!r} is damaged: it is not as it was written; {_REMEDY}"
            )


def require_no_foreign_files(folder: Path) -> None:
    """Raises:
    ValueError: something is in the folder that belongs to no census.
    """
    for path in sorted(folder.iterdir()):
        known = path.name in (HEADER, LOCK) or _SHARD.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)
        if not known or not path.is_file():
            raise ValueError(
                f"{str(folder)!r} holds {path.name!r}, which is of no census; name a folder that is new or empty"
            )


def remove_unfinished(folder: Path) -> None:
    """What a run that was killed while it wrote has left."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink()
