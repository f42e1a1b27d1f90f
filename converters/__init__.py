"""Hugging Face checkpoints as hooked models: the registry of families, and loading.

A family is one file: how to read its config (`read_config`), and where each of its tensors goes (`KEY_MAP`).
To add one, write such a file and register it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_lens.config import MoEConfig
from moe_lens.converters import deepseek_v2, mixtral, olmoe, qwen2_moe, qwen3_moe
from moe_lens.converters.errors import (
    CheckpointChanged,
    CheckpointMismatch,
    NotEnoughMemory,
    UnsupportedCheckpoint,
)
from moe_lens.converters.key_map import KeyMap


@dataclass(frozen=True)
class Converter:
    """A family: its transformers `model_type`, its config reading, its key map."""

    model_type: str
    read_config: Callable[[Any], MoEConfig]
    key_map: KeyMap


REGISTRY: dict[str, Converter] = {}


def register(converter: Converter) -> None:
    """Add a family.

    Raises:
        ValueError: its model type is registered already.
    """
    if converter.model_type in REGISTRY:
        raise ValueError(f"a converter for model type {converter.model_type!r} is registered already")
    REGISTRY[converter.model_type] = converter


def converter_for(model_type: str) -> Converter:
    """The converter of a model type.

    Raises:
        UnsupportedCheckpoint: there is none; the known ones are named.
    """
    if model_type not in REGISTRY:
        raise UnsupportedCheckpoint(
            f"no converter for model type {model_type!r}; known model types are {', '.join(sorted(REGISTRY))}"
        )
    return REGISTRY[model_type]


for _family in (olmoe, qwen2_moe, deepseek_v2, qwen3_moe, mixtral):
    register(Converter(_family.MODEL_TYPE, _family.read_config, _family.KEY_MAP))

from moe_lens.converters.loading import load_pretrained  # noqa: E402 (it reads the registry)

__all__ = [
    "REGISTRY",
    "CheckpointChanged",
    "CheckpointMismatch",
    "Converter",
    "NotEnoughMemory",
    "UnsupportedCheckpoint",
    "converter_for",
    "load_pretrained",
    "register",
]
