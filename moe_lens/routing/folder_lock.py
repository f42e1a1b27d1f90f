"""A lock on a folder, which its process holds as long as it lives."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps a second writer out
    fcntl = None

LOCK = ".lock"


class FolderInUse(RuntimeError):
    """Another writer is at work in a folder."""


class FolderLock:
    """Keeps a second writer out of a folder. The system lets go of it when its process ends, however that ends.

    Args:
        folder: which there is.
        what: it holds, for the error.

    Raises:
        FolderInUse: another writer is at work there.
    """

    def __init__(self, folder: Path, what: str = "the census"):
        self.path = folder / LOCK
        while True:
            self._file = open(self.path, "a+")  # noqa: SIM115
            try:
                if fcntl is not None:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._file.fileno()).st_ino == self.path.stat().st_ino:
                    break
                self._file.close()  # whoever had it has just let go, and taken the name away
            except FileNotFoundError:
                self._file.close()
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                mine = holder == _this_process()
                raise FolderInUse(
                    f"{what} {str(folder)!r} is being written by {holder}"
                    + (
                        ", this one: close() that writer"
                        if mine
                        else "; two writers would mix what they write"
                    )
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{str(folder)!r} is on a file system without locks ({error}): a second writer there would not "
                    f"be noticed",
                    stacklevel=4,
                )
                break
        self._file.truncate(0)
        self._file.write(_this_process())
        self._file.flush()

    def release(self) -> None:
        if self._file.closed:
            return
        # Processes that were forked meanwhile keep the file, but not its name.
        self.path.unlink(missing_ok=True)
        self._file.close()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
