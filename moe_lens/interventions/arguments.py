"""What the specs' arguments say: integers, layers, and experts by name or by number."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from moe_lens.interventions.expert_outputs import SHARED

Layers = int | str | Sequence[int | str] | None
"""Layers as a caller gives them: 3, "M3", or several; None is all."""

_LAYER = re.compile(r"M?([0-9]+)")
_EXPERT = re.compile(r"M([0-9]+)(?:E([0-9]+)|S)")


class ExpertName(NamedTuple):
    layer: int
    expert: int
    """-1 (`SHARED`) stands for the layer's shared experts."""

    def __str__(self) -> str:
        return f"M{self.layer}S" if self.expert == SHARED else f"M{self.layer}E{self.expert}"


def parse_expert(name: str) -> ExpertName:
    """`M1E9`, or `M1S`.

    Raises:
        ValueError: it is no expert's name.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is no expert; name one as 'M1E9' (layer 1, expert 9) or 'M1S' (shared experts)"
        )
    return ExpertName(int(match[1]), SHARED if match[2] is None else int(match[2]))


def expert_names(given: Any, layers: tuple[int, ...] | None) -> tuple[ExpertName, ...]:
    """One or more experts: by name, or by number (-1 the shared ones) in each of some layers.

    Raises:
        ValueError: neither; names and layers; numbers without layers; an expert that comes twice.
    """
    items = _listed(given)
    items = tuple(str(item) if isinstance(item, ExpertName) else item for item in items)
    if not items:
        return ()
    if all(isinstance(item, str) for item in items):
        if layers is not None:
            raise ValueError(f"the names {items} say their layers; leave layers={layers} away")
        named = tuple(parse_expert(item) for item in items)
    else:
        numbers = integers(items, "experts")
        if layers is None:
            raise ValueError(f"experts {numbers} are numbers: say of which layers, or name them as 'M1E9'")
        if min(numbers) < SHARED:
            raise ValueError(f"there is no expert {min(numbers)}; -1 stands for the shared experts")
        if min(layers) < 0:
            raise ValueError(
                f"layer {min(layers)} has no experts: layers are counted from 0, not from the end"
            )
        named = tuple(ExpertName(layer, expert) for layer in layers for expert in numbers)
    if len(set(named)) < len(named):
        raise ValueError(f"an expert is named twice: {', '.join(map(str, named))}")
    return named


def integers(value: Any, name: str) -> tuple[int, ...]:
    """One or more integers, each once, as a tuple.

    Args:
        name: of the argument, for the error.

    Raises:
        ValueError: something else, none, or one that comes twice.
    """
    items = _listed(value)
    try:
        if any(isinstance(item, bool | np.bool_) for item in items):
            raise TypeError
        numbers = tuple(operator.index(item) for item in items)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be an integer, or several") from None
    if not numbers:
        raise ValueError(f"{name} is empty")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={numbers} has one twice")
    return numbers


def layer_numbers(value: Any, name: str = "layers") -> tuple[int, ...]:
    """One or more layers, by number or as `"M3"`, each once, as a tuple of numbers.

    Args:
        name: of the argument, for the error.

    Raises:
        ValueError: something else, none, or one that comes twice.
    """

    def number(item: Any) -> Any:
        match = _LAYER.fullmatch(item) if isinstance(item, str) else None
        return item if match is None else int(match[1])

    items = _listed(value)
    numbers = [number(item) for item in items]
    if any(isinstance(item, str) for item in numbers):
        raise ValueError(f"{name}={value!r} must be an integer or a name as 'M3', or several")
    # As it was given, for the error.
    return integers(value if numbers == list(items) else numbers, name)


def integer(value: Any, name: str) -> int:
    """A lone integer.

    Raises:
        ValueError: something else.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be an integer") from None


def _listed(value: Any) -> tuple[Any, ...]:
    """What was given, or each of what was given."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    is_one = isinstance(value, str | ExpertName) or not isinstance(value, Iterable)
    return (value,) if is_one else tuple(value)
