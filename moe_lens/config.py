"""What a model is, as plain frozen data: one `MoEConfig`, and the variants it is made of.

A converter fills this in from a checkpoint's own config; `model/` builds itself from it and from
nothing else. The flat names (`n_layers`, `n_heads`, `d_model`, ...) are TransformerLens's, so that its
`ActivationCache` and `patching` functions can read `model.cfg`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embedding.

    `inverse_frequencies` holds one angle per rotated pair and per position, in radians; every scaling of
    the checkpoint (yarn, linear, llama3) is already in it. `attention_scaling` multiplies cosine and sine.
    `pairs` says which coordinates turn together: `halves` is (i, i + d/2), `adjacent` is (2i, 2i + 1).
    """

    inverse_frequencies: tuple[float, ...]
    attention_scaling: float
    pairs: Literal["halves", "adjacent"]

    @property
    def d_rotary(self) -> int:
        return 2 * len(self.inverse_frequencies)


@dataclass(frozen=True)
class GroupedQueryAttentionConfig:
    """Standard attention; multi-head (n_key_value_heads == n_heads) and grouped-query alike.

    `query_key_norm`: `none`; `width`, one RMSNorm over all heads' coordinates together (OLMoE); or
    `head`, one RMSNorm within each head (Qwen3). `clip` bounds queries, keys and values to +-clip.
    """

    n_heads: int
    n_key_value_heads: int
    d_head: int
    qkv_bias: bool = False
    output_bias: bool = False
    query_key_norm: Literal["none", "width", "head"] = "none"
    clip: float | None = None

    @property
    def d_value(self) -> int:
        return self.d_head

    @property
    def softmax_scale(self) -> float:
        return self.d_head**-0.5


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    A head's query and key are [d_nope | d_rope]; the rotary part of the key is shared by all heads. Keys and
    values are read from a latent of `kv_rank`; queries too where `query_rank` is given.
    """

    n_heads: int
    d_nope: int
    d_rope: int
    d_value: int
    kv_rank: int
    query_rank: int | None
    softmax_scale: float
    bias: bool = False
    latent_norm_eps: float = 1e-6

    @property
    def n_key_value_heads(self) -> int:
        return self.n_heads

    @property
    def d_head(self) -> int:
        return self.d_nope + self.d_rope

    @property
    def output_bias(self) -> bool:
        return self.bias


@dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts: softmax over all, top-k of it, weights as applied.

    `renormalize`: the chosen weights are divided by their sum. `scaling_factor` multiplies them afterwards.
    `n_groups`, `top_k_groups`: experts lie in equal groups, of which only the `top_k_groups` with the
    largest single probability are eligible (DeepSeek-V2's group-limited top-k); 1 and 1 mean no groups.
    `float32_logits` and `float32_weights`: what stays in float32 whatever the model's dtype.
    """

    n_experts: int
    top_k: int
    renormalize: bool
    scaling_factor: float = 1.0
    n_groups: int = 1
    top_k_groups: int = 1
    float32_logits: bool = False
    float32_weights: bool = False


@dataclass(frozen=True)
class SharedExpertConfig:
    """The always-active expert beside the routed ones: one gated MLP of width `d_shared`.

    `gated`: its output is multiplied by the sigmoid of a learned score (Qwen1.5-MoE).
    """

    d_shared: int
    gated: bool


@dataclass(frozen=True)
class MoEConfig:
    """The whole model. Widths in coordinates, `eps` as in sqrt(mean(x^2) + eps)."""

    model_type: str
    model_name: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    eps: float
    act_fn: str
    attention: GroupedQueryAttentionConfig | LatentAttentionConfig
    rotary: RotaryConfig
    router: RouterConfig
    d_expert: int
    moe_layers: tuple[int, ...]
    d_mlp: int
    """Width of the dense layers' MLP; meaningless where every layer is an MoE layer."""
    shared: SharedExpertConfig | None = None
    tied_embeddings: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    revision: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generated text."""
    pad_token_id: int | None = None
    """What `generate` fills a row with that has ended; None is the token that ended it."""

    # Read by TransformerLens's ActivationCache and patching.
    attn_only: bool = False
    normalization_type: str = "RMS"
    final_rms: bool = True
    use_attn_result: bool = False

    def __post_init__(self) -> None:
        router = self.router
        if not 1 <= router.top_k <= router.n_experts:
            raise ValueError(f"top_k must lie in 1..n_experts={router.n_experts}, not {router.top_k}")
        if router.n_experts % router.n_groups:
            raise ValueError(f"{router.n_experts} experts do not divide into {router.n_groups} equal groups")
        eligible = router.top_k_groups * (router.n_experts // router.n_groups)
        if not 1 <= router.top_k_groups <= router.n_groups or eligible < router.top_k:
            raise ValueError(
                f"top_k_groups={router.top_k_groups} of n_groups={router.n_groups} leaves {eligible} eligible "
                f"experts; top_k={router.top_k} needs at least as many"
            )
        if self.attention.n_heads % self.attention.n_key_value_heads:
            raise ValueError(
                f"n_heads={self.attention.n_heads} is not a multiple of "
                f"n_key_value_heads={self.attention.n_key_value_heads}"
            )
        if not set(self.moe_layers) <= set(range(self.n_layers)):
            raise ValueError(f"moe_layers {self.moe_layers} go beyond the {self.n_layers} layers")

    @property
    def n_heads(self) -> int:
        return self.attention.n_heads

    @property
    def n_key_value_heads(self) -> int:
        return self.attention.n_key_value_heads

    @property
    def d_head(self) -> int:
        return self.attention.d_head

    @property
    def n_experts(self) -> int:
        return self.router.n_experts

    @property
    def top_k(self) -> int:
        return self.router.top_k
