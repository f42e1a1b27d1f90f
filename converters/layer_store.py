"""A checkpoint's layers, read one at a time: the next while the present one is used.

A layer's tensors go from the safetensors files straight into their stacked places in one stretch of memory. There are
two such stretches, as large as the largest layer, and they are used in turn. Files are read, not mapped: a mapped file
that is cut short ends the process, a file that is read gives an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.converters.checkpoint import STORED_DTYPES, Checkpoint, require_finite
from moe_lens.converters.errors import CheckpointChanged, CheckpointMismatch
from moe_lens.converters.key_map import Place

# Every tensor of a stretch begins at a multiple of this, so that kernels find it as they would one of its own.
_ALIGNMENT = 256
# A tensor is read in pieces: what must be converted passes through memory of this size, and a reader that is told to
# stop does so after a piece.
PIECE_BYTES = 8 * 2**20


@dataclass
class ReadCounts:
    """What a `LayerStore` has done so far.

    Attributes:
        bytes_read: from the files.
        layers_read: how many times a layer was read.
        tensors_read: how many times a tensor was read.
        seconds_waiting: how long somebody waited for a layer that was not there yet.
        seconds_reading: how long the reading thread was at it.
        peak_bytes: the most memory that its weights took at a time, with the piece that is converted.
    """

    bytes_read: int = 0
    layers_read: int = 0
    tensors_read: int = 0
    seconds_waiting: float = 0.0
    seconds_reading: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class _Stored:
    """One tensor of a file, and the view of a layer's memory that it fills."""

    name: str
    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: str
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _FileState:
    size: int
    modified: int
    header: str


