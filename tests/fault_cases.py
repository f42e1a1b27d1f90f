"""What the tests of faults share: memory that runs out where it is told to, and a small census."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens.audit import census
from moe_lens.audit.census_table import Census
from moe_lens.model.block import Block
from tests.families import prompts

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

OF_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ...")
OF_THE_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "99 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY = [OF_A_GPU, OF_THE_CPU, MemoryError("std::bad_alloc")]


@contextmanager
def memory_for(
    n_rows: int, error: BaseException = OF_A_GPU, of: type = Block, one: Any = None
) -> Iterator[list[int]]:
    """Where a module (or this one) is given more rows, of all axes but the last, at once, memory runs out; gives the
    sizes that were tried."""
    forward, tried = of.forward, []

    def limited(self: Any, stream: torch.Tensor, *args: Any, **more: Any) -> Any:
        if one is not None and self is not one:
            return forward(self, stream, *args, **more)
        tried.append(stream[..., 0].numel())
        if tried[-1] > n_rows:
            raise error
        return forward(self, stream, *args, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(of, "forward", limited)
        yield tried


def as_census(model: Any, folder: Path | None = None, **changes: Any) -> Census:
    tokens, mask = prompts("right", batch=4, length=9, seed=8)
    how: dict[str, Any] = dict(outcome="kl", predictors="first_order", save_every=0.0, noise_samples=0)
    return census(model, tokens, attention_mask=mask, output=folder, **{**how, **changes})
