"""The table of a census: what rows may be, how they come back, and what is left after a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moe_lens.audit import census_shards
from moe_lens.audit.census_table import COLUMNS, Census, CensusWriter

IDENTITY = {
    "model": "tiny",
    "weights": "abc",
    "how": "zero",
    "scope": "token",
    "layers": [0, 2],
    "dtype": None,
}
EXTRA = ("first_order", "kl")
Rows = dict[str, np.ndarray]


def rows_of(
    document: int,
    *,
    length: int | None = None,
    layers: Sequence[int] = (0, 2, 3),
    k: int = 2,
    shared: bool = False,
    extra: Sequence[str] = EXTRA,
    shuffled: bool = True,
) -> Rows:
    """A document's rows, always the same, in no order. Every fourth document has none."""
    rng = np.random.default_rng(document)
    length = int(rng.integers(1, 9)) if length is None else length
    n = 0 if document % 4 == 3 else length
    ranks = np.arange(0 if shared else 1, k + 1)
    position, layer, rank = (axis.ravel() for axis in np.meshgrid(np.arange(n), layers, ranks, indexing="ij"))
    experts = rng.permuted(np.tile(np.arange(8), (n * len(layers), 1)), axis=1)[:, : len(ranks)].ravel()
    rows = {
        "position": position,
        "layer": layer,
        "expert": np.where(rank == 0, -1, experts),
        "rank": rank,
        "loss": np.repeat(rng.exponential(size=n), len(layers) * len(ranks)),
    }
    for name in ("routing_weight", "gap_norm", "delta_loss", *extra):
        rows[name] = rng.normal(size=len(position)) + document
    order = rng.permutation(len(position)) if shuffled else slice(None)
    return {
        name: values[order].astype(np.float32 if values.dtype.kind == "f" else np.int64)
        for name, values in rows.items()
    }


def frame_of(n_documents: int, **how: Any) -> pd.DataFrame:
    """The whole table, made with pandas."""
    frames = [pd.DataFrame(rows_of(i, **how)).assign(document=i) for i in range(n_documents)]
    extra = list(how.get("extra", EXTRA))
    table = pd.concat(frames).sort_values(["document", "layer", "position", "rank"])
    dtypes = {**COLUMNS, **dict.fromkeys(extra, np.float32)}
    return table[[*COLUMNS, *extra]].astype(dtypes).reset_index(drop=True)


def census_of(n_documents: int, folder: Path | None = None, **how: Any) -> Census:
    with CensusWriter(folder, IDENTITY, extra=how.get("extra", EXTRA), rows_per_shard=40) as writer:
        for i in range(n_documents):
            writer.add_document(i, rows_of(i, **how))
        return writer.finish({"noise_floor": 0.5})


def assert_same_frame(got: pd.DataFrame, want: pd.DataFrame) -> None:
    assert list(got.dtypes.items()) == list(want.dtypes.items())
    assert got.index.equals(want.index)
    for name in want:
        assert got[name].to_numpy().tobytes() == want[name].to_numpy().tobytes(), name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "census"


# ---- what comes back ----


def test_rows_come_back_in_order(place: Path | None) -> None:
    want = frame_of(20)
    census = census_of(20, place)
    assert len(census) == len(want) > 200
    assert census.n_documents == 20
    assert census.finished
    assert census.columns == (*COLUMNS, *EXTRA)
    assert census.layers == (0, 2, 3)
    assert_same_frame(census.to_pandas(), want)
    assert_same_frame(census.to_pandas(layers=[2]), want[want.layer == 2].reset_index(drop=True))
    assert_same_frame(census.to_pandas(layers=3), want[want.layer == 3].reset_index(drop=True))
    assert_same_frame(census.to_pandas(layers="M3"), want[want.layer == 3].reset_index(drop=True))
    assert_same_frame(census.to_pandas(layers=(3, 0, 3)), want[want.layer != 2].reset_index(drop=True))
    assert_same_frame(census.to_pandas(layers=np.array([0])), want[want.layer == 0].reset_index(drop=True))
    columns = ["kl", "position", "delta_loss"]
    assert_same_frame(census.to_pandas(columns), want[columns])
    assert_same_frame(census.to_pandas("loss", 0), want[want.layer == 0][["loss"]].reset_index(drop=True))
    assert len(census.to_pandas([])) == len(want)
    assert census.to_pandas(layers=[]).empty
    # What is given away can be written to, and that changes nothing.
    frame = census.to_pandas()
    frame.loc[:, "loss"] = -1.0
    assert_same_frame(census.to_pandas(), want)


def test_columns_are_as_small_as_stated(place: Path | None) -> None:
    assert {name: str(dtype) for name, dtype in COLUMNS.items()} == {
        "document": "int32", "position": "int32", "layer": "int16", "expert": "int16", "rank": "int16",
        "routing_weight": "float32", "gap_norm": "float32", "loss": "float32", "delta_loss": "float32",
    }  # fmt: skip
    frame = census_of(3, place).to_pandas()
    assert all(frame[name].dtype == dtype for name, dtype in COLUMNS.items())
    assert all(frame[name].dtype == np.float32 for name in EXTRA)


