"""Files that are there whole, or as they were before: arrays with JSON data, without pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def whole_or_not(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; when this closes without an error, what was written there becomes `path`.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name} into")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: str | Path, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Arrays and JSON data to a safetensors file that is there whole, or as it was before.

    Raises:
        FileNotFoundError: its folder does not exist.
    """
    tensors = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    with whole_or_not(path) as unfinished:
        save_file(tensors, unfinished, metadata={"facts": json.dumps(facts)})
        # safetensors writes for the owner alone; this is a file like any other.
        unfinished.chmod(0o666 & ~_umask())
    return Path(path)


def read_arrays(
    path: str | Path, what: str = "routing contributions"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_atomically` wrote.

    Args:
        what: the file should be of, for the error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none that this package wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path.name} is no file of {what}: {error!r}") from error


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
