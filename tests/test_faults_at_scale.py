"""What can go wrong in a long run: memory that runs out, a full disk, damaged files, interrupts. Real faults, or raised
where real ones are."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import cli
from moe_lens.audit import census, expert_metrics
from moe_lens.audit.census_table import Census
from moe_lens.audit.frame_file import write_frame
from moe_lens.converters import NotEnoughMemory
from moe_lens.converters.checkpoint import SINGLE
from moe_lens.interrupts import ended_like_an_interrupt, interrupts_held
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.expert_reference import expert_reference
from moe_lens.interventions.first_order import loss_gradients
from moe_lens.interventions.replay import replay
from moe_lens.model.block import Block
from moe_lens.out_of_memory import InParts, is_out_of_memory, said_what_would_help
from moe_lens.page import write_page
from moe_lens.routing import streaming
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.documents import Moments
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.storage import read_arrays, whole_or_not, write_atomically
from moe_lens.routing.tally import Tally
from tests.families import prompts
from tests.routing_cases import assert_close_results, assert_same_results
from tests.test_contribution_runs import five_batches
from tests.test_replay import assert_equal, each_slot

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

OF_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ...")
OF_THE_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "99 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY = [OF_A_GPU, OF_THE_CPU, MemoryError("std::bad_alloc")]


# ---- the helper ----


def test_what_is_out_of_memory() -> None:
    for ask in (lambda: torch.empty(2**55, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert is_out_of_memory(caught.value)
    assert all(is_out_of_memory(error) for error in OUT_OF_MEMORY)
    others = [
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("can't allocate memory"),
        KeyboardInterrupt(),
    ]
    assert not any(is_out_of_memory(error) for error in others)


def test_rows_are_done_once_each_in_their_order(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[tuple[int, int]] = []

    def work(part: slice) -> list[int]:
        tried.append((part.start, part.stop))
        if part.stop - part.start > 3:
            raise OF_A_GPU
        return list(range(part.start, part.stop))

    in_parts = InParts("rows", "less of it")
    assert [row for part in in_parts.run(work, 20) for row in part] == list(range(20))
    assert tried[:3] == [(0, 20), (0, 10), (0, 5)]
    # What was found to be too much is not tried again, nor in the next run.
    assert {stop - start for start, stop in tried[3:]} == {2}
    tried.clear()
    assert in_parts.run(work, slice(4, 7)) == [[4, 5], [6]]
    assert tried == [(4, 6), (6, 7)]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("memory ran out at 20 rows (CUDA out of memory.")
    assert messages[0].endswith("; going on with 10 at a time")
    assert len(messages) == 3
    assert {(r.name, r.levelno) for r in caplog.records} == {("moe_lens.out_of_memory", logging.WARNING)}
    assert InParts("rows", "", at_once=4).run(lambda part: (part.start, part.stop), 9) == [
        (0, 4),
        (4, 8),
        (8, 9),
    ]
    assert InParts("rows", "").run(work, 0) == []


def test_what_cannot_be_helped_says_what_would_help() -> None:
    def fail(part: slice, error: BaseException = OF_THE_CPU) -> None:
        raise error

    with pytest.raises(
        NotEnoughMemory, match=r"at 1 rows \(\[enforce fail .* would help: less of it"
    ) as caught:
        InParts("rows", "less of it").run(fail, 5)
    assert caught.value.__cause__ is OF_THE_CPU
    with pytest.raises(NotEnoughMemory, match="memory ran out at 5 rows"):
        InParts("rows", "less of it").run(fail, 5, can_be_repeated=lambda: False)
    with (
        pytest.raises(NotEnoughMemory, match=r"at a batch \(std::bad_alloc\); what would help: less of it"),
        said_what_would_help("a batch", "less of it"),
    ):
        raise MemoryError("std::bad_alloc")
    for other in (RuntimeError("another"), KeyboardInterrupt()):
        with pytest.raises(type(other)) as went_through:
            InParts("rows", "").run(lambda part, other=other: fail(part, other), 5)
        assert went_through.value is other


# ---- memory runs out in a replay ----


@contextmanager
def memory_for(
    n_rows: int, error: BaseException = OF_A_GPU, of: type = Block, one: Any = None
) -> Iterator[list[int]]:
    """Where a module (or this one) is given more rows, of all axes but the last, at once, memory runs out; gives the
    sizes that were tried."""
    forward, tried = of.forward, []

    def limited(self: Any, stream: torch.Tensor, *args: Any, **more: Any) -> Any:
        if one is not None and self is not one:
            return forward(self, stream, *args, **more)
        tried.append(stream[..., 0].numel())
        if tried[-1] > n_rows:
            raise error
        return forward(self, stream, *args, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(of, "forward", limited)
        yield tried


def document(model: Any, length: int = 12) -> CleanRun:
    tokens, _ = prompts("none", length=length)
    return CleanRun.of(model, tokens[0])


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_replay_goes_on_with_fewer_rows(
    model_of: Any, caplog: pytest.LogCaptureFixture, error: BaseException, n_threads: int
) -> None:
    model = model_of("qwen2_moe_no_bias")
    clean, branches = document(model), each_slot(model, shared=True)
    expected = replay(clean, branches, outcomes=["kl"])
    torch.set_num_threads(n_threads)
    try:
        # A layer's branches at two tokens, or two layers' at one.
        with memory_for(2 * (model.cfg.top_k + 2), error) as tried:
            found = replay(clean, branches, outcomes=["kl"])
    finally:
        torch.set_num_threads(1)
    assert max(tried) > 2 * (model.cfg.top_k + 2)
    assert_equal(found, expected, tolerance=1e-6)
    assert "rows of a replay" in caplog.records[0].getMessage()


def test_logits_and_gradients_of_fewer_tokens(model_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("mixtral")
    clean, branches = document(model), each_slot(model)
    rows = clean.has_next.nonzero()[:, 0]
    expected, gradients = replay(clean, branches, outcomes=["kl"]), loss_gradients(clean, rows)
    width = (model.cfg.top_k + 1) * len(branches)
    with memory_for(2 * width, of=type(model.unembed), one=model.unembed):
        assert_equal(replay(clean, branches, outcomes=["kl"]), expected, tolerance=1e-6)
    with memory_for(3):
        torch.testing.assert_close(loss_gradients(clean, rows), gradients, rtol=1e-5, atol=1e-6)
    said = {record.getMessage().split(" (")[0].split(" ", 5)[-1] for record in caplog.records}
    assert said == {"tokens' logits of a replay", "tokens' gradients"}


def test_branches_of_fewer_layers_and_none_at_all(model_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Where not even one token's fit, one layer's branches are taken at a time; then it is said what would help."""
    model = model_of("olmoe")
    tokens, _ = prompts("none", length=3)
    clean, branches = CleanRun.of(model, tokens[0]), each_slot(model)
    expected = replay(clean, branches)
    with memory_for(model.cfg.top_k + 1):
        assert_equal(replay(clean, branches), expected, tolerance=1e-6)
    assert any("layers' branches of a replay" in record.getMessage() for record in caplog.records)
    with memory_for(1), pytest.raises(NotEnoughMemory, match="what would help: a smaller memory_budget"):
        replay(clean, branches)
    with memory_for(1, RuntimeError("another")), pytest.raises(RuntimeError, match=r"^another$"):
        replay(clean, branches)


