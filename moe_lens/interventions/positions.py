"""Where an intervention acts: columns, as plain data, and their places in a batch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.routing.score_maps import position_columns

Pos = int | tuple[int, ...] | tuple[tuple[bool, ...], ...] | None
"""Columns: None is every real token; an int one of each row (negative from the end of the columns); a tuple of ints
one for each row; a tuple of tuples of bools a mask `[batch, pos]`. Tensors, arrays and lists are taken and become
tuples."""
Positions = int | Sequence[int] | Int[Tensor, " batch"] | Bool[Tensor, "batch pos"] | None
"""The same as patching takes it: None, a column of each row, one for each row, or a mask."""


def as_position(pos: Any, name: str = "pos") -> Pos:
    """A position argument as plain data.

    Args:
        name: of the argument, for the error.

    Raises:
        ValueError: it is no column, no columns and no mask; a mask that selects nothing.
    """
    if pos is None:
        return None
    if isinstance(pos, Tensor | np.ndarray):
        pos = pos.tolist()
    if isinstance(pos, Iterable) and not isinstance(pos, str):
        rows: tuple[Any, ...] = tuple(
            row.tolist() if isinstance(row, Tensor | np.ndarray | np.generic) else row for row in pos
        )
        rows = tuple(
            tuple(row) if isinstance(row, Iterable) and not isinstance(row, str) else row for row in rows
        )
        if rows and all(isinstance(row, tuple) and row for row in rows):
            return _mask(pos, rows, name)
        pos = rows
    items: tuple[Any, ...] = pos if isinstance(pos, tuple) else (pos,)
    try:
        if not items or any(isinstance(item, bool | np.bool_) for item in items):
            raise TypeError
        numbers = tuple(operator.index(item) for item in items)
    except TypeError:
        raise _no_position(pos, name) from None
    return numbers if isinstance(pos, tuple) else numbers[0]


def _mask(given: Any, rows: tuple[tuple[Any, ...], ...], name: str) -> tuple[tuple[bool, ...], ...]:
    are_bools = all(isinstance(value, bool | np.bool_) for row in rows for value in row)
    if not are_bools or len({len(row) for row in rows}) > 1:
        raise _no_position(given, name)
    mask = tuple(tuple(map(bool, row)) for row in rows)
    if not any(map(any, mask)):
        raise ValueError(f"the mask {name} selects no position")
    return mask


def _no_position(given: Any, name: str) -> ValueError:
    return ValueError(f"{name}={given!r} must be a column, one for each row, or a mask of bools [batch, pos]")


def is_mask(pos: Pos) -> bool:
    return isinstance(pos, tuple) and isinstance(pos[0], tuple)


def places_of(pos: Pos, real: Bool[Tensor, "batch pos"], name: str = "pos") -> Bool[Tensor, "batch pos"]:
    """The places that a position stands for, in a batch with these real tokens.

    Args:
        name: of the argument, for the error.

    Raises:
        ValueError: a position past the sequence, padding, another number of rows, or a mask of another shape.
    """
    if pos is None:
        return real
    if is_mask(pos):
        mask = torch.tensor(pos, device=real.device)
        if mask.shape != real.shape:
            raise ValueError(f"the mask {name} is {list(mask.shape)}, and the tokens are {list(real.shape)}")
        padding = (mask & ~real).nonzero()
        if len(padding):
            row, column = padding[0].tolist()
            raise ValueError(f"row {row}: position {column} of the mask {name} is padding")
        return mask
    if isinstance(pos, tuple) and len(pos) != len(real):
        raise ValueError(
            f"{name}={pos} has {len(pos)} columns for {len(real)} rows: give one for all, or one for each; several "
            f"columns of a row are a bool mask [batch, pos]"
        )
    columns = position_columns(pos, "pos", real)  # type: ignore[arg-type]
    return torch.zeros_like(real).scatter(1, columns[:, None], True)


def patched_places(positions: Positions, real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The places that `positions=` of a patch stands for, in a batch with these real tokens.

    Raises:
        ValueError: as `as_position` and `places_of`.
    """
    pos = as_position(positions, "positions")
    return places_of(pos, real, "positions")


def certain_places(positions: dict[int, Pos]) -> dict[int, Bool[Tensor, "batch pos"]]:
    """Places in a made-up batch of one row, a column for each position that is named, before any batch is known.

    Where two of these have a place in common, they have one in common in every batch: those that name the same
    position, and those that act everywhere with any other.
    """
    columns = list(dict.fromkeys(positions.values()))
    return {
        key: torch.tensor([[pos is None or pos == column for column in columns]])
        for key, pos in positions.items()
    }
