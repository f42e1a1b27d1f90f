"""What the senders of one component write, read from the hook points inside it.

For each kind of sender group: which hook points are needed (`hooks_of`), the scores of every sender against any
matrix of readout rows (`sender_scores`), and their sum as a vector (`written_by`). All of it is linear, so a score
is never made by way of the sender's vector where a smaller product will do: a head is read through `W_O R^T`.

    head     z_h W_O^h                       source   A[q, p] v_p W_O^h
    expert   g_i E_i(x)                      neuron   g_i a_n W_down[:, n]

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 2, 9-11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.model.attention import Attention
from moe_lens.model.expert_matmul import SlotOrder, expert_matmul
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_weights import weights_in_memory
from moe_lens.model.mlp import DenseMLP
from moe_lens.model.moe import MoE
from moe_lens.routing.senders import SenderGroup

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

Values = Mapping[str, Tensor]
"""Hook values, by their whole names."""


def hooks_of(model: HookedMoE, group: SenderGroup) -> list[str]:
    """The hook points that a group's senders are read from."""
    points = {
        "whole": [],
        "heads": ["attn.hook_z"],
        "sources": ["attn.hook_pattern", "attn.hook_v"],
        "experts": ["mlp.hook_expert_indices", "mlp.hook_expert_contrib"],
        "neurons": ["mlp.hook_expert_indices", "mlp.hook_routing_weights", "mlp.hook_expert_post"],
        "dense neurons": ["mlp.hook_post"],
    }[group.kind]
    shared = model.cfg.shared
    if group.kind == "experts" and shared:
        points = [*points, "mlp.hook_shared_out"]
    if group.kind == "neurons" and shared:
        points = [*points, "mlp.hook_shared_post", *(["mlp.hook_shared_gate"] if shared.gated else [])]
    return [f"blocks.{group.layer}.{point}" for point in points] or [group.written_at]


class GroupValues(NamedTuple):
    """A group with the hook values it is read from: `at("hook_z")` is this layer's."""

    group: SenderGroup
    values: Values

    def at(self, point: str) -> Tensor:
        inside = "attn" if self.group.component.startswith("A") else "mlp"
        return self.values[f"blocks.{self.group.layer}.{inside}.{point}"]


# ---- heads and sources ----


def attention_of(model: HookedMoE, layer: int | None) -> Attention:
    return model.blocks[layer].attn  # type: ignore[index, return-value, union-attr]


def folded_output(
    attention: Attention, readout: Float[Tensor, "row d_model"]
) -> Float[Tensor, "head d_value row"]:
    """W_O^h R^T of every head: a head's z (or a source's v) times this is its score."""
    return einsum(
        attention.W_O.detach().float(), readout, "head d_value d_model, row d_model -> head d_value row"
    )


def head_values(
    attention: Attention, values: Float[Tensor, "batch pos kv_head d_value"]
) -> Float[Tensor, "batch pos head d_value"]:
    """hook_v with grouped queries' values repeated: one for each head."""
    group = attention.n_heads // attention.n_key_value_heads
    return repeat(values.float(), "b p kv_head d_value -> b p (kv_head group) d_value", group=group)


def attended_values(model: HookedMoE, of: GroupValues) -> Float[Tensor, "batch pos head d_value"]:
    """z in float32 from pattern and values: the sum over sources."""
    values = head_values(attention_of(model, of.group.layer), of.at("hook_v"))
    return einsum(of.at("hook_pattern").float(), values, "b head q k, b k head d_value -> b q head d_value")


# ---- experts and neurons ----


def mlp_of(model: HookedMoE, layer: int | None) -> MoE | DenseMLP:
    return model.blocks[layer].mlp  # type: ignore[index, return-value, union-attr]


def routed_neurons(of: GroupValues) -> Float[Tensor, "batch pos k d_expert"]:
    """g_i a_n: what multiplies the neuron's column, in float32."""
    return of.at("hook_routing_weights").float()[..., None] * of.at("hook_expert_post").float()