def as_census(model: Any, folder: Path | None = None, **changes: Any) -> Census:
    tokens, mask = prompts("right", batch=4, length=9, seed=8)
    how: dict[str, Any] = dict(outcome="kl", predictors="first_order", save_every=0.0, noise_samples=0)
    return census(model, tokens, attention_mask=mask, output=folder, **{**how, **changes})


def assert_close_census(one: Census, other: Census) -> None:
    assert one.columns == other.columns
    for name, values in one.to_pandas().items():
        if values.dtype.kind == "i":
            assert values.equals(other.to_pandas()[name]), name
        else:
            np.testing.assert_allclose(
                values, other.to_pandas()[name], rtol=1e-5, atol=2e-6, err_msg=str(name)
            )


@pytest.mark.parametrize(
    "changes", [{}, {"scope": "sequence"}, {"outcome": "later_loss", "layers": [0]}], ids=str
)
def test_a_census_goes_on(model_of: Any, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]) -> None:
    model = model_of("mixtral")
    expected = as_census(model, **changes)
    with memory_for(10):
        assert_close_census(as_census(model, **changes), expected)
    assert caplog.records


def test_a_document_that_does_not_fit_is_named(model_of: Any, tmp_path: Path) -> None:
    """What came before it is kept, and the same call goes on from there."""
    model = model_of("mixtral")
    expected, ran = as_census(model), []
    forward = Block.forward

    def full_in_the_third(self: Any, stream: torch.Tensor, *args: Any) -> Any:
        if self is model.blocks[0] and len(stream) == 1:
            ran.append(1)
        if len(ran) == 3:
            raise OF_A_GPU
        return forward(self, stream, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Block, "forward", full_in_the_third)
        with pytest.raises(
            NotEnoughMemory, match=r"memory ran out at document 2 .*what would help: shorter doc"
        ):
            as_census(model, tmp_path / "census", predictors=())
    assert Census.load(tmp_path / "census", allow_unfinished=True).n_documents == 2
    found = as_census(model, tmp_path / "census", predictors=())
    np.testing.assert_array_equal(found.to_pandas().delta_loss, expected.to_pandas().delta_loss)


