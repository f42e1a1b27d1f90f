"""A full disk, and files that were damaged between two calls: told by name, and what was finished is kept."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens import cli
from moe_lens.audit import expert_metrics
from moe_lens.audit.census_table import Census
from moe_lens.audit.frame_file import write_frame
from moe_lens.converters.checkpoint import SINGLE
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.expert_reference import expert_reference
from moe_lens.page import write_page
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.storage import whole_or_not, write_atomically
from tests.fault_cases import as_census, memory_for
from tests.routing_cases import assert_same_results
from tests.test_contribution_runs import five_batches

# ---- a full disk ----


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """No file may become larger, so that writing fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def writers(model: Any) -> dict[str, Callable[[Path], object]]:
    contributions = routing_contributions(model, five_batches(), by="expert")
    table = expert_metrics(model, five_batches())
    whole = as_census(model)
    frame = whole.to_pandas()
    return {
        "result": contributions.save,
        "parquet": contributions.write_table,
        "metrics": table.save,
        "reference": expert_reference(model, five_batches()).save,
        "frame": lambda path: write_frame(path, frame, "audit", {}),
        "page": lambda path: write_page("page " * 10_000, path),
        "census": whole.save,
    }


def test_files_on_a_full_disk(model_of: Any, tmp_path: Path) -> None:
    """The file is named, it is as it was before, and nothing else is left."""
    for name, write in writers(model_of("qwen2_moe_no_bias")).items():
        path = tmp_path / name / "file"
        path.parent.mkdir()
        for before in (None, b"as it was"):
            if before is not None:
                if name == "census":
                    continue  # a folder, which is never written over
                path.write_bytes(before)
            with files_of_at_most(2000), pytest.raises(OSError, match="there is no room to write") as caught:
                write(path)
            assert caught.value.errno == errno.EFBIG
            assert "file" in str(caught.value)
            assert "File too large): free some" in str(caught.value)
            left = {p.name: p.read_bytes() for p in path.parent.iterdir()}
            assert left == ({} if before is None else {"file": before}), name
            if before is not None or name == "census":
                path.unlink(missing_ok=True)
                write(path)
                assert path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_without_space(tmp_path: Path) -> None:
    """The device that is always full, which is written to through a link."""
    for write in (
        lambda path: write_page("page", path),
        lambda path: write_frame(path, pd.DataFrame({"a": np.arange(9999)}), "audit", {}),
    ):
        (tmp_path / ".file.unfinished").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"there is no room to write .*No space left on device") as caught:
            write(tmp_path / "file")
        assert caught.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []


def test_another_error_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        write_atomically(tmp_path / "file", {}, {"a": object()})
    with pytest.raises(OSError, match=r"^.Errno 5. Input/output error$"), whole_or_not(tmp_path / "file"):
        raise OSError(errno.EIO, "Input/output error")
    assert list(tmp_path.iterdir()) == []


