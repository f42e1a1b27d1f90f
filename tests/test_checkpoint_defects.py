"""Defective checkpoints: every one told before a weight is read; nothing is unpickled, nobody's code runs."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lens import HookedMoE
from moe_lens.converters import (
    CheckpointMismatch,
    UnsupportedCheckpoint,
    loading,
)
from moe_lens.converters.checkpoint import INDEX, SINGLE
from tests.checkpoints import EXPERT, change_config, change_tensors, load
from tests.families import FAMILIES, prompts

# --- defects, each told before a weight is read ---------------------------------------------------------


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
