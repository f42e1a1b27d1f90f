"""The residual streams of many batches between two layers: in memory up to a budget, beyond it in a file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Every stream in the file begins at a multiple of this many numbers.
_ALIGNMENT = 64


class ResidualStreams:
    """A stream for each batch, on the CPU; a context manager, which removes its file at the end.

    Args:
        shapes: (batch, pos) of each batch; what is put there may have fewer positions at first.
        d_model: of the model.
        dtype: of the streams.
        budget: bytes that are held in memory; the batches that do not fit lie in a mapped file.
        directory: where the file's temporary directory is made; None is the system's. On a RAM disk it saves nothing.
        budget_name: what whoever runs calls the budget, for the error.

    Attributes:
        bytes_in_memory, bytes_in_file: what the streams take.

    Raises:
        OSError: there is no room for the file; raised at once, and nothing has been run.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        d_model: int,
        dtype: torch.dtype,
        budget: int,
        directory: str | Path | None = None,
        *,
        budget_name: str = "memory_budget",
    ):
        self._dtype, self._directory, self._budget_name = dtype, directory, budget_name
        self._in_memory: dict[int, Tensor] = {}
        self._in_file: dict[int, tuple[int, tuple[int, int, int]]] = {}
        """Where each stream in the file begins, and the shape of what is there."""
        self._shapes = [(*shape, d_model) for shape in shapes]
        self._file: Tensor | None = None
        self._contexts = ExitStack()
        self.bytes_in_memory, n_in_file = 0, 0
        for number, shape in enumerate(shapes):
            n_bytes = math.prod(shape) * d_model * dtype.itemsize
            if self.bytes_in_memory + n_bytes <= budget:
                self.bytes_in_memory += n_bytes
                continue
            self._in_file[number] = n_in_file, (*shape, d_model)
            n_in_file += -(-math.prod(shape) * d_model // _ALIGNMENT) * _ALIGNMENT
        self._n_in_file = n_in_file
        self.bytes_in_file = n_in_file * dtype.itemsize

    def __enter__(self) -> ResidualStreams:
        if self._in_file:
            folder = self._contexts.enter_context(
                tempfile.TemporaryDirectory(prefix="moe_lens_streams_", dir=self._directory)
            )
            path = Path(folder) / "residual_streams"
            try:
                with open(path, "wb") as file:
                    # Room is taken at once: a mapped file that meets a full disk later ends the process.
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, self.bytes_in_file)
                    else:
                        file.truncate(self.bytes_in_file)
            except OSError as error:
                self._contexts.close()
                raise OSError(
                    error.errno,
                    f"there is no room for {self.bytes_in_file:,} bytes of residual streams in {folder!r} "
                    f"({error.strerror}); give another spill_directory or a larger {self._budget_name}",
                ) from error
            self._file = torch.from_file(str(path), shared=True, size=self._n_in_file, dtype=self._dtype)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._in_memory.clear()
        self._file = None
        self._contexts.close()

    def __setitem__(self, number: int, stream: Float[Tensor, "batch pos d_model"]) -> None:
        if number in self._in_file:
            start, _ = self._in_file[number]
            assert math.prod(stream.shape) <= math.prod(self._shapes[number])
            n_batch, n_pos, d_model = stream.shape
            self._in_file[number] = start, (n_batch, n_pos, d_model)
            self._place(number).copy_(stream)
        else:
            self._in_memory[number] = stream.detach().to("cpu", self._dtype)

    def __getitem__(self, number: int) -> Float[Tensor, "batch pos d_model"]:
        return self._place(number) if number in self._in_file else self._in_memory[number]

    def drop(self, number: int) -> None:
        """It is not needed any more."""
        self._in_memory.pop(number, None)

    def _place(self, number: int) -> Tensor:
        assert self._file is not None
        start, shape = self._in_file[number]
        return self._file[start : start + math.prod(shape)].view(shape)
