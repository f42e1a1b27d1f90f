"""Families: every hub tensor in its place at full size, and how a sixth one is added."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_lens import HookedMoE
from moe_lens.converters import (
    REGISTRY,
    CheckpointMismatch,
    Converter,
    converter_for,
    loading,
    olmoe,
    register,
)
from moe_lens.converters.checkpoint import Checkpoint
from moe_lens.converters.key_map import check_tensors, placements
from tests.checkpoints import change_config, change_tensors, load
from tests.families import FAMILIES, VARIANTS, prompts, variant_config
from tests.full_size_configs import FULL_SIZE_CONFIGS, PUBLISHED_BILLIONS

# --- where every tensor of the real models goes ---------------------------------------------------------


def hub_tensors(model: nn.Module, model_type: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes that `save_pretrained` writes for a transformers model: experts one by one."""
    parts = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if model_type == "mixtral":
        parts = {"gate": "w1", "up": "w3", "down": "w2"}
    tensors: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():  # a tied weight is listed once, as the embedding
        shape = tuple(parameter.shape)
        if model_type == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = shape
            continue
        prefix, _, kind = name.rpartition(".")
        n_experts, d_out, d_in = shape
        for expert in range(n_experts):
            if kind == "down_proj":
                tensors[f"{prefix}.{expert}.{parts['down']}.weight"] = (d_out, d_in)
            else:
                tensors[f"{prefix}.{expert}.{parts['gate']}.weight"] = (d_out // 2, d_in)
                tensors[f"{prefix}.{expert}.{parts['up']}.weight"] = (d_out // 2, d_in)
    return tensors


@pytest.mark.parametrize("variant", VARIANTS)
def test_hub_tensors_are_what_save_pretrained_writes(checkpoint: Any, variant: str) -> None:
    """The layout that the full-size test below expects is the one on disk, of every variant."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(variant_config(variant))
    assert hub_tensors(model, VARIANTS[variant].family) == Checkpoint(checkpoint(variant)).shapes


@pytest.mark.parametrize("name", FULL_SIZE_CONFIGS)
def test_full_size(tmp_path: Path, name: str) -> None:
    """On the meta device: each hub tensor has one place of its shape, and the places tile every parameter."""
    values = FULL_SIZE_CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    hf_config = loading.read_hf_config(tmp_path, name)
    cfg = loading.convert_config(hf_config, name=name, device="meta")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(hf_config)
        ours = HookedMoE(cfg)
    assert cfg.dtype == torch.bfloat16

    tensors = hub_tensors(theirs, values["model_type"])
    needed = placements(converter_for(values["model_type"]).key_map, cfg, ours)
    check_tensors(needed, tensors, ours, values["model_type"])
    places = {tensor: place for tensor, place in needed.items() if place is not None}
    assert set(places) == set(tensors)

    pieces: dict[int, list[tuple[int, int]]] = {}
    for tensor, place in places.items():
        view = place.view(ours)
        assert view is not None
        assert tuple(view.shape) == tensors[tensor]
        parameter = view if view._base is None else view._base
        pieces.setdefault(id(parameter), []).append((view.storage_offset(), view.numel()))
    for parameter_name, parameter in ours.named_parameters():
        end = 0
        for start, size in sorted(pieces.pop(id(parameter))):
            assert start == end, f"a gap or an overlap in {parameter_name}"
            end = start + size
        assert end == parameter.numel()
    assert not pieces

    total = sum(parameter.numel() for parameter in ours.parameters())
    assert total == sum(parameter.numel() for parameter in theirs.parameters())
    assert round(total / 1e9, 1) == PUBLISHED_BILLIONS[name]


def test_full_size_facts() -> None:
    """What the configs of the real models turn into, beyond shapes."""

    def converted(name: str) -> Any:
        values = dict(FULL_SIZE_CONFIGS[name])
        hf_config = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
        return loading.convert_config(hf_config, name=name, device="meta")

    olmoe_cfg, qwen2, deepseek, qwen3, mixtral = map(converted, FULL_SIZE_CONFIGS)
    assert (olmoe_cfg.attention.query_key_norm, qwen3.attention.query_key_norm) == ("width", "head")
    assert (qwen3.n_key_value_heads, mixtral.n_key_value_heads) == (4, 8)
    assert qwen2.attention.qkv_bias
    assert not qwen2.attention.output_bias
    assert [cfg.router.renormalize for cfg in (olmoe_cfg, qwen2, deepseek, qwen3, mixtral)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert deepseek.moe_layers == tuple(range(1, 27))
    assert (qwen2.shared.d_shared, qwen2.shared.gated) == (5632, True)
    assert (deepseek.shared.d_shared, deepseek.shared.gated) == (2816, False)
    mscale = 0.1 * 0.707 * torch.log(torch.tensor(40.0)).item() + 1
    assert deepseek.attention.softmax_scale == pytest.approx(192**-0.5 * mscale**2)
    assert deepseek.rotary.attention_scaling == pytest.approx(1.0)
    first = [cfg.rotary.inverse_frequencies[1] for cfg in (olmoe_cfg, qwen2, mixtral)]
    assert first == pytest.approx([1e4 ** (-1 / 64), 1e6 ** (-1 / 64), 1e6 ** (-1 / 64)])
    assert len(deepseek.rotary.inverse_frequencies) == 32


# --- families -------------------------------------------------------------------------------------------


def test_registry_refuses_duplicates() -> None:
    before = dict(REGISTRY)
    for family in FAMILIES:
        with pytest.raises(ValueError, match=f"model type '{family}' is registered already"):
            register(Converter(family, olmoe.read_config, olmoe.KEY_MAP))
    assert before == REGISTRY
    assert set(REGISTRY) == set(FAMILIES)


class ToyConfig(OlmoeConfig):
    model_type = "toy_moe"


@pytest.fixture
def toy_family(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A sixth family, made from outside: OLMoE under another model type, with one tensor of another name."""
    renamed = {
        name.replace("model.norm.", "model.last_norm."): place for name, place in olmoe.KEY_MAP.items()
    }

    def read_config(hf_config: Any) -> Any:
        return replace(olmoe.read_config(hf_config), model_type="toy_moe")

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "toy_moe", ToyConfig)
    register(Converter("toy_moe", read_config, renamed))
    yield
    del REGISTRY["toy_moe"]


@pytest.mark.usefixtures("toy_family")
def test_a_sixth_family(copy: Any) -> None:
    directory = copy("olmoe")
    tokens, _ = prompts()
    logits = load(directory)(tokens)
    change_config(directory, model_type="toy_moe")
    with pytest.raises(
        CheckpointMismatch, match=r"missing model.last_norm.weight; surplus model.norm.weight"
    ):
        load(directory)
    change_tensors(
        directory,
        lambda tensors: tensors.update({"model.last_norm.weight": tensors.pop("model.norm.weight")}),
    )
    model = load(directory)
    assert model.cfg.model_type == "toy_moe"
    assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key_map: key_map.pop("model.norm.weight"), r"fills 0 of 64 numbers of ln_final.w"),
        (
            lambda key_map: key_map.update({"model.twice.weight": "ln_final.w"}),
            r"fills 128 of 64 numbers of ln_final.w",
        ),
        (
            lambda key_map: key_map.pop("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
            r"fills 16384 of 32768 numbers of blocks.0.mlp.experts.W_gate_up",
        ),
    ],
)
@pytest.mark.usefixtures("no_weight_is_read")
def test_an_incomplete_key_map(copy: Any, monkeypatch: Any, change: Any, message: str) -> None:
    """A family whose map forgets a parameter, or fills one twice, is told so at the first load."""
    key_map = dict(olmoe.KEY_MAP)
    change(key_map)
    monkeypatch.setitem(REGISTRY, "olmoe", Converter("olmoe", olmoe.read_config, key_map))
    with pytest.raises(CheckpointMismatch, match=message):
        load(copy("olmoe"))


def test_a_place_that_is_none() -> None:
    from moe_lens.converters.key_map import Place

    with pytest.raises(ValueError, match=r"'blocks\[0\]\[1\]' names no place in a model"):
        Place.parse("blocks[0][1]")
