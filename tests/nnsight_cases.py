"""Tiny checkpoints in nnsight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel
from transformers import AutoTokenizer

from tests.families import hf_model


def traced_model(directory: Path, dtype: torch.dtype = torch.float32) -> TransformersModel:
    """A checkpoint loaded, with the plainest kernels, and wrapped."""
    return TransformersModel(hf_model(directory, dtype), tokenizer=AutoTokenizer.from_pretrained(directory))


def lazy_model(directory: Path, **settings: Any) -> TransformersModel:
    """A checkpoint of which only config and tokenizer are here, until a trace runs in this process."""
    return TransformersModel(
        str(directory),
        task="text-generation",
        tokenizer=AutoTokenizer.from_pretrained(directory),
        **settings,
    )
