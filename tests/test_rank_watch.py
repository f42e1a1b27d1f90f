"""A rank that is gone, silent or cannot be reached is noticed, and named; one that is well or done is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from moe_lens import cli, rank_watch
from moe_lens.rank_watch import Told, Watch, Word
from moe_lens.ranks import Ranks, _Launched
from tests.rank_cases import on_ranks


@pytest.fixture
def pair() -> tuple[Watch, Watch]:
    store = HashStore()
    return Watch(store, 0, 2), Watch(store, 1, 2)


def says(watch: Watch, **changes: Any) -> None:
    """The rank of this watch, as if it were another process."""
    watch._word = replace(watch._word, **changes)
    watch._say()


def test_all_is_well(pair: tuple[Watch, Watch]) -> None:
    one, other = pair
    assert one.cause() == other.cause() == ""
    other.end("")
    assert one.cause(patience=0.2) == ""


def test_an_error_is_told_and_handed_on(pair: tuple[Watch, Watch]) -> None:
    one, other = pair
    other.end("rank 1 met an error: no")
    assert one.cause() == one.known == "rank 1 met an error: no"


def test_a_process_that_is_gone(pair: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    started = rank_watch.psutil.Process(process.pid).create_time()
    says(other, pid=process.pid, started=started)
    assert one.cause() == ""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is there still, as what is left of it
    gone = f"rank 1 (process {process.pid} on {other._word.host}) is gone: it was killed, or crashed"
    assert one._look() == gone
    process.wait()
    assert one._look() == gone
    # Another process of that number; and another machine, whose processes are not seen.
    says(other, pid=os.getpid(), started=started)
    assert "rank 1 (process " in one._look()
    says(other, where="elsewhere")
    assert one._look() == ""
    # It ended in good order between two looks.
    says(other, where=one._word.where)
    words = one._words
    seen: list[int] = []

    def then_done() -> Any:
        seen.append(1)
        if len(seen) == 2:
            other.end("")
        return words()

    monkeypatch.setattr(one, "_words", then_done)
    assert one._look() == ""
    assert len(seen) == 2


def test_silence(pair: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair
    now = [0.0]
    monkeypatch.setattr(rank_watch.time, "monotonic", lambda: now[0])
    one._looked_at = 0.0

    def look_for(seconds: int) -> str:
        for _ in range(seconds):
            now[0] += 1.0
            if found := one._look():
                return found
        return ""

    says(other, where="elsewhere", host="node7", pid=77)
    assert look_for(29) == ""
    says(other, beats=1)
    assert look_for(30) == ""
    now[0] += 1000  # this process itself was asleep
    assert look_for(30) == ""
    assert look_for(2) == "rank 1 (process 77 on node7) has said nothing for 30 seconds"
    other.end("")
    assert look_for(100) == ""


def test_the_store_is_gone(pair: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = pair
    store = SimpleNamespace(check=_fails, set=_fails)
    monkeypatch.setattr(one, "store", store)
    assert one.cause() == (
        "torchrun's store cannot be reached, which the first machine keeps: that machine is lost, or a rank there has "
        "ended (connection reset)"
    )
    one.end("")


def _fails(*_: Any) -> None:
    raise RuntimeError("connection reset\nlong trace")


def test_the_main_thread_is_told(pair: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a long sleep; and once only."""
    monkeypatch.setattr(rank_watch, "EVERY", 0.05)
    one, other = pair
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    started = time.monotonic()
    threading.Timer(0.2, other.end, ["rank 1 met an error: no"]).start()
    one.start()
    with pytest.raises(Told), one.listening():
        time.sleep(30)
    assert time.monotonic() - started < 10
    assert one.known == "rank 1 met an error: no"
    one.end("")
    for number, handler in before.items():
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, handler)
    with pytest.raises(KeyboardInterrupt), one.listening():
        signal.raise_signal(signal.SIGINT)
    for number, handler in before.items():
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, handler)
    with one.listening():
        pass
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_deaf_process_is_ended(tmp_path: Path) -> None:
    def deaf(_: int) -> int:
        rank_watch.EVERY, rank_watch.GRACE = 0.05, 0.2
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        store = HashStore()
        one, other = Watch(store, 0, 2), Watch(store, 1, 2)
        one.start()
        other.end("rank 1 met an error: no")
        time.sleep(60)
        return 0

    (ended,) = on_ranks(1, deaf, tmp_path)
    assert (ended.status, ended.err) == (2, "moe-lens: rank 0: ended, because rank 1 met an error: no\n")
    assert ended.seconds < 10


def test_word_goes_as_json() -> None:
    word = Word.of_this_process()
    assert Word(**json.loads(json.dumps(asdict(word)))) == word
    assert not word.is_gone()


# ---- what is each rank's own ----


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device each."""
    ranks = object.__new__(_Launched)
    ranks.local_rank, ranks.n_local = 1, 2
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (ranks.device(None), ranks.device(cpu)) == (None, cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert ranks.device(None) == ranks.device(cuda) == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)] * 2
    assert ranks.device(cpu) == cpu
    with pytest.raises(ValueError, match="cuda:0 would be shared by the 2 processes of this machine"):
        ranks.device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"has 1 CUDA devices for 2 processes; .*--nproc-per-node 1"):
        ranks.device(None)
    assert Ranks().device(None) is None


def test_other_commands_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["verify", "mini"]) == 2
    assert capsys.readouterr().err.startswith(
        "moe-lens: rank 2: error: this command runs in one process, and torchrun started 4; contributions and census"
    )