# ---- memory runs out in routing contributions ----

SEVERAL: dict[str, Any] = dict(by=("layer", "neuron", "source"), max_positions=8)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_contributions_of_fewer_documents_at_once(
    model_of: Any, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """Batches are divided alike, and each document is counted once."""
    model, batches = model_of("qwen2_moe_no_bias"), five_batches()
    one_by_one = [(t[None], m[None]) for tokens, mask in batches for t, m in zip(tokens, mask, strict=True)]
    expected = routing_contributions(model, one_by_one, **SEVERAL)
    longest = max(tokens.shape[1] for tokens, _ in batches)
    with memory_for(longest, error) as tried:
        found = routing_contributions(model, batches, **SEVERAL)
    assert max(tried) > longest
    for by in SEVERAL["by"]:
        assert_close_results(found[by], expected[by], rtol=1e-5, atol=1e-6)
        assert found[by].n_documents == expected[by].n_documents
        assert found[by].provenance["fingerprints"] == expected[by].provenance["fingerprints"]
    assert "documents of a batch" in caplog.records[0].getMessage()


def test_a_document_of_a_batch_that_does_not_fit(model_of: Any, tmp_path: Path) -> None:
    """It is said what would help; the batches before are in the state, though it was not due."""
    model, batches = model_of("olmoe"), five_batches()
    expected = routing_contributions(model, batches)
    lengths = [tokens.shape[1] for tokens, _ in batches]
    assert lengths == sorted(lengths)
    with memory_for(max(t.numel() for t, _ in batches[:3])), pytest.raises(NotEnoughMemory) as caught:
        routing_contributions(
            model, [*batches[:3], prompts("none", length=40, batch=2)], state=tmp_path / "state"
        )
    assert "memory ran out at 1 documents of a batch (CUDA" in str(caught.value)
    assert "what would help: a smaller batch_size" in str(caught.value)
    with memory_for(max(t.numel() for t, _ in batches)) as tried:
        found = routing_contributions(model, batches, state=tmp_path / "state")
    assert len(tried) == 2 * model.cfg.n_layers - 2 * (model.cfg.n_layers - len(found.receivers))
    assert_same_results(found, expected)


@pytest.mark.parametrize("at_once", [True, False])
def test_memory_that_runs_out_while_a_batch_is_added(
    model_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_once: bool
) -> None:
    """Nothing of it is added twice: its documents are divided where nothing was, and else the run ends."""
    model, batches = model_of("mixtral"), five_batches()
    expected = routing_contributions(model, batches, by="expert")
    additions, n_made = Tally.additions, []

    def fails_in_the_middle(self: Tally, *args: Any) -> Iterator[Callable[[], None]]:
        for addition in additions(self, *args):
            yield addition
            n_made.append(1)
            if len(n_made) == 60:
                raise OF_A_GPU

    if not at_once:
        monkeypatch.setattr(streaming, "MADE_AT_ONCE", 0)
    with monkeypatch.context() as patched:
        patched.setattr(Tally, "additions", fails_in_the_middle)
        how: dict[str, Any] = dict(by="expert", state=tmp_path / "state")
        if at_once:
            assert_close_results(routing_contributions(model, batches, **how), expected, rtol=1e-5, atol=1e-6)
        else:
            with pytest.raises(NotEnoughMemory, match=r"memory ran out at \d documents of a batch"):
                routing_contributions(model, batches, **how)
    assert len(n_made) >= 60
    if not at_once:
        # What was added in part is kept nowhere.
        assert not (tmp_path / "state").exists()
        assert_same_results(routing_contributions(model, batches, **how), expected)


# ---- a limit that the system sets ----


@needs_fork
def test_under_a_limit_of_the_system(model_of: Any, tmp_path: Path) -> None:
    """A process that may take no more memory than it has and a little: its logits are made for fewer tokens at a time.
    The numbers are the same."""
    model = model_of("mixtral")
    expected = as_census(model)
    child = os.fork()
    if child == 0:
        try:
            logging.basicConfig(filename=tmp_path / "log", force=True)
            room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**27
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            unembed = type(model.unembed).forward

            def larger(self: Any, stream: torch.Tensor) -> torch.Tensor:
                if self is model.unembed:
                    # As a vocabulary of two millions would take.
                    torch.empty(stream[..., 0].numel(), 2_000_000)
                return unembed(self, stream)

            type(model.unembed).forward = larger
            result = as_census(model)
            (tmp_path / "rows").write_text(
                json.dumps(result.to_pandas()[["delta_loss", "kl"]].to_numpy().tolist())
            )
        except BaseException:
            logging.exception("it failed")
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0
    assert "memory ran out at" in (log := (tmp_path / "log").read_text())
    assert "DefaultCPUAllocator: can't allocate memory" in log
    found = np.array(json.loads((tmp_path / "rows").read_text()))
    np.testing.assert_allclose(
        found, expected.to_pandas()[["delta_loss", "kl"]].to_numpy(), rtol=1e-5, atol=2e-6
    )


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
    """A run does not go on from one; without it and those after it, it does, and makes the same table."""
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
    with pytest.raises(
        ValueError, match=rf"the shard '{shards[1]}' is damaged: .*; delete it and the shards after it"
    ):
        as_census(model, folder)
    assert (ran, {path: path.read_bytes() for path in folder.iterdir()}) == ([], before)
    for shard in shards[1:]:
        shard.unlink()
    if finished:
        # It says that there were more, and is no shard.
        with pytest.raises(ValueError, match=rf"'{shards[1]}' is missing; delete _census.json"):
            as_census(model, folder)
        (folder / "_census.json").unlink()
    monkeypatch.setattr(CleanRun, "of", lambda *args: (ran.append(1), of(*args))[1])
    found = as_census(model, folder)
    assert len(ran) == 3
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


# ---- interrupts ----


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def interrupted_at(owner: Any, name: str, n: int) -> Iterator[None]:
    """A real signal, sent before the n-th call of something, which is then made all the same."""
    called, true = [], getattr(owner, name)

    def call(*args: Any, **more: Any) -> Any:
        called.append(1)
        if len(called) == n:
            interrupt()
        return true(*args, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, call)
        yield


@pytest.mark.parametrize("at", ["run", "made", "added", "saved"])
def test_an_interrupt_saves_what_is_whole(model_of: Any, tmp_path: Path, at: str) -> None:
    """Long before the state is due: in a forward pass, before and while a batch is added, while it is written."""
    model, batches, state = model_of("olmoe"), five_batches(), tmp_path / "state"
    how: dict[str, Any] = dict(by=["layer", "expert"], state=state)
    expected = routing_contributions(model, batches, by=how["by"])
    n_groups = sum(len(result.senders.groups) for result in expected.values())
    place = {
        "run": (Block, "forward", 2 * model.cfg.n_layers + 2),
        "made": (Tally, "additions", 2 * n_groups + 2),
        "added": (Moments, "merge", 2 * 4 * n_groups + 3),
        "saved": (os, "fsync", 1),
    }[at]
    with interrupted_at(*place), pytest.raises(KeyboardInterrupt):
        routing_contributions(model, batches, **how)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    n_done = read_arrays(state)[1]["batches"]
    assert n_done == {"run": 2, "made": 2, "added": 3, "saved": 5}[at]
    with memory_for(2**40) as ran:
        found = routing_contributions(model, batches, **how)
    assert len(ran) == (5 - n_done) * model.cfg.n_layers
    for by in expected:
        assert_same_results(found[by], expected[by])
        assert found[by].provenance == expected[by].provenance


@pytest.mark.parametrize("n_saved", [0, 2])
def test_a_second_interrupt_while_the_state_is_saved(model_of: Any, tmp_path: Path, n_saved: int) -> None:
    model, batches, state = model_of("olmoe"), five_batches(), tmp_path / "state"
    expected = routing_contributions(model, batches)
    if n_saved:
        routing_contributions(model, batches[:n_saved], state=state)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        interrupted_at(Block, "forward", 2 * model.cfg.n_layers + 1),
        interrupted_at(os, "fsync", 1),
        pytest.raises(KeyboardInterrupt),
    ):
        routing_contributions(model, batches, state=state)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same_results(routing_contributions(model, batches, state=state), expected)


