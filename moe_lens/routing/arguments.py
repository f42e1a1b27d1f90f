"""Arguments as callers give them, and how errors list what there is instead."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np


def positive_integer(value: object, name: str) -> int:
    """A positive whole number, of whatever integer type.

    Args:
        value: as the caller gave it.
        name: of the argument, for the error.

    Raises:
        TypeError: no integer; a bool is none.
        ValueError: not positive.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} must be a positive integer, not {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{name}={number} must be positive")
    return number


def natural_number(value: object, name: str) -> int:
    """A whole number, 0 or more, of whatever integer type.

    Raises:
        TypeError: no integer; a bool is none.
        ValueError: negative.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}") from None
    if number < 0:
        raise ValueError(f"{name}={number} must be 0 or more")
    return number


def layers_said(layers: Sequence[int]) -> str:
    """`layers 0 to 7`, or the first of them one by one where some between are missing.

    Args:
        layers: ascending; `no layers` where there are none.
    """
    if not layers:
        return "no layers"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {few(layers)}"


def few(items: Sequence[object]) -> str:
    """The first of some items, for a message."""
    return ", ".join(map(str, items[:20])) + (", ..." if len(items) > 20 else "")