class LayerStore:
    """The tensors of each layer of a checkpoint that are not kept in memory.

    Args:
        checkpoint: whose names and shapes were found to be the model's (`check_tensors`).
        places: where its tensors go.
        model: the model on the meta device, in the dtype that is wanted.
        streamed: names of the parameters that are read with their layer, all of them a block's.
        device: where layers are put.

    Attributes:
        counts: what it has done so far.

    Raises:
        CheckpointChanged: a file is another than it was when the checkpoint was opened.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        places: Mapping[str, Place],
        model: nn.Module,
        streamed: Sequence[str],
        device: torch.device,
    ):
        self.directory, self.device = checkpoint.directory, device
        self.counts = ReadCounts()
        parameters = dict(model.named_parameters())
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        self.dtype = next(iter(parameters.values())).dtype
        self.parameters: dict[int, dict[str, tuple[torch.Size, int]]] = {}
        """By layer: each streamed parameter's shape, and where in the layer's memory it begins, in bytes."""
        self._bytes: dict[int, int] = {}
        for name in streamed:
            layer = int(name.split(".")[1])
            begin, parameter = self._bytes.get(layer, 0), parameters[name]
            self.parameters.setdefault(layer, {})[name] = parameter.shape, begin
            self._bytes[layer] = begin + _aligned(parameter.numel() * self.dtype.itemsize)

        headers = {}
        self._files: dict[str, _FileState] = {}
        for file in set(checkpoint.file_of.values()):
            with open(self.directory / file, "rb") as opened:
                headers[file], self._files[file] = _read_header(opened.fileno())
        self._stored: dict[int, list[_Stored]] = {layer: [] for layer in self.parameters}
        for name, place in places.items():
            view = place.view(model)
            assert view is not None
            parameter = name_of[id(view if view._base is None else view._base)]
            if parameter not in streamed:
                continue
            file = checkpoint.file_of[name]
            start, entries = headers[file]
            entry = entries[name]
            if tuple(entry["shape"]) != checkpoint.shapes[name]:
                raise CheckpointChanged(f"{file} was changed while it was being opened")
            self._stored[int(parameter.split(".")[1])].append(
                _Stored(
                    name,
                    file,
                    start + entry["data_offsets"][0],
                    STORED_DTYPES[entry["dtype"]],
                    checkpoint.shapes[name],
                    parameter,
                    view.stride(),
                    int(view.storage_offset()),
                )
            )
        for tensors in self._stored.values():
            tensors.sort(key=lambda stored: (stored.file, stored.start))
        self._names = {stored.name for tensors in self._stored.values() for stored in tensors}
        largest = max((_row_bytes(s) for tensors in self._stored.values() for s in tensors), default=0)
        self._piece_bytes = max(PIECE_BYTES, largest)
        self._piece: Tensor | None = None
        self._stretches: list[Tensor | None] = [None, None]
        self._is_busy = threading.Lock()

    def holds(self, name: str) -> bool:
        """Whether this tensor of the checkpoint is read with its layer."""
        return name in self._names

    @property
    def layer_bytes(self) -> int:
        """Memory of the largest layer."""
        return max(self._bytes.values(), default=0)

    @property
    def bytes_needed(self) -> int:
        """Memory for two layers and the piece that is being converted."""
        return 2 * self.layer_bytes + self._piece_bytes

    def stored_bytes(self, layers: Sequence[int]) -> int:
        """How much is read from disk for these layers."""
        return sum(
            math.prod(stored.shape) * stored.dtype.itemsize
            for layer in layers
            for stored in self._stored.get(layer, ())
        )

    def reading(self, layers: Sequence[int]) -> Reading:
        """Some layers, one after another; see `Reading`."""
        return Reading(self, layers)

    # ---- what a `Reading` uses ----

    def begin(self) -> None:
        """Raises:
        RuntimeError: layers are being read already.
        """
        if not self._is_busy.acquire(blocking=False):
            raise RuntimeError(
                "the layers of this streamed model are in use: a hook, or another thread, ran the model inside of "
                "a run, and there is memory for one run's layers only; load the model a second time for that"
            )

    def end(self) -> None:
        self._is_busy.release()

    def stretch(self, number: int) -> Tensor:
        """One of the two stretches of memory. Where somebody has kept a view of it, they keep it, and another one is
        made: what they hold does not turn into another layer's weights."""
        held = self._stretches[number]
        if held is None or _is_kept(held):
            held = self._stretches[number] = None
            with torch.inference_mode(False):
                held = torch.empty(self.layer_bytes, dtype=torch.uint8, device=self.device)
            self._stretches[number] = held
            self._count_memory()
        return held

    def read(self, layer: int, stretch: Tensor, stop: threading.Event) -> dict[str, Tensor]:
        """Fill a stretch of memory with a layer.

        Returns:
            Its parameters, by name; views of the stretch.

        Raises:
            CheckpointMismatch: a tensor holds NaN or infinity.
            CheckpointChanged: a file is no longer what it was.
        """
        began = time.monotonic()
        weights = {
            name: stretch[begin : begin + shape.numel() * self.dtype.itemsize].view(self.dtype).view(shape)
            for name, (shape, begin) in self.parameters.get(layer, {}).items()
        }
        descriptor, opened = -1, None
        try:
            with torch.no_grad():
                for stored in self._stored.get(layer, ()):
                    if stored.file != opened:
                        self._close(descriptor, opened)
                        descriptor = -1
                        descriptor, opened = self._open(stored.file), stored.file
                    view = weights[stored.parameter].as_strided(
                        stored.shape,
                        stored.stride,
                        weights[stored.parameter].storage_offset() + stored.offset,
                    )
                    if not self._fill(view, stored, descriptor, stop):
                        return {}
                    try:
                        require_finite(stored.name, view, self.dtype)
                    except CheckpointMismatch:
                        self._require_unchanged(descriptor, stored.file)
                        raise
                    self.counts.tensors_read += 1
            self._close(descriptor, opened)
            descriptor = -1
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        self.counts.layers_read += 1
        self.counts.seconds_reading += time.monotonic() - began
        return weights

    def _fill(self, view: Tensor, stored: _Stored, descriptor: int, stop: threading.Event) -> bool:
        """Read a tensor into its place, some rows at a time; False when told to stop."""
        row_bytes = _row_bytes(stored)
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        as_stored = view.dtype == stored.dtype and view.is_contiguous() and view.device.type == "cpu"
        for row in range(0, stored.shape[0], step):
            if stop.is_set():
                return False
            rows = view[row : row + step]
            n_bytes = len(rows) * row_bytes
            at = stored.start + row * row_bytes
            if as_stored:
                self._read_bytes(rows.flatten().view(torch.uint8), stored, descriptor, at)
            else:
                piece = self._own_piece()[:n_bytes]
                self._read_bytes(piece, stored, descriptor, at)
                rows.copy_(piece.view(stored.dtype).view(rows.shape))
            self.counts.bytes_read += n_bytes
        return True

    def _own_piece(self) -> Tensor:
        if self._piece is None:
            self._piece = torch.empty(self._piece_bytes, dtype=torch.uint8)
            self._count_memory()
        return self._piece

    def _count_memory(self) -> None:
        held = [t for t in (*self._stretches, self._piece) if t is not None]
        self.counts.peak_bytes = max(self.counts.peak_bytes, sum(t.nbytes for t in held))

    def _read_bytes(self, into: Tensor, stored: _Stored, descriptor: int, at: int) -> None:
        room = into.numpy().data
        while room:
            n = os.preadv(descriptor, [room], at)
            if n == 0:
                raise CheckpointChanged(
                    f"{self.directory / stored.file} ends within {stored.name}: it was cut short since the model was "
                    f"loaded"
                )
            room, at = room[n:], at + n

    def _open(self, file: str) -> int:
        """A descriptor of a file, after it was found to be what it was."""
        path = self.directory / file
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointChanged(f"{path} cannot be read any more: {error.strerror}") from error
        try:
            self._require_unchanged(descriptor, file)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _close(self, descriptor: int, file: str | None) -> None:
        if file is None:
            return
        # Once more: it may have been written while it was read.
        self._require_unchanged(descriptor, file)
        os.close(descriptor)

    def _require_unchanged(self, descriptor: int, file: str) -> None:
        known = self._files[file]
        now = os.fstat(descriptor)
        if now.st_size != known.size:
            what = f"it had {known.size:,} bytes and has {now.st_size:,}"
        elif now.st_mtime_ns != known.modified:
            what = "it was written to"
        elif _read_header(descriptor)[1].header != known.header:
            what = "its header is another"
        else:
            return
        raise CheckpointChanged(
            f"{self.directory / file} was changed since the model was loaded ({what}); load the model again"
        )


