"""A corpus through a streamed model, layer by layer: the numbers of its batches, each layer read once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.converters.checkpoint import Checkpoint
from moe_lens.interventions import Ablate, RouterOnly, TopK
from moe_lens.routing.streaming import ContributionAccumulator
from tests.checkpoints import load
from tests.conftest import leftover_hooks
from tests.families import prompts
from tests.streamed_cases import (
    BATCHES,
    STORAGES,
    batchwise,
    caching,
    same_cache,
)


@pytest.mark.parametrize(
    ("variant", "budget"),
    [(variant, 2**30) for variant in STORAGES]
    + [
        (variant, budget)
        for variant in ("olmoe", "deepseek_v2_bf16_sharded")
        for budget in (2 * 7 * 64 * 4, 0)
    ],
)
@torch.no_grad()
def test_a_corpus_is_its_batches(
    streamed: Any, checkpoint: Any, tmp_path: Path, variant: str, budget: int
) -> None:
    """Losses and everything at every hook point, with streams in memory, in part and wholly in a file; each batch's
    hooks hear that batch alone; each layer is read once."""
    model = streamed(variant)
    losses, caches = batchwise(load(checkpoint(variant)), BATCHES)
    ours: list[dict[str, Tensor]] = []
    got = model.run_corpus(
        BATCHES, caching(model, ours), return_type="loss", memory_budget=budget, spill_directory=tmp_path
    )
    for mine, its in zip(got.losses, losses, strict=True):
        assert torch.equal(mine.nan_to_num(-1), its.nan_to_num(-1))
    for mine, its in zip(ours, caches, strict=True):
        same_cache(mine, its)
    assert got.layers_read == model.cfg.n_layers == model.read_counts.layers_read
    stored = Checkpoint(checkpoint(variant))
    streamed_names = [name for name in stored.shapes if model.store.holds(name)]
    assert model.read_counts.tensors_read == len(streamed_names) > 3 * 8
    n_bytes = sum(torch.Size(stored.shapes[n]).numel() for n in streamed_names) * model.cfg.dtype.itemsize
    assert got.bytes_read == n_bytes
    assert got.layer_bytes <= model.store.bytes_needed
    all_streams = sum(tokens.numel() for tokens, _ in BATCHES) * 64 * model.cfg.dtype.itemsize
    assert got.stream_bytes <= budget
    assert got.stream_bytes + got.spilled_bytes >= all_streams
    assert (got.spilled_bytes > 0) == (budget < all_streams)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_corpus_in_part_and_without_listeners(streamed: Any, in_memory: Any) -> None:
    model, last = streamed("qwen2_moe"), []
    hook = ("blocks.1.hook_resid_post", lambda value, hook: last.append(value))
    with model.hooks([hook]):
        got = model.run_corpus((tokens for tokens, _ in BATCHES), stop_at_layer=2)
    assert got.losses is None
    assert got.layers_read == 2
    for stream, (tokens, _) in zip(last, BATCHES, strict=True):
        assert torch.equal(stream, in_memory("qwen2_moe")(tokens, stop_at_layer=2))


@pytest.mark.parametrize("rank_shift", [False, True])
@pytest.mark.parametrize("by", ["layer", "expert"])
@torch.no_grad()
def test_an_accumulator_listens_as_it_does_to_plain_runs(
    streamed: Any, in_memory: Any, by: str, rank_shift: bool
) -> None:
    """Analyses need not know which run they listen to: the same means, bit by bit."""
    batches = [(tokens, mask.bool()) for tokens, mask in BATCHES]
    ours = ContributionAccumulator(streamed("deepseek_v2"), by=by, rank_shift=rank_shift)
    theirs = ContributionAccumulator(in_memory("deepseek_v2"), by=by, rank_shift=rank_shift)
    for tokens, mask in batches:
        with theirs.listening(tokens, mask):
            theirs.model(tokens, attention_mask=mask)
    ours.model.run_corpus(batches, lambda i: ours.listening(*batches[i]))  # type: ignore[attr-defined]
    for key, groups in theirs.tallies[by].moments.items():  # type: ignore[index]
        for mine, its in zip(ours.tallies[by].moments[key], groups, strict=True):  # type: ignore[index]
            assert torch.equal(mine.mean, its.mean)
            assert torch.equal(mine.squares, its.squares)
            assert torch.equal(mine.count, its.count)


def test_a_listener_takes_its_own_hooks_off(streamed: Any) -> None:
    """As after a plain run: when its context has ended, the hooks of the caller are there and no others."""
    model, there = streamed("olmoe"), []

    @contextmanager
    def listening(i: int) -> Iterator[None]:
        with model.hooks([("hook_embed", lambda value, hook: None)]):
            yield
        there.append((leftover_hooks(model), model.context_level))

    with model.hooks([("blocks.0.hook_resid_pre", lambda value, hook: None)]):
        model.run_corpus(BATCHES, listening)
    assert there == [(["blocks.0.hook_resid_pre"], 1)] * 3


@torch.no_grad()
def test_logits_in_parts(streamed: Any, in_memory: Any) -> None:
    model, largest = streamed("olmoe"), []
    model.unembed.register_forward_hook(lambda module, given, out: largest.append(out.numel()))
    got = model.run_corpus(BATCHES, return_type="loss", logits_budget=3 * 2 * 128 * 4)
    assert max(largest) <= 3 * 2 * 128
    for loss, expected in zip(got.losses, batchwise(in_memory("olmoe"), BATCHES)[0], strict=True):
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("where", ["around the call", "around each batch"])
@torch.no_grad()
def test_interventions_on_a_corpus(streamed: Any, in_memory: Any, where: str) -> None:
    """`intervene` keeps one run's values: each batch has its own, and the receipt counts them all."""
    specs = (Ablate(ranks=1, layers=0, how="renormalize"), TopK(2, layers=1), RouterOnly("A1", receivers=[2]))
    model, theirs = streamed("olmoe"), in_memory("olmoe")
    expected, expected_receipts = [], []
    for tokens, mask in BATCHES:
        with theirs.intervene(*specs) as receipt:
            expected.append(theirs(tokens, attention_mask=mask, return_type="loss", loss_per_token=True))
        expected_receipts.append(receipt)
    receipts = []

    @contextmanager
    def listening(i: int) -> Iterator[None]:
        with model.intervene(*specs) as receipt:
            receipts.append(receipt)
            yield

    if where == "around the call":
        with model.intervene(*specs) as receipt:
            got = model.run_corpus(BATCHES, return_type="loss")
        assert receipt.n_runs == 3
        assert receipt.fired == receipt.asked == sum(r.fired for r in expected_receipts) > 0
    else:
        got = model.run_corpus(BATCHES, listening, return_type="loss")
        assert [str(r) for r in receipts] == [str(r) for r in expected_receipts]
    for loss, its in zip(got.losses, expected, strict=True):
        assert torch.equal(loss.nan_to_num(-1), its.nan_to_num(-1))