def test_rows_may_be_tensors(place: Path | None) -> None:
    rows = {name: torch.tensor(values) for name, values in rows_of(0).items()}
    rows["expert"] = rows["expert"].to(torch.int8)
    rows["loss"] = rows["loss"].bfloat16().requires_grad_()
    rows["kl"] = rows["kl"].double() / 3
    with CensusWriter(place, IDENTITY, extra=EXTRA) as writer:
        writer.add_document(0, rows)
        frame = writer.finish({}).to_pandas()
    want = pd.DataFrame({name: values.detach().float().numpy() for name, values in rows.items()})
    want = want.sort_values(["layer", "position", "rank"]).reset_index(drop=True)
    for name in rows:
        assert (frame[name] == want[name].astype(frame[name].dtype)).all(), name


def test_numbers_at_the_edge_of_their_column(place: Path | None) -> None:
    rows = rows_of(0, length=1, layers=[2**15 - 1], k=1)
    rows["position"][:] = 2**31 - 1
    rows["expert"][:] = rows["rank"][:] = 2**15 - 1
    with CensusWriter(place, IDENTITY, extra=EXTRA) as writer:
        writer.add_document(0, rows)
        (row,) = writer.finish({}).to_pandas().itertuples()
    assert (row.position, row.layer, row.expert, row.rank) == (2**31 - 1, *[2**15 - 1] * 3)


def test_a_census_of_nothing(place: Path | None) -> None:
    for n_documents in (0, 1):
        folder = place and place.with_name(f"of-{n_documents}")
        with CensusWriter(folder, IDENTITY) as writer:
            if n_documents:
                empty = {name: np.empty(0, dtype) for name, dtype in COLUMNS.items() if name != "document"}
                writer.add_document(0, empty)
            census = writer.finish({})
        assert len(census) == 0
        assert census.n_documents == n_documents
        assert census.layers == ()
        assert dict(census.to_pandas().dtypes) == COLUMNS
        assert census.to_pandas().empty
        assert census.top().empty
        assert census.by_layer().empty
        assert list(census.by_rank().columns[:4]) == ["layer", "rank", "n_rows", "n_documents"]
        counted = "1 document" if n_documents == 1 else "0 documents"
        assert repr(census) == f"<Census of tiny: 0 rows, {counted}, no layers>"


def test_unknown_columns_and_layers(place: Path | None) -> None:
    census = census_of(5, place)
    with pytest.raises(ValueError, match="has no column 'losses'; it has document, position, layer"):
        census.to_pandas(["loss", "losses"])
    with pytest.raises(ValueError, match="has no layer 1, 4; it has 0, 2, 3"):
        census.to_pandas(layers=[0, 1, 4])
    with pytest.raises(ValueError, match="has no layer 1; it has 0, 2, 3"):
        census.top(layer=1)
    with pytest.raises(ValueError, match="has no column 'x'"):
        census.top(by="x")
    with pytest.raises(ValueError, match="n=0 must be positive"):
        census.top(0)


def test_repr_is_one_line(place: Path | None) -> None:
    n_rows = len(frame_of(6))
    assert repr(census_of(6, place)) == (
        f"<Census of tiny: {n_rows} rows, 6 documents, layers 0, 2, 3; with first_order, kl>"
    )
    assert ", layers 0 to 3; " in repr(census_of(2, layers=(0, 1, 2, 3)))
    assert ", layer 2; " in repr(census_of(2, layers=(2,)))


def test_provenance(place: Path | None) -> None:
    census = census_of(2, place)
    assert census.identity == {**IDENTITY, "extra_columns": list(EXTRA)}
    assert census.facts == {"noise_floor": 0.5}
    assert census.provenance == census.identity | census.facts


# ---- what rows may be ----


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("position", 2**31, r"position is 2147483648, and must be 0 to 2,147,483,647"),
        ("position", -1, "position is -1"),
        ("layer", 2**15, "layer is 32768"),
        ("layer", -1, "layer is -1"),
        ("expert", 2**15, r"expert is 32768, and must be -1 to 32,767"),
        ("expert", -2, "expert is -2"),
        ("rank", 2**15, "rank is 32768"),
        ("expert", -1, "expert -1 has rank"),
        ("rank", 0, "rank 0 is that of expert -1"),
        ("loss", np.nan, "loss is nan at row 2, and must be finite"),
        ("loss", np.inf, "loss is inf"),
        ("delta_loss", 1e39, r"delta_loss is 1e\+39"),
        ("first_order", np.nan, "first_order is nan"),
        ("kl", -np.inf, "kl is -inf"),
    ],
)
def test_numbers_that_a_column_cannot_hold(column: str, value: float, message: str) -> None:
    writer = CensusWriter(None, IDENTITY, extra=EXTRA, may_be_nan=["kl"])
    rows = rows_of(0)
    rows["delta_loss"] = rows["delta_loss"].astype(np.float64)
    rows[column] = rows[column].copy()
    rows[column][2] = value
    with pytest.raises(ValueError, match=f"document 0: .*{message}"):
        writer.add_document(0, rows)
    assert writer.n_documents_done == 0
    writer.add_document(0, rows_of(0))  # nothing of it was kept
    assert_same_frame(writer.finish({}).to_pandas(), frame_of(1))


