"""Freed memory goes back to the system: the heap does not grow with every value that a layer makes and frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_lens.model import freed_memory
from moe_lens.model.freed_memory import FreedMemory

# Blocks of a few pages, which the heap serves, each kept apart from the next by a smaller one that stays.
HOLES = """
import ctypes
from moe_lens.model.freed_memory import FreedMemory
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
blocks = []
for i in range(4000):
    block, pin = libc.malloc(65536), libc.malloc(3000)
    ctypes.memset(block, 1, 65536)
    blocks.append(block)
for block in blocks:
    libc.free(block)
before = resident()
FreedMemory().give_back()
print(before - resident())
"""


@pytest.mark.skipif(
    freed_memory._malloc_trim() is None, reason="this C library's heap cannot be asked for it"
)
def test_freed_memory_goes_back() -> None:
    run = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 200_000  # kB, of 256,000


def test_it_goes_back_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(freed_memory, "_malloc_trim", lambda: calls.append)
    freed = FreedMemory()
    for _ in range(5):
        freed.add(2**25)
    assert calls == [0, 0]
    freed.give_back()
    assert calls == [0, 0, 0]
    freed.add(2**25)
    assert calls == [0, 0, 0]


def test_where_it_cannot_be_asked_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_malloc_trim", lambda: None)
    FreedMemory().give_back()
