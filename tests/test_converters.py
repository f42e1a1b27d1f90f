"""Checkpoints: every hub tensor in its place at full size, and every defect told before a weight is read."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_lens import HookedMoE
from moe_lens.converters import (
    REGISTRY,
    CheckpointMismatch,
    Converter,
    NotEnoughMemory,
    UnsupportedCheckpoint,
    converter_for,
    loading,
    olmoe,
    register,
)
from moe_lens.converters.checkpoint import INDEX, SINGLE, Checkpoint
from moe_lens.converters.key_map import check_tensors, placements
from tests.families import FAMILIES, VARIANTS, hf_model, prompts, variant_config, write_checkpoint
from tests.full_size_configs import FULL_SIZE_CONFIGS, PUBLISHED_BILLIONS

# --- (a) where every tensor of the real models goes ---------------------------------------------------------


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


# --- (b) defects, each told before a weight is read ---------------------------------------------------------


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        pytest.fail("a weight was read")

    monkeypatch.setattr(Checkpoint, "tensors", refuse)


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A variant's checkpoint directory, to be damaged."""
    return lambda variant: shutil.copytree(checkpoint(variant), tmp_path / variant)


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
TENSOR_DEFECTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop(EXPERT), rf"missing {EXPERT}$"),
    "missing many": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1.mlp.experts." in name],
        r"missing (model.layers.1.mlp.experts.\d.\w+.weight(, )?){5} and 19 more$",
    ),
    "surplus": (
        lambda tensors: tensors.update({"model.layers.0.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)}),
        r"surplus model.layers.0.mlp.experts.8.up_proj.weight$",
    ),
    "surplus bias": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        r"surplus model.layers.0.self_attn.q_proj.bias$",
    ),
    "misshapen": (
        lambda tensors: tensors.update({EXPERT: torch.zeros(64, 32)}),
        rf"{EXPERT} has shape \[64, 32\], the config asks for \[32, 64\]$",
    ),
    "several": (
        lambda tensors: tensors.update({"odd": tensors.pop(EXPERT), "model.norm.weight": torch.zeros(65)}),
        rf"missing {EXPERT}; surplus odd; model.norm.weight has shape \[65\], the config asks for \[64\]$",
    ),
    "integers": (
        lambda tensors: tensors.update({EXPERT: torch.zeros(32, 64, dtype=torch.int8)}),
        rf"{EXPERT} is stored as I8; only F32, BF16, F16, F64 are read",
    ),
}


@pytest.mark.parametrize("defect", TENSOR_DEFECTS)
@pytest.mark.usefixtures("no_weight_is_read")
def test_defective_tensors(copy: Any, defect: str) -> None:
    directory = copy("olmoe")
    change, message = TENSOR_DEFECTS[defect]
    change_tensors(directory, change)
    with pytest.raises(CheckpointMismatch, match=message):
        load(directory)


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def change_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def two_shards_with_one_tensor(directory: Path) -> None:
    first, second = shards_of(directory)[:2]
    tensors = load_file(second)
    name = next(iter(load_file(first)))
    save_file({**tensors, name: torch.zeros(1)}, second)


def promise_broken(directory: Path) -> None:
    change_index(directory, lambda index: index.update({"model.norm.weight": shards_of(directory)[0].name}))


def promise_of_nothing(directory: Path) -> None:
    change_index(directory, lambda index: index.update({"model.extra.weight": shards_of(directory)[0].name}))


def absent(directory: Path) -> None:
    shards_of(directory)[1].unlink()


def truncated(directory: Path) -> None:
    shard = shards_of(directory)[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def corrupted(directory: Path) -> None:
    shard = shards_of(directory)[0]
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])


def empty_file(directory: Path) -> None:
    shards_of(directory)[0].write_bytes(b"")


def outside(directory: Path) -> None:
    shutil.move(shards_of(directory)[0], directory.parent / "x.safetensors")
    change_index(directory, lambda index: index.update(dict.fromkeys(list(index)[:3], "../x.safetensors")))


def absolute(directory: Path) -> None:
    file = str(shards_of(directory)[0].resolve())
    change_index(directory, lambda index: index.update(dict.fromkeys(list(index)[:3], file)))


def broken_index(directory: Path) -> None:
    (directory / INDEX).write_text('{"weight_map": ')


