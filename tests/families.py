"""Tiny random checkpoints of every family, written as transformers writes them.

`VARIANTS` names one small model for each way in which a config can change the arithmetic: grouped queries,
biases, query/key norms, clipping, shared experts, dense layers, rotary scalings, routing rules, storage.
Between them they cover what the converters claim to read. `write_checkpoint` makes one, `hf_model` loads it
with transformers, `write_tokenizer` puts a small byte-level tokenizer beside it, `prompts` makes padded
batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
VOCABULARY = 128


@dataclass(frozen=True)
class Variant:
    """One tiny model: its family, what its config changes, and how it is stored."""

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str | None = None


COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    tie_word_embeddings=False,
    rms_norm_eps=1e-5,
)

FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "olmoe": dict(num_key_value_heads=4, intermediate_size=32, num_experts=8, num_experts_per_tok=4),
    "qwen2_moe": dict(
        num_key_value_heads=2,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
    ),
    "deepseek_v2": dict(
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    "qwen3_moe": dict(
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
    "mixtral": dict(
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
    ),
}


def _yarn(**changes: float) -> dict[str, Any]:
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    return {**scaling, "beta_fast": 32.0, "beta_slow": 1.0, **changes}


LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, Variant] = {
    # olmoe: query/key norm over the whole width, clipping, raw weights
    "olmoe": Variant("olmoe"),
    "olmoe_gqa_clip": Variant("olmoe", dict(num_key_value_heads=2, clip_qkv=0.9, norm_topk_prob=True)),
    "olmoe_bias_odd_width": Variant(
        "olmoe", dict(attention_bias=True, intermediate_size=25, tie_word_embeddings=True, rms_norm_eps=1e-2)
    ),
    "olmoe_yarn": Variant("olmoe", dict(rope_parameters=_yarn())),
    "olmoe_bf16": Variant("olmoe", dict(num_key_value_heads=2), dtype=torch.bfloat16),
    # qwen2_moe: biases on q, k, v; a gated shared expert; dense layers by two rules
    "qwen2_moe": Variant("qwen2_moe"),
    "qwen2_moe_no_bias": Variant(
        "qwen2_moe",
        dict(qkv_bias=False, mlp_only_layers=[1], rope_parameters=LINEAR_ROPE, norm_topk_prob=True),
    ),
    "qwen2_moe_sparse_step": Variant(
        "qwen2_moe", dict(decoder_sparse_step=2, num_key_value_heads=4, tie_word_embeddings=True)
    ),
    "qwen2_moe_sharded": Variant("qwen2_moe", max_shard_size="60KB"),
    # deepseek_v2: latent attention, ungated shared experts, leading dense layers, group-limited top-k
    "deepseek_v2": Variant("deepseek_v2", dict(rope_parameters=_yarn(mscale=0.707, mscale_all_dim=0.707))),
    "deepseek_v2_groups": Variant(
        "deepseek_v2",
        dict(
            q_lora_rank=32,
            first_k_dense_replace=0,
            n_shared_experts=1,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            rope_parameters=_yarn(mscale=1.0, mscale_all_dim=0.5),
            rms_norm_eps=1e-2,
        ),
    ),
    "deepseek_v2_bias": Variant(
        "deepseek_v2", dict(attention_bias=True, q_lora_rank=48, tie_word_embeddings=True, v_head_dim=16)
    ),
    "deepseek_v2_two_dense": Variant(
        "deepseek_v2", dict(first_k_dense_replace=2, attention_bias=True, routed_scaling_factor=1.5)
    ),
    "deepseek_v2_bf16_sharded": Variant("deepseek_v2", dtype=torch.bfloat16, max_shard_size="60KB"),
    # qwen3_moe: query/key norm per head, heads wider than d_model / n_heads, renormalised weights
    "qwen3_moe": Variant("qwen3_moe"),
    "qwen3_moe_dense_bias": Variant(
        "qwen3_moe",
        dict(mlp_only_layers=[0], attention_bias=True, rope_parameters=LLAMA3_ROPE, norm_topk_prob=False),
    ),
    "qwen3_moe_sparse_step": Variant(
        "qwen3_moe",
        dict(decoder_sparse_step=2, tie_word_embeddings=True, num_key_value_heads=1, rope_parameters=_yarn()),
    ),
    # mixtral: top-2 of 8, renormalised
    "mixtral": Variant("mixtral"),
    "mixtral_head_dim_odd_width": Variant(
        "mixtral",
        dict(
            head_dim=32,
            intermediate_size=27,
            num_hidden_layers=3,
            rope_parameters=LLAMA3_ROPE,
            rms_norm_eps=1e-2,
        ),
    ),
    "mixtral_bf16_sharded": Variant(
        "mixtral", dict(num_key_value_heads=4, tie_word_embeddings=True), torch.bfloat16, "60KB"
    ),
}

FAMILIES = tuple(FAMILY_DEFAULTS)
PLAIN_VARIANTS = tuple(name for name, variant in VARIANTS.items() if variant.dtype == torch.float32)


def variant_config(name: str) -> Any:
    """The transformers config of one variant."""
    variant = VARIANTS[name]
    values = {**COMMON, **FAMILY_DEFAULTS[variant.family], **variant.config}
    return AutoConfig.for_model(variant.family, **values)


@torch.no_grad()
def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every parameter anew, so that none is a trivial one, a zero bias or an idle router."""
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[-1]
        if parameter.ndim == 1 and "norm" in name:
            value = 1 + 0.3 * noise
        elif parameter.ndim == 1:
            value = 0.3 * noise
        elif name.endswith("embed_tokens.weight"):
            value = noise / math.sqrt(fan_in) if tied else noise
        elif name.endswith("mlp.gate.weight"):
            value = 1.5 * noise / math.sqrt(fan_in)
        elif name.endswith("down_proj") or name.endswith("down_proj.weight"):
            value = 2 * noise / math.sqrt(fan_in)
        else:
            value = noise / math.sqrt(fan_in)
        parameter.copy_(value)


