"""Independent pieces of work on all cores of a CPU, side by side.

A product of many small matrices gains less from a second core than two such products, side by side, each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

# More pieces at once would leave each too little of the memory budget; of many cores, several work on a piece.
_AT_ONCE = 8


class Cores(Generic[T]):
    """Where pieces of work are handed in; `submit` returns what `result` of will be theirs.

    Attributes:
        n: how many pieces are worked on at once.
    """

    def __init__(self, n: int, pool: ThreadPoolExecutor | None):
        self.n, self._pool = n, pool

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Hand in a piece of work, which runs without gradients. With one core it is done at once."""
        if self._pool is not None:
            return self._pool.submit(_without_gradients, work)
        future: Future[T] = Future()
        future.set_result(_without_gradients(work))
        return future


def _without_gradients(work: Callable[[], T]) -> T:
    # Whether gradients are recorded is known to each thread by itself.
    with torch.no_grad():
        return work()


def pieces_at_once(device: torch.device) -> int:
    """How many pieces `all_cores` will work on side by side."""
    return min(torch.get_num_threads(), _AT_ONCE) if device.type == "cpu" else 1


@contextmanager
def all_cores(device: torch.device) -> Iterator[Cores]:
    """The threads that torch may use, divided among a few pieces at once; on other devices, one after the other.

    Torch's number of threads is that of one piece meanwhile, for the whole process, and afterwards what it was.
    """
    n, n_threads = pieces_at_once(device), torch.get_num_threads()
    if n == 1:
        yield Cores(1, None)
        return
    torch.set_num_threads(n_threads // n)
    try:
        with ThreadPoolExecutor(n) as pool:
            try:
                yield Cores(n, pool)
            except BaseException:
                # An interrupt or an error waits for what is at work, not for what has yet to begin.
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(n_threads)
