"""How ranks notice that one of them is gone.

Every rank says every second, in the store of `torchrun`, that it is there, and what ended it when it ends. A rank that
is killed says nothing: on its own machine it is missed at once, because its process is gone, and on another machine
when it has been silent for half a minute. A process can only be stopped between two steps of its main thread, so the
watch sends it SIGTERM, as `torchrun` does with the others of a machine; a process that is deaf to it is ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

EVERY = 1.0
"""Seconds between two looks."""
SILENCE = 30.0
"""Seconds of silence after which a rank on another machine is lost."""
GRACE = 20.0
"""Seconds that the main thread has to put things in order; `torchrun` allows 30."""


class RankLost(ConnectionError):
    """A run on several ranks cannot go on: one of them has ended."""


class Told(KeyboardInterrupt):
    """SIGTERM came."""


@dataclass
class Word:
    """What a rank says of itself.

    Attributes:
        pid, started: its process.
        host: its machine's name.
        where: the machine and the process table that its pid is in.
        beats: how often it has said so.
        ended: whether it has ended.
        cause: and why; nothing where it was done.
    """

    pid: int
    started: float
    host: str
    where: str
    beats: int = 0
    ended: bool = False
    cause: str = ""

    @classmethod
    def of_this_process(cls) -> Word:
        try:
            table = os.readlink("/proc/self/ns/pid")
        except OSError:
            table = ""
        host = socket.gethostname()
        return cls(os.getpid(), psutil.Process().create_time(), host, f"{host} {table}")

    def is_gone(self) -> bool:
        """Whether its process, of this machine, is there no longer."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Watch:
    """Of one rank over the others.

    Args:
        store: a `torch.distributed` store that nobody else uses from another thread.

    Attributes:
        known: why the run cannot go on, once that is known.
    """

    def __init__(self, store: Any, rank: int, n: int):
        self.store, self.rank, self.n = store, rank, n
        self.known = ""
        self._word = Word.of_this_process()
        self._seen: dict[int, tuple[int, float]] = {}
        self._looked_at = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._say()

    def start(self) -> None:
        """From now on; where `listening` is open."""
        threading.Thread(target=self._watch, name="watch over the other ranks", daemon=True).start()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, SIGTERM raises `Told`, and SIGINT `KeyboardInterrupt`: whichever comes first, once."""
        handled = {signal.SIGTERM: Told, signal.SIGINT: KeyboardInterrupt}

        def stop(number: int, _: object) -> None:
            # What is put in order now must not be cut short by another.
            for one in handled:
                signal.signal(one, signal.SIG_IGN)
            raise handled[signal.Signals(number)]

        before = {number: signal.signal(number, stop) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                # One that was stopped is on its way out.
                if signal.getsignal(number) is stop:
                    signal.signal(number, handler)

    def end(self, cause: str) -> None:
        """This rank ends: because of this, or because it is done, which is no cause."""
        self._closed.set()
        with self._lock:
            self._word.ended, self._word.cause = True, cause
            with suppress(RuntimeError):  # the store is gone, and with it whoever would have heard it
                self._say()

    def cause(self, patience: float = 0.0) -> str:
        """Why the run cannot go on; nothing where all are well.

        Args:
            patience: seconds to wait for bad news.
        """
        until = time.monotonic() + patience
        while not self.known:
            with self._lock:
                self.known = self.known or self._look()
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
        return self.known

    # ---- the thread ----

    def _watch(self) -> None:
        while not self._closed.wait(EVERY):
            with self._lock:
                self._word.beats += 1
                try:
                    self._say()
                except RuntimeError as error:
                    self.known = self.known or unreachable(error)
            if self.cause():
                break
        else:
            return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if not self._closed.wait(GRACE):
            print(f"moe-lens: rank {self.rank}: ended, because {self.known}", file=sys.stderr, flush=True)
            os._exit(2)

    def _say(self) -> None:
        self.store.set(f"rank {self.rank}", json.dumps(asdict(self._word)))

    def _words(self) -> dict[int, Word]:
        others = [rank for rank in range(self.n) if rank != self.rank]
        keys = [f"rank {rank}" for rank in others]
        if not others or not self.store.check(keys):
            return {}  # alone; or not all are so far
        said = self.store.multi_get(keys)
        return {rank: Word(**json.loads(word)) for rank, word in zip(others, said, strict=True)}

    def _look(self) -> str:
        try:
            words = self._words()
            causes = [word.cause for word in words.values() if word.cause]
            if causes:
                return causes[0]
            gone = [rank for rank, word in words.items() if not word.ended and self._is_gone(word)]
            if gone:
                # It may have ended in good order since it was asked.
                words = self._words()
                gone = [rank for rank in gone if not words[rank].ended]
            if gone:
                word = words[gone[0]]
                return (
                    f"rank {gone[0]} (process {word.pid} on {word.host}) is gone: it was killed, or crashed"
                )
            return self._silent(words)
        except RuntimeError as error:
            return unreachable(error)

    def _is_gone(self, word: Word) -> bool:
        return word.where == self._word.where and word.is_gone()

    def _silent(self, words: dict[int, Word]) -> str:
        now = time.monotonic()
        if now - self._looked_at > SILENCE / 2:
            self._seen.clear()  # this process itself was asleep
        self._looked_at = now
        for rank, word in words.items():
            beats, since = self._seen.get(rank, (-1, now))
            if word.ended or beats != word.beats:
                self._seen[rank] = word.beats, now
            elif now - since > SILENCE:
                return f"rank {rank} (process {word.pid} on {word.host}) has said nothing for {SILENCE:.0f} seconds"
        return ""


def unreachable(error: Exception) -> str:
    """That the ranks have lost their store."""
    return (
        f"torchrun's store cannot be reached, which the first machine keeps: that machine is lost, or a rank there "
        f"has ended ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )
