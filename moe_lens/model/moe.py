"""The Mixture-of-Experts layer: logits, probabilities, choice, weights, experts, shared expert, sum.

Everything keeps its leading `batch pos` axes, and slots lie on an axis `k`, heaviest routing weight first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_lens.config import MoEConfig, RouterConfig
from moe_lens.model.expert_matmul import SlotOrder, expert_matmul
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.mlp import GatedMLP


def eligible_probabilities(
    probabilities: Float[Tensor, "batch pos expert"], cfg: RouterConfig
) -> Float[Tensor, "batch pos expert"]:
    """Probabilities with the experts outside the best groups at -inf, so that top-k cannot choose them
    (DeepSeek-V2, arXiv:2405.04434, section 2.2.2); unchanged for a router without groups."""
    if cfg.n_groups == 1:
        return probabilities
    grouped = rearrange(probabilities, "b p (group member) -> b p group member", group=cfg.n_groups)
    best_groups = grouped.amax(dim=-1).topk(cfg.top_k_groups, dim=-1).indices
    allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best_groups, True)
    return rearrange(
        grouped.masked_fill(~allowed[..., None], -torch.inf), "b p group member -> b p (group member)"
    )


def applied_weights(
    probabilities: Float[Tensor, "batch pos expert"], indices: Int[Tensor, "batch pos k"], cfg: RouterConfig
) -> Float[Tensor, "batch pos k"]:
    """The weights with which the chosen experts' outputs are added: read for the chosen indices, then
    renormalised and scaled as the family does."""
    weights = probabilities.gather(-1, indices)
    if cfg.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * cfg.scaling_factor if cfg.scaling_factor != 1.0 else weights


class Router(nn.Module):
    """Scores every expert for every token: `weight` is `[expert, d_model]`, without a bias."""

    def __init__(self, cfg: MoEConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_model))
        self.float32_logits = cfg.router.float32_logits

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert"]:
        if self.float32_logits:
            return F.linear(x.float(), self.weight.float())
        return F.linear(x, self.weight)


class Experts(nn.Module):
    """The routed experts, stacked. Each of `W_gate`, `W_up`, `W_down` is `[expert, d_expert, d_model]`: row n
    of an expert's `W_down` is what its neuron n writes."""

    def __init__(self, cfg: MoEConfig):
        super().__init__()
        self.W_gate_up = nn.Parameter(torch.empty(cfg.n_experts, 2 * cfg.d_expert, cfg.d_model))
        self.W_down = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_expert, cfg.d_model))

    @property
    def W_gate(self) -> Float[Tensor, "expert d_expert d_model"]:
        return self.W_gate_up.chunk(2, dim=1)[0]

    @property
    def W_up(self) -> Float[Tensor, "expert d_expert d_model"]:
        return self.W_gate_up.chunk(2, dim=1)[1]