def test_nan_where_it_may_be(place: Path | None) -> None:
    rows = rows_of(0)
    rows["kl"][1] = np.nan
    with CensusWriter(place, IDENTITY, extra=EXTRA, may_be_nan=["kl"]) as writer:
        writer.add_document(0, rows)
        census = writer.finish({})
    assert census.to_pandas().isna().sum().sum() == 1
    assert len(census.top(1000, by="kl")) == len(census) - 1


def test_other_kinds_of_numbers() -> None:
    writer, rows = CensusWriter(None, IDENTITY, extra=EXTRA), rows_of(0)
    for name, values, message in (
        ("rank", rows["rank"].astype(float), "rank must be integers, not float64"),
        ("expert", rows["expert"] > 0, "expert must be integers, not bool"),
        ("loss", rows["rank"], "loss must be floating-point numbers, not int64"),
        ("kl", torch.ones(len(rows["kl"]), dtype=torch.cfloat), "kl must be floating-point numbers"),
        ("kl", rows["kl"][:-1], "its columns must be equally long, not .*'kl': "),
        ("kl", rows["kl"][:, None], r"kl must be \[row\], not \["),
    ):
        with pytest.raises(ValueError, match=f"document 0: {message}"):
            writer.add_document(0, {**rows, name: values})
    for wrong, message in (
        ({n: v for n, v in rows.items() if n not in ("kl", "loss")}, "it lacks the column 'loss', 'kl'; its"),
        ({**rows, "direct": rows["kl"]}, "there is no column 'direct'; its columns must be position, layer"),
        ({**rows, "document": rows["rank"]}, "there is no column 'document'"),
    ):
        with pytest.raises(ValueError, match=f"document 0: {message}"):
            writer.add_document(0, wrong)
    assert writer.n_documents_done == 0


@pytest.mark.parametrize("name", ["rank", "expert"])
def test_rows_that_are_there_twice(name: str) -> None:
    writer, rows = CensusWriter(None, IDENTITY, extra=EXTRA), rows_of(0, shuffled=False)
    rows[name][1] = rows[name][0]  # of one position and layer
    with pytest.raises(ValueError, match=f"document 0: position 0 has {name} .* twice at layer 0"):
        writer.add_document(0, rows)


def test_documents_come_in_order(place: Path | None) -> None:
    with CensusWriter(place, IDENTITY, extra=EXTRA) as writer:
        with pytest.raises(ValueError, match="document 1 was given, and 0 is the next"):
            writer.add_document(1, rows_of(1))
        writer.add_document(0, rows_of(0))
        with pytest.raises(ValueError, match="document 0 was given, and 1 is the next"):
            writer.add_document(0, rows_of(0))
        writer.flush()
        assert writer.n_documents_done == 1
        writer.finish({})
    with pytest.raises(ValueError, match="this writer is closed"):
        writer.add_document(1, rows_of(1))


def test_arguments_of_the_writer(tmp_path: Path) -> None:
    for extra in (["loss"], ["a", "a"], [""], [1]):
        with pytest.raises(ValueError, match="extra columns need names of their own"):
            CensusWriter(None, IDENTITY, extra=extra)
    with pytest.raises(ValueError, match="no float column 'rank'; it has routing_weight"):
        CensusWriter(None, IDENTITY, may_be_nan=["rank"])
    with pytest.raises(ValueError, match=r"identity\['layers'\] is no JSON data"):
        CensusWriter(None, {**IDENTITY, "layers": np.arange(2)})
    with pytest.raises(ValueError, match=r"identity\['x'\] is no JSON data"):
        CensusWriter(None, {**IDENTITY, "x": float("nan")})
    with pytest.raises(ValueError, match="is for the names given as extra"):
        CensusWriter(None, {"extra_columns": []})
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        CensusWriter(tmp_path / "nowhere" / "census", IDENTITY)
    with CensusWriter(tmp_path / "census", IDENTITY) as writer:
        with pytest.raises(ValueError, match=r"facts\['seconds'\] is no JSON data"):
            writer.finish({"seconds": torch.ones(1)})
        with pytest.raises(ValueError, match=r"facts\['how'\] is in the identity already"):
            writer.finish({"how": 1})
        writer.finish({"noise_floor": float("nan")})
    assert np.isnan(Census.load(tmp_path / "census").facts["noise_floor"])


# ---- on disk ----


def test_what_a_folder_holds(tmp_path: Path) -> None:
    folder = tmp_path / "census"
    census = census_of(20, folder)
    names = names_in(folder)
    assert names[0] == "_census.json"
    ends = [0]
    for name in names[1:]:
        first, end = (int(number) for number in name.removesuffix(".parquet").split("-")[1:])
        assert name == f"rows-{first:08d}-{end:08d}.parquet"
        assert first == ends[-1]
        ends.append(end)
        rows = pq.read_table(folder / name)
        assert set(rows["document"].to_pylist()) == {i for i in range(first, end) if i % 4 != 3}
    assert ends[-1] == 20
    assert len(ends) > 4
    # Any reader of Parquet reads it.
    frame = pd.read_parquet(folder).sort_values(["document", "layer", "position", "rank"])
    assert_same_frame(frame.reset_index(drop=True), census.to_pandas())
    assert_same_frame(Census.load(str(folder)).to_pandas(), census.to_pandas())
    assert b"pickle" not in b"".join(path.read_bytes() for path in folder.iterdir())


