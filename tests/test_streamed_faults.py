"""What can go wrong while layers are read and run: told plainly, and nothing is left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.converters import CheckpointChanged, CheckpointMismatch
from moe_lens.converters.checkpoint import SINGLE
from moe_lens.converters.layer_store import LayerStore
from moe_lens.interventions import TopK
from moe_lens.model import residual_streams, streamed_moe
from tests.checkpoints import EXPERT, change_tensors, load
from tests.families import prompts
from tests.streamed_cases import (
    BATCHES,
    assert_nothing_is_left,
    caching,
)
from tests.test_checkpoint_defects import SHARD_DEFECTS, TENSOR_DEFECTS


@pytest.mark.parametrize("defect", TENSOR_DEFECTS)
@pytest.mark.usefixtures("no_weight_is_read")
def test_defective_tensors_are_told_as_in_memory(copy: Any, defect: str) -> None:
    directory = copy("olmoe")
    change, message = TENSOR_DEFECTS[defect]
    change_tensors(directory, change)
    with pytest.raises(CheckpointMismatch, match=message):
        load(directory, stream=True)


@pytest.mark.parametrize("defect", SHARD_DEFECTS, ids=lambda defect: defect.__name__)
@pytest.mark.usefixtures("no_weight_is_read")
def test_defective_shards_are_told_as_in_memory(copy: Any, defect: Any) -> None:
    directory = copy("qwen2_moe_sharded")
    defect(directory)
    with pytest.raises(CheckpointMismatch, match=SHARD_DEFECTS[defect]):
        load(directory, stream=True)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_values_that_are_not_finite(copy: Any, streamed: Any, number: float) -> None:
    """In a layer when it is read, with the layers before it; in what is kept in memory at once."""
    directory = copy("olmoe")
    change_tensors(directory, lambda tensors: tensors[EXPERT][3, 5:6].fill_(number))
    model = streamed(directory)
    model(prompts()[0], stop_at_layer=1)
    for run in (lambda: model(prompts()[0]), lambda: model.run_corpus(BATCHES)):
        with pytest.raises(CheckpointMismatch, match=rf"{EXPERT} holds NaN or infinity in torch.float32"):
            run()
        assert_nothing_is_left(model)
    change_tensors(directory, lambda tensors: tensors["model.norm.weight"][3:4].fill_(number))
    with pytest.raises(CheckpointMismatch, match=r"model.norm.weight holds NaN or infinity in torch.float32"):
        load(directory, stream=True)


def replace(file: Path, content: bytes, modified: int) -> None:
    """At once, as a careful program writes: what reads the old file goes on with it."""
    file.with_name("new").write_bytes(content)
    os.utime(file.with_name("new"), ns=(modified, modified))
    file.with_name("new").replace(file)


def longer(file: Path) -> None:
    replace(file, file.read_bytes() + b"0", file.stat().st_mtime_ns)


def shorter(file: Path) -> None:
    replace(file, file.read_bytes()[:-1000], file.stat().st_mtime_ns)


def rewritten(file: Path) -> None:
    replace(file, file.read_bytes(), file.stat().st_mtime_ns + 1)


def with_another_header(file: Path) -> None:
    replace(file, file.read_bytes().replace(b"up_proj", b"op_proj", 1), file.stat().st_mtime_ns)


CHANGES = {
    longer: r"was changed since the model was loaded \(it had [\d,]+ bytes and has [\d,]+\)",
    shorter: r"was changed since the model was loaded \(it had [\d,]+ bytes and has [\d,]+\)",
    rewritten: r"was changed since the model was loaded \(it was written to\)",
    with_another_header: r"was changed since the model was loaded \(its header is another\)",
    Path.unlink: r"cannot be read any more: No such file",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["between runs", "within a run"])
def test_a_file_that_changed_is_named(copy: Any, streamed: Any, change: Any, when: str) -> None:
    directory = copy("olmoe")
    model = streamed(directory)
    model(prompts()[0])

    def change_it(value: Tensor, hook: Any) -> None:
        change(directory / SINGLE)

    def run() -> None:
        if when == "within a run":
            model.run_with_hooks(prompts()[0], fwd_hooks=[("blocks.0.hook_resid_pre", change_it)])
        else:
            change(directory / SINGLE)
        # The last layers may have been read before it changed; then the next run tells.
        model(prompts()[0])

    with pytest.raises(CheckpointChanged, match=rf"{SINGLE} {CHANGES[change]}"):
        run()


@pytest.mark.parametrize("change", [longer, rewritten, Path.unlink], ids=lambda change: change.__name__)
def test_the_second_file_of_a_layer_that_changed_is_named(copy: Any, streamed: Any, change: Any) -> None:
    directory = copy("qwen2_moe_sharded")
    model = streamed(directory)
    files = [[*dict.fromkeys(stored.file for stored in of)] for of in model.store._stored.values()]
    second = next(names[1] for names in files if names[1:])
    change(directory / second)
    with pytest.raises(CheckpointChanged, match=rf"{second} {CHANGES[change]}"):
        model(prompts()[0])


def test_a_file_cut_short_while_it_is_read(copy: Any, streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(copy("olmoe"))
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    with pytest.raises(
        CheckpointChanged, match=rf"{SINGLE} ends within model.layers.0.\S+: it was cut short"
    ):
        model(prompts()[0])


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), MemoryError("no room")]
)
@pytest.mark.parametrize("corpus", [False, True])
def test_errors_of_the_reading_thread_come_out_as_they_are(
    streamed: Any, in_memory: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, corpus: bool
) -> None:
    model, fill = streamed("olmoe"), LayerStore._fill
    heard: list[dict[str, Tensor]] = []

    def failing(self: Any, view: Tensor, stored: Any, *args: Any) -> bool:
        if ".layers.1." in stored.name:
            raise error
        return fill(self, view, stored, *args)

    def run() -> Any:
        return model.run_corpus(BATCHES, caching(model, heard)) if corpus else model(prompts()[0])

    with monkeypatch.context() as patched:
        patched.setattr(LayerStore, "_fill", failing)
        with pytest.raises(type(error)) as caught:
            run()
        assert caught.value is error
    assert_nothing_is_left(model)
    assert torch.equal(model(prompts()[0]), in_memory("olmoe")(prompts()[0]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("place", ["hook_embed", "blocks.1.hook_resid_mid", "ln_final.hook_scale"])
def test_errors_of_listeners_leave_nothing_behind(
    streamed: Any, in_memory: Any, tmp_path: Path, error: type[BaseException], place: str
) -> None:
    """Every batch's contexts are left with the error, last to first; no thread, file or hook stays."""
    model, left = streamed("olmoe"), []

    def fail(value: Tensor, hook: Any) -> None:
        raise error("planted")

    @contextmanager
    def listening(i: int) -> Iterator[None]:
        with model.hooks([(place, fail)] if i == 1 else []):
            try:
                yield
            except error:
                left.append(i)
                raise

    with pytest.raises(error, match="planted"), model.intervene(TopK(2, layers=1)):
        model.run_corpus(BATCHES, listening, memory_budget=0, spill_directory=tmp_path)
    expected = {"hook_embed": [1, 0], "blocks.1.hook_resid_mid": [2, 1, 0], "ln_final.hook_scale": [2, 1]}
    assert left == expected[place]
    assert_nothing_is_left(model)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(model(prompts()[0]), in_memory("olmoe")(prompts()[0]))