def test_contributions_on_a_disk_that_becomes_full(model_of: Any, tmp_path: Path) -> None:
    model, batches, state = model_of("olmoe"), five_batches(), tmp_path / "state"
    expected = routing_contributions(model, batches, by="expert")
    routing_contributions(model, batches[:2], by="expert", state=state)
    before = state.read_bytes()
    for save_every in (0, 1e6):
        with (
            files_of_at_most(len(before) // 2),
            pytest.raises(OSError, match=rf"no room to write '{state}' .*goes on from them"),
        ):
            routing_contributions(model, batches, by="expert", state=state, save_every=save_every)
        assert [p.name for p in tmp_path.iterdir()] == ["state"]
        assert state.read_bytes() == before
    with memory_for(max(t.numel() for t, _ in batches)) as run:
        assert_same_results(routing_contributions(model, batches, by="expert", state=state), expected)
    assert len(run) == 3 * model.cfg.n_layers


@pytest.mark.parametrize("save_every", [0.0, 1e6])
def test_a_census_on_a_disk_that_becomes_full(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: float
) -> None:
    """The documents that are on the disk are kept, and gone on from."""
    model, folder = model_of("mixtral"), tmp_path / "census"
    expected = as_census(model)
    of, ran = CleanRun.of, []

    def becomes_full(*args: Any) -> CleanRun:
        ran.append(1)
        if len(ran) == 3:
            limits.enter_context(files_of_at_most(2000))
        return of(*args)

    with ExitStack() as limits, monkeypatch.context() as patched:
        patched.setattr(CleanRun, "of", becomes_full)
        with pytest.raises(
            OSError, match=r"no room to write '.*/rows-0.*-00000004?.*parquet' .*the same call"
        ):
            as_census(model, folder, save_every=save_every)
    kept = Census.load(folder, allow_unfinished=True)
    assert (kept.n_documents, kept.finished) == (2 if save_every == 0 else 0, False)
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    found = as_census(model, folder)
    pd.testing.assert_frame_equal(found.to_pandas(), expected.to_pandas(), check_exact=True)


def test_a_command_on_a_full_disk(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "The router sends every token. " * 3}) + "\n")
    given = [str(checkpoint("olmoe")), "--corpus", str(tmp_path / "corpus.jsonl"), "--device", "cpu"]
    for name, file in (("contributions", "state.safetensors"), ("census", "rows-00000000-00000001.parquet")):
        with files_of_at_most(3000):
            assert cli.main([name, *given, "--output", str(tmp_path / name)]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(said) == 1
        assert said[0].startswith("moe-lens: error: ")
        assert f"{file}' (File too large)" in said[0]
        assert cli.main([name, *given, "--output", str(tmp_path / name)]) == 0


# ---- damage ----


def flip(path: Path, at: int) -> None:
    """One bit is another."""
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_damaged_state(model_of: Any, tmp_path: Path) -> None:
    """Any byte of it; it is named, left as it is, and when it is gone the run begins anew."""
    model, batches, state = model_of("mixtral"), five_batches(), tmp_path / "state"
    expected = routing_contributions(model, batches, state=state)
    whole = state.read_bytes()
    assert_same_results(routing_contributions(model, batches, state=state), expected)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in (0, 9, header, (header + len(whole)) // 2, len(whole) - 1):
        flip(state, at)
        damaged = state.read_bytes()
        with pytest.raises(
            ValueError, match=rf"{state} is (damaged|no file of routing).*delete it, and the run begins"
        ):
            routing_contributions(model, batches, state=state)
        assert state.read_bytes() == damaged != whole
        state.write_bytes(whole)


SHARD_DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of its numbers": lambda path: flip(path, 200),
    "a bit of its end": lambda path: flip(path, path.stat().st_size - 100),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, finished: bool
) -> None:
    """A run does not go on from one; without it, it does, and makes the same table."""
    model, folder = model_of("mixtral"), tmp_path / "census"
    expected, of, ran = as_census(model), CleanRun.of, []

    def counted(*args: Any) -> CleanRun:
        ran.append(1)
        if len(ran) == 4 and not finished:
            raise KeyboardInterrupt
        return of(*args)

    monkeypatch.setattr(CleanRun, "of", counted)
    with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        as_census(model, folder)
    shards = sorted(folder.glob("rows-*"))
    assert len(shards) == 3 + finished
    SHARD_DAMAGES[damage](shards[1])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    ran.clear()
    with pytest.raises(ValueError, match=rf"the shard '{shards[1]}' is damaged: .*; delete it, and the run"):
        as_census(model, folder)
    assert (ran, {path: path.read_bytes() for path in folder.iterdir()}) == ([], before)
    shards[1].unlink()
    if finished:
        # It says that there were more, and is no shard.
        with pytest.raises(ValueError, match=rf"'{shards[1]}' is missing; delete _census.json"):
            as_census(model, folder)
        (folder / "_census.json").unlink()
    monkeypatch.setattr(CleanRun, "of", lambda *args: (ran.append(1), of(*args))[1])
    found = as_census(model, folder)
    assert len(ran) == (1 if finished else 2)
    pd.testing.assert_frame_equal(found.to_pandas(), expected.to_pandas(), check_exact=True)


@pytest.mark.parametrize("command", ["contributions", "census"])
def test_a_checkpoint_that_changed_between_two_calls(
    copy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """One bit of one number. A file of numbers has no checksum, and so it is read; but a run is not gone on with."""
    directory, out = copy("olmoe"), tmp_path / "out"
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "The router sends every token. " * 3}) + "\n")
    given = [command, str(directory), "--corpus", str(tmp_path / "corpus.jsonl"), "--device", "cpu"]
    assert cli.main([*given, "--output", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flip(directory / SINGLE, (directory / SINGLE).stat().st_size - 2)
    capsys.readouterr()
    assert cli.main([*given, "--output", str(out)]) == 2
    assert "is of another run: weights was " in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_streamed_checkpoint_that_changed_between_two_calls(
    copy: Any, streamed: Any, tmp_path: Path
) -> None:
    directory, batches, state = copy("olmoe"), five_batches(), tmp_path / "state"
    routing_contributions(streamed(directory), batches[:2], state=state)
    flip(directory / SINGLE, (directory / SINGLE).stat().st_size - 2)
    with pytest.raises(ValueError, match="is of another run: weights was "):
        routing_contributions(streamed(directory), batches, state=state)