def index_without_map(directory: Path) -> None:
    (directory / INDEX).write_text('{"metadata": {}}')


SHARD_DEFECTS: dict[Callable[[Path], None], str] = {
    two_shards_with_one_tensor: r"\S+ is in two shards, model-00001-of-\d+.safetensors and model-00002",
    promise_broken: r"promises model.norm.weight in model-00001-of-\d+.safetensors, which does not hold it",
    promise_of_nothing: r"promises model.extra.weight in model-00001-of-\d+.safetensors, which does not",
    truncated: r"shard model-00001-of-\d+.safetensors cannot be read as safetensors",
    corrupted: r"shard model-00001-of-\d+.safetensors cannot be read as safetensors",
    empty_file: r"shard model-00001-of-\d+.safetensors cannot be read as safetensors",
    absent: r"shard 'model-00002-of-\d+.safetensors' is not in",
    outside: r"shard '../x.safetensors' is not in",
    absolute: r"shard '/.*' is not in",
    broken_index: r"model.safetensors.index.json is no index of shards: JSONDecodeError",
    index_without_map: r"model.safetensors.index.json is no index of shards: KeyError\('weight_map'\)",
}


@pytest.mark.parametrize("defect", SHARD_DEFECTS, ids=lambda defect: defect.__name__)
@pytest.mark.usefixtures("no_weight_is_read")
def test_defective_shards(copy: Any, defect: Callable[[Path], None]) -> None:
    directory = copy("qwen2_moe_sharded")
    defect(directory)
    with pytest.raises(CheckpointMismatch, match=SHARD_DEFECTS[defect]):
        load(directory)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}}


_LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}
UNIMPLEMENTED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", dict(sliding_window=128), "sliding_window=128"),
    ("qwen2_moe", dict(use_sliding_window=True, max_window_layers=1), "use_sliding_window=True"),
    ("qwen2_moe", dict(layer_types=["sliding_attention"] * 3), "layer_types=.*'sliding_attention'"),
    ("qwen3_moe", dict(use_sliding_window=True), "use_sliding_window=True"),
    ("deepseek_v2", dict(norm_topk_prob=True), "norm_topk_prob=True"),
    ("deepseek_v2", dict(mlp_bias=True), "mlp_bias=True"),
    ("deepseek_v2", dict(n_shared_experts=0), "n_shared_experts=0"),
    ("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method='noaux_tc'"),
    ("deepseek_v2", dict(scoring_func="sigmoid"), "scoring_func='sigmoid'"),
    ("deepseek_v2", dict(moe_layer_freq=2), "moe_layer_freq=2"),
    ("olmoe", dict(dtype="float8_e4m3fn"), "dtype torch.float8_e4m3fn"),
    *((family, dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5") for family in FAMILIES),
    *((family, _rope("dynamic"), "rope_type='dynamic'") for family in FAMILIES),
    *((family, _rope("longrope", **_LONGROPE), "rope_type='longrope'") for family in FAMILIES[:-1]),
    ("mixtral", _rope("longrope", **_LONGROPE) | dict(head_dim=16), "rope_type='longrope'"),
    *((family, dict(hidden_act="swoosh"), "hidden_act='swoosh'") for family in FAMILIES),
    *(
        (family, dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config=")
        for family in FAMILIES
    ),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"), UNIMPLEMENTED, ids=lambda part: part if isinstance(part, str) else ""
)
@pytest.mark.usefixtures("no_weight_is_read")
def test_unimplemented_features(copy: Any, family: str, changes: dict[str, Any], message: str) -> None:
    """Each names the config field."""
    directory = copy(family)
    change_config(directory, **changes)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        load(directory)


@pytest.mark.usefixtures("no_weight_is_read")
def test_unknown_model_type(copy: Any) -> None:
    directory = copy("olmoe")
    known = "deepseek_v2, mixtral, olmoe, qwen2_moe, qwen3_moe"
    for model_type in ("llama", "never_heard_of"):
        change_config(directory, model_type=model_type)
        with pytest.raises(
            UnsupportedCheckpoint,
            match=f"no converter for model type '{model_type}'; known model types are {known}",
        ):
            load(directory)


@pytest.mark.usefixtures("no_weight_is_read")
def test_no_config(copy: Any) -> None:
    directory = copy("olmoe")
    (directory / "config.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"has no config.json"):
        load(directory)


@pytest.mark.usefixtures("no_weight_is_read")
def test_a_config_that_transformers_refuses(copy: Any) -> None:
    directory = copy("olmoe")
    change_config(directory, hidden_size="wide")
    with pytest.raises(UnsupportedCheckpoint, match=r"transformers refuses its config: (.|\n)*hidden_size"):
        load(directory)


@pytest.mark.usefixtures("no_weight_is_read")
def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give a directory, a hub id such as .*, or 'mini'"):
        load(tmp_path / "nowhere")


# --- nothing is unpickled, nobody's code runs ---------------------------------------------------------------


class _Trap:
    """Unpickling this makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def set_pickle_trap(directory: Path, sprung: Path) -> None:
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin"):
        (directory / name).write_bytes(pickle.dumps(_Trap(sprung)))


def test_pickles_are_never_opened(copy: Any, tmp_path: Path) -> None:
    """Beside safetensors they are passed by; alone they are refused; named by an index they are no safetensors."""
    directory, sprung = copy("olmoe"), tmp_path / "sprung"
    set_pickle_trap(directory, sprung)
    load(directory)
    (directory / SINGLE).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin"}}))
    with pytest.raises(CheckpointMismatch, match=r"shard pytorch_model.bin cannot be read as safetensors"):
        load(directory)
    (directory / INDEX).unlink()
    with pytest.raises(UnsupportedCheckpoint, match="only safetensors are read, never pickled weights"):
        load(directory)
    assert not sprung.exists()
    pickle.loads((directory / "model.bin").read_bytes())
    assert sprung.exists(), "the trap itself works"


@pytest.mark.parametrize("model_type", ["deepseek_v2", "never_heard_of"])
def test_remote_code_never_runs(copy: Any, tmp_path: Path, model_type: str) -> None:
    """`auto_map` in config and tokenizer, with the Python file beside them: it is not even imported."""
    directory, sprung = copy("deepseek_v2"), tmp_path / "sprung"
    evil = f"import pathlib\npathlib.Path({str(sprung)!r}).touch()\nclass Config: ...\nclass Tokenizer: ...\n"
    (directory / "evil.py").write_text(evil)
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    change_config(directory, model_type=model_type, auto_map=auto_map)
    tokenizer_config = directory / "tokenizer_config.json"
    tokenizer_config.write_text(
        json.dumps({**json.loads(tokenizer_config.read_text()), "auto_map": auto_map})
    )
    if model_type == "deepseek_v2":
        model = load(directory)
        assert model.tokenizer is not None
        tokens, _ = prompts()
        assert torch.equal(model(tokens), load(copy_of_clean(directory))(tokens))
    else:
        with pytest.raises(UnsupportedCheckpoint, match="no converter for model type 'never_heard_of'"):
            load(directory)
    assert not sprung.exists()
    assert not any("evil" in name for name in sys.modules)
    exec(compile(evil, "evil.py", "exec"), {})
    assert sprung.exists(), "the trap itself works"


def copy_of_clean(directory: Path) -> Path:
    """The same checkpoint without the code and the tokenizer."""
    clean = shutil.copytree(
        directory, directory.parent / "clean", ignore=shutil.ignore_patterns("*.py", "tok*")
    )
    values = json.loads((clean / "config.json").read_text())
    del values["auto_map"]
    (clean / "config.json").write_text(json.dumps(values))
    return clean


def test_what_is_fetched_from_the_hub(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs, tokenizers and safetensors: no pickles, no Python. The revision is handed on."""
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(checkpoint("olmoe"))

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    model = HookedMoE.from_pretrained("someone/model", device="cpu", revision="abc", verbose=False)
    assert (asked["name"], asked["revision"]) == ("someone/model", "abc")
    assert (model.cfg.model_name, model.cfg.revision) == ("someone/model", "abc")
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "*.model", "*.txt"}

    def fail(name: str, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(loading, "snapshot_download", fail)
    with pytest.raises(
        FileNotFoundError, match=r"could not be fetched from the Hugging Face hub: no network"
    ):
        load(Path("someone/model"))


# --- (c) storage, dtypes, memory ----------------------------------------------------------------------------


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


# --- (d) families -------------------------------------------------------------------------------------------


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
