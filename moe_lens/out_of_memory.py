"""Work on many rows at once, where memory may run out: the part that was tried is halved, and the work goes on.

What is said of it goes to the log (`logging`, logger `moe_lens.out_of_memory`, level WARNING), once for each time that
a part is halved. Rows that go through a model in other company may come out different by rounding, as kernels of other
shapes add in another order; nothing else depends on how the work was divided.

On Linux a process that takes more memory than there is may be ended by the system without any error. What is caught
here is memory that was refused: by a GPU's allocator, or by the system, where a limit is set (`ulimit -v`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

# What torch's allocators for the CPU say in a RuntimeError of no other type (c10/core/impl/alloc_cpu.cpp).
_OF_THE_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, by a GPU's allocator, torch's for the CPU, or Python's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _OF_THE_CPU)


class InParts:
    """Does work on runs of rows, as many at once as memory holds: fewer from then on when it has once run out.

    It may be used by several threads.

    Args:
        what: the rows are of, for the log: `"rows of a replay"`.
        remedy: what would help where not even one fits, for the error: `"a smaller batch_size"`.
        at_once: how many rows to try first; None is all that there are.
    """

    def __init__(self, what: str, remedy: str, at_once: int | None = None):
        self.what, self.remedy, self.at_once = what, remedy, at_once

    def run(
        self,
        work: Callable[[slice], T],
        rows: int | slice,
        *,
        can_be_repeated: Callable[[], bool] = lambda: True,
    ) -> list[T]:
        """What `work` gives for each part of the rows, in their order.

        Args:
            work: is given a part, and may be given it again, in halves, when it has run out of memory.
            rows: how many there are; or some of them.
            can_be_repeated: asked when it has; False where it has left something behind.

        Raises:
            NotEnoughMemory: one row alone does not fit, or the work cannot be repeated.
            Whatever else `work` raises.
        """
        start, stop = (0, rows) if isinstance(rows, int) else (rows.start, rows.stop)
        results: list[T] = []
        while start < stop:
            end = stop if self.at_once is None else min(stop, start + self.at_once)
            try:
                results.append(work(slice(start, end)))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if end - start == 1 or not can_be_repeated():
                    raise self._gives_up(end - start, error) from error
                said = _first_line(error)
            else:
                start = end
                continue
            # Outside of the handler, where nothing holds the frames that held the memory.
            half = (end - start) // 2
            if self.at_once is None or half < self.at_once:
                self.at_once = half
            _release()
            log.warning(
                "memory ran out at %d %s (%s); going on with %d at a time", end - start, self.what, said, half
            )
        return results

    def _gives_up(self, n: int, error: BaseException) -> MemoryError:
        return _not_enough(f"{n} {self.what}", self.remedy, error)


@contextmanager
def said_what_would_help(what: str, remedy: str) -> Iterator[None]:
    """Of work that cannot be repeated: memory that runs out is told with what would help.

    Args:
        what: is done: `"a batch of 8 documents"`.
        remedy: `"a smaller batch_size"`.

    Raises:
        NotEnoughMemory: it ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _not_enough(what, remedy, error) from error


def _not_enough(what: str, remedy: str, error: BaseException) -> MemoryError:
    from moe_lens.converters.errors import NotEnoughMemory

    return NotEnoughMemory(f"memory ran out at {what} ({_first_line(error)}); what would help: {remedy}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "..."


def _release() -> None:
    """Memory that nothing uses any more goes back to where the next try takes it from."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
