"""Files that are there whole, or as they were before: arrays with JSON data, without pickles.

Safetensors files have no checksums: a byte of their numbers that has changed is another number. Those that are written
here have one of each array in their metadata, and are held against it when they are read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lens.routing.arguments import few


@contextmanager
def whole_or_not(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; when this closes without an error, what was written there becomes `path`.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: there is no room on the disk; nothing is left of what was written.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name} into")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with _room_said(path):
            yield unfinished
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


_CHECKSUMS = "checksums of arrays"

# No space; more than a user's, or a file's, share of it.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _room_said(path: Path) -> Iterator[None]:
    """A full disk is told in one way, whichever library wrote."""
    try:
        yield
    except Exception as error:
        # Safetensors' errors are no OSErrors, and have the number in their text.
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if number not in _NO_ROOM:
            raise
        raise OSError(
            number,
            f"there is no room to write {str(path)!r} ({os.strerror(number)}): free some, or name another place. What "
            f"was written before is kept, and a run that keeps its state or its shards goes on from them with the same "
            f"call",
        ) from error


def write_atomically(path: str | Path, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Arrays and JSON data to a safetensors file that is there whole, or as it was before.

    Raises:
        FileNotFoundError: its folder does not exist.
        OSError: there is no room on the disk.
    """
    tensors = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    with whole_or_not(path) as unfinished:
        checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
        # Of one entry, because safetensors writes several in no order: the same contents are the same bytes.
        save_file(tensors, unfinished, metadata={"facts": json.dumps({**facts, _CHECKSUMS: checksums})})
        # safetensors writes for the owner alone; this is a file like any other.
        unfinished.chmod(0o666 & ~_umask())
    return Path(path)


def read_arrays(
    path: str | Path,
    what: str = "routing contributions",
    remedy: str = "Where a run keeps its state in it, delete it, and the run begins anew",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_atomically` wrote.

    Args:
        what: the file should be of, for the error.
        remedy: what would help, for the error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none that this package wrote, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            facts = json.loads(metadata["facts"])
            checksums = facts.pop(_CHECKSUMS, {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is no file of {what}: {error!r}. {remedy}") from error
    damaged = [name for name, checksum in checksums.items() if _checksum(arrays[name]) != checksum]
    if damaged:
        raise ValueError(f"{path} is damaged: {few(damaged)} in it is not as it was written. {remedy}")
    return arrays, facts


def _checksum(array: Tensor) -> int:
    return zlib.crc32(array.flatten().view(torch.uint8).numpy().data)


def sync_folder(folder: Path) -> None:
    """A new name is on the disk when its folder is."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _umask() -> int:
    """What is not permitted to new files. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
