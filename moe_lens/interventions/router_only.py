"""`RouterOnly` as hooks: a sender's exact score is subtracted from a router's logits, and nothing else changes.

    logits_r - R_r z_c / s_r        R_r = W_r diag(gamma_r),  z_c what the sender wrote,  s_r the norm's scale

all as they are in the same run.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 2 for a
component's score, section 7.2 for setting it to zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.spec import RouterOnly
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.mlp import DenseMLP
from moe_lens.model.moe import MoE
from moe_lens.model.observers import Run
from moe_lens.routing.readout import router_readout
from moe_lens.routing.senders import SenderGroup
from moe_lens.routing.writes import (
    GroupValues,
    attention_of,
    head_values,
    hooks_of,
    mlp_of,
    routed_neurons,
    shared_neurons,
)


def sender_vector(
    model: HookedMoE,
    group: SenderGroup,
    coordinates: Mapping[str, int],
    name: str,
    values: Mapping[str, Tensor],
) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"]]:
    """What one sender wrote, in float32; and where it wrote at all.

    Args:
        group, coordinates: the component, and where in it the sender lies (`Senders.group_of`, `.coordinates`).
        name: the sender's.
        values: of the hook points that `hooks_of(model, group)` lists.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", eq. 2 and 9 to 11.
    """
    of = GroupValues(group, values)
    if group.kind == "whole":
        vector = values[group.written_at].float()
        return vector, _everywhere(vector)
    if group.kind in ("heads", "sources"):
        attention = attention_of(model, group.layer)
        if name.endswith("bias"):
            z = of.at("hook_z") if group.kind == "heads" else of.at("hook_v")
            vector = attention.b_O.detach().float().expand(*z.shape[:2], -1)
            return vector, _everywhere(vector)
        head = coordinates["H"]
        weight = attention.W_O[head].detach().float()
        if group.kind == "heads":
            vector = of.at("hook_z")[:, :, head].float() @ weight
            return vector, _everywhere(vector)
        key = coordinates["<-"]
        pattern = of.at("hook_pattern")[:, head].float()
        if key >= pattern.shape[-1]:
            raise ValueError(f"{name}: there is no source position {key} among {pattern.shape[-1]}")
        value = head_values(attention, of.at("hook_v"))[:, key, head] @ weight
        weights = pattern[:, :, key]
        return einsum(weights, value, "b q, b d -> b q d"), weights > 0
    mlp = mlp_of(model, group.layer)
    if "E" in coordinates:
        active = of.at("hook_expert_indices") == coordinates["E"]
        if group.kind == "experts":
            slots = of.at("hook_expert_contrib").float()
        else:
            assert isinstance(mlp, MoE)
            column = mlp.experts.W_down[coordinates["E"], coordinates["N"]].detach().float()
            slots = routed_neurons(of)[..., coordinates["N"], None] * column
        return (slots * active[..., None]).sum(dim=2), active.any(dim=-1)
    if group.kind == "experts":
        vector = of.at("hook_shared_out").float()
    elif group.kind == "neurons":
        assert isinstance(mlp, MoE)
        assert mlp.shared is not None
        neuron = shared_neurons(model, of)[..., coordinates["N"], None]
        vector = neuron * mlp.shared.W_down[coordinates["N"]].detach().float()
    else:
        assert isinstance(mlp, DenseMLP)
        neuron = of.at("hook_post")[..., coordinates["N"], None].float()
        vector = neuron * mlp.W_down[coordinates["N"]].detach().float()
    return vector, _everywhere(vector)


def _everywhere(vector: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
    return torch.ones_like(vector[..., 0], dtype=torch.bool)


class RouterOnlyHooks:
    """The hooks of one `RouterOnly`.

    Attributes:
        receivers: the layers whose routers are changed.
    """

    def __init__(self, model: HookedMoE, index: int, spec: RouterOnly, receipt: Receipt):
        self.model, self.index, self.spec, self.receipt = model, index, spec, receipt
        self.group, self.coordinates, _ = spec.located(model.cfg)
        self.receivers = spec.moe_layers(model.cfg)
        self.values: dict[str, Tensor] = {}
        self.places: Bool[Tensor, "batch pos"] | None = None
        self.run: Run | None = None

    def begin(self, places: Bool[Tensor, "batch pos"], run: Run) -> None:
        """A run is about to begin.

        Raises:
            ValueError: it does not pass through the sender, or a source position is past the sequence.
        """
        layer = -1 if self.group.layer is None else self.group.layer
        if run.first_layer > max(layer, 0) or (layer < 0 and run.first_layer > 0):
            raise ValueError(
                f"{self.spec}: this run starts at layer {run.first_layer}, after {self.spec.sender}"
            )
        key = self.coordinates.get("<-")
        if key is not None and (run.n_past or key >= places.shape[1]):
            raise ValueError(f"{self.spec}: there is no source position {key} among {places.shape[1]}")
        self.places, self.run, self.values = places, run, {}

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        hooks: list[tuple[str, Callable[..., Any]]] = []
        for layer in self.receivers:
            block = f"blocks.{layer}"
            hooks.append((f"{block}.ln2.hook_scale", self._keep))
            if self.spec.hold_outputs:
                hooks.append((f"{block}.ln2.hook_normalized", self._keep))
                hooks.append((f"{block}.hook_mlp_out", self._hold))
            hooks.append((f"{block}.mlp.hook_router_logits", self._on_logits))
        return hooks

    def _keep(self, value: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        self.values[hook.name] = value

    def _on_logits(
        self, value: Float[Tensor, "batch pos expert"], hook: HookPoint
    ) -> Float[Tensor, "batch pos expert"]:
        assert hook.name is not None
        assert self.places is not None
        layer = int(hook.name.split(".")[1])
        vector, present = sender_vector(
            self.model, self.group, self.coordinates, self.spec.sender, self.values
        )
        self._require_present(present)
        scale = self.values[f"blocks.{layer}.ln2.hook_scale"].float()
        scores = vector @ router_readout(self.model, layer).T / scale
        changed = self.places & present
        self.receipt.add(self.index, layer, asked=int(changed.sum()), fired=int(changed.sum()))
        return torch.where(changed[..., None], (value.float() - scores).to(value.dtype), value)

    def _require_present(self, present: Bool[Tensor, "batch pos"]) -> None:
        assert self.places is not None
        assert self.run is not None
        if self.spec.inactive == "allow" or self.run.n_past:
            return
        absent = self.places & ~present
        explicit = self.spec.pos is not None or self.spec.inactive == "raise"
        if explicit and bool(absent.any()):
            batch, pos = absent.nonzero()[0].tolist()
            raise UnfiredIntervention(
                f"{self.spec.sender} writes nothing at row {batch}, position {pos}, so it has no score there; "
                f"inactive='allow' lets that pass"
            )
        if not bool((self.places & present).any()):
            raise UnfiredIntervention(
                f"{self.spec.sender} writes at none of the {int(self.places.sum())} positions of {self.spec}; "
                f"inactive='allow' lets that pass"
            )

    def _hold(
        self, value: Float[Tensor, "batch pos d_model"], hook: HookPoint
    ) -> Float[Tensor, "batch pos d_model"]:
        """The layer's output by its own choice, at the positions that are changed."""
        assert hook.name is not None
        assert self.places is not None
        layer = int(hook.name.split(".")[1])
        block: Any = self.model.blocks[layer]
        clean = without_hooks(block.mlp)(block.ln2.w * self.values[f"blocks.{layer}.ln2.hook_normalized"])
        return torch.where(self.places[..., None], clean, value)


def sender_hooks(model: HookedMoE, router: RouterOnlyHooks) -> list[tuple[str, Callable[..., Any]]]:
    """The hooks that keep what the sender is read from."""
    return [(name, router._keep) for name in hooks_of(model, router.group)]


def without_hooks(module: nn.Module) -> nn.Module:
    """The same module on the same weights, with hook points of its own: whoever listens hears nothing of its runs."""
    twin = copy.copy(module)
    twin._modules = {
        name: HookPoint(may_change_shape=child.may_change_shape) if isinstance(child, HookPoint) else child
        for name, child in module._modules.items()
    }
    return twin
