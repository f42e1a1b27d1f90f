"""Ranks in forked processes, which start at once: as `torchrun` starts them, but for that nobody stops the others when
one has ended."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

PATIENCE = 120.0


class Ended(NamedTuple):
    """How a rank ended: its exit status, negative for a signal; what it printed; and after how many seconds."""

    status: int
    out: str
    err: str
    seconds: float


def new_store() -> TCPStore:
    """As torchrun keeps one."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def on_ranks(n: int, work: Callable[[int], int], folder: Path, store: TCPStore | None = None) -> list[Ended]:
    """Do it on so many ranks.

    Args:
        work: of a rank; gives its exit status.
        folder: where what they print is kept.
        store: which has been used before; None is a new one.
    """
    store = store or new_store()
    started = time.monotonic()
    texts = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(n)]
    children = {_forked(rank, n, store.port, work, texts[rank]): rank for rank in range(n)}
    ended: dict[int, tuple[int, float]] = {}
    # They are only asked for when all have ended: a process that nobody asks for stays in the process table.
    gone: dict[int, float] = {}
    while len(gone) < n:
        for child in children:
            if child not in gone and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                gone[child] = time.monotonic() - started
        if time.monotonic() - started > PATIENCE:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    for child, rank in children.items():
        ended[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), gone[child]
    del store
    return [
        Ended(ended[rank][0], out.read_text(), err.read_text(), ended[rank][1])
        for rank, (out, err) in enumerate(texts)
    ]


def _forked(rank: int, n: int, port: int, work: Callable[[int], int], texts: tuple[Path, Path]) -> int:
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        sys.stdout, sys.stderr = (open(path, "w", buffering=1) for path in texts)  # noqa: SIM115
        status = work(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