def write_checkpoint(
    variant: str,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | None = None,
    seed: int = 0,
) -> Path:
    """Write one variant with `save_pretrained`. `dtype` and `max_shard_size` default to the variant's own."""
    chosen = VARIANTS[variant]
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(variant_config(variant), dtype=torch.float32)
    randomise(model, torch.Generator().manual_seed(seed))
    model = model.to(dtype or chosen.dtype)
    sharding = max_shard_size or chosen.max_shard_size
    model.save_pretrained(directory, **({"max_shard_size": sharding} if sharding else {}))
    return Path(directory)


def hf_model(
    directory: str | Path,
    dtype: torch.dtype | str = torch.float32,
    *,
    attention: str = "eager",
    experts: str | None = "eager",
) -> PreTrainedModel:
    """The checkpoint as transformers loads it.

    `experts=None` leaves the choice of expert kernel to transformers, except for odd widths, at which its choice
    (the grouped matmul) fails.
    """
    config = AutoConfig.from_pretrained(directory)
    if experts is None and getattr(config, "moe_intermediate_size", config.intermediate_size) % 8:
        experts = "eager"
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=attention,
        **({"experts_implementation": experts} if experts else {}),
    )
    return model.eval()


TOKENIZER_TEXT = [
    "The router sends every token to the experts whose readouts score it highest.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "Each expert writes what it knows into the residual stream, and the stream goes on.",
]


def write_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE over printable ASCII, small enough for the tiny models, saved beside a checkpoint."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(directory)
    return wrapped


def prompts(
    padding: str = "none", *, seed: int = 0, batch: int = 2, length: int = 9
) -> tuple[Tensor, Tensor]:
    """Random tokens and their attention mask; `padding` is "none", "left" or "right", more of it each row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(UNKNOWN + 1, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(batch):
        absent = 0 if padding == "none" else min(1 + 2 * row, length - 2)
        positions = slice(0, absent) if padding == "left" else slice(length - absent, length)
        tokens[row, positions] = PAD
        mask[row, positions] = 0
    return tokens, mask