def test_an_interrupt_while_a_layer_is_put_in_place(
    streamed: Any, in_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(values: Tensor) -> tuple[int, int]:
        raise KeyboardInterrupt

    model = streamed("olmoe")
    with monkeypatch.context() as patched:
        patched.setattr(streamed_moe, "sums_of_bits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(prompts()[0])
    assert_nothing_is_left(model)
    assert torch.equal(model(prompts()[0]), in_memory("olmoe")(prompts()[0]))


def test_no_room_for_streams(streamed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = streamed("olmoe")
    monkeypatch.setattr(residual_streams.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for [\d,]+ bytes of residual streams in .*No space left"):
        model.run_corpus(BATCHES, memory_budget=0, spill_directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert model.read_counts.bytes_read == 0


def test_a_run_inside_of_a_run(streamed: Any) -> None:
    model = streamed("olmoe")

    def again(value: Tensor, hook: Any) -> None:
        model(prompts()[0])

    for run in (
        model.run_with_hooks,
        lambda tokens, fwd_hooks: model.run_corpus([tokens], lambda i: model.hooks(fwd_hooks)),
    ):
        with pytest.raises(RuntimeError, match="layers of this streamed model are in use"):
            run(prompts()[0], fwd_hooks=[("blocks.1.hook_resid_mid", again)])
        assert_nothing_is_left(model)
