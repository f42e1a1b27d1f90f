"""An nnsight model as this package sees it: its structure, the facts that travel, its tokens."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from nnsight.intervention.serialization import dumps
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

from moe_lens.config import LatentAttentionConfig, MoEConfig
from moe_lens.converters import converter_for
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.rotary import rotation_at
from moe_lens.model.text import Text


def structure_of(lm: TransformersModel) -> HookedMoE:
    """A HookedMoE of the same config, without weights: it knows the hook points, the tokens, what makes sense.

    Its parameters are on the meta device, so it takes no memory and nothing of it can be run.

    Raises:
        TypeError: not an nnsight `TransformersModel`.
        UnsupportedCheckpoint: a model type or a config feature that is not implemented.
        ValueError: the model's modules are not those that its family has (a wrapped, adapted or quantised model); it
            is here in training mode.
    """
    if not isinstance(lm, TransformersModel):
        held = type(getattr(lm, "_module", lm)).__name__
        hint = (
            "; a HookedMoE in nnsight is traced as it is, and its own methods do the rest"
            if held == "HookedMoE"
            else ""
        )
        raise TypeError(f"an nnsight TransformersModel is wanted, not {type(lm).__name__} of {held}{hint}")
    module: Any = lm._module
    hf = module.config
    cfg = converter_for(hf.model_type).read_config(hf)
    cfg = replace(
        cfg,
        model_name=str(lm.repo_id or hf.model_type),
        dtype=dtype_of(module),
        revision=lm.revision,
        device=torch.device("cpu"),
    )
    _check_modules(module, cfg)
    # A model that is not here yet says nothing of how it will run: transformers loads in evaluation mode.
    if module.training and not any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"{cfg.model_name} is in training mode, where dropout and a router's noise make its values random; call "
            f".eval() on the model first"
        )
    with torch.device("meta"):
        structure = HookedMoE(cfg, lm.tokenizer).to(cfg.dtype)
    # Tokens are made on the CPU: the config says where.
    structure.cfg = cfg
    return structure


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    """The dtype of the embedding, with which the residual stream begins."""
    return module.get_input_embeddings().weight.dtype  # type: ignore[operator, union-attr]


def _check_modules(module: Any, cfg: MoEConfig) -> None:
    """Whether the weights that shipped functions read are what the model multiplies with."""
    for layer in range(cfg.n_layers):
        place = f"model.layers.{layer}"
        try:
            attention, mlp = (module.get_submodule(f"{place}.{name}") for name in ("self_attn", "mlp"))
        except AttributeError as error:
            raise ValueError(f"{cfg.model_name} has no {place} with self_attn and mlp: {error}") from error
        _check_linear(attention, "o_proj", f"{place}.self_attn")
        if layer not in cfg.moe_layers:
            _check_linear(mlp, "down_proj", f"{place}.mlp")
            continue
        wanted = {
            "gate.weight": (cfg.n_experts, cfg.d_model),
            "experts.gate_up_proj": (cfg.n_experts, 2 * cfg.d_expert, cfg.d_model),
            "experts.down_proj": (cfg.n_experts, cfg.d_model, cfg.d_expert),
        }
        found = dict(mlp.named_parameters())
        for name, shape in wanted.items():
            if name not in found or tuple(found[name].shape) != shape or found[name].dtype not in _DTYPES:
                described = (
                    f"{tuple(found[name].shape)} in {found[name].dtype}" if name in found else "missing"
                )
                raise ValueError(
                    f"{place}.mlp.{name} of {cfg.model_name} must be a parameter {shape} in floating point, and is "
                    f"{described}: the model is quantised, wrapped, or of another version of transformers"
                )
        if cfg.shared is not None:
            name = "shared_expert" if cfg.shared.gated else "shared_experts"
            _check_linear(getattr(mlp, name, None), "down_proj", f"{place}.mlp.{name}")
    _check_linear(module, "lm_head", "the model")


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_linear(parent: Any, name: str, place: str) -> None:
    """A subclass may multiply with something else than its `weight`: with scales, with an adapter's besides."""
    linear = getattr(parent, name, None)
    if type(linear) is not torch.nn.Linear or linear.weight.dtype not in _DTYPES:
        described = type(linear).__name__ if linear is not None else "missing"
        if isinstance(linear, torch.nn.Linear):
            described += f" in {linear.weight.dtype}"
        raise ValueError(
            f"{name} of {place} must be a plain torch.nn.Linear in floating point, and is {described}: the model is "
            f"quantised, or has an adapter (merge it first)"
        )


def edits_of(lm: TransformersModel) -> list[str]:
    """The edits that nnsight makes in every run of a model: of each its source, and a digest of it with its values."""
    described = []
    for edit in lm._edits:
        source = edit.__getstate__()["reduced"][0].strip()
        described.append(f"{source} [{hashlib.sha256(dumps(edit)).hexdigest()[:16]}]")
    return described


def facts_of(cfg: MoEConfig) -> dict[str, Any]:
    """What shipped functions have to know of a model, as plain numbers and lists."""
    attention, router, shared = cfg.attention, cfg.router, cfg.shared
    latent = None
    if isinstance(attention, LatentAttentionConfig):
        latent = {
            "d_nope": attention.d_nope,
            "kv_rank": attention.kv_rank,
            "query_rank": attention.query_rank,
        }
    return {
        "n_layers": cfg.n_layers,
        "moe_layers": list(cfg.moe_layers),
        "n_heads": cfg.n_heads,
        "n_key_value_heads": cfg.n_key_value_heads,
        "d_value": attention.d_value,
        "latent": latent,
        "clip": getattr(attention, "clip", None),
        "query_key_norm": getattr(attention, "query_key_norm", "none") != "none",
        "softmax_scale": attention.softmax_scale,
        "eps": cfg.eps,
        "n_experts": cfg.n_experts,
        "top_k": cfg.top_k,
        "renormalize": router.renormalize,
        "scaling_factor": router.scaling_factor,
        "n_groups": router.n_groups,
        "top_k_groups": router.top_k_groups,
        "shared": None if shared is None else {"gated": shared.gated},
    }


def attention_facts(cfg: MoEConfig, real: Bool[Tensor, "batch pos"]) -> dict[str, Any]:
    """What is needed besides to compute rotations, scores and patterns of these tokens again."""
    rotation = rotation_at(cfg.rotary, torch.arange(real.shape[1])[None])
    return {
        "real": real,
        "rotation": {"cos": rotation.cos, "sin": rotation.sin, "adjacent": rotation.adjacent},
    }


def tokens_of(
    structure: HookedMoE,
    text_or_tokens: Text | Int[Tensor, "batch pos"],
    attention_mask: Tensor | None,
    prepend_bos: bool | None = None,
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Checked tokens and the mask of real ones, on the CPU, as `HookedMoE` makes them: texts are padded on the right.

    Raises:
        ValueError: see `HookedMoE.tokens_and_mask`.
    """
    tokens, mask = structure.tokens_and_mask(text_or_tokens, attention_mask, prepend_bos=prepend_bos)
    return tokens, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask


def inputs_of(tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """What a trace is given: one batched input.

    Positions are counted from the first column, padding included, as HookedMoE and transformers' forward count them;
    nnsight would count a row that is padded on the left from its first token.
    """
    columns = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": columns.clone()}
