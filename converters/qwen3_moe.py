"""Qwen3-MoE (arXiv:2505.09388): grouped-query attention with a norm within each query and key head."""

from __future__ import annotations

from typing import Any

from moe_lens.config import GroupedQueryAttentionConfig, MoEConfig, RouterConfig
from moe_lens.converters.config_reading import (
    d_head_of,
    decoder_facts,
    moe_layers_by_step,
    read_rotary,
    require,
)
from moe_lens.converters.key_map import ATTENTION, DECODER, DENSE_MLP, QUERY_KEY_NORM, ROUTED_EXPERTS, KeyMap

MODEL_TYPE = "qwen3_moe"

KEY_MAP: KeyMap = {**DECODER, **ATTENTION, **QUERY_KEY_NORM, **ROUTED_EXPERTS, **DENSE_MLP}


def read_config(hf: Any) -> MoEConfig:
    require(hf, "use_sliding_window", False)
    d_head = d_head_of(hf)
    return MoEConfig(
        model_type=MODEL_TYPE,
        **decoder_facts(hf),
        attention=GroupedQueryAttentionConfig(
            n_heads=hf.num_attention_heads,
            n_key_value_heads=hf.num_key_value_heads,
            d_head=d_head,
            qkv_bias=hf.attention_bias,
            output_bias=hf.attention_bias,
            query_key_norm="head",
        ),
        rotary=read_rotary(hf, d_head, "halves"),
        router=RouterConfig(hf.num_experts, hf.num_experts_per_tok, renormalize=hf.norm_topk_prob),
        d_expert=hf.moe_intermediate_size,
        moe_layers=moe_layers_by_step(hf),
        d_mlp=hf.intermediate_size,
    )
