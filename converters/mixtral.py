"""Mixtral (Jiang et al., arXiv:2401.04088): every layer MoE, top-k weights renormalised and in float32."""

from __future__ import annotations

from typing import Any

from moe_lens.config import GroupedQueryAttentionConfig, MoEConfig, RouterConfig
from moe_lens.converters.config_reading import d_head_of, decoder_facts, read_rotary, require
from moe_lens.converters.key_map import ATTENTION, DECODER, KeyMap

MODEL_TYPE = "mixtral"

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
KEY_MAP: KeyMap = {
    **DECODER,
    **ATTENTION,
    "model.layers.{layer}.block_sparse_moe.gate.weight": "blocks.{layer}.mlp.router.weight",
    f"{_EXPERT}.w1.weight": "blocks.{layer}.mlp.experts.W_gate[{expert}]",
    f"{_EXPERT}.w3.weight": "blocks.{layer}.mlp.experts.W_up[{expert}]",
    f"{_EXPERT}.w2.weight": "blocks.{layer}.mlp.experts.W_down[{expert}].T",
}


def read_config(hf: Any) -> MoEConfig:
    require(hf, "sliding_window", None)
    d_head = d_head_of(hf)
    return MoEConfig(
        model_type=MODEL_TYPE,
        **decoder_facts(hf),
        attention=GroupedQueryAttentionConfig(
            n_heads=hf.num_attention_heads,
            n_key_value_heads=hf.num_key_value_heads,
            d_head=d_head,
        ),
        rotary=read_rotary(hf, d_head, "halves"),
        router=RouterConfig(
            hf.num_local_experts, hf.num_experts_per_tok, renormalize=True, float32_weights=True
        ),
        d_expert=hf.intermediate_size,
        moe_layers=tuple(range(hf.num_hidden_layers)),
        d_mlp=0,
    )