class MoE(nn.Module):
    def __init__(self, cfg: MoEConfig):
        super().__init__()
        self.cfg = cfg.router
        self.router = Router(cfg)
        self.experts = Experts(cfg)
        self.act_fn = ACT2FN[cfg.act_fn]
        self.hook_router_logits = HookPoint()
        self.hook_expert_weights = HookPoint()
        self.hook_expert_indices = HookPoint(may_change_shape=True)
        self.hook_routing_weights = HookPoint()
        self.hook_expert_pre = HookPoint()
        self.hook_expert_pre_linear = HookPoint()
        self.hook_expert_post = HookPoint()
        self.hook_expert_out = HookPoint()
        self.hook_expert_contrib = HookPoint()

        self.shared = None
        self.shared_gate = None
        if cfg.shared is not None:
            self.shared = GatedMLP(cfg.d_model, cfg.shared.d_shared, cfg.act_fn)
            self.hook_shared_pre = HookPoint()
            self.hook_shared_pre_linear = HookPoint()
            self.hook_shared_post = HookPoint()
            self.hook_shared_out = HookPoint()
            if cfg.shared.gated:
                self.shared_gate = nn.Linear(cfg.d_model, 1, bias=False)
                self.hook_shared_gate = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        indices, weights = self.route(x)
        expert_out = self.hook_expert_out(self.run_experts(x, indices))
        contrib = self.hook_expert_contrib((weights[..., None] * expert_out).to(expert_out.dtype))
        out = contrib.sum(dim=2)
        return out if self.shared is None else out + self.run_shared(x)

    def route(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Int[Tensor, "batch pos k"], Float[Tensor, "batch pos k"]]:
        """The chosen experts and the weights they are applied with. Softmax and choice are in float32."""
        logits = self.hook_router_logits(self.router(x))
        probabilities = self.hook_expert_weights(logits.float().softmax(dim=-1))
        chosen = eligible_probabilities(probabilities, self.cfg).topk(self.cfg.top_k, dim=-1).indices
        indices = self.hook_expert_indices(chosen)
        if self.hook_expert_indices.is_listened_to:
            check_forced_indices(indices, self.cfg.n_experts, self.hook_expert_indices.name or "")
        weights = applied_weights(probabilities, indices, self.cfg)
        return indices, self.hook_routing_weights(
            weights if self.cfg.float32_weights else weights.to(x.dtype)
        )

    def run_experts(
        self, x: Float[Tensor, "batch pos d_model"], indices: Int[Tensor, "batch pos k"]
    ) -> Float[Tensor, "batch pos k d_model"]:
        """E_i(x) of every chosen expert, before its routing weight.

        Slots are sorted by expert for the matmuls. The neurons' hook points see them in their places, which
        costs two copies each: a neuron point that nobody listens to is passed by.
        """
        slots = SlotOrder.of(indices, self.cfg.n_experts)
        gate_up = expert_matmul(slots.gather(x), self.experts.W_gate_up.transpose(1, 2), slots.ends)
        pre, pre_linear = gate_up.chunk(2, dim=-1)
        pre = _in_places(self.hook_expert_pre, pre, slots)
        pre_linear = _in_places(self.hook_expert_pre_linear, pre_linear, slots)
        post = _in_places(self.hook_expert_post, self.act_fn(pre) * pre_linear, slots)
        return slots.restore(expert_matmul(post, self.experts.W_down, slots.ends))

    def run_shared(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        assert self.shared is not None
        out = self.shared.run(x, self.hook_shared_pre, self.hook_shared_pre_linear, self.hook_shared_post)
        if self.shared_gate is not None:
            out = self.hook_shared_gate(self.shared_gate(x).sigmoid()) * out
        return self.hook_shared_out(out)


def check_forced_indices(indices: Int[Tensor, "batch pos k"], n_experts: int, name: str) -> None:
    """An edit of the choice, at the hook point of this name, must name real experts, each at most once per token.

    Raises:
        ValueError: it does not.
    """
    if indices.is_floating_point() or indices.ndim != 3:
        raise ValueError(f"{name} holds integers [batch, pos, k], not {indices.dtype} {tuple(indices.shape)}")
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < n_experts):
        raise ValueError(
            f"{name} names an expert outside 0..{n_experts - 1}: the range is "
            f"{int(indices.min())}..{int(indices.max())}"
        )
    in_order = indices.sort(dim=-1).values
    twice = (in_order[..., 1:] == in_order[..., :-1]).any(dim=-1).nonzero()
    if len(twice):
        batch, pos = twice[0].tolist()
        raise ValueError(
            f"{name} gives a token the same expert twice: batch {batch}, position {pos} has "
            f"{indices[batch, pos].tolist()}; every slot needs an expert of its own"
        )


def _in_places(
    point: HookPoint, sorted_slots: Float[Tensor, "slot d"], slots: SlotOrder
) -> Float[Tensor, "slot d"]:
    """Show sorted slots to a hook point in their places `[batch, pos, k, d]`, if anybody listens."""
    if not point.is_listened_to:
        return sorted_slots
    shown = slots.restore(sorted_slots)
    # Torch counts in-place edits: what was only looked at need not be sorted back.
    version = None if shown.is_inference() else shown._version
    seen = point(shown)
    untouched = seen is shown and version is not None and version == shown._version
    return sorted_slots if untouched else slots.sort(seen)