def shared_neurons(model: HookedMoE, of: GroupValues) -> Float[Tensor, "batch pos d_shared"]:
    """The same for the shared experts, whose gate (where there is one) is a scalar for each token."""
    post = of.at("hook_shared_post").float()
    gated = model.cfg.shared is not None and model.cfg.shared.gated
    return of.at("hook_shared_gate").float() * post if gated else post


def scattered(
    slots: Float[Tensor, "batch pos k *rest"], indices: Int[Tensor, "batch pos k"], n_experts: int
) -> Float[Tensor, "expert batch pos *rest"]:
    """Slots in the places of their experts, zero where an expert was not chosen."""
    batch, pos, k = indices.shape
    out = slots.new_zeros(batch, pos, n_experts, *slots.shape[3:])
    index = indices.view(batch, pos, k, *[1] * (slots.ndim - 3)).expand_as(slots)
    return out.scatter_(2, index, slots).movedim(2, 0)


# ---- scores and sums ----

READ_WITH_WEIGHTS = ("heads", "sources", "neurons", "dense neurons")
"""Kinds of senders that are read through their layer's matrices."""


def weights_of(model: HookedMoE, group: SenderGroup) -> AbstractContextManager[None]:
    """Within it, the matrices through which a group's senders are read are in memory (`weights_in_memory`)."""
    part = "attn.o_proj" if group.kind in ("heads", "sources") else "mlp"
    return weights_in_memory(model, group.layer if group.kind in READ_WITH_WEIGHTS else None, part)


