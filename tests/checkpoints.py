"""Loading and damaging checkpoints, for the tests of converters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.converters.checkpoint import SINGLE


def load(directory: Path, **options: Any) -> HookedMoE:
    return HookedMoE.from_pretrained(directory, **{"device": "cpu", "verbose": False, **options})


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
