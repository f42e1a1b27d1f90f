"""What is installed on the server: nnsight, torch, transformers and what these need, nothing else.

A real server has neither moe_lens nor what only moe_lens needs (jaxtyping, transformer_lens, pandas, scipy,
plotly, ...). All of it is installed beside the stand-in, whose process therefore hides it: a module is found
only if it belongs to Python, to the packages below, or to what those name as their requirements. Nor has it the
client's files, from which Python would take the source of a function whose source was not sent.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

# What nnsight says is always there (nnsight/intervention/backends/local.py, `_SERVER_MODULES`), and tornado,
# which serves: a real server has a web framework of its own.
INSTALLED = ("nnsight", "torch", "numpy", "transformers", "accelerate", "einops", "tornado")

# Asked for at the start, so that a stand-in that would let something through never serves.
ABSENT = ("moe_lens", "tests", "jaxtyping", "transformer_lens", "pandas", "scipy", "plotly")


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _closure(roots: Iterable[str]) -> set[str]:
    """The distributions that `roots` need, themselves included; extras and other platforms left out."""
    found: set[str] = set()
    waiting = [_canonical(root) for root in roots]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in requirements:
            if "extra ==" not in requirement:
                waiting.append(_canonical(re.match(r"[\w.-]+", requirement).group()))  # type: ignore[union-attr]
    return found


class OnlyInstalled:
    """A finder that finds what `finder` finds, if its top-level name is among `names`."""

    def __init__(self, finder: Any, names: set[str], distributions: set[str]) -> None:
        self.finder = finder
        self.names = names
        self.distributions = distributions

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        # None, as for a module that is not there: torch asks for the specs of modules that it can do without.
        if name.partition(".")[0] not in self.names or not hasattr(self.finder, "find_spec"):
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, *context: Any, **options: Any) -> Iterable[Any]:
        if not hasattr(self.finder, "find_distributions"):
            return ()
        found = self.finder.find_distributions(*context, **options)
        return (d for d in found if _canonical(d.metadata["Name"]) in self.distributions)

    def invalidate_caches(self) -> None:
        getattr(self.finder, "invalidate_caches", lambda: None)()


def hide_files(hidden: Iterable[str], shown: list[str]) -> None:
    """From here on, no file below a directory of `hidden` can be opened, unless it is below one of `shown`.

    `shown` is read anew each time: more can be put into it.
    """
    below = tuple(os.path.join(os.path.realpath(directory), "") for directory in hidden)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], str):
            return
        path = os.path.realpath(arguments[0])
        if path.startswith(below) and not any(
            path == directory or path.startswith(os.path.join(directory, "")) for directory in shown
        ):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])

    shown[:] = [os.path.realpath(directory) for directory in [*shown, sys.prefix, sys.base_prefix]]
    sys.addaudithook(refuse)


def hide_all_else(own: str) -> None:
    """Leave only Python, the packages of `INSTALLED` and the package `own` importable, and prove it.

    Raises:
        RuntimeError: something of `ABSENT` can be imported, or has been.
    """
    distributions = _closure(INSTALLED)
    tops = {
        name
        for name, owners in metadata.packages_distributions().items()
        if distributions & {*map(_canonical, owners)}
    }
    # The one module of Python's own whose name its list of names does not have, because it differs by platform.
    platform = {
        module.name
        for module in pkgutil.iter_modules([os.path.dirname(os.__file__)])
        if "sysconfig" in module.name
    }
    names = {*sys.stdlib_module_names, *sys.builtin_module_names, *platform, *tops, own}
    sys.meta_path[:] = [OnlyInstalled(finder, names, distributions) for finder in sys.meta_path]
    importlib.invalidate_caches()
    for name in ABSENT:
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            raise RuntimeError(f"{name} can be imported by the stand-in, but is on no real server.")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{name} was imported by the stand-in, but is on no real server.")