def test_observers_of_one_run_at_a_time_are_refused(streamed: Any) -> None:
    class Follower:
        @contextmanager
        def observing(self, run: Any) -> Iterator[None]:
            yield

    model, follower = streamed("olmoe"), Follower()
    model.run_observers.append(follower.observing)
    with pytest.raises(RuntimeError, match="Follower follows one run at a time"):
        model.run_corpus(BATCHES)
    model.run_observers.remove(follower.observing)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "there are no batches"),
        ([prompts(), "text"], {}, "batch 1 must be tokens"),
        ([[None]], {}, "batch 0 must begin with tokens, not NoneType"),
        ([prompts()[0], torch.tensor([[500]])], {}, r"batch 1: tokens 500..500 go beyond"),
        ([(prompts()[0], torch.ones(1, 2))], {}, "batch 0: attention_mask"),
        (BATCHES, {"return_type": "logits"}, "return_type must be 'loss' or None"),
        (BATCHES, {"return_type": "loss", "stop_at_layer": 1}, "there is no loss to return"),
        (BATCHES, {"stop_at_layer": 9}, "stop_at_layer=9"),
    ],
)
def test_wrong_arguments_are_told_first(streamed: Any, batches: Any, options: Any, message: str) -> None:
    model = streamed("olmoe")
    with pytest.raises(ValueError, match=message):
        model.run_corpus(batches, **options)
    assert model.read_counts.bytes_read == 0
