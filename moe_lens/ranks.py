"""The processes that work together on one run, under `torchrun`; a process that was started plainly is alone.

Whatever is large goes through files in the output's folder, which every machine must see. Between the processes go
short JSON texts, and never pickles. Work is handed out a piece at a time to whichever rank is free, and a piece does
not depend on who does it, so no result depends on the number of ranks.

    with joined() as ranks:
        census(model, corpus, output="census", ranks=ranks)

Where one rank ends before its time, all others do too, within seconds, and say which it was: see `moe_lens.rank_watch`.
"""

from __future__ import annotations

import json
import os
import reprlib
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from moe_lens.rank_watch import RankLost, Told, Watch, unreachable

__all__ = ["ALONE", "RankLost", "Ranks", "joined"]

T = TypeVar("T")

_TO_COME_TOGETHER = timedelta(minutes=10)
_TO_SEE_A_FILE = 30.0
"""Seconds within which a file that one machine wrote must be seen by the others: network folders take their time."""
SHARED_MARK = ".ranks-"
"""How the name of a file begins by which ranks see that their folders are one."""
_KEPT = "what is finished is kept: the same command goes on from there, with any number of ranks"


class Ranks:
    """What a process knows of the others, and what it does together with them. This one is alone; see `joined`.

    All methods but `device` are for all ranks to call, in the same order.

    Attributes:
        rank: the number of this process; rank 0 prints, and writes results.
        n: how many there are.
        local_rank: its number among those on its machine.
        launched: whether `torchrun` started it.
    """

    rank = 0
    n = 1
    local_rank = 0
    launched = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gathered(self, data: Any, meanwhile: Callable[[], object] = lambda: None) -> list[Any]:
        """The JSON data of every rank, when all have come here.

        Args:
            meanwhile: is called every so often.
        """
        return [json.loads(json.dumps(data))]

    def of_first(self, data: Any) -> Any:
        """The JSON data that rank 0 gave; what the others give is not read."""
        return self.gathered(data if self.first else None)[0]

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Until all ranks have come here.

        Args:
            meanwhile: is called every so often.
        """

    def taking(self, items: Sequence[T]) -> Iterator[T]:
        """Those of the items that this rank is to do; every item is given to one rank, the next to whoever asks.

        Args:
            items: the same at every rank.
        """
        return iter(items)

    def counter(self) -> Callable[[int], int]:
        """A function that adds to a number which all ranks share, 0 at first, and gives what it is then."""
        total = 0

        def add(more: int) -> int:
            nonlocal total
            total += more
            return total

        return add

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Refuse to work together on different runs.

        Args:
            identity: JSON data that says what the run is.

        Raises:
            ValueError: a rank's is not that of rank 0; the first difference is named.
        """
        everyone = self.gathered(dict(identity))
        for rank, its in enumerate(everyone):
            for name in [*everyone[0], *(its.keys() - everyone[0].keys())]:
                here, there = everyone[0].get(name), its.get(name)
                if here != there:
                    raise ValueError(
                        f"rank {rank} sees another run than rank 0: {name} is {reprlib.repr(there)} there and "
                        f"{reprlib.repr(here)} at rank 0; all ranks must be given the same model, corpus and options"
                    )

    def require_shared(self, folder: Path) -> None:
        """Refuse a folder that is another one on some machine. A process that is alone looks for nothing.

        Args:
            folder: which rank 0 has.

        Raises:
            FileNotFoundError: there is none.
            OSError: a rank does not see what rank 0 writes there.
        """
        if self.n == 1:
            return
        # Rank 0 may make it a moment before: the others look for what is in it, with patience.
        if self.first and not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}, for what all ranks write")
        name = self.of_first(f"{SHARED_MARK}{uuid.uuid4().hex}")
        if self.first:
            (folder / name).touch()
        try:
            self.wait()
            sees = self.gathered(became_visible(folder / name))
        finally:
            if self.first:
                (folder / name).unlink(missing_ok=True)
        if not all(sees):
            raise OSError(
                f"rank {sees.index(False)} does not see what rank 0 writes in {str(folder)!r}: all ranks need one "
                f"folder, on a file system that their machines share"
            )

    def device(self, asked: torch.device | None) -> torch.device | None:
        """That of this process; where it is one of several CUDA devices, torch's current one from now on.

        Args:
            asked: None is a CUDA device where there is one.

        Raises:
            ValueError: there is none for it.
        """
        return asked


ALONE = Ranks()


def became_visible(path: Path) -> bool:
    """Whether a file that another machine wrote is seen here, now or soon."""
    until = time.monotonic() + _TO_SEE_A_FILE
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(path.parent)  # network file systems then look again for a name that was not there
    return True


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that `torchrun` started, with this process among them; `ALONE` where it was not started so.

    Call it in the main thread. While it is open, SIGTERM raises, so that what is under way can be put in order; and of
    several signals, as `torchrun` and a terminal send them, the first counts.

    Raises:
        RankLost: another rank has ended, or this one was told to stop.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    ranks = _Launched()
    try:
        with ranks.watch.listening():
            ranks.watch.start()
            try:
                yield ranks
            except dist.DistError as error:
                cause = ranks.watch.cause(patience=3.0) or unreachable(error)
                raise RankLost(f"stopped, because {cause}; {_KEPT}") from error
    except Told:
        cause = ranks.watch.cause(patience=3.0)
        ranks.watch.end(cause or f"rank {ranks.rank} was told to stop (SIGTERM)")
        because = f", because {cause}" if cause else " by SIGTERM"
        raise RankLost(f"stopped{because}; {_KEPT}") from None
    except RankLost as error:
        ranks.watch.end(ranks.watch.known or str(error))
        raise
    except KeyboardInterrupt:
        ranks.watch.end(f"rank {ranks.rank} was stopped from the keyboard")
        raise
    except SystemExit as error:
        ranks.watch.end(f"rank {ranks.rank} ended with status {error.code}" if error.code else "")
        raise
    except BaseException as error:
        said = " ".join(str(error).split())
        ranks.watch.end(f"rank {ranks.rank} met an error: {said or type(error).__name__}")
        raise
    ranks.watch.end("")
    dist.destroy_process_group()