def test_a_layer_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its row groups, and no others."""
    monkeypatch.setattr(census_shards, "_ROWS_PER_GROUP", 7)
    want, census = frame_of(20), census_of(20, tmp_path / "census")
    read = []
    true_read = pq.ParquetFile.read_row_groups

    def count(file: pq.ParquetFile, groups: list[int], columns: list[str]) -> pa.Table:
        rows = true_read(file, groups, columns=columns)
        read.append((rows.num_rows, columns))
        return rows

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", count)
    for layer in census.layers:
        read.clear()
        got = census.to_pandas(["loss"], layers=layer)
        assert_same_frame(got, want[want.layer == layer][["loss"]].reset_index(drop=True))
        assert sum(n for n, _ in read) <= len(got) + len(read) * 2 * 6
        assert all(columns == ["loss"] for _, columns in read)
    assert_same_frame(census.to_pandas(layers=[0, 3]), want[want.layer != 2].reset_index(drop=True))
    assert_same_frame(census.to_pandas(), want)


def test_bytes_per_row(tmp_path: Path) -> None:
    """Of what cannot be compressed there are three floats a row; the loss is said once for a position."""
    n, sizes = 400, []
    for repeated in (True, False):
        rows = rows_of(0, length=n, layers=range(16), k=4, extra=(), shuffled=False)
        if not repeated:
            rows["loss"] = np.random.default_rng(0).exponential(size=len(rows["loss"]))
        with CensusWriter(tmp_path / str(repeated), IDENTITY) as writer:
            writer.add_document(0, rows)
            census = writer.finish({})
        (shard,) = (tmp_path / str(repeated)).glob("rows-*")
        sizes.append(shard.stat().st_size / len(census))
    assert sizes[0] < 13.5
    assert sizes[0] < sizes[1] - 2


def test_reading_takes_no_multiple_of_what_is_read(tmp_path: Path) -> None:
    how = dict(length=100, k=4, extra=())
    with CensusWriter(tmp_path / "census", IDENTITY, rows_per_shard=5000) as writer:
        for i in range(200):
            writer.add_document(i, rows_of(i, **how))
        census = writer.finish({})
    census.to_pandas(layers=0)  # what pandas allocates once

    def peak(call: Any) -> int:
        tracemalloc.start()
        result = call()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del result
        return found

    size = len(census) * sum(dtype.itemsize for dtype in COLUMNS.values())
    assert size > 5e6
    assert size <= peak(census.to_pandas) < 1.25 * size
    assert peak(census.by_layer) < 0.8 * size  # of three layers, one
    assert peak(census.top) < 0.25 * size


def test_saved_and_loaded(place: Path | None, tmp_path: Path) -> None:
    census = census_of(20, place)
    saved = census.save(tmp_path / "saved")
    assert saved == tmp_path / "saved"
    loaded = Census.load(saved)
    assert_same_frame(loaded.to_pandas(), census.to_pandas())
    assert (loaded.identity, loaded.facts, loaded.finished) == (census.identity, census.facts, True)
    assert loaded.folder == saved
    assert repr(loaded) == repr(census)
    with CensusWriter(saved, IDENTITY, extra=EXTRA) as writer:  # like one that was written there
        assert writer.n_documents_done == 20
        assert writer.finished
    with pytest.raises(FileExistsError, match="saved' is there, and not empty"):
        census.save(saved)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        census.save(tmp_path / "nowhere" / "saved")
    (tmp_path / "empty").mkdir()
    census.save(tmp_path / "empty")
    (tmp_path / ".killed.unfinished").mkdir()
    (tmp_path / ".killed.unfinished" / "rows-00000000-00000001.parquet").write_bytes(b"half")
    census.save(tmp_path / "killed")
    assert_same_frame(Census.load(tmp_path / "killed").to_pandas(), census.to_pandas())
    assert {path.name for path in tmp_path.iterdir()} <= {"census", "saved", "empty", "killed"}


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    census = census_of(20)
    monkeypatch.setattr(census_shards, "sync_folder", dies_at(3))
    with pytest.raises(Killed):
        census.save(tmp_path / "saved")
    assert names_in(tmp_path) == []


# ---- gone on with ----


class Killed(BaseException):
    """Nothing more is done."""


def dies_at(n: int) -> Any:
    calls = []

    def call(*_: object, **__: object) -> None:
        calls.append(1)
        if len(calls) == n:
            raise Killed

    return call


def go_on(folder: Path, n_documents: int, **how: Any) -> Census:
    with CensusWriter(folder, IDENTITY, extra=EXTRA, **how) as writer:
        for i in range(writer.n_documents_done, n_documents):
            writer.add_document(i, rows_of(i))
        return writer.finish({"noise_floor": 0.5})


@pytest.mark.parametrize("n", [0, 1, 7, 19, 20])
def test_cut_anywhere_the_table_is_the_same(tmp_path: Path, n: int) -> None:
    folder = tmp_path / "census"
    with CensusWriter(folder, IDENTITY, extra=EXTRA, rows_per_shard=30) as writer:
        for i in range(n):
            writer.add_document(i, rows_of(i))
    with pytest.raises(ValueError, match=f"is not finished: it has {n} documents so far; .*allow_unfinished"):
        Census.load(folder)
    part = Census.load(folder, allow_unfinished=True)
    assert (part.finished, part.n_documents, part.facts) == (False, n, {})
    assert repr(part).endswith("; not finished>")
    assert_same_frame(part.to_pandas(), frame_of(n) if n else frame_of(1).iloc[:0])
    with pytest.raises(ValueError, match="not finished"):
        part.save(tmp_path / "part")
    census = go_on(folder, 20, rows_per_shard=100)
    assert census.finished
    assert_same_frame(census.to_pandas(), frame_of(20))
    for ours, whole in ((census.by_layer(), census_of(20).by_layer()), (census.top(5), census_of(20).top(5))):
        assert_same_frame(ours, whole)


def test_a_finished_census(tmp_path: Path) -> None:
    """Finishing it once more changes nothing; a longer corpus goes on from it."""
    folder = tmp_path / "census"
    census_of(10, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with CensusWriter(folder, IDENTITY, extra=EXTRA) as writer:
        assert (writer.finished, writer.n_documents_done) == (True, 10)
        assert writer.finish({"noise_floor": 9}).facts == {"noise_floor": 0.5}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with CensusWriter(folder, IDENTITY, extra=EXTRA) as writer:
        writer.add_document(10, rows_of(10))
        writer.flush()
        assert not writer.finished
    with pytest.raises(ValueError, match="not finished"):
        Census.load(folder)
    census = go_on(folder, 20)
    assert census.n_documents == 20
    assert_same_frame(census.to_pandas(), frame_of(20))


def test_how_often_shards_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_rows = [len(rows_of(i)["loss"]) for i in range(20)]
    for name, how, n_shards in (
        ("seldom", dict(save_every=3600), 1),
        ("often", dict(save_every=0), 20),
        ("by rows", dict(rows_per_shard=max(n_rows)), None),
    ):
        go_on(tmp_path / name, 20, **how)
        shards = census_shards.shards_in(tmp_path / name, {**IDENTITY, "extra_columns": [*EXTRA]})
        assert n_shards is None or len(shards) == n_shards
        if name == "by rows":
            assert all(max(n_rows) <= shard.n_rows() < 2 * max(n_rows) for shard in shards[:-1])
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with CensusWriter(tmp_path / "timed", IDENTITY, extra=EXTRA, save_every=10) as writer:
        for i in range(20):
            now[0] += 4
            writer.add_document(i, rows_of(i))
    assert names_in(tmp_path / "timed")[1:-1] == [
        f"rows-{i:08d}-{i + 3:08d}.parquet" for i in range(0, 18, 3)
    ]


def one_document_and_an_interrupt(folder: Path) -> None:
    with CensusWriter(folder, IDENTITY, extra=EXTRA) as writer:
        writer.add_document(writer.n_documents_done, rows_of(writer.n_documents_done))
        raise Killed


def test_an_exception_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "census"
    for n in range(1, 4):
        with pytest.raises(Killed):
            one_document_and_an_interrupt(folder)
        assert Census.load(folder, allow_unfinished=True).n_documents == n
    assert ".lock" not in names_in(folder)


class Machine:
    """Dies at the n-th of the calls by which anything becomes lasting, before it or after it."""

    def __init__(self, n: int | None, before: bool, monkeypatch: pytest.MonkeyPatch):
        self.n, self.before, self.calls, self.dead = n, before, 0, False
        for name in ("replace", "fsync", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise Killed
            self.calls += 1
            self.dead = self.calls == self.n
            if self.dead and self.before:
                raise Killed
            result = call(*args, **kwargs)
            if self.dead:
                raise Killed
            return result

        return wrapped


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_dies_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    n_documents, n_steps = (
        4,
        4,
    )  # of a file: onto the disk, its name, the old name, and the folder onto the disk
    want = frame_of(n_documents)
    with monkeypatch.context() as patch:
        machine = Machine(None, before, patch)
        go_on(tmp_path / "whole", n_documents, save_every=0)
    assert machine.calls == n_steps * (1 + n_documents + 1) + 1  # headers at both ends; the lock
    for n in range(1, machine.calls + 1):
        folder = tmp_path / str(n)
        with monkeypatch.context() as patch:
            Machine(n, before, patch)
            with pytest.raises(Killed):
                go_on(folder, n_documents, save_every=0)
        if (folder / "_census.json").exists():
            part = Census.load(folder, allow_unfinished=True)
            assert_same_frame(part.to_pandas(), want[want.document < part.n_documents])
            names_given = [n_steps * (1 + i) + 2 for i in range(n_documents)]
            assert part.n_documents == sum(step < n + (not before) for step in names_given)
        assert_same_frame(go_on(folder, n_documents).to_pandas(), want)
        assert all(name.startswith(("_census.json", "rows-")) for name in names_in(folder))


class InterruptedList(list):
    def append(self, item: Any) -> None:
        super().append(item)
        raise Killed


def test_an_interrupt_between_a_shard_and_the_next(tmp_path: Path) -> None:
    """A shard that is written, where the writer had no time to take note of it, is not written twice."""
    folder = tmp_path / "census"
    with CensusWriter(folder, IDENTITY, extra=EXTRA) as writer:
        for i in range(3):
            writer.add_document(i, rows_of(i))
        writer._shards = InterruptedList()
        with pytest.raises(Killed):
            writer.flush()
        writer._shards = list(writer._shards)
        assert writer.n_documents_done == 3
    assert names_in(folder) == ["_census.json", "rows-00000000-00000003.parquet"]
    assert_same_frame(go_on(folder, 12).to_pandas(), frame_of(12))


def kill_while_writing(folder: Path, n_documents: int, seconds: float | None) -> bool:
    """Write in another process, and kill that after so long (None: never); whether it was still at work."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # Neither a shard for every document nor all in one.
            with CensusWriter(folder, IDENTITY, extra=EXTRA, rows_per_shard=60) as writer:
                for i in range(writer.n_documents_done, n_documents):
                    writer.add_document(i, rows_of(i))
                writer.finish({"noise_floor": 0.5})
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(tmp_path: Path, seed: int) -> None:
    n_documents, n_killed, last = 60, 0, 0
    want, folder, rng = frame_of(n_documents), tmp_path / "census", np.random.default_rng(seed)
    began = time.monotonic()
    assert not kill_while_writing(tmp_path / "uninterrupted", n_documents, None)
    longest = (time.monotonic() - began) / 5
    # Later and later, so that it comes to an end whatever else the machine does.
    while kill_while_writing(folder, n_documents, rng.uniform(0, longest * 1.1**n_killed)):
        n_killed += 1
        if (folder / "_census.json").exists():
            part = Census.load(folder, allow_unfinished=True)
            assert part.n_documents >= last
            last = part.n_documents
            assert_same_frame(part.to_pandas(), want[want.document < last])
    assert n_killed >= 1
    census = Census.load(folder)
    assert census.n_documents == n_documents
    assert_same_frame(census.to_pandas(), want)
    assert len(list(folder.glob("rows-*"))) > 5


