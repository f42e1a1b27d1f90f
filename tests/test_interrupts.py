"""Interrupts at any moment leave a state that is whole, from which the same call goes on to the same numbers."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moe_lens import cli
from moe_lens.audit.census_table import Census
from moe_lens.interrupts import ended_like_an_interrupt, interrupts_held
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.model.block import Block
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing.documents import Moments
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.storage import read_arrays
from moe_lens.routing.tally import Tally
from tests.fault_cases import as_census, memory_for, needs_fork
from tests.routing_cases import assert_same_results
from tests.test_contribution_runs import five_batches

# ---- interrupts ----


@pytest.fixture(autouse=True)
def ctrl_c_is_answered() -> Iterator[None]:
    """As at a terminal: a shell starts what runs in the background with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