class Reading:
    """Layers of a store, in the order given: a context manager that goes through (layer, weights by name).

    While one is used, a thread reads the next. The weights are good until the next layer is asked for: a view that is
    kept is no longer the model's. The thread ends with the context, whatever ends that.

    Raises:
        RuntimeError: the store's layers are in use.
        Whatever reading a layer raises, when that layer is asked for.
    """

    def __init__(self, store: LayerStore, layers: Sequence[int]):
        self.store, self.layers = store, list(layers)
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Reading:
        self.store.begin()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="moe_lens-layers")
        return self

    def __exit__(self, *exception: Any) -> None:
        assert self._pool is not None
        self._stop.set()
        try:
            self._pool.shutdown(wait=True, cancel_futures=True)
        finally:
            self.store.end()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        coming = self._ask(0)
        for number, layer in enumerate(self.layers):
            assert coming is not None
            began = time.monotonic()
            weights = coming.result()
            self.store.counts.seconds_waiting += time.monotonic() - began
            coming = self._ask(number + 1)
            try:
                yield layer, weights
            finally:
                # So that nobody holds this layer's memory any more, which the next but one is read into.
                weights.clear()

    def _ask(self, number: int) -> Future[dict[str, Tensor]] | None:
        if number == len(self.layers):
            return None
        assert self._pool is not None
        stretch = self.store.stretch(number % 2)
        return self._pool.submit(self.store.read, self.layers[number], stretch, self._stop)


def _read_header(descriptor: int) -> tuple[tuple[int, dict[str, Any]], _FileState]:
    """Of a safetensors file: where its data begins, its entries, and what it is recognised by."""
    of_file = os.fstat(descriptor)
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    text = os.pread(descriptor, length, 8)
    state = _FileState(of_file.st_size, of_file.st_mtime_ns, hashlib.sha256(text).hexdigest())
    try:
        return (8 + length, json.loads(text)), state
    except ValueError:
        return (8 + length, {}), state


def _is_kept(stretch: Tensor) -> bool:
    """Whether anybody else holds a view of this memory; yes where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    # One for the tensor itself, one for the storage that is asked.
    return count is None or count(stretch.untyped_storage()._cdata) > 2


def _row_bytes(stored: _Stored) -> int:
    return math.prod(stored.shape[1:]) * stored.dtype.itemsize


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
