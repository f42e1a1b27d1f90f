"""Interrupts that wait while numbers must not be cut off: Ctrl-C, and a request to end where something answers it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_like_an_interrupt() -> Iterator[None]:
    """While open, a request to end (SIGTERM) raises KeyboardInterrupt, as Ctrl-C does; where somebody answers it
    already, it is left to them."""
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("asked to end")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """While open, SIGINT and SIGTERM wait; they are answered when this closes, as they would have been.

    Signals reach the main thread alone, so that elsewhere there is nothing to hold; and a signal that Python does not
    handle is left as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))

    before: dict[int, Callable[[int, FrameType | None], object]] = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(handler := signal.getsignal(number))
    }
    try:
        for number in before:
            signal.signal(number, hold)
        yield
    finally:
        try:
            _answered_by(before)
        finally:
            # Whatever came in between has been answered, and must not leave the others unanswered.
            _answered_by(before)
        for number, frame in came[:1]:
            before[number](number, frame)


def _answered_by(handlers: Mapping[int, Callable[[int, FrameType | None], object]]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
