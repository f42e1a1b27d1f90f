"""From a checkpoint to a hooked model: check everything, then read each tensor straight into its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.activations import ACT2FN

from moe_lens.config import MoEConfig
from moe_lens.converters.checkpoint import Checkpoint, require_finite
from moe_lens.converters.errors import CheckpointMismatch, NotEnoughMemory, UnsupportedCheckpoint
from moe_lens.converters.key_map import KeyMap, Place, check_tensors, placements
from moe_lens.converters.layer_store import LayerStore
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import StreamedMoE, is_streamed

BUNDLED = "mini"
# What a checkpoint needs from the hub: no pickled weights, no code.
HUB_CONFIG = ("*.json", "*.model", "*.txt")
HUB_WEIGHTS = (*HUB_CONFIG, "*.safetensors")
# Some repositories hold the weights twice, once in another layout.
_NOT_HUB_FILES = ["consolidated*"]
# Room for the tensor in flight, the embedding of a batch, and the like.
_HEADROOM = 1.15


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    stream: bool = False,
    verbose: bool = True,
) -> HookedMoE:
    """See `HookedMoE.from_pretrained`."""
    from moe_lens.converters import converter_for

    # Config first: what cannot be loaded is told before its weights are fetched.
    directory = find_checkpoint(path_or_hub_id, revision, HUB_CONFIG)
    hf = read_hf_config(directory, str(path_or_hub_id))
    if dtype is None and getattr(hf, "dtype", None) is None:
        dtype = Checkpoint(find_checkpoint(path_or_hub_id, revision, HUB_WEIGHTS)).dtype
    cfg = convert_config(hf, name=str(path_or_hub_id), dtype=dtype, device=device, revision=revision)
    cfg = replace(cfg, **read_generation_ids(directory, hf))
    with torch.device("meta"):
        model = (StreamedMoE if stream else HookedMoE)(cfg).to(cfg.dtype)
    if not stream:
        check_memory(sum(parameter.nbytes for parameter in model.parameters()), model, cfg, verbose=verbose)

    key_map = converter_for(cfg.model_type).key_map
    checkpoint = Checkpoint(find_checkpoint(path_or_hub_id, revision, HUB_WEIGHTS))
    needed = placements(key_map, cfg, model)
    check_tensors(needed, checkpoint.shapes, model, cfg.model_type)
    if cfg.tied_embeddings:
        check_tied(key_map, checkpoint)

    places = {name: place for name, place in needed.items() if place is not None}
    if isinstance(model, StreamedMoE):
        streamed = [name for name, parameter in model.named_parameters() if is_streamed(name, parameter)]
        store = LayerStore(checkpoint, places, model, streamed, cfg.device)
        resident = sum(p.nbytes for name, p in model.named_parameters() if name not in streamed)
        check_memory(resident + store.bytes_needed, model, cfg, verbose=verbose)
        model.keep_on_disk(store, cfg)
        places = {name: place for name, place in places.items() if not store.holds(name)}
    else:
        model.to_empty(device=cfg.device)
    _fill(model, places, checkpoint, verbose=verbose)
    model.tokenizer = read_tokenizer(directory)
    return model


def _fill(model: HookedMoE, places: dict[str, Place], checkpoint: Checkpoint, *, verbose: bool) -> None:
    """Read tensors into their places.

    Raises:
        CheckpointMismatch: one holds NaN or infinity.
    """
    with (
        torch.no_grad(),
        tqdm(total=len(places), desc=f"loading {model.cfg.model_name}", disable=not verbose) as bar,
    ):
        for name, tensor in checkpoint.tensors(list(places)):
            view = places[name].view(model)
            assert view is not None
            view.copy_(tensor)
            require_finite(name, view, model.cfg.dtype)
            bar.update()


def find_checkpoint(
    path_or_hub_id: str | Path, revision: str | None = None, wanted: Sequence[str] = HUB_CONFIG
) -> Path:
    """The directory of a checkpoint: the bundled one, one on disk, or one fetched from the hub.

    Args:
        wanted: patterns of the files to fetch: `HUB_CONFIG` or `HUB_WEIGHTS`.

    Raises:
        FileNotFoundError: neither a directory nor something the hub gives.
    """
    if str(path_or_hub_id) == BUNDLED:
        return Path(str(files("moe_lens.assets"))) / BUNDLED
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists() or str(path_or_hub_id).count("/") != 1 or path.is_absolute():
        raise FileNotFoundError(
            f"{str(path_or_hub_id)!r} is no checkpoint: give a directory, a hub id such as "
            f"'allenai/OLMoE-1B-7B-0924', or {BUNDLED!r}"
        )
    try:
        fetched = snapshot_download(
            str(path_or_hub_id),
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=_NOT_HUB_FILES,
        )
        return Path(fetched)
    except Exception as error:
        raise FileNotFoundError(
            f"{str(path_or_hub_id)!r} is no directory here, and could not be fetched from the Hugging Face hub: {error}"
        ) from error


def read_generation_ids(directory: Path, hf: Any) -> dict[str, Any]:
    """Which tokens end a text, and which one fills a row that has ended: `generation_config.json`'s, else the
    config's, as transformers' `generate` reads them."""
    path = directory / "generation_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def read(field: str) -> Any:
        return stored[field] if stored.get(field) is not None else getattr(hf, field, None)

    end, pad = read("eos_token_id"), read("pad_token_id")
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    return {"eos_token_ids": ends, "pad_token_id": pad}


def check_tied(key_map: KeyMap, checkpoint: Checkpoint) -> None:
    """A checkpoint whose config ties the unembedding to the embedding may store both, if they are the same.

    Raises:
        CheckpointMismatch: they differ, so that one of config and weights is wrong.
    """
    name_of = {place: name for name, place in key_map.items()}
    embedding, unembedding = name_of["embed.weight"], name_of["unembed.weight"]
    if unembedding in checkpoint.shapes and not checkpoint.equal(embedding, unembedding):
        raise CheckpointMismatch(
            f"the config says tie_word_embeddings=true, but {unembedding} and {embedding} are stored and differ; "
            f"if the stored one is meant, set tie_word_embeddings to false in config.json"
        )


def read_hf_config(directory: Path, name: str) -> Any:
    """The checkpoint's config through AutoConfig, after its model type was found to have a converter.

    Raises:
        UnsupportedCheckpoint: no config, one that transformers refuses, or a model type without a converter.
    """
    from moe_lens.converters import converter_for

    if not (directory / "config.json").is_file():
        raise UnsupportedCheckpoint(f"{name} has no config.json")
    raw, _ = PretrainedConfig.get_config_dict(directory)
    converter_for(raw.get("model_type", "none given"))
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except StrictDataclassError as error:
        raise UnsupportedCheckpoint(f"{name}: transformers refuses its config: {error}") from error


def convert_config(
    hf: Any,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> MoEConfig:
    """A transformers config as a `MoEConfig`, with dtype (None: the checkpoint's, else float32) and device
    (None: CUDA where there is one).

    Raises:
        UnsupportedCheckpoint: a feature that is not implemented.
    """
    from moe_lens.converters import converter_for

    dtype = dtype or getattr(hf, "dtype", None) or torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedCheckpoint(
            f"{name}: dtype {dtype} is not implemented (softmax, norms and rotation run in float32); ask for "
            f"dtype=torch.float32, bfloat16 or float16"
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cfg = converter_for(hf.model_type).read_config(hf)
    if cfg.act_fn not in ACT2FN:
        raise UnsupportedCheckpoint(f"{name}: config field hidden_act={cfg.act_fn!r} is not implemented")
    return replace(cfg, model_name=name, dtype=dtype, device=device, revision=revision)


def check_memory(needed: int, model: nn.Module, cfg: MoEConfig, *, verbose: bool) -> None:
    """Say what the weights will take, and refuse what cannot fit.

    Args:
        needed: bytes that are held at a time: of all weights, or of a streamed model's.

    Raises:
        NotEnoughMemory: naming the options.
    """
    numbers = sum(parameter.numel() for parameter in model.parameters())
    streamed = isinstance(model, StreamedMoE)
    if cfg.device.type == "meta":
        return
    free = free_memory(cfg.device)
    gib = 2**30
    line = (
        f"{cfg.model_name}: {numbers / 1e6:,.1f} M parameters in {str(cfg.dtype).removeprefix('torch.')}"
        f"{', streamed from disk,' if streamed else ''} take "
        f"{needed / gib:.2f} GiB on {cfg.device}; {free / gib:.2f} GiB are free"
    )
    if needed * _HEADROOM > free:
        raise NotEnoughMemory(
            f"{line}. It cannot fit. Options: dtype=torch.bfloat16 (half of float32), "
            f"{'' if streamed else 'stream=True (two layers at a time), '}another device=, or a machine "
            f"with {needed * _HEADROOM / gib:.1f} GiB free"
        )
    if verbose:
        print(line, file=sys.stderr)


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device, or for this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_memory())


def _container_memory() -> float:
    """Bytes that this process's control group still allows; infinite where there is no such limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return float("inf")


def read_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer, or None where its files are not there."""
    if not any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
