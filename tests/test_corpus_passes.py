"""One pass of a corpus for those who listen: the same on a model in memory and on one that is on disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.audit.released_padding import PaddingAsInTransformers
from moe_lens.model.corpus_passes import CorpusBatch, run_batches
from tests.conftest import leftover_hooks
from tests.families import prompts
from tests.streamed_cases import BATCHES, same_cache

LISTENED = (
    "hook_embed",
    "blocks.1.attn.hook_z",
    "blocks.1.mlp.hook_expert_indices",
    "blocks.2.hook_resid_post",
)


def heard(model: Any, batches: Any, **options: Any) -> tuple[Any, list[dict[str, Tensor]], list[CorpusBatch]]:
    """Losses, what passed some hook points in each batch, and the batches as listeners are given them."""
    caches: list[dict[str, Tensor]] = []
    given: list[CorpusBatch] = []

    def listening(batch: CorpusBatch) -> Any:
        cache: dict[str, Tensor] = {}
        caches.append(cache)
        given.append(batch)
        return model.listening(
            [(name, lambda value, hook: cache.update({hook.name: value})) for name in LISTENED]
        )

    return run_batches(model, batches, listening, **options), caches, given


@pytest.mark.parametrize("kind", ["streamed", "hooked"])
@torch.no_grad()
def test_listeners_hear_what_plain_runs_say(request: Any, hooked: Any, kind: str) -> None:
    """Of an iterator of batches that bring more than tokens and mask; losses are those of the plain runs."""
    model = request.getfixturevalue(kind)("qwen2_moe")
    losses, caches = [], []
    for tokens, mask in BATCHES:
        loss, cache = hooked("qwen2_moe").run_with_cache(
            tokens,
            attention_mask=mask,
            return_type="loss",
            loss_per_token=True,
            names_filter=LISTENED,
            return_cache_object=False,
        )
        losses.append(loss)
        caches.append(cache)
    batches = ((tokens, mask, f"batch {i}", i) for i, (tokens, mask) in enumerate(BATCHES))
    got, ours, given = heard(model, batches, return_type="loss")
    for mine, its in zip(got, losses, strict=True):
        assert torch.equal(mine.nan_to_num(-1), its.nan_to_num(-1))
    for mine, its in zip(ours, caches, strict=True):
        same_cache(mine, its)
    assert [batch.number for batch in given] == [0, 1, 2]
    assert [batch.rest for batch in given] == [("batch 0", 0), ("batch 1", 1), ("batch 2", 2)]
    for batch, (tokens, mask) in zip(given, BATCHES, strict=True):
        assert torch.equal(batch.tokens, tokens)
        assert torch.equal(batch.real, mask.bool())
    assert leftover_hooks(model) == []
    if kind == "streamed":
        assert model.read_counts.layers_read == model.cfg.n_layers


@pytest.mark.parametrize("stop", [None, 3])
@torch.no_grad()
def test_another_attention(streamed: Any, hooked: Any, stop: int | None) -> None:
    """Padded queries see the same with either model, and not what they see in a plain run."""
    options = {"attend": PaddingAsInTransformers, "stop_at_layer": stop}
    _, ours, _ = heard(streamed("deepseek_v2"), BATCHES, **options)
    _, theirs, _ = heard(hooked("deepseek_v2"), BATCHES, **options)
    for mine, its in zip(ours, theirs, strict=True):
        same_cache(mine, its)
    _, plain, _ = heard(hooked("deepseek_v2"), BATCHES, stop_at_layer=stop)
    changed = ours[0]["blocks.1.attn.hook_z"] != plain[0]["blocks.1.attn.hook_z"]
    is_padding = BATCHES[0][1] == 0
    assert bool(changed[is_padding].any())
    assert not bool(changed[~is_padding].any())


@pytest.mark.parametrize("kind", ["streamed", "hooked"])
def test_no_gradient_and_no_loss_unless_asked(request: Any, kind: str) -> None:
    model, tracked = request.getfixturevalue(kind)("olmoe"), []
    hook = ("blocks.0.hook_resid_post", lambda value, hook: tracked.append(value.requires_grad))
    assert run_batches(model, BATCHES[:1], lambda batch: model.listening([hook]), stop_at_layer=1) is None
    assert tracked == [False]


@pytest.mark.parametrize("kind", ["streamed", "hooked"])
@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "there were no batches to run"),
        (iter([]), {}, "there were no batches to run"),
        ([prompts()[0], "text"], {}, "batch 1 must be tokens"),
        ([prompts()[0], torch.tensor([[500]])], {}, r"batch 1: tokens 500..500 go beyond"),
        (BATCHES, {"return_type": "logits"}, "return_type must be 'loss' or None"),
        (BATCHES, {"return_type": "loss", "attend": PaddingAsInTransformers}, "there is no loss to return"),
    ],
)
def test_what_makes_no_sense_is_told(
    request: Any, kind: str, batches: Any, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_batches(request.getfixturevalue(kind)("olmoe"), batches, **options)


@pytest.mark.parametrize("kind", ["streamed", "hooked"])
def test_a_hook_that_would_never_run_is_told(request: Any, kind: str) -> None:
    model = request.getfixturevalue(kind)("olmoe")
    with pytest.raises(RuntimeError, match=r"never ran in this forward pass: .*blocks\.1\.attn\.hook_z"):
        heard(model, BATCHES, stop_at_layer=1)
    assert leftover_hooks(model) == []


def test_progress_and_what_will_be_read(streamed: Any, hooked: Any, capfd: Any) -> None:
    """A bar of layers times batches, after a plan; a model in memory has a bar of batches and no plan."""
    model = streamed("mixtral")
    run_batches(model, BATCHES, stop_at_layer=2, verbose=True)
    out, bar = capfd.readouterr()
    assert f"2 layers, each read once: {model.read_counts.bytes_read / 2**30:,.2f} GiB" in out
    assert "tokens in 3 batch(es)" in out
    assert "6/6" in bar
    assert "layer 1 of 0..1" in bar
    run_batches(hooked("mixtral"), iter(BATCHES), n_batches=3, verbose=True)
    out, bar = capfd.readouterr()
    assert out == ""
    assert "3/3" in bar
    run_batches(model, BATCHES, stop_at_layer=1)
    assert capfd.readouterr() == ("", "")
