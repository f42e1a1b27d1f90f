"""A census that is killed at any moment goes on with the same call, and becomes the same table, bit for bit."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens.audit import census
from moe_lens.audit.census_table import Census
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.outcomes import LogitDifference
from tests.census_cases import reference_of
from tests.families import prompts

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten documents; the last but one has a single token, and so no rows."""
    tokens, mask = prompts("right", batch=10, length=9, seed=8)
    mask[:] = 1
    mask[::3, 6:], mask[8, 1:] = 0, 0
    return tokens, mask.bool()


def run(model: Any, folder: Path | None, **changes: Any) -> Census:
    tokens, mask = corpus()
    arguments: dict[str, Any] = dict(
        attention_mask=mask,
        shared=True,
        outcome=["kl", "later_loss"],
        predictors="first_order",
        n=30,
        save_every=0.0,
        noise_samples=6,
    )
    return census(model, tokens, output=folder, **{**arguments, **changes})


def assert_same(one: Census, other: Census) -> None:
    assert one.columns == other.columns
    assert (one.n_documents, one.finished) == (other.n_documents, other.finished)
    for name, values in one.to_pandas().items():
        assert values.to_numpy().tobytes() == other.to_pandas()[name].to_numpy().tobytes(), name
    assert one.facts["noise_floor"] == other.facts["noise_floor"]


def n_shards(folder: Path) -> int:
    return len(list(folder.glob("rows-*"))) if folder.exists() else 0


def killed_when(work: Callable[[], Any], ready: Callable[[], bool]) -> bool:
    """Do it in another process, and kill that as soon as something is so; whether it was still at work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    started = time.monotonic()
    while not ready():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        assert time.monotonic() - started < 60
        time.sleep(1e-3)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize(("scope", "dtype"), [("token", torch.float32), ("sequence", torch.bfloat16)])
def test_killed_and_gone_on_with(hooked: Any, tmp_path: Path, scope: str, dtype: torch.dtype) -> None:
    """Killed as soon as it has so many shards, again and again in one folder."""
    model = copy.deepcopy(hooked("qwen2_moe_no_bias")).to(dtype)
    how: dict[str, Any] = dict(scope=scope, outcome=["kl"] if scope == "sequence" else ["kl", "later_loss"])
    expected = run(model, None, **how)
    folder = tmp_path / "census"
    n_killed = 0
    for wanted in (1, 3, 6):
        n_killed += killed_when(lambda: run(model, folder, **how), lambda n=wanted: n_shards(folder) >= n)
        part = Census.load(folder, allow_unfinished=True)
        assert part.n_documents >= wanted
        frame, whole = part.to_pandas(), expected.to_pandas()
        so_far = whole[whole.document < part.n_documents]
        assert frame.to_numpy().tobytes() == so_far.to_numpy().tobytes()
    assert n_killed >= 1
    assert_same(run(model, folder, **how), expected)
    assert_same(Census.load(folder), expected)


@needs_fork
@pytest.mark.slow
def test_killed_at_random_moments(hooked: Any, tmp_path: Path) -> None:
    """Before the first shard too, while one is written, and while the end is."""
    model, rng = hooked("mixtral"), np.random.default_rng(0)
    how: dict[str, Any] = dict(shared=False, outcome="kl")
    started = time.monotonic()
    expected = run(model, tmp_path / "whole", **how)
    took = time.monotonic() - started
    for attempt in range(3):
        folder = tmp_path / f"census {attempt}"
        for share in (0.0, *rng.uniform(0, 1.1, 3)):
            until = time.monotonic() + share * took
            killed_when(lambda to=folder: run(model, to, **how), lambda t=until: time.monotonic() >= t)
        assert_same(run(model, folder, **how), expected)


def test_what_is_done_is_not_done_again(hooked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interrupt the documents before it are kept; a batch size and a pace of saving may be others."""
    model = hooked("mixtral")
    how: dict[str, Any] = dict(shared=False, outcome="kl", n=None)
    expected = run(model, None, **how)
    clean_run, seen = CleanRun.of, []

    def interrupted(*args: Any) -> CleanRun:
        seen.append(len(seen))
        if len(seen) == 5:
            raise KeyboardInterrupt
        return clean_run(*args)

    monkeypatch.setattr(CleanRun, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "census", save_every=1e6, **how)
    kept = Census.load(tmp_path / "census", allow_unfinished=True)
    assert (kept.n_documents, kept.finished) == (4, False)
    seen[:] = range(100)
    made = run(model, tmp_path / "census", save_every=0.0, batch_size=3, verbose=True, **how)
    assert len(seen) == 100 + 10 - 4 - 1  # but for the one that has no position to be measured
    assert_same(made, expected)


