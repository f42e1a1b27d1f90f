"""A tiny random model of every type of the installed transformers that uses its experts interface.

The types are found in transformers' sources, none is listed here. A config is the class's own with the sizes below
where it has such a field; `EXCEPTIONS` holds what a type needs besides. The language model is built where a type has
more than one part.
"""

from __future__ import annotations

import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 128

# By field name. Some fields are aliases of others: a class takes those that it has.
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    vocab_size_per_layer_input=VOCABULARY,
    unpadded_vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    dense_intermediate_size=96,
    shared_expert_intermediate_size=48,
    moe_shared_expert_intermediate_size=48,
    shared_intermediate_size=48,
    shared_experts_intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    n_routed_experts=8,
    num_local_experts=8,
    moe_num_experts=8,
    num_experts_per_tok=3,
    num_experts_per_token=3,
    moe_topk=3,
    moe_k=3,
    top_k_experts=3,
    n_shared_experts=1,
    num_shared_experts=1,
    moe_num_shared_experts=1,
    n_group=2,
    num_expert_group=2,
    topk_group=1,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    # Such that most layers have experts.
    first_k_dense_replace=1,
    num_dense_layers=1,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    # Smaller than the text, so that sliding windows and sparse attention take part.
    index_topk=4,
    index_n_heads=4,
    index_head_dim=16,
    linear_head_dim=16,
    linear_num_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)

_MOSTLY_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": dict(layer_types=_HYBRID, head_dim=16),
    "deepseek_ocr2": dict(mlp_layer_types=_MOSTLY_SPARSE, topk_method="group_limited_greedy"),
    "dots3_note": dict(num_key_value_heads=4),
    "ernie4_5_vl_moe": dict(
        moe_intermediate_size=[32, 24],
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 4]),
    ),
    "gemma4": dict(enable_moe_block=True, top_k_experts=3),
    "glm4v_moe": dict(
        rope_parameters=dict(
            rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2], partial_rotary_factor=0.5
        )
    ),
    "glm5_next": dict(num_key_value_heads=4, index_kpool=2, qk_rope_head_dim=0),
    "granitemoehybrid": dict(layer_types=_HYBRID, mamba_n_heads=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    "kimi_linear": dict(layer_types=_HYBRID),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "muse_spark": dict(moe_hidden_size=48),
    "qwen4_exp": dict(
        indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2
    ),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=24),
}


def interface_types() -> list[str]:
    """Folders of transformers' models whose code uses the experts interface."""
    root = Path(transformers.__file__).parent / "models"
    return sorted(
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text()
    )


def model_class(folder: str) -> type[PreTrainedModel]:
    """The language model of a type: with a head where there is one, without other towers where they can be left."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and not value.__name__.endswith("PreTrainedModel")
        and isinstance(value.config_class, type)
        and issubclass(value.config_class, PretrainedConfig)
    ]
    for ending in ("ForCausalLM", "TextModel", "LanguageModel", "ForTokenClassification", "Model"):
        for chosen in classes:
            if chosen.__name__.endswith(ending) and not chosen.config_class.sub_configs:
                return chosen
    raise LookupError(f"{folder}: no language model among {[c.__name__ for c in classes]}")


def tiny_config(folder: str) -> PretrainedConfig:
    """A small config of a type, with every size that its class knows."""
    chosen = model_class(folder).config_class
    known = set(chosen().to_dict()) | set(getattr(chosen, "attribute_map", {}))
    values = {key: value for key, value in SIZES.items() if key in known}
    # Latent attention: a head's width follows from its parts, and every head has keys of its own.
    if "kv_lora_rank" in known:
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    # An alias and what it stands for are one field.
    for alias, name in getattr(chosen, "attribute_map", {}).items():
        if alias in values and name in values:
            del values[alias]
    return chosen(**{**values, **EXCEPTIONS.get(folder, {})})


@torch.no_grad()
def tiny_model(folder: str, seed: int = 0) -> Any:
    """A tiny random model of a type, in eval mode, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(folder)(tiny_config(folder)).eval().float()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):
            # The experts of each token of the vocabulary: all the same ones before training.
            tensor.copy_(torch.rand(len(tensor), 8, generator=generator).argsort(-1)[:, : tensor.shape[1]])
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "correction_bias" in name or "expert_bias" in name or name.endswith("balancing_biases"):
            tensor.copy_(0.1 * noise)
        elif "experts" in name or "gate" in name or "router" in name:
            # Experts and routers do nothing in many untrained models.
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]) if tensor.ndim > 1 else 1 + 0.3 * noise)
    return model


def inputs(folder: str, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; for a type with experts of their own for images, some tokens are said to be of one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, VOCABULARY, (batch, length), generator=generator)
    if folder != "ernie4_5_vl_moe":
        return {"input_ids": tokens}
    return {
        "input_ids": tokens,
        "moe_mm_token_type_ids": (torch.arange(length) % 3 == 1).int().expand(batch, -1),
    }
