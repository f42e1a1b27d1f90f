"""Qwen1.5-MoE and Qwen2-MoE: biases on queries, keys and values; a sigmoid-gated shared expert."""

from __future__ import annotations

from typing import Any

from moe_lens.config import GroupedQueryAttentionConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_lens.converters.config_reading import (
    d_head_of,
    decoder_facts,
    moe_layers_by_step,
    read_rotary,
    require,
)
from moe_lens.converters.errors import UnsupportedCheckpoint
from moe_lens.converters.key_map import ATTENTION, DECODER, DENSE_MLP, ROUTED_EXPERTS, KeyMap

MODEL_TYPE = "qwen2_moe"

KEY_MAP: KeyMap = {
    **DECODER,
    **ATTENTION,
    **ROUTED_EXPERTS,
    **DENSE_MLP,
    "model.layers.{layer}.mlp.shared_expert.gate_proj.weight": "blocks.{layer}.mlp.shared.W_gate",
    "model.layers.{layer}.mlp.shared_expert.up_proj.weight": "blocks.{layer}.mlp.shared.W_up",
    "model.layers.{layer}.mlp.shared_expert.down_proj.weight": "blocks.{layer}.mlp.shared.W_down.T",
    "model.layers.{layer}.mlp.shared_expert_gate.weight": "blocks.{layer}.mlp.shared_gate.weight",
}


def read_config(hf: Any) -> MoEConfig:
    require(hf, "use_sliding_window", False)
    if any(kind != "full_attention" for kind in hf.layer_types):
        raise UnsupportedCheckpoint(
            f"{MODEL_TYPE}: config field layer_types={hf.layer_types} is not implemented, only 'full_attention'"
        )
    d_head = d_head_of(hf)
    return MoEConfig(
        model_type=MODEL_TYPE,
        **decoder_facts(hf),
        attention=GroupedQueryAttentionConfig(
            n_heads=hf.num_attention_heads,
            n_key_value_heads=hf.num_key_value_heads,
            d_head=d_head,
            qkv_bias=hf.qkv_bias,
        ),
        rotary=read_rotary(hf, d_head, "halves"),
        router=RouterConfig(hf.num_experts, hf.num_experts_per_tok, renormalize=hf.norm_topk_prob),
        d_expert=hf.moe_intermediate_size,
        moe_layers=moe_layers_by_step(hf),
        d_mlp=hf.intermediate_size,
        shared=SharedExpertConfig(hf.shared_expert_intermediate_size, gated=True),
    )