def test_another_run_is_refused(hooked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs is named, whether the run is finished or not, and nothing is run or written."""
    model, other = hooked("qwen2_moe_no_bias"), copy.deepcopy(hooked("qwen2_moe_no_bias"))
    reference = reference_of(hooked, "qwen2_moe_no_bias")
    with torch.no_grad():
        other.blocks[2].mlp.experts.W_down[3, 4, 5] += 1e-3
    tokens, mask = corpus()
    tokens_of_others, shorter = tokens.clone(), mask.clone()
    tokens_of_others[7, 8] += 1
    shorter[1, 8] = False
    moved = torch.cat((tokens[:, :1], tokens), dim=1), torch.cat((mask[:, :1] & False, mask), dim=1)
    folders = tmp_path / "finished", tmp_path / "unfinished"
    run(model, folders[0])
    clean_run, seen = CleanRun.of, []

    def interrupted(*args: Any) -> CleanRun:
        seen.append(len(seen))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return clean_run(*args)

    monkeypatch.setattr(CleanRun, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, folders[1])
    seen[:] = []
    monkeypatch.setattr(CleanRun, "of", lambda *_: pytest.fail("a document was run"))
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}

    for changes, message in (
        (dict(how="renormalize", shared=False), "how was 'zero' and is 'renormalize'"),
        (dict(how="mean", reference=reference), "how was 'zero' and is 'mean'"),
        (dict(scope="sequence", outcome="kl"), "scope was 'token' and is 'sequence'"),
        (dict(layers=[0]), r"layers was \[0, 2\] and is \[0\]"),
        (dict(shared=False), "shared was True and is False"),
        (dict(outcome="kl"), r"outcomes was \['kl', 'later_loss'\] and is \['kl'\]"),
        (dict(outcome=["kl", "later_loss", LogitDifference(4, 5)]), "outcomes was"),
        (dict(predictors=()), r"predictors was \['first_order'\] and is \[\]"),
        (dict(n=None), "sample was {'n': 30, 'seed': 0} and is None"),
        (dict(seed=1), "sample was {'n': 30, 'seed': 0} and is {'n': 30, 'seed': 1}"),
        (dict(memory_budget=2**20), "memory_budget was"),
    ):
        for folder in folders:
            with pytest.raises(ValueError, match=f"is of another run: {message}"):
                run(model, folder, **changes)
    for folder in folders:
        with pytest.raises(ValueError, match="is of another run: weights was"):
            run(other, folder)
        arguments: dict[str, Any] = dict(
            shared=True, outcome=["kl", "later_loss"], predictors="first_order", n=30, output=folder
        )
        for given, given_mask, message in (
            (tokens_of_others, mask, "tokens was"),
            (tokens, shorter, "tokens was"),
            (tokens[:9], mask[:9], "corpus was '10 rows|tokens was"),
            (*moved, "columns was"),
        ):
            with pytest.raises(ValueError, match=f"is of another run: ({message})"):
                census(model, given, attention_mask=given_mask, **arguments)
    assert {path: path.read_bytes() for folder in folders for path in folder.iterdir()} == before


def test_another_reference_is_refused(hooked: Any, tmp_path: Path) -> None:
    model, reference = hooked("mixtral"), reference_of(hooked, "mixtral")
    how: dict[str, Any] = dict(shared=False, outcome="kl", how="resample", n=5)
    first = run(model, tmp_path / "census", reference=reference, **how)
    changed = replace(
        reference, samples={layer: samples + 1e-3 for layer, samples in reference.samples.items()}
    )
    with pytest.raises(ValueError, match="is of another run: reference was"):
        run(model, tmp_path / "census", reference=changed, **how)
    with pytest.raises(ValueError, match="is of another run: seed was 0 and is 1"):
        run(model, tmp_path / "census", reference=reference, seed=1, **how)
    assert_same(run(model, tmp_path / "census", reference=reference, **how), first)


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from moe_lens import HookedMoE
from moe_lens.interventions.clean_run import CleanRun
from tests.test_census_resume import run
clean_run = CleanRun.of
CleanRun.of = lambda *arguments: (time.sleep(0.2), clean_run(*arguments))[1]
model = HookedMoE.from_pretrained(sys.argv[1], dtype=torch.float32, device="cpu", verbose=False)
run(model, Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed_in_a_process_of_its_own(checkpoint: Any, hooked: Any, tmp_path: Path) -> None:
    """A new Python, which loads the checkpoint itself; killed, and gone on with in this one."""
    folder, directory = tmp_path / "census", checkpoint("qwen2_moe_no_bias")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
    )
    started = time.monotonic()
    while n_shards(folder) < 3 and process.poll() is None:
        assert time.monotonic() - started < 300
        time.sleep(1e-3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= Census.load(folder, allow_unfinished=True).n_documents < 10
    assert_same(run(hooked("qwen2_moe_no_bias"), folder), run(hooked("qwen2_moe_no_bias"), None))
