"""A model whose layers stay on disk: the numbers of the one in memory, its memory, and what it is not."""

from __future__ import annotations

import copy as copying
import gc
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.converters import NotEnoughMemory, loading
from moe_lens.converters.checkpoint import SINGLE
from moe_lens.converters.layer_store import LayerStore
from moe_lens.interventions import RouterOnly, TopK
from moe_lens.model.streamed_moe import OnDisk
from moe_lens.routing.provenance import weights_fingerprint
from tests.checkpoints import change_tensors, load
from tests.families import prompts
from tests.streamed_cases import (
    STORAGES,
    readers,
    same_cache,
)

# --- one batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", STORAGES)
@torch.no_grad()
def test_every_value_is_that_of_the_model_in_memory(streamed: Any, checkpoint: Any, variant: str) -> None:
    ours, theirs = streamed(variant), load(checkpoint(variant))
    assert ours.cfg == theirs.cfg
    for padding in ("none", "left", "right"):
        tokens, mask = prompts(padding)
        logits, cache = ours.run_with_cache(tokens, attention_mask=mask)
        expected, expected_cache = theirs.run_with_cache(tokens, attention_mask=mask)
        assert torch.equal(logits, expected)
        same_cache(cache, expected_cache)
        both = [
            m(tokens, attention_mask=mask, return_type="both", loss_per_token=True) for m in (ours, theirs)
        ]
        for mine, its in zip(*both, strict=True):
            assert torch.equal(mine.nan_to_num(-1), its.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2_bf16_sharded"])
@torch.no_grad()
def test_another_dtype_than_on_disk(streamed: Any, checkpoint: Any, variant: str, dtype: Any) -> None:
    ours, theirs = streamed(variant, dtype=dtype), load(checkpoint(variant), dtype=dtype)
    assert torch.equal(ours(prompts()[0]), theirs(prompts()[0]))


@torch.no_grad()
def test_parts_of_a_run_read_their_layers_only(streamed: Any, in_memory: Any) -> None:
    ours, theirs, (tokens, _) = streamed("olmoe"), in_memory("olmoe"), prompts()
    stream = theirs(tokens, stop_at_layer=1)
    assert torch.equal(ours(tokens, stop_at_layer=1), stream)
    assert ours.read_counts.layers_read == 1
    assert torch.equal(ours(stream, start_at_layer=1, stop_at_layer=-1), theirs(tokens, stop_at_layer=2))
    assert ours.read_counts.layers_read == 2
    assert torch.equal(ours(stream, start_at_layer=1), theirs(tokens))
    assert ours.read_counts.layers_read == 4


def test_inference_mode_and_back(streamed: Any, in_memory: Any) -> None:
    model, theirs = streamed("qwen3_moe"), in_memory("qwen3_moe")
    expected = theirs(prompts()[0])
    for context in (torch.inference_mode, torch.enable_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(prompts()[0]), expected)
            assert torch.equal(
                model.run_corpus([prompts()[0]], return_type="loss").losses[0],
                theirs(prompts()[0], return_type="loss", loss_per_token=True),
            )


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v2"])
@torch.no_grad()
def test_hooks_interventions_and_generation(streamed: Any, in_memory: Any, variant: str) -> None:
    ours, theirs, (tokens, mask) = streamed(variant), in_memory(variant), prompts("left")
    edits = [("blocks.1.hook_attn_out", lambda value, hook: value * 0.5)]
    assert torch.equal(
        ours.run_with_hooks(tokens, fwd_hooks=edits), theirs.run_with_hooks(tokens, fwd_hooks=edits)
    )
    results = []
    for model in (ours, theirs):
        with model.intervene(TopK(2, layers=1), RouterOnly("A1", receivers=[2])) as receipt:
            results.append((model(tokens, attention_mask=mask), str(receipt)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    generated = [model.generate(tokens, 4, attention_mask=mask) for model in (ours, theirs)]
    assert torch.equal(*generated)


# --- what is in memory --------------------------------------------------------------------------------------


def test_one_layer_is_there_and_the_next_is_being_read(streamed: Any) -> None:
    """At each layer its own weights are there and no other's; in all, never more than two layers' memory."""
    model = streamed("olmoe")
    seen: dict[str, set[str]] = {}
    alive: list[weakref.ref[Tensor]] = []

    def look(value: Tensor, hook: Any) -> None:
        there = {
            n: p for n, p in model.named_parameters() if n.startswith("blocks.") and not isinstance(p, OnDisk)
        }
        matrices = {n for n, p in there.items() if p.ndim > 1 and not n.endswith("router.weight")}
        seen[hook.name] = {name.split(".")[1] for name in matrices}
        alive.extend(weakref.ref(there[name]) for name in matrices)

    model.run_with_hooks(prompts()[0], fwd_hooks=[(lambda name: name.endswith("hook_resid_mid"), look)])
    assert seen == {f"blocks.{layer}.hook_resid_mid": {str(layer)} for layer in range(3)}
    gc.collect(2)
    assert len(alive) > 3
    assert not any(reference() is not None for reference in alive)
    largest = sum(
        p.nbytes for n, p in model.named_parameters() if n.startswith("blocks.1.") and isinstance(p, OnDisk)
    )
    assert model.store.layer_bytes == largest  # type: ignore[union-attr]
    assert model.read_counts.peak_bytes <= model.store.bytes_needed  # type: ignore[union-attr]
    assert sum(s.nbytes for s in model.store._stretches) == 2 * largest  # type: ignore[union-attr]


def test_what_is_kept_of_a_layer_does_not_turn_into_another(streamed: Any, in_memory: Any) -> None:
    model, kept = streamed("olmoe"), []
    for _ in range(2):
        with model.layers_in_memory([0, 1, 2]) as blocks:
            kept += [block.mlp.experts.W_down for block in blocks]
    expected = [block.mlp.experts.W_down for block in in_memory("olmoe").blocks]
    for ours, theirs in zip(kept, expected * 2, strict=True):
        assert torch.equal(ours, theirs)


def test_memory_is_used_again(streamed: Any) -> None:
    model = streamed("deepseek_v2")
    model(prompts()[0])
    before = [stretch.data_ptr() for stretch in model.store._stretches]
    model(prompts()[0])
    assert [stretch.data_ptr() for stretch in model.store._stretches] == before


def test_a_weight_out_of_turn_raises_by_its_name(streamed: Any) -> None:
    model = streamed("olmoe")
    experts = model.blocks[2].mlp.experts
    assert experts.W_down.shape == (8, 32, 64)
    assert (experts.W_down.device.type, experts.W_down.dtype) == ("meta", torch.float32)
    for read in (lambda: experts.W_gate, lambda: torch.stack([experts.W_down]), lambda: experts.W_down + 1):
        with pytest.raises(
            RuntimeError, match=r"blocks.2.mlp.experts.W_\w+ is on disk: .*layers_in_memory\(\[2\]\)"
        ):
            read()
    with pytest.raises(RuntimeError, match=r"blocks.0.attn.q_proj.weight is on disk"):
        model.blocks[0].attn.q_proj(torch.zeros(1, 64))
    with pytest.raises(ValueError, match="there is no layer 3; "), model.layers_in_memory([0, 3]):
        pass


# --- reading ahead ------------------------------------------------------------------------------------------


def test_the_next_layer_is_read_meanwhile(streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While layer l computes, layer l + 1 is read to its end, and layer l + 2 is not begun."""
    model = streamed("olmoe")
    begun, done = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]
    read = LayerStore.read

    def observed(self: Any, layer: int, *args: Any) -> Any:
        assert threading.current_thread() in readers()
        begun[layer].set()
        weights = read(self, layer, *args)
        done[layer].set()
        return weights

    monkeypatch.setattr(LayerStore, "read", observed)

    def wait(value: Tensor, hook: Any) -> None:
        layer = int(hook.name.split(".")[1])
        assert layer == 2 or done[layer + 1].wait(20)
        assert layer > 0 or not begun[2].is_set()

    model.run_with_hooks(prompts()[0], fwd_hooks=[(lambda name: name.endswith("hook_resid_mid"), wait)])


def test_waiting_is_counted(streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, slow, read = streamed("olmoe"), threading.Event(), LayerStore.read
    monkeypatch.setattr(LayerStore, "read", lambda *args: (slow.wait(0.05), read(*args))[1])
    model(prompts()[0])
    assert model.read_counts.seconds_waiting >= 0.09


# --- what it is not -----------------------------------------------------------------------------------------


def test_gradients_are_refused(streamed: Any, in_memory: Any) -> None:
    model, (tokens, _) = streamed("olmoe"), prompts()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    stream = in_memory("olmoe")(tokens, stop_at_layer=1).detach().requires_grad_()
    for refused in (
        lambda: model(stream, start_at_layer=1),
        lambda: model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.hook_attn_out", lambda value, hook: value.clone().requires_grad_())]
        ),
        lambda: model.run_with_cache(tokens, return_type="loss", incl_bwd=True),
        model.requires_grad_,
        lambda: model.requires_grad_(True),
    ):
        with pytest.raises(
            RuntimeError, match=r"a streamed model has no gradients, and .*without stream=True"
        ):
            refused()
    assert model.requires_grad_(False) is model
    with torch.no_grad():
        model(stream, start_at_layer=1)
    assert not model(tokens).requires_grad


def test_moving_storing_and_copying_are_refused(streamed: Any, tmp_path: Path) -> None:
    model = streamed("olmoe")
    for refused in (lambda: model.to("cpu"), model.half, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(
            RuntimeError, match=r"stays where and what it was loaded as, on cpu in torch.float32"
        ):
            refused()
    with pytest.raises(RuntimeError, match="has no state_dict"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="cannot be given others"):
        model.load_state_dict({})
    for refused in (
        lambda: copying.deepcopy(model),
        lambda: copying.copy(model),
        lambda: torch.save(model, tmp_path / "model"),
    ):
        with pytest.raises(TypeError, match="neither copied nor stored"):
            refused()


def test_biases_are_in_memory(streamed: Any, in_memory: Any) -> None:
    for variant in ("olmoe_bias_odd_width", "mixtral"):
        for layer in range(3 if variant != "mixtral" else 2):
            ours, theirs = (m(variant).accumulated_bias(layer, True) for m in (streamed, in_memory))
            assert torch.equal(ours, theirs)


def test_memory_is_checked(checkpoint: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where all layers do not fit, streaming is named; where two do, it loads."""
    resident = sum(p.nbytes for p in load(checkpoint("olmoe")).parameters())
    monkeypatch.setattr(loading, "free_memory", lambda device: resident)
    with pytest.raises(NotEnoughMemory, match=r"Options: .*stream=True \(two layers at a time\)"):
        load(checkpoint("olmoe"))
    monkeypatch.setattr(loading, "free_memory", lambda device: 100)
    with pytest.raises(NotEnoughMemory, match=r"streamed from disk, take .*Options: dtype=torch.bfloat16"):
        load(checkpoint("olmoe"), stream=True)


def test_a_symlinked_shard_is_read(copy: Any, streamed: Any, in_memory: Any, tmp_path: Path) -> None:
    """The hub's cache is made of links."""
    directory = copy("olmoe")
    shutil.move(directory / SINGLE, tmp_path / "blob")
    (directory / SINGLE).symlink_to(tmp_path / "blob")
    assert torch.equal(streamed(directory)(prompts()[0]), in_memory("olmoe")(prompts()[0]))


def test_tensors_larger_than_a_piece(
    copy: Any, streamed: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a row, and of some rows with a rest; converted on the way, and not."""
    from moe_lens.converters import layer_store

    for n_bytes in (1, 3 * 64 * 4):
        monkeypatch.setattr(layer_store, "PIECE_BYTES", n_bytes)
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = streamed("qwen2_moe", dtype=dtype), load(checkpoint("qwen2_moe"), dtype=dtype)
            assert torch.equal(ours(prompts()[0]), theirs(prompts()[0]))


# --- which weights they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", STORAGES)
def test_the_fingerprint_is_that_of_the_weights_in_memory(
    streamed: Any, checkpoint: Any, variant: str
) -> None:
    model = streamed(variant)
    assert weights_fingerprint(model) == weights_fingerprint(load(checkpoint(variant)))
    assert model.read_counts.layers_read == model.cfg.n_layers
    assert weights_fingerprint(model)
    assert model.read_counts.layers_read == model.cfg.n_layers


def test_a_run_takes_what_the_fingerprint_needs(streamed: Any, checkpoint: Any) -> None:
    model = streamed("olmoe")
    model(prompts()[0], stop_at_layer=2)
    expected = weights_fingerprint(load(checkpoint("olmoe")))
    assert weights_fingerprint(model) == expected
    assert model.read_counts.layers_read == 3


def test_another_weight_has_another_fingerprint(streamed: Any, checkpoint: Any, copy: Any) -> None:
    directory = copy("olmoe")
    before = weights_fingerprint(streamed(directory))
    change_tensors(directory, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"][0].neg_())
    assert weights_fingerprint(streamed(directory)) != before
