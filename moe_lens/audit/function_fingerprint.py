"""A short hash of what a function does, so that a result kept on disk is not taken for one of a function since changed.

It is of the bytecode, the constants (docstring included), the names that the code looks up, the defaults, and the
values that a closure holds; functions among these are gone into. It does not see what else the code finds by name:
globals, functions and modules that it calls, attributes of objects. Other versions of Python have other bytecode, and
so other hashes.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

_LENGTH = 16
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def function_fingerprint(function: Callable[..., Any]) -> str:
    """16 hexadecimal digits: the same for the same code in every process, and others once it is changed."""
    digest = hashlib.sha256()
    for part in _parts(function, set()):
        encoded = part.encode()
        # With lengths, so that no two lists of parts run together into the same text.
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()[:_LENGTH]


def _parts(value: Any, gone_into: set[int]) -> Iterator[str]:
    """What tells a value from others, as texts in order."""
    if isinstance(value, (FunctionType, MethodType, functools.partial, CodeType)):
        if id(value) in gone_into:
            yield "again"
            return
        gone_into = gone_into | {id(value)}
    yield str(type(value).__qualname__)
    if isinstance(value, CodeType):
        yield value.co_code.hex()
        yield getattr(value, "co_exceptiontable", b"").hex()
        yield repr((value.co_names, value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount))
        # The names of parameters are how they are called; those of other variables are nobody's business.
        n_named = value.co_argcount + value.co_kwonlyargcount
        yield repr((value.co_varnames[:n_named], value.co_flags))
        yield from _parts(value.co_consts, gone_into)
    elif isinstance(value, FunctionType):
        yield from _parts(value.__code__, gone_into)
        yield from _parts(value.__defaults__, gone_into)
        yield from _parts(value.__kwdefaults__, gone_into)
        yield from _parts(tuple(_cell(cell) for cell in value.__closure__ or ()), gone_into)
    elif isinstance(value, MethodType):
        yield from _parts(value.__func__, gone_into)
        yield from _parts(value.__self__, gone_into)
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), gone_into)
    elif isinstance(value, (tuple, list)):
        yield str(len(value))
        for item in value:
            yield from _parts(item, gone_into)
    elif isinstance(value, dict):
        yield from _parts(list(value.items()), gone_into)
    elif isinstance(value, (set, frozenset)):
        # Their order differs between processes.
        yield repr(sorted("\n".join(_parts(item, gone_into)) for item in value))
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        # Their repr leaves out most of a large one.
        array = value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value
        yield repr((str(array.dtype), tuple(array.shape)))
        yield hashlib.sha256(_ADDRESS.sub("", repr(array.tolist())).encode()).hexdigest()
    else:
        call = inspect.getattr_static(type(value), "__call__", None)
        if isinstance(call, FunctionType):
            # An object that is called as a function: its code, and what it keeps.
            yield from _parts(call, gone_into)
            yield from _parts(dict(getattr(value, "__dict__", {})), gone_into)
        else:
            # Where an object lies in memory says nothing of what it is.
            yield _ADDRESS.sub("", repr(value))


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"