# ---- one writer ----


def test_two_writers(tmp_path: Path) -> None:
    folder = tmp_path / "census"
    with CensusWriter(folder, IDENTITY, extra=EXTRA) as writer:
        with pytest.raises(RuntimeError, match=rf"is being written by process {os.getpid()} on .*, this one"):
            CensusWriter(folder, IDENTITY, extra=EXTRA)
        writer.add_document(0, rows_of(0))  # and goes on undisturbed
        writer.flush()
        assert Census.load(folder, allow_unfinished=True).n_documents == 1  # reading needs no lock
    assert_same_frame(go_on(folder, 5).to_pandas(), frame_of(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_in_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "census"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            writer = CensusWriter(folder, IDENTITY, extra=EXTRA)
            writer.add_document(0, rows_of(0))
            os.write(write, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(read, 1)
    with pytest.raises(RuntimeError, match=rf"is being written by process {child} on .*two writers"):
        CensusWriter(folder, IDENTITY, extra=EXTRA)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ".lock" in names_in(folder)
    assert_same_frame(go_on(folder, 5).to_pandas(), frame_of(5))
    assert ".lock" not in names_in(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_closed_writer_keeps_nobody_out(tmp_path: Path) -> None:
    """Not even while a process lives that was forked while it was open."""
    with CensusWriter(tmp_path / "census", IDENTITY, extra=EXTRA):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        go_on(tmp_path / "census", 5)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---- of other runs, and damaged ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "xyz"}, "weights was 'abc' and is 'xyz'"),
        ({"how": "mean"}, "how was 'zero' and is 'mean'"),
        ({"layers": [0]}, r"layers was \[0, 2\] and is \[0\]"),
        ({"new": None}, "new was None and is None|new was"),
    ],
)
def test_of_another_run(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "census"
    census_of(10, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"is of another run: {message}; name another folder, or delete"):
        CensusWriter(folder, {**IDENTITY, **change}, extra=EXTRA)
    with pytest.raises(ValueError, match=r"extra_columns was \['first_order', 'kl'\] and is \['kl'\]"):
        CensusWriter(folder, IDENTITY, extra=["kl"])
    lacking = {name: value for name, value in IDENTITY.items() if name != "dtype"}
    with pytest.raises(ValueError, match="another run: dtype was None and is"):
        CensusWriter(folder, lacking, extra=EXTRA)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with CensusWriter(folder, {**IDENTITY, "layers": (0, 2)}, extra=EXTRA):
        pass  # as JSON, the same


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"holds 'notes.txt', which is of no census; name a folder that is new"
    ):
        CensusWriter(tmp_path, IDENTITY)
    assert names_in(tmp_path) == ["notes.txt"]
    for name in ("rows-1-2.parquet", "rows-00000000-00000001.parquet.bak", "sub", "table.parquet"):
        folder = tmp_path / f"with {name}"
        census_of(3, folder)
        (folder / name).mkdir()
        with pytest.raises(ValueError, match="which is of no census"):
            CensusWriter(folder, IDENTITY, extra=EXTRA)
    with pytest.raises(FileNotFoundError, match=r"there is no census in .*it has no _census.json"):
        Census.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no census"):
        Census.load(tmp_path / "nowhere")