def test_a_second_interrupt_while_a_shard_is_written(model_of: Any, tmp_path: Path) -> None:
    model, folder = model_of("mixtral"), tmp_path / "census"
    expected = as_census(model)
    with (
        interrupted_at(CleanRun, "_require_finite", 3),
        interrupted_at(os, "fsync", 3),  # the header, and its folder's name, before
        pytest.raises(KeyboardInterrupt),
    ):
        as_census(model, folder, save_every=1e6)
    assert [path.name for path in folder.iterdir()] == ["_census.json"]
    found = as_census(model, folder)
    pd.testing.assert_frame_equal(found.to_pandas(), expected.to_pandas(), check_exact=True)


def test_interrupts_are_held_and_then_answered() -> None:
    done = []

    def twice(number: int) -> None:
        with interrupts_held():
            interrupt(number)
            interrupt(number)
            done.append(number)
        done.append("too late")

    for number in (signal.SIGINT, signal.SIGTERM):
        with ended_like_an_interrupt(), pytest.raises(KeyboardInterrupt):
            twice(number)
    assert done == [signal.SIGINT, signal.SIGTERM]
    with interrupts_held():  # nothing came
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@needs_fork
@pytest.mark.parametrize(
    ("command", "number"), [("contributions", signal.SIGINT), ("census", signal.SIGTERM)], ids=str
)
def test_a_command_that_is_stopped(
    checkpoint: Any, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    """In a process of its own, as soon as its bar shows that something is done. It says how to go on, and that gives
    what a run that was not stopped gives."""
    corpus, n_documents = tmp_path / "corpus.jsonl", 80 if command == "contributions" else 24
    lines = [json.dumps({"text": f"{i}: The router sends every token. " * 2}) for i in range(n_documents)]
    corpus.write_text("\n".join(lines) + "\n")
    given = [command, str(checkpoint("mixtral")), "--corpus", str(corpus), "--device", "cpu"]
    given += ["--batch-size", "2"] if command == "contributions" else []
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with open(tmp_path / "said", "w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout = sys.stderr = said
                status = cli.main([*given, "--output", str(tmp_path / "out")])
                said.flush()
            os._exit(status)
        finally:
            os._exit(99)
    started = time.monotonic()
    shown = re.compile(r"[1-9]\S*/\S+ \[[^\]]*(batch|ablations)")
    while not (tmp_path / "said").exists() or not shown.search((tmp_path / "said").read_text()):
        assert time.monotonic() - started < 60
        time.sleep(1e-3)
    os.kill(child, number)
    status = os.waitpid(child, 0)[1]
    said = (tmp_path / "said").read_text()
    assert os.waitstatus_to_exitcode(status) == 130, said
    assert said.splitlines()[-1] == (
        "moe-lens: stopped; what keeps a state goes on from it with the same command"
    )
    assert "Traceback" not in said
    if command == "contributions":
        n_done = read_arrays(tmp_path / "out" / "state.safetensors")[1]["batches"]
        assert 0 < n_done < n_documents // 2
    else:
        kept = Census.load(tmp_path / "out" / "census", allow_unfinished=True)
        assert 0 < kept.n_documents < n_documents
        assert not kept.finished
    for name in ("out", "whole"):
        assert cli.main([*given, "--output", str(tmp_path / name)]) == 0
    if command == "contributions":
        mine, its = (
            RoutingContributions.load(tmp_path / name / "layer.safetensors") for name in ("out", "whole")
        )
        assert_same_results(mine, its)
    else:
        mine, its = (Census.load(tmp_path / name / "census").to_pandas() for name in ("out", "whole"))
        pd.testing.assert_frame_equal(mine, its, check_exact=True)
