"""DeepSeek-V2 (arXiv:2405.04434): latent attention, ungated shared experts, dense first layers, groups."""

from __future__ import annotations

import math
from typing import Any

from moe_lens.config import LatentAttentionConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_lens.converters.config_reading import decoder_facts, read_rotary, require
from moe_lens.converters.errors import UnsupportedCheckpoint
from moe_lens.converters.key_map import DECODER, DENSE_MLP, ROUTED_EXPERTS, KeyMap

MODEL_TYPE = "deepseek_v2"

_ATTENTION = "model.layers.{layer}.self_attn"
KEY_MAP: KeyMap = {
    **DECODER,
    f"{_ATTENTION}.q_proj.weight": "blocks.{layer}.attn.q_proj.weight",
    f"{_ATTENTION}.q_a_proj.weight": "blocks.{layer}.attn.q_a_proj.weight",
    f"{_ATTENTION}.q_a_proj.bias": "blocks.{layer}.attn.q_a_proj.bias",
    f"{_ATTENTION}.q_a_layernorm.weight": "blocks.{layer}.attn.q_a_norm",
    f"{_ATTENTION}.q_b_proj.weight": "blocks.{layer}.attn.q_b_proj.weight",
    f"{_ATTENTION}.kv_a_proj_with_mqa.weight": "blocks.{layer}.attn.kv_a_proj.weight",
    f"{_ATTENTION}.kv_a_proj_with_mqa.bias": "blocks.{layer}.attn.kv_a_proj.bias",
    f"{_ATTENTION}.kv_a_layernorm.weight": "blocks.{layer}.attn.kv_a_norm",
    f"{_ATTENTION}.kv_b_proj.weight": "blocks.{layer}.attn.kv_b_proj.weight",
    f"{_ATTENTION}.o_proj.weight": "blocks.{layer}.attn.o_proj.weight",
    f"{_ATTENTION}.o_proj.bias": "blocks.{layer}.attn.o_proj.bias",
    **ROUTED_EXPERTS,
    "model.layers.{layer}.mlp.shared_experts.gate_proj.weight": "blocks.{layer}.mlp.shared.W_gate",
    "model.layers.{layer}.mlp.shared_experts.up_proj.weight": "blocks.{layer}.mlp.shared.W_up",
    "model.layers.{layer}.mlp.shared_experts.down_proj.weight": "blocks.{layer}.mlp.shared.W_down.T",
    **DENSE_MLP,
}


def read_config(hf: Any) -> MoEConfig:
    require(hf, "mlp_bias", False)
    require(hf, "norm_topk_prob", False, because="transformers ignores it, the original code does not")
    require(hf, "topk_method", "greedy", "group_limited_greedy")
    require(hf, "scoring_func", "softmax", None)
    require(hf, "moe_layer_freq", 1, None)
    require(hf, "num_key_value_heads", hf.num_attention_heads, because="latent attention has no grouped keys")
    grouped = hf.topk_method == "group_limited_greedy"
    for field in ("n_shared_experts", "num_experts_per_tok", *(("n_group", "topk_group") if grouped else ())):
        if not getattr(hf, field):
            raise UnsupportedCheckpoint(
                f"{MODEL_TYPE}: config field {field}={getattr(hf, field)} is not implemented, only 1 or more"
            )
    return MoEConfig(
        model_type=MODEL_TYPE,
        **decoder_facts(hf),
        attention=LatentAttentionConfig(
            n_heads=hf.num_attention_heads,
            d_nope=hf.qk_nope_head_dim,
            d_rope=hf.qk_rope_head_dim,
            d_value=hf.v_head_dim,
            kv_rank=hf.kv_lora_rank,
            query_rank=hf.q_lora_rank,
            softmax_scale=_softmax_scale(hf),
            bias=hf.attention_bias,
        ),
        rotary=read_rotary(hf, hf.qk_rope_head_dim, "adjacent"),
        router=RouterConfig(
            hf.n_routed_experts,
            hf.num_experts_per_tok,
            renormalize=False,
            scaling_factor=hf.routed_scaling_factor,
            n_groups=hf.n_group if grouped else 1,
            top_k_groups=hf.topk_group if grouped else 1,
            float32_logits=True,
            float32_weights=True,
        ),
        d_expert=hf.moe_intermediate_size,
        moe_layers=tuple(range(min(hf.first_k_dense_replace, hf.num_hidden_layers), hf.num_hidden_layers)),
        d_mlp=hf.intermediate_size,
        shared=SharedExpertConfig(hf.n_shared_experts * hf.moe_intermediate_size, gated=False),
    )


def _softmax_scale(hf: Any) -> float:
    """1/sqrt(d_head), times mscale^2 where a yarn config gives `mscale_all_dim` (as transformers applies it)."""
    scale = (hf.qk_nope_head_dim + hf.qk_rope_head_dim) ** -0.5
    parameters = hf.rope_parameters
    mscale_all_dim = parameters.get("mscale_all_dim", 0)
    if parameters.get("rope_type", "default") == "default" or not mscale_all_dim or parameters["factor"] <= 1:
        return scale
    mscale = 0.1 * mscale_all_dim * math.log(parameters["factor"]) + 1.0
    return scale * mscale * mscale
