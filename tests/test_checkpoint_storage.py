"""How checkpoints are stored and loaded: shards, dtypes, tied embeddings, memory, progress."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.converters import (
    CheckpointMismatch,
    NotEnoughMemory,
    loading,
)
from moe_lens.converters.checkpoint import INDEX, SINGLE, Checkpoint
from tests.checkpoints import change_tensors, load
from tests.families import VARIANTS, hf_model, prompts, write_checkpoint

# --- storage, dtypes, memory ----------------------------------------------------------------------------


def assert_weights_are(model: HookedMoE, theirs: Any, dtype: torch.dtype) -> None:
    """Entry by entry the tensors that transformers loads from the same files."""

    def same(ours: Tensor, other: Tensor) -> None:
        assert ours.dtype == dtype
        assert torch.equal(ours, other.to(dtype))

    same(model.embed.weight, theirs.model.embed_tokens.weight)
    same(model.unembed.weight, theirs.lm_head.weight)
    same(model.ln_final.w, theirs.model.norm.weight)
    for block, layer in zip(model.blocks, theirs.model.layers, strict=True):
        same(block.ln1.w, layer.input_layernorm.weight)
        same(block.ln2.w, layer.post_attention_layernorm.weight)
        same(block.attn.o_proj.weight, layer.self_attn.o_proj.weight)
        if hasattr(layer.mlp, "experts"):
            same(block.mlp.router.weight, layer.mlp.gate.weight)
            same(block.mlp.experts.W_gate_up, layer.mlp.experts.gate_up_proj)
            same(block.mlp.experts.W_down, layer.mlp.experts.down_proj.transpose(1, 2))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "variant", ["olmoe", "qwen2_moe_sharded", "deepseek_v2_bf16_sharded", "qwen3_moe", "mixtral_bf16_sharded"]
)
def test_storage_and_dtypes(checkpoint: Any, variant: str, dtype: torch.dtype | None) -> None:
    """One file or shards, float32 or bfloat16 on disk: the same numbers, in the dtype asked for."""
    model = load(checkpoint(variant), dtype=dtype)
    expected = dtype or VARIANTS[variant].dtype
    assert model.cfg.dtype == expected
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert_weights_are(model, hf_model(checkpoint(variant), VARIANTS[variant].dtype), expected)
    assert not model.training


@pytest.mark.parametrize("head_in_file", [False, True])
def test_tied_embeddings(tmp_path: Path, head_in_file: bool) -> None:
    """Sharded, bfloat16, tied; with `lm_head.weight` in the files or without: one parameter serves both."""
    directory = write_checkpoint("mixtral_bf16_sharded", tmp_path)
    if head_in_file:
        index = json.loads((directory / INDEX).read_text())
        shard = directory / index["weight_map"]["model.embed_tokens.weight"]
        tensors = load_file(shard)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, shard)
        index["weight_map"]["lm_head.weight"] = shard.name
        (directory / INDEX).write_text(json.dumps(index))
    model = load(directory)
    assert model.unembed.weight is model.embed.weight
    assert_weights_are(model, hf_model(directory, torch.bfloat16), torch.bfloat16)
    names = [name for name, _ in model.named_parameters()]
    assert "unembed.weight" not in names


def test_untied_head_is_needed(copy: Any) -> None:
    directory = copy("olmoe")
    change_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointMismatch, match=r"missing lm_head.weight$"):
        load(directory)


def test_old_rotary_buffers_are_read_past(copy: Any) -> None:
    """Old checkpoints carry `inv_freq`, which the config gives as well."""
    directory = copy("olmoe")
    tokens, _ = prompts()
    logits = load(directory)(tokens)
    change_tensors(
        directory,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}),
    )
    assert torch.equal(load(directory)(tokens), logits)


def test_shards_are_reopened_within(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a file anew after so many bytes changes nothing but memory: each tensor is still read once."""
    directory = checkpoint("olmoe")
    stored = load_file(directory / SINGLE)
    for limit in (1, 10_000, 2**40):
        monkeypatch.setattr("moe_lens.converters.checkpoint.REMAP_EVERY_BYTES", limit)
        read = [(name, tensor.clone()) for name, tensor in Checkpoint(directory).tensors(list(stored))]
        assert sorted(name for name, _ in read) == sorted(stored)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in read)


@pytest.mark.usefixtures("no_weight_is_read")
def test_not_enough_memory(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before reading, with the sizes and what can be done about it."""
    directory = checkpoint("olmoe")
    numbers = sum(parameter.numel() for parameter in hf_model(directory).parameters())

    def with_free(available: int) -> None:
        monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    with_free(4 * numbers)  # the weights alone, and no room to move
    with pytest.raises(
        NotEnoughMemory, match=r"in float32 take .* GiB on cpu; .* cannot fit. Options: dtype=torch.bfloat16"
    ) as raised:
        load(directory)
    assert "another device=" in str(raised.value)
    assert isinstance(raised.value, MemoryError)
    with_free(int(1.2 * 2 * numbers))
    with pytest.raises(pytest.fail.Exception, match="a weight was read"):
        load(directory, dtype=torch.bfloat16)


def test_progress_goes_to_stderr(checkpoint: Any, capfd: pytest.CaptureFixture[str]) -> None:
    directory = checkpoint("olmoe")
    capfd.readouterr()
    load(directory, verbose=True)
    said = capfd.readouterr()
    assert said.out == ""
    numbers = sum(parameter.numel() for parameter in hf_model(directory).parameters()) / 1e6
    capfd.readouterr()
    assert f"{directory}: {numbers:,.1f} M parameters in float32 take" in said.err
    assert f"loading {directory}: 100%" in said.err
    load(directory)
    assert capfd.readouterr() == ("", "")
