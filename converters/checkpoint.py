"""A checkpoint directory's safetensors, read lazily: names and shapes at once, one tensor at a time.

Never pickle, never remote code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lens.converters.errors import CheckpointMismatch, UnsupportedCheckpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Plain numbers. Integers and eight-bit floats are codes of a quantised checkpoint, not its weights.
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

# A shard stays mapped while it is open, and its pages that were read count as this process's memory. Opening
# it anew after this many bytes lets them go.
REMAP_EVERY_BYTES = 64 * 2**20


class Checkpoint:
    """The tensors of a directory with one `model.safetensors`, or shards and their index.

    Attributes:
        shapes: every tensor's shape by name, from the files' headers.
        dtype: that of the first tensor.

    Raises:
        UnsupportedCheckpoint: no safetensors here.
        CheckpointMismatch: a shard is missing or damaged, or the index and the shards disagree.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        # One file goes before an index, as in transformers: saving again in one file leaves an old index behind.
        if (directory / SINGLE).is_file():
            weight_map, files = {}, [SINGLE]
        elif (directory / INDEX).is_file():
            weight_map = self._weight_map()
            files = sorted(set(weight_map.values()))
        else:
            raise UnsupportedCheckpoint(
                f"{directory} holds neither {SINGLE} nor {INDEX}; only safetensors are read, never pickled weights"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file_of: dict[str, str] = {}
        self.dtype: torch.dtype | None = None
        for file in files:
            for name, shape in self._header(file):
                if name in self.file_of:
                    raise CheckpointMismatch(f"{name} is in two shards, {self.file_of[name]} and {file}")
                self.shapes[name], self.file_of[name] = shape, file
        for name, file in weight_map.items():
            if self.file_of.get(name) != file:
                raise CheckpointMismatch(f"{INDEX} promises {name} in {file}, which does not hold it")

    def _weight_map(self) -> dict[str, str]:
        """The index: every tensor's name, and the shard that holds it."""
        try:
            weight_map = dict(json.loads((self.directory / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointMismatch(f"{INDEX} is no index of shards: {error!r}") from error
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointMismatch(f"{INDEX} is no index of shards: it names files that are no text")
        return weight_map

    def _header(self, file: str) -> list[tuple[str, tuple[int, ...]]]:
        path = self.directory / file
        # The index is data from elsewhere: it names files of its own directory and nothing else.
        if Path(file).name != file or not path.is_file():
            raise CheckpointMismatch(f"shard {file!r} is not in {self.directory}")
        try:
            with safe_open(path, framework="pt") as shard:
                slices = [(name, shard.get_slice(name)) for name in shard.offset_keys()]
                for name, stored in slices:
                    if stored.get_dtype() not in STORED_DTYPES:
                        raise CheckpointMismatch(
                            f"{name} is stored as {stored.get_dtype()}; only {', '.join(STORED_DTYPES)} are read"
                        )
                if self.dtype is None and slices:
                    self.dtype = STORED_DTYPES[slices[0][1].get_dtype()]
                return [(name, tuple(stored.get_shape())) for name, stored in slices]
        except SafetensorError as error:
            raise CheckpointMismatch(f"shard {file} cannot be read as safetensors: {error}") from error

    def equal(self, first: str, second: str, rows: int = 4096) -> bool:
        """Whether two stored matrices hold the same numbers; read a few rows at a time."""
        if self.shapes[first] != self.shapes[second]:
            return False
        with (
            safe_open(self.directory / self.file_of[first], framework="pt") as one,
            safe_open(self.directory / self.file_of[second], framework="pt") as other,
        ):
            a, b = one.get_slice(first), other.get_slice(second)
            starts = range(0, self.shapes[first][0], rows)
            return all(torch.equal(a[start : start + rows], b[start : start + rows]) for start in starts)

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, one after another in the order they lie in on disk, on the CPU. Each is only
        good until the next is asked for."""
        wanted = set(names)
        for file in sorted({self.file_of[name] for name in names}):
            waiting = [name for name in self.shapes if name in wanted and self.file_of[name] == file]
            while waiting:
                with safe_open(self.directory / file, framework="pt") as shard:
                    read = 0
                    while waiting and read < REMAP_EVERY_BYTES:
                        name = waiting.pop(0)
                        tensor = shard.get_tensor(name)
                        read += tensor.nbytes
                        yield name, tensor
                        del tensor


def require_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """What was read, in the dtype it was copied to: a narrower one may overflow.

    Raises:
        CheckpointMismatch: it holds NaN or infinity.
    """
    # NaN goes through aminmax; isfinite is slower.
    low, high = tensor.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise CheckpointMismatch(f"{name} holds NaN or infinity in {dtype}")