def test_what_a_killed_run_left(tmp_path: Path) -> None:
    folder = tmp_path / "census"
    with CensusWriter(folder, IDENTITY, extra=EXTRA, save_every=0) as writer:
        for i in range(3):
            writer.add_document(i, rows_of(i))
    for name in (".rows-00000003-00000004.parquet.unfinished", "._census.json.unfinished"):
        (folder / name).write_bytes(b"half of a fi")
    assert Census.load(folder, allow_unfinished=True).n_documents == 3
    with CensusWriter(folder, IDENTITY, extra=EXTRA):
        assert not any("unfinished" in name for name in names_in(folder))
    assert_same_frame(go_on(folder, 5).to_pandas(), frame_of(5))


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten documents, a shard each, not finished."""
    with CensusWriter(tmp_path / "ten", IDENTITY, extra=EXTRA, save_every=0) as writer:
        for i in range(10):
            writer.add_document(i, rows_of(i))
    return tmp_path / "ten"


def refused(folder: Path, message: str) -> None:
    for opening in (
        lambda: Census.load(folder, allow_unfinished=True),
        lambda: CensusWriter(folder, IDENTITY, extra=EXTRA),
    ):
        with pytest.raises(ValueError, match=message):
            opening()
    assert ".lock" not in names_in(folder)


def test_missing_and_overlapping_shards(ten: Path) -> None:
    fourth = ten / "rows-00000004-00000005.parquet"
    content = fourth.read_bytes()
    fourth.unlink()
    # Until it is finished, others may be at work on what is missing.
    assert Census.load(ten, allow_unfinished=True).n_documents == 9
    with CensusWriter(ten, IDENTITY, extra=EXTRA) as writer:
        assert (writer.missing(12), writer.n_documents_done, writer.next_document) == ([4, 10, 11], 9, 4)
        with pytest.raises(ValueError, match="document 10 was given, and 4 is the next"):
            writer.add_document(10, rows_of(10))
        with pytest.raises(ValueError, match=r"the documents 4 to 4 are missing in .*ten"):
            writer.finish({})
    renamed = ten / "rows-00000004-00000006.parquet"
    renamed.write_bytes(content)
    refused(ten, "rows-00000004-00000006.parquet' is damaged: .*holds the documents 4 to 4")
    renamed.unlink()
    fourth.write_bytes(content)
    (ten / "rows-00000010-00000011.parquet").write_bytes(content)
    refused(ten, "rows-00000010-00000011.parquet' is damaged: .*holds the documents 4 to 4")
    (ten / "rows-00000010-00000011.parquet").unlink()
    with CensusWriter(ten.with_name("other"), IDENTITY, extra=EXTRA) as writer:
        for i in range(10):
            writer.add_document(i, rows_of(i))
    name = "rows-00000000-00000010.parquet"
    (ten / name).write_bytes((ten.with_name("other") / name).read_bytes())
    refused(ten, f"{name}' has documents of .*rows-00000000-00000001.parquet' once more")


def test_a_shard_of_another_run(ten: Path) -> None:
    with CensusWriter(ten.with_name("other"), {**IDENTITY, "seed": 1}, extra=EXTRA, save_every=0) as writer:
        for i in range(10):
            writer.add_document(i, rows_of(i))
    name = "rows-00000004-00000005.parquet"
    os.replace(ten.with_name("other") / name, ten / name)
    refused(ten, f"{name}' is of another run: seed was 1 and is None")
    pq.write_table(pa.table({"loss": [1.0]}), ten / name)
    refused(ten, f"{name}' is damaged: KeyError")


def test_a_finished_census_is_checked_whole(tmp_path: Path) -> None:
    """Any byte, and any file more or less."""
    folder, rng = tmp_path / "census", np.random.default_rng(0)
    census_of(20, folder)
    shards = sorted(folder.glob("rows-*"))
    for _ in range(300):
        path = shards[int(rng.integers(len(shards)))]
        good = path.read_bytes()
        spoilt = bytearray(good)
        spoilt[int(rng.integers(len(good)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=path.name):
            Census.load(folder)
        path.write_bytes(good)
    for spoilt in (b"", b"garbage", good[:-1], good + b"x"):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=f"{path.name}.* is damaged"):
            Census.load(folder)
        path.write_bytes(good)
    assert len(Census.load(folder).to_pandas()) == len(frame_of(20))
    last = shards[-1].read_bytes()
    shards[-1].unlink()
    with pytest.raises(ValueError, match=f"{shards[-1].name}' is missing"):
        Census.load(folder)
    with pytest.raises(ValueError, match=f"{shards[-1].name}' is missing"):
        CensusWriter(folder, IDENTITY, extra=EXTRA)
    shards[-1].write_bytes(last)
    header = json.loads((folder / "_census.json").read_text())
    del header["shards"][shards[-1].name]
    (folder / "_census.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=f"{shards[-1].name}' came after the census was finished"):
        Census.load(folder)


def table_or_error(folder: Path) -> pd.DataFrame | str:
    try:
        return Census.load(folder, allow_unfinished=True).to_pandas()
    except ValueError as error:
        return str(error)


def test_an_unfinished_census_is_never_read_wrong(ten: Path) -> None:
    """Its pages carry sums of their own: a spoilt byte is told, or it was of no importance."""
    rng, want = np.random.default_rng(1), frame_of(10)
    path, n_told = ten / "rows-00000004-00000005.parquet", 0
    good = path.read_bytes()
    for _ in range(300):
        spoilt = bytearray(good)
        spoilt[int(rng.integers(len(good)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        got = table_or_error(ten)
        if isinstance(got, str):
            assert path.name in got
            n_told += 1
        else:
            assert_same_frame(got, want)
    assert n_told > 100


def test_a_shard_that_goes_while_it_is_read(tmp_path: Path) -> None:
    census = census_of(20, tmp_path / "census")
    path = sorted((tmp_path / "census").glob("rows-*"))[1]
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}' is gone"):
        census.to_pandas()


def test_damaged_headers(tmp_path: Path) -> None:
    folder = tmp_path / "census"
    census_of(5, folder)
    path = folder / "_census.json"
    good = json.loads(path.read_text())
    for spoilt in ("", "{", "[]", "{}", json.dumps({**good, "format": 0}), json.dumps({**good, "shards": 1})):
        path.write_text(spoilt)
        with pytest.raises(ValueError, match=r"_census\.json' is damaged"):
            Census.load(folder)
        with pytest.raises(ValueError, match=r"_census\.json' is damaged"):
            CensusWriter(folder, IDENTITY, extra=EXTRA)


# ---- summaries ----


def regression_error(values: np.ndarray, documents: np.ndarray) -> float:
    """The error of the constant in a regression on it alone, clustered: (X'X)^-1 X'uu'X (X'X)^-1, times G / (G-1)."""
    x = np.ones((len(values), 1))
    u = values - x[:, 0] * np.linalg.lstsq(x, values, rcond=None)[0]
    meat = np.zeros((1, 1))
    for document in set(documents.tolist()):
        s = x[documents == document].T @ u[documents == document]
        meat += np.outer(s, s)
    bread = np.linalg.inv(x.T @ x)
    n = len(set(documents.tolist()))
    return float(np.sqrt((n / (n - 1) * bread @ meat @ bread)[0, 0]))


@pytest.mark.parametrize("by_rank", [False, True])
def test_summaries(place: Path | None, by_rank: bool) -> None:
    how = dict(shared=True, k=3)
    census, frame = census_of(20, place, **how), frame_of(20, **how)
    got = census.by_rank() if by_rank else census.by_layer()
    if not by_rank:
        frame = frame[frame["rank"] > 0]  # the shared experts are other things
    keys = ["layer", "rank"] if by_rank else ["layer"]
    assert len(got) == (12 if by_rank else 3)
    assert got.columns.tolist() == [
        *keys, "n_rows", "n_documents", "delta_loss", "delta_loss_standard_error", "delta_loss_median",
        "delta_loss_p5", "delta_loss_p95", "gap_norm", "gap_norm_standard_error", "routing_weight",
        "routing_weight_standard_error",
    ]  # fmt: skip
    for (key, rows), (_, line) in zip(frame.groupby(keys), got.iterrows(), strict=True):
        assert tuple(line[keys]) == key
        assert line.n_rows == len(rows)
        assert line.n_documents == rows.document.nunique() == 15
        for name in ("delta_loss", "gap_norm", "routing_weight"):
            values = rows[name].to_numpy(np.float64)
            assert line[name] == pytest.approx(values.mean(), rel=1e-12)
            want = regression_error(values, rows.document.to_numpy())
            assert line[f"{name}_standard_error"] == pytest.approx(want, rel=1e-9)
        for name, q in (("median", 0.5), ("p5", 0.05), ("p95", 0.95)):
            assert line[f"delta_loss_{name}"] == pytest.approx(rows.delta_loss.astype(float).quantile(q))
    assert got.n_rows.dtype == got.n_documents.dtype == got.layer.dtype == np.int64


def test_equal_documents_are_one_observation_each() -> None:
    """Then the error is that of the mean of their means."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=30)
    with CensusWriter(None, IDENTITY) as writer:
        for i, mean in enumerate(means):
            rows = rows_of(4 * i, length=5, layers=[0], extra=())
            rows["delta_loss"] = mean + 1e6 + np.zeros(10)  # far from 0, so that squares would cancel
            writer.add_document(i, rows)
        (line,) = writer.finish({}).by_layer().itertuples()
    seen = (means + 1e6).astype(np.float32).astype(np.float64)
    assert line.delta_loss_standard_error == pytest.approx(seen.std(ddof=1) / np.sqrt(30), rel=1e-6)