def reading_weights(
    function: Callable[Concatenate[HookedMoE, SenderGroup, _Arguments], _Result],
) -> Callable[Concatenate[HookedMoE, SenderGroup, _Arguments], _Result]:
    """A function of a model and a group of senders, within which the group's layer is in memory if it is read."""

    @wraps(function)
    def reading(
        model: HookedMoE, group: SenderGroup, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        with weights_of(model, group):
            return function(model, group, *args, **kwargs)

    return reading


@reading_weights
def sender_scores(
    model: HookedMoE, group: SenderGroup, values: Values, readout: Float[Tensor, "row d_model"]
) -> Float[Tensor, "sender batch pos row"]:
    """Every sender's product with every row of a readout, in float32, not yet divided by the receiver's scale.

    Of the size it says: for sources and neurons only small inputs fit.
    """
    of = GroupValues(group, values)
    match group.kind:
        case "whole":
            return _read(values[group.written_at], readout)[None]
        case "heads":
            attention = attention_of(model, group.layer)
            scores = einsum(
                of.at("hook_z").float(),
                folded_output(attention, readout),
                "b p head d_value, head d_value row -> head b p row",
            )
            return _with_bias(scores, attention, group, readout)
        case "sources":
            attention = attention_of(model, group.layer)
            of_sources = einsum(
                head_values(attention, of.at("hook_v")),
                folded_output(attention, readout),
                "b k head d_value, head d_value row -> b head k row",
            )
            pattern = of.at("hook_pattern").float()
            scores = einsum(pattern, of_sources, "b head q k, b head k row -> head k b q row")
            return _with_bias(
                rearrange(scores, "head k b q row -> (head k) b q row"), attention, group, readout
            )
        case "experts":
            scores = scattered(
                _read(of.at("hook_expert_contrib"), readout),
                of.at("hook_expert_indices"),
                model.cfg.n_experts,
            )
            if model.cfg.shared is None:
                return scores
            return torch.cat((scores, _read(of.at("hook_shared_out"), readout)[None]))
        case "neurons":
            mlp = mlp_of(model, group.layer)
            assert isinstance(mlp, MoE)
            neurons = scattered(routed_neurons(of), of.at("hook_expert_indices"), model.cfg.n_experts)
            columns = _read(mlp.experts.W_down.detach(), readout)
            scores = einsum(neurons, columns, "expert b p neuron, expert neuron row -> expert neuron b p row")
            scores = rearrange(scores, "expert neuron b p row -> (expert neuron) b p row")
            if mlp.shared is None:
                return scores
            shared = _neuron_scores(shared_neurons(model, of), mlp.shared.W_down, readout)
            return torch.cat((scores, shared))
        case "dense neurons":
            mlp = mlp_of(model, group.layer)
            assert isinstance(mlp, DenseMLP)
            return _neuron_scores(of.at("hook_post").float(), mlp.W_down, readout)


@reading_weights
def written_by(
    model: HookedMoE, group: SenderGroup, values: Values
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"] | None]:
    """The sum of a group's senders, in float32; and the sum of the sizes of everything that the model rounded
    on its way from them to what the component wrote (see `StreamSum`), None where the component is one sender."""
    of = GroupValues(group, values)
    written = values[group.written_at].float()
    match group.kind:
        case "whole":
            return written, None
        case "heads" | "sources":
            attention = attention_of(model, group.layer)
            z = of.at("hook_z").float() if group.kind == "heads" else attended_values(model, of)
            weight = attention.W_O.detach().float()
            vector = einsum(z, weight, "b p head d_value, head d_value d_model -> b p d_model")
            # z itself (or each head's product with W_O) may have been rounded, and what was written was.
            sizes = einsum(z.abs(), weight.abs(), "b p head d_value, head d_value d_model -> b p d_model")
            return vector + attention.b_O.detach().float(), 2 * sizes + written.abs()
        case "experts":
            routed = of.at("hook_expert_contrib").float()
            vector, sizes = routed.sum(dim=2), routed.abs().sum(dim=2)
            if model.cfg.shared is not None:
                shared = of.at("hook_shared_out").float()
                vector, sizes = vector + shared, sizes + shared.abs()
            return vector, sizes + written.abs()
        case "neurons":
            mlp = mlp_of(model, group.layer)
            assert isinstance(mlp, MoE)
            slots = SlotOrder.of(of.at("hook_expert_indices"), model.cfg.n_experts)
            weight = mlp.experts.W_down.detach().float()
            routed = slots.restore(expert_matmul(slots.sort(routed_neurons(of)), weight, slots.ends))
            vector, sizes = routed.sum(dim=2), routed.abs().sum(dim=2)
            if mlp.shared is not None:
                shared = shared_neurons(model, of) @ mlp.shared.W_down.detach().float()
                vector, sizes = vector + shared, sizes + shared.abs()
            # Each output, its product with the weight or gate, and their sum.
            return vector, 4 * sizes + written.abs()
        case "dense neurons":
            mlp = mlp_of(model, group.layer)
            assert isinstance(mlp, DenseMLP)
            vector = of.at("hook_post").float() @ mlp.W_down.detach().float()
            return vector, vector.abs() + written.abs()


def _read(
    vectors: Float[Tensor, "*place d_model"], readout: Float[Tensor, "row d_model"]
) -> Float[Tensor, "*place row"]:
    return vectors.float() @ readout.T


def _with_bias(
    scores: Float[Tensor, "sender batch pos row"],
    attention: Attention,
    group: SenderGroup,
    readout: Float[Tensor, "row d_model"],
) -> Float[Tensor, "sender_and_bias batch pos row"]:
    if len(group.names) == 1:
        return scores
    bias = _read(attention.b_O.detach(), readout).expand(1, *scores.shape[1:])
    return torch.cat((scores, bias))


def _neuron_scores(
    neurons: Float[Tensor, "batch pos neuron"],
    columns: Float[Tensor, "neuron d_model"],
    readout: Float[Tensor, "row d_model"],
) -> Float[Tensor, "neuron batch pos row"]:
    read = _read(columns.detach(), readout)
    return einsum(neurons, read, "b p neuron, neuron row -> neuron b p row")
