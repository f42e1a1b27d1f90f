"""A census's table: one row for every document, position, layer and active expert; written as it comes, read in parts.

`CensusWriter` takes documents and writes them in shards. It can be killed at any time, and goes on with the documents
that are not on the disk; the table does not depend on where it was cut, nor on how many processes wrote it. `Census` is
what has been written.
"""

from __future__ import annotations

import operator
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from torch import Tensor

from moe_lens.audit.census_rows import COLUMNS, Columns, dtypes_with, rows_of_document, those_there
from moe_lens.audit.census_shards import (
    HEADER,
    Shard,
    difference_of,
    json_data,
    read_header,
    remove_unfinished,
    require_no_foreign_files,
    require_no_gap,
    require_readable,
    require_sums,
    shard_path,
    shards_in,
    write_header,
)
from moe_lens.audit.census_summary import SUMMARISED, summary
from moe_lens.interventions.arguments import Layers
from moe_lens.ranks import ALONE, Ranks, became_visible
from moe_lens.routing.arguments import layers_said, positive_integer
from moe_lens.routing.folder_lock import FolderLock

__all__ = ["COLUMNS", "Census", "CensusWriter"]


class CensusWriter:
    """Takes a census's rows, a document at a time, and writes them in shards, each whole or absent.

    Use it in a `with` block: whatever ends that, what came so far is written, and the folder is let go.

    Args:
        folder: a new or empty one, or that of the same run before, which is then gone on with. None: the rows are
            kept in memory.
        identity: JSON data that says of which run they are (model, weights, corpus, settings), all of which must be
            the same for a run to be gone on with.
        extra: the names of further columns, float32.
        may_be_nan: columns of floating-point numbers in which NaN stands for "there is none".
        rows_per_shard: a shard is written when it has so many rows, after a whole document.
        save_every: and when so many seconds have passed since the last.
        ranks: that write in one folder, each with a writer of its own, and documents in any order: see
            `moe_lens.ranks`. The folder is held by rank 0, which finishes the census.

    Attributes:
        finished: whether the folder holds a finished census, to which nothing has been added.

    Raises:
        FileNotFoundError: there is no folder to make the folder in.
        ValueError: the folder holds another run, or something else; a shard is damaged; the identity is no JSON data.
        RuntimeError: another writer is at work there.
    """

    def __init__(
        self,
        folder: str | Path | None,
        identity: Mapping[str, Any],
        *,
        extra: Sequence[str] = (),
        may_be_nan: Sequence[str] = (),
        rows_per_shard: int = 2**20,
        save_every: float = 30.0,
        ranks: Ranks = ALONE,
    ):
        self.dtypes = dtypes_with(extra)
        those_there(may_be_nan, [n for n, dtype in self.dtypes.items() if dtype.kind == "f"], "float column")
        if "extra_columns" in identity:
            raise ValueError("identity['extra_columns'] is for the names given as extra")
        self.identity = json_data("identity", {**identity, "extra_columns": [*extra]}, nan=False)
        self.may_be_nan = frozenset(may_be_nan)
        self.rows_per_shard = positive_integer(rows_per_shard, "rows_per_shard")
        self.save_every = save_every
        self.folder = None if folder is None else Path(folder).absolute()
        self.finished = False
        self._shards: list[Shard] = []
        self._pending: list[tuple[int, Columns]] = []
        self._n_pending_rows = 0
        self._lock: FolderLock | None = None
        self._closed = False
        self._ranks = ranks
        if self.folder is not None and ranks.first:
            self._open(self.folder)
        self._written_at = time.monotonic()

    def _open(self, folder: Path) -> None:
        if not folder.parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {str(folder.parent)!r} to make the census {folder.name} in"
            )
        folder.mkdir(exist_ok=True)
        require_no_foreign_files(folder)
        self._lock = FolderLock(folder)
        try:
            if (folder / HEADER).exists():
                header = read_header(folder)
                difference = difference_of(header["identity"], self.identity)
                if difference:
                    raise ValueError(
                        f"the census {str(folder)!r} is of another run: {difference}; name another folder, or delete "
                        f"this one"
                    )
                self._shards = shards_in(folder, self.identity)
                self.finished = header["finished"]
                if self.finished:
                    require_sums(folder, self._shards, header["shards"])
            else:
                self._shards = shards_in(folder, self.identity)
                write_header(folder, self.identity)
            if not self.finished:
                # What is found at the end is called whole, so that it must be whole now.
                require_readable(self._shards)
            remove_unfinished(folder)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_documents_done(self) -> int:
        """How many documents have been added, here or by the run that this one goes on with."""
        return sum(end - first for first, end in self._done())

    @property
    def next_document(self) -> int:
        """The number of the first that is not there."""
        first, end = next(iter(self._done()), (0, 0))
        return end if first == 0 else 0

    def missing(self, n_documents: int) -> list[int]:
        """Which of so many documents are not there, to no rank's knowledge; every rank must ask."""
        gaps, document = [], 0
        for first, end in [*self._done(), (n_documents, n_documents)]:
            gaps += range(document, min(first, n_documents))
            document = end
        return self._ranks.of_first(gaps)

    def _done(self) -> list[tuple[int, int]]:
        """Runs of documents that are there, from the first to one past the last; none meets another."""
        runs = [(shard.first, shard.end) for shard in self._shards]
        if self._pending:
            runs.append((self._pending[0][0], self._pending[-1][0] + 1))
        joined: list[tuple[int, int]] = []
        for first, end in sorted(runs):
            if joined and first <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((first, end))
        return joined

    def add_document(self, document: int, columns: Mapping[str, np.ndarray | Tensor]) -> None:
        """All rows of a document, in any order; a document may have none.

        Args:
            document: its number: `next_document`, or among several ranks any that is not there.
            columns: `[row]`, all columns but `document`.

        Raises:
            ValueError: another document is due, or its rows are not what they must be; nothing of it is kept then.
        """
        self._require_open()
        document = operator.index(document)
        if self._ranks.n > 1 and document >= 0:
            if any(first <= document < end for first, end in self._done()):
                raise ValueError(f"document {document} was given, and it is there already")
        elif document != self.next_document:
            raise ValueError(f"document {document} was given, and {self.next_document} is the next")
        rows = rows_of_document(document, columns, self.dtypes, self.may_be_nan)
        if self._pending and document != self._pending[-1][0] + 1:
            self.flush()  # a shard's documents follow one another
        self._pending.append((document, rows))
        self._n_pending_rows += len(rows["layer"])
        late = self.folder is not None and time.monotonic() - self._written_at >= self.save_every
        if self._n_pending_rows >= self.rows_per_shard or late:
            self.flush()

    def flush(self) -> None:
        """Write what came since the last shard as one more."""
        self._require_open()
        # An interrupt may have come between a shard and this list's being emptied.
        first = self._pending[0][0] if self._pending else 0
        if self._pending and not any(shard.first <= first < shard.end for shard in self._shards):
            pending = [rows for _, rows in self._pending]
            shard = Shard.of(first, first + len(pending), pending, self.dtypes)
            if self.folder is not None:
                if self.finished:
                    write_header(self.folder, self.identity)
                shard = shard.written(self.folder, self.identity)
            self.finished = False
            self._shards.append(shard)
            self._shards.sort(key=lambda shard: shard.first)
        self._pending, self._n_pending_rows = [], 0
        self._written_at = time.monotonic()

    def together(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Write what is left, and wait until all ranks have; this writer then takes note of what they wrote.

        Args:
            meanwhile: is called every so often.
        """
        self.flush()
        if self._ranks.n == 1 or self.folder is None:
            return
        written = self._ranks.gathered(
            [[shard.first, shard.end] for shard in self._shards], meanwhile=meanwhile
        )
        for first, end in (run for runs in written for run in runs):
            became_visible(shard_path(self.folder, first, end))
        self._shards = shards_in(self.folder, self.identity)

    def finish(self, facts: Mapping[str, Any]) -> Census:
        """Write what is left and say that this was all: at every rank, after `together`, and with what rank 0 says.

        Args:
            facts: JSON data that is known at the end: noise floor, seconds, versions. A census that was finished
                before, and to which nothing was added, keeps those that it has.

        Raises:
            ValueError: they are no JSON data, or have a name that the identity has; documents are missing.
        """
        facts = json_data("facts", facts)
        twice = facts.keys() & self.identity.keys()
        if twice:
            raise ValueError(f"facts[{min(twice)!r}] is in the identity already")
        self.flush()
        require_no_gap(self._shards, "the census" if self.folder is None else repr(str(self.folder)))
        if self.folder is None:
            self._closed = True
            return Census(self.identity, facts, self._shards)
        if not self._ranks.first:
            self.close()
            return Census(self.identity, self._ranks.of_first(None), self._shards, folder=self.folder)
        if not self.finished:
            write_header(self.folder, self.identity, facts, self._shards)
            self.finished = True
        self.close()
        census = Census.load(self.folder)
        self._ranks.of_first(census.facts)
        return census

    def close(self) -> None:
        """Write what came so far, unfinished as it is, and let go of the folder."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = True
            if self._lock is not None:
                self._lock.release()

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("this writer is closed; make another to go on")


class Census:
    """What ablating every active expert, one at a time, does at every token: a row for each.

    Its rows are a document after the other; within a document by layer, then position, then rank.

    Attributes:
        identity: of which run they are.
        facts: what was known at the end of it; of a finished census.
        columns: `document`, `position` (the column in the document), `layer`, `expert` (-1: the shared experts),
            `rank` (1: the heaviest; 0: the shared experts), `routing_weight`, `gap_norm`, `loss` (nats),
            `delta_loss`, and what else was measured.
        layers: those that have rows.
        n_documents: how many documents were gone through, also where they have no rows.
        finished: whether these are all documents that were to be.
        folder: where its rows are; None: in memory.
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        facts: Mapping[str, Any],
        shards: Sequence[Shard],
        *,
        finished: bool = True,
        folder: Path | None = None,
    ):
        self.identity, self.facts = dict(identity), dict(facts)
        self.finished = finished
        self.folder = folder
        self._shards = tuple(shards)
        self._dtypes = dtypes_with(self.identity["extra_columns"])
        self.columns = tuple(self._dtypes)
        self.layers = tuple(sorted({layer for shard in shards for layer in shard.rows}))
        self.n_documents = _n_documents(shards)

    @classmethod
    def load(cls, folder: str | Path, *, allow_unfinished: bool = False) -> Census:
        """The census that a `CensusWriter` wrote to a folder, or `save`.

        Args:
            allow_unfinished: whether it may be one whose run is still going on, or was stopped: its shards so far.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not finished; a shard is damaged, missing, or of another run.
        """
        folder = Path(folder).absolute()
        header = read_header(folder)
        shards = shards_in(folder, header["identity"])
        if header["finished"]:
            require_sums(folder, shards, header["shards"])
        elif not allow_unfinished:
            raise ValueError(
                f"the census {str(folder)!r} is not finished: it has {_n_documents(shards)} documents so far; go "
                f"on with its run, or load it with allow_unfinished=True"
            )
        return cls(
            header["identity"], header.get("facts", {}), shards, finished=header["finished"], folder=folder
        )

    def save(self, folder: str | Path) -> Path:
        """Write everything to a folder, which is there whole or not at all.

        Raises:
            FileNotFoundError: there is no folder to make it in.
            FileExistsError: it is there, and not empty.
            ValueError: this census is not finished.
        """
        folder = Path(folder).absolute()
        if not self.finished:
            raise ValueError("this census is not finished; its run can still go on, and a copy's could not")
        if not folder.parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {str(folder.parent)!r} to make the census {folder.name} in"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{str(folder)!r} is there, and not empty")
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        try:
            self._copy_to(unfinished)
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return folder

    def _copy_to(self, folder: Path) -> None:
        written = []
        for shard in self._shards:
            copy = Shard.of(shard.first, shard.end, [shard.read(self.columns)], self._dtypes)
            written.append(copy.written(folder, self.identity))
        write_header(folder, self.identity, self.facts, written)

    def __len__(self) -> int:
        return sum(shard.n_rows() for shard in self._shards)

    def __repr__(self) -> str:
        of = f" of {self.provenance['model']}" if "model" in self.identity else ""
        extra = ", ".join(self.identity["extra_columns"])
        plural = "" if self.n_documents == 1 else "s"
        return (
            f"<Census{of}: {len(self):,} rows, {self.n_documents:,} document{plural}, {layers_said(self.layers)}"
            f"{f'; with {extra}' if extra else ''}{'' if self.finished else '; not finished'}>"
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """Of which run the rows are, and what was known at the end of it."""
        return {**self.identity, **self.facts}

    # ---- rows ----

    def to_pandas(self, columns: str | Sequence[str] | None = None, layers: Layers = None) -> pd.DataFrame:
        """These columns (None: all) of the rows of these layers (None: all), in the types they are kept in. A shard
        is read at a time, and of that no more than is asked for.

        Raises:
            ValueError: a column or layer that there is not; those that there are, are named.
        """
        names = self.columns if columns is None else [columns] if isinstance(columns, str) else columns
        wanted = None if layers is None else self._layers(layers)
        return _frame(self._arrays(names, wanted), self._n_rows(wanted))

    def _layers(self, layers: int | str | Sequence[int | str]) -> list[int]:
        several = [layers] if isinstance(layers, (int, np.integer, str)) else layers
        named: dict[Any, int] = {f"M{layer}": layer for layer in self.layers}
        wanted: list[Any] = [
            named.get(one, one) if isinstance(one, str) else operator.index(one) for one in several
        ]
        those_there(wanted, self.layers, "layer")
        return wanted

    def _n_rows(self, layers: Sequence[int] | None) -> int:
        return sum(shard.n_rows(layers) for shard in self._shards)

    def _arrays(self, columns: Sequence[str], layers: Sequence[int] | None) -> Columns:
        those_there(columns, self.columns, "column")
        arrays = {name: np.empty(self._n_rows(layers), self._dtypes[name]) for name in columns}
        at = 0
        for shard in self._shards:
            part, n_rows = shard.read([*arrays], layers), shard.n_rows(layers)
            for name, values in part.items():
                arrays[name][at : at + n_rows] = values
            at += n_rows
        return arrays

    def top(self, n: int = 10, layer: int | None = None, by: str = "delta_loss") -> pd.DataFrame:
        """The n rows of the largest value of a column, the largest first, with all columns; NaN is none.

        Args:
            layer: the layer whose rows they are to be. None: of all.

        Raises:
            ValueError: no such layer or column; n is not positive.
        """
        n = positive_integer(n, "n")
        those_there([by], self.columns, "column")
        layers = None if layer is None else self._layers(layer)
        best = {name: np.empty(0, dtype) for name, dtype in self._dtypes.items()}
        for shard in self._shards:
            if not shard.n_rows(layers):
                continue
            values = shard.read([by], layers)[by]
            candidates = np.isfinite(values)
            if len(best[by]) == n:
                candidates &= values > best[by][-1]
            if candidates.any():
                rows = shard.read(self.columns, layers)
                for name in best:
                    best[name] = np.concatenate([best[name], rows[name][candidates]])
                # Of rows that are equal, the first stay.
                order = np.argsort(-best[by].astype(np.float64), kind="stable")[:n]
                best = {name: values[order] for name, values in best.items()}
        return _frame(best, len(best[by]))

    # ---- summaries ----

    def by_layer(self) -> pd.DataFrame:
        """One row per layer, over its routed experts' rows (the shared experts are rank 0 of `by_rank`): `n_rows`,
        `n_documents` that have any; of `delta_loss`, `gap_norm` and `routing_weight` the mean over rows and its
        `_standard_error`, and of `delta_loss` also `_median`, `_p5`, `_p95`.

        Rows of one document are not independent: standard errors are clustered by document, with a factor of
        G / (G - 1) on the variance for G documents, and NaN for fewer than two.
        """
        return self._summary(by_rank=False)

    def by_rank(self) -> pd.DataFrame:
        """As `by_layer`, one row per layer and rank; rank 0 is the shared experts."""
        return self._summary(by_rank=True)

    def _summary(self, by_rank: bool) -> pd.DataFrame:
        of_layers = ((layer, self._arrays(SUMMARISED, [layer])) for layer in self.layers)
        return summary(of_layers, by_rank=by_rank)


def _n_documents(shards: Sequence[Shard]) -> int:
    return sum(shard.end - shard.first for shard in shards)


def _frame(arrays: Columns, n_rows: int) -> pd.DataFrame:
    """The arrays themselves, not copies of them."""
    return pd.DataFrame(arrays, index=pd.RangeIndex(n_rows), copy=False)