class _Launched(Ranks):
    """Those that `torchrun` started."""

    launched = True

    def __init__(self) -> None:
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.n_local = int(os.environ["LOCAL_WORLD_SIZE"])
        shared, self.rank, self.n = next(iter(rendezvous("env://")))
        store = c10d.PrefixStore(f"moe_lens {_meeting(shared, self.rank, self.n)}", shared)
        try:
            dist.init_process_group(
                "gloo",
                store=c10d.PrefixStore("gloo", store),
                rank=self.rank,
                world_size=self.n,
                timeout=_TO_COME_TOGETHER,
            )
        except RuntimeError as error:
            raise RankLost(
                f"the ranks could not reach each other: {error}; where a machine has several networks, "
                f"GLOO_SOCKET_IFNAME names the one to use"
            ) from error
        self._store = c10d.PrefixStore("steps", store)
        self._step = 0
        # The watch asks from a thread of its own, and a connection answers one at a time.
        other = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.watch = Watch(c10d.PrefixStore("watch", other), self.rank, self.n)

    def _key(self) -> str:
        """Of the next thing that is done together: all ranks do the same things, in the same order."""
        self._step += 1
        return str(self._step)

    def gathered(self, data: Any, meanwhile: Callable[[], object] = lambda: None) -> list[Any]:
        mine = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)
        # The others may come hours later; the exchange itself is short.
        self.wait(meanwhile)
        try:
            sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.n)]
            dist.all_gather(sizes, torch.tensor([len(mine)]))
            longest = int(torch.cat(sizes).max())
            texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.n)]
            dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        except RuntimeError as error:
            raise RankLost(f"{self.watch.cause(patience=3.0) or error}; {_KEPT}") from error
        return [
            json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)
        ]

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        there, pause = self._key(), 0.01
        n_there = self._store.add(there, 1)
        while n_there < self.n:
            meanwhile()
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            n_there = self._store.add(there, 0)
        meanwhile()

    def taking(self, items: Sequence[T]) -> Iterator[T]:
        taken = self._key()
        return self._taking(taken, items)

    def _taking(self, taken: str, items: Sequence[T]) -> Iterator[T]:
        while (place := self._store.add(taken, 1) - 1) < len(items):
            yield items[place]

    def counter(self) -> Callable[[int], int]:
        key = self._key()
        return lambda more: self._store.add(key, more)

    def device(self, asked: torch.device | None) -> torch.device | None:
        if asked is None and torch.cuda.is_available():
            asked = torch.device("cuda")
        if asked is None or asked.type != "cuda":
            return asked
        if asked.index is not None:
            if self.n_local > 1:
                raise ValueError(
                    f"--device {asked} would be shared by the {self.n_local} processes of this machine; each takes "
                    f"one of its own with --device cuda"
                )
            return asked
        there = torch.cuda.device_count()
        if self.local_rank >= there:
            raise ValueError(
                f"{socket.gethostname()} has {there} CUDA devices for {self.n_local} processes; start as many: "
                f"torchrun --nproc-per-node {there}"
            )
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own


def _meeting(store: Any, rank: int, n: int) -> str:
    """A name that these processes have for their being together, and that none had before them: torchrun's store keeps
    what was said by those that it started earlier, and by these when they joined before."""
    mine, until = uuid.uuid4().hex, time.monotonic() + _TO_COME_TOGETHER.total_seconds()
    hello = [f"moe_lens hello {other}" for other in range(n)]
    store.set(hello[rank], mine)
    heard: dict[int, str] = {}
    while time.monotonic() < until:
        if rank == 0:
            # What another rank said may be from earlier, until it says something else.
            now = {other: store.get(key).decode() for other, key in enumerate(hello) if store.check([key])}
            if now != heard:
                heard = now
                store.set("moe_lens meeting", json.dumps([mine, heard]))
            if all(store.check([f"moe_lens {mine} {other}"]) for other in range(1, n)):
                return mine
        elif store.check(["moe_lens meeting"]):
            name, known = json.loads(store.get("moe_lens meeting"))
            if known.get(str(rank)) == mine:
                store.set(f"moe_lens {name} {rank}", "here")
                return name
        time.sleep(0.05)
    raise RankLost(
        f"not all of the {n} ranks have come together within {_TO_COME_TOGETHER.total_seconds() / 60:.0f} minutes"
    )


def require_alone() -> None:
    """Raises:
    ValueError: `torchrun` started several processes, each of which would do the same.
    """
    n = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if n > 1:
        raise ValueError(
            f"this command runs in one process, and torchrun started {n}; contributions and census divide their work"
        )


def program() -> str:
    """How messages of this process begin."""
    return f"moe-lens: rank {os.environ['RANK']}" if dist.is_torchelastic_launched() else "moe-lens"


def say(message: str) -> None:
    """To standard error, now."""
    print(f"{program()}: {message}", file=sys.stderr, flush=True)
