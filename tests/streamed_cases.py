"""What the tests of streamed models share: which checkpoints, which batches, and what may not be left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_lens.model.streamed_moe import OnDisk, StreamedMoE
from tests.conftest import leftover_hooks
from tests.families import FAMILIES, prompts

STORAGES = (
    *FAMILIES,
    "deepseek_v2_groups",
    "deepseek_v2_bias",
    "olmoe_bias_odd_width",
    "olmoe_bf16",
    "qwen2_moe_sharded",
    "qwen3_moe_dense_bias",
    "deepseek_v2_bf16_sharded",
    "mixtral_bf16_sharded",
)
BATCHES = [prompts("left", length=7), prompts("none", seed=1, length=5), prompts("right", seed=2, batch=3)]


def assert_nothing_is_left(model: StreamedMoE) -> None:
    assert leftover_hooks(model) == []
    assert model.run_observers == []
    assert model.current_run is None
    assert model.context_level == 0
    assert [name for name, p in model.named_parameters() if p.ndim > 1 and not on_disk(name, p)] == []
    assert readers() == []


def on_disk(name: str, parameter: Tensor) -> bool:
    resident = not name.startswith("blocks.") or name.endswith("router.weight")
    return isinstance(parameter, OnDisk) != resident


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moe_lens-layers")]


def same_cache(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def batchwise(model: Any, batches: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Losses and caches of plain runs, one after another."""
    losses, caches = [], []
    for tokens, mask in batches:
        loss, cache = model.run_with_cache(
            tokens, attention_mask=mask, return_type="loss", loss_per_token=True, return_cache_object=False
        )
        losses.append(loss)
        caches.append(cache)
    return losses, caches


def caching(model: Any, caches: list[dict[str, Tensor]]) -> Callable[[int], Any]:
    def listening(i: int) -> Any:
        cache, hooks, _ = model.get_caching_hooks()
        caches.append(cache)
        return model.hooks(hooks)

    return listening
