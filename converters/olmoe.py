"""OLMoE (Muennighoff et al., arXiv:2409.02060): every layer MoE, query and key norms over the whole width."""

from __future__ import annotations

from typing import Any

from moe_lens.config import GroupedQueryAttentionConfig, MoEConfig, RouterConfig
from moe_lens.converters.config_reading import d_head_of, decoder_facts, read_rotary
from moe_lens.converters.key_map import ATTENTION, DECODER, QUERY_KEY_NORM, ROUTED_EXPERTS, KeyMap

MODEL_TYPE = "olmoe"

KEY_MAP: KeyMap = {**DECODER, **ATTENTION, **QUERY_KEY_NORM, **ROUTED_EXPERTS}


def read_config(hf: Any) -> MoEConfig:
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
            query_key_norm="width",
            clip=hf.clip_qkv,
        ),
        rotary=read_rotary(hf, d_head, "halves"),
        router=RouterConfig(hf.num_experts, hf.num_experts_per_tok, renormalize=hf.norm_topk_prob),
        d_expert=hf.intermediate_size,
        moe_layers=tuple(range(hf.num_hidden_layers)),
        d_mlp=0,
    )