def test_one_document_has_no_error(place: Path | None) -> None:
    census = census_of(1, place)
    for table in (census.by_layer(), census.by_rank()):
        assert table.filter(like="standard_error").isna().all().all()
        assert table.delta_loss.notna().all()


def test_a_layer_of_shared_experts_alone() -> None:
    rows = rows_of(0, shared=True, k=0)
    with CensusWriter(None, IDENTITY, extra=EXTRA) as writer:
        writer.add_document(0, rows)
        census = writer.finish({})
    assert census.by_layer().empty
    assert census.by_rank()["rank"].tolist() == [0, 0, 0]
    assert (census.to_pandas("expert") == -1).all().all()


def test_top(place: Path | None) -> None:
    census, frame = census_of(20, place), frame_of(20)
    for n, layer, by in (
        (1, None, "delta_loss"),
        (10, 2, "kl"),
        (7, None, "loss"),
        (1000, 0, "gap_norm"),
        (9, 3, "rank"),
    ):
        there = frame if layer is None else frame[frame.layer == layer]
        want = there.sort_values(by, ascending=False, kind="stable").head(n).reset_index(drop=True)
        assert_same_frame(census.top(n, layer, by), want)
    assert_same_frame(census.top(), frame.nlargest(10, "delta_loss").reset_index(drop=True))
