"""`RouterOnly` as hooks: a sender's exact score is subtracted from a router's logits, and nothing else changes.

    logits_r - R_r z_c / s_r        R_r = W_r diag(gamma_r),  z_c what the sender wrote,  s_r the norm's scale

all as they are in the same run.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 2 for a
component's score, section 7.2 for setting it to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.interventions.layer_hooks import Hook, LayerHooks
from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.spec import RouterOnly
from moe_lens.model.hook_point import HookPoint, with_own_hook_points
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_weights import require_all_layers
from moe_lens.model.mlp import DenseMLP
from moe_lens.model.moe import MoE
from moe_lens.model.observers import Run
from moe_lens.routing.readout import router_readout
from moe_lens.routing.senders import SenderGroup
from moe_lens.routing.writes import (
    READ_WITH_WEIGHTS,
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

    def __init__(
        self,
        model: HookedMoE,
        index: int,
        spec: RouterOnly,
        receipt: Receipt,
        layers: Mapping[int, LayerHooks],
    ):
        """
        Args:
            index: of the spec among all that are applied.
            layers: the hooks of layers that other specs change.
        """
        self.model, self.index, self.spec, self.receipt, self.layers = model, index, spec, receipt, layers
        self.group, self.coordinates, _ = spec.located(model.cfg)
        self.receivers = spec.moe_layers(model.cfg)
        if self.group.kind in READ_WITH_WEIGHTS:
            # The receivers run after the sender's layer, when that is no longer in memory.
            require_all_layers(model, f"{spec}, whose sender is read through its layer's weights,")
        self.forget()

    def forget(self) -> None:
        """Let go of a run's values."""
        self.values: dict[str, Tensor] = {}
        self.places: Bool[Tensor, "batch pos"] | None = None
        self.run: Run | None = None
        self.read: tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"]] | None = None

    def begin(self, places: Bool[Tensor, "batch pos"], run: Run) -> None:
        """A run is about to begin.

        Raises:
            ValueError: it does not pass through the sender, or a source position is past the sequence.
            UnfiredIntervention: a source position is not seen where it has to be.
        """
        self.forget()
        layer = 0 if self.group.layer is None else self.group.layer
        if run.first_layer > layer or (self.group.layer is None and run.tokens is None):
            raise ValueError(
                f"{self.spec}: this run starts at layer {run.first_layer}, after {self.spec.sender}"
            )
        key = self.coordinates.get("<-")
        if key is not None:
            if run.n_past is not None:
                raise ValueError(
                    f"{self.spec} names a position, and a generation runs each new token as a column of its own"
                )
            if key >= places.shape[1]:
                raise ValueError(f"{self.spec}: there is no source position {key} among {places.shape[1]}")
            columns = torch.arange(places.shape[1], device=places.device)
            self._require_present(run.real & run.real[:, key, None] & (columns >= key), places, run)
        self.places, self.run = places, run

    def edits(self) -> list[Hook]:
        hooks: list[Hook] = []
        for layer in self.receivers:
            hooks.append((f"blocks.{layer}.mlp.hook_router_logits", self._change_logits))
            if self.spec.hold_outputs:
                hooks.append((f"blocks.{layer}.hook_mlp_out", self._hold))
        return hooks

    def witnesses(self) -> list[Hook]:
        names = hooks_of(self.model, self.group)
        for layer in self.receivers:
            names.append(f"blocks.{layer}.ln2.hook_scale")
            if self.spec.hold_outputs:
                names.append(f"blocks.{layer}.ln2.hook_normalized")
        return [(name, self._keep) for name in dict.fromkeys(names)]

    def _keep(self, value: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        self.values[hook.name] = value

    def _written(self, run: Run) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"]]:
        """What the sender wrote in this run, and where: the same for all receivers."""
        if self.read is None:
            assert self.places is not None
            vector, present = sender_vector(
                self.model, self.group, self.coordinates, self.spec.sender, self.values
            )
            changed = self.layers.get(-1 if self.group.layer is None else self.group.layer)
            if "E" in self.coordinates and changed is not None and changed.kept is not None:
                # A slot to spare holds an expert that is not active.
                present = ((changed.indices == self.coordinates["E"]) & changed.kept).any(dim=-1)
            self._require_present(present, self.places, run)
            self.read = vector, present
        return self.read

    def _change_logits(
        self, value: Float[Tensor, "batch pos expert"], hook: HookPoint
    ) -> Float[Tensor, "batch pos expert"]:
        if self.run is None or self.run is not self.model.current_run:
            raise RuntimeError(
                f"{self.spec} was not told of this run: hooks of as_hooks begin at the embedding, of the model that "
                f"they were made for; model.intervene also goes with start_at_layer"
            )
        assert hook.name is not None
        assert self.places is not None
        layer = int(hook.name.split(".")[1])
        vector, present = self._written(self.run)
        scale = self.values[f"blocks.{layer}.ln2.hook_scale"].float()
        scores = vector @ router_readout(self.model, layer).T / scale
        changed = self.places & present
        self.receipt.add(self.index, layer, asked=int(changed.sum()), fired=int(changed.sum()))
        return torch.where(changed[..., None], (value.float() - scores).to(value.dtype), value)

    def _require_present(
        self, present: Bool[Tensor, "batch pos"], places: Bool[Tensor, "batch pos"], run: Run
    ) -> None:
        if self.spec.inactive == "allow":
            return
        absent = (places & ~present).nonzero()
        explicit = self.spec.pos is not None or self.spec.inactive == "raise"
        if explicit and len(absent):
            row, column = absent[0].tolist()
            raise UnfiredIntervention(
                f"{self.spec.sender} writes nothing at row {row}, position {column}, so it has no score there; "
                f"inactive='allow' lets that pass"
            )
        if not run.n_past and len(absent) == int(places.sum()):
            raise UnfiredIntervention(
                f"{self.spec.sender} writes at none of the {len(absent)} positions of {self.spec}; "
                f"inactive='allow' lets that pass"
            )

    def _hold(
        self, value: Float[Tensor, "batch pos d_model"], hook: HookPoint
    ) -> Float[Tensor, "batch pos d_model"]:
        """The layer's output by its own choice. At all positions: a matmul of other rows would round otherwise."""
        assert hook.name is not None
        layer = int(hook.name.split(".")[1])
        block: Any = self.model.blocks[layer]
        x = block.ln2.w * self.values[f"blocks.{layer}.ln2.hook_normalized"]
        return with_own_hook_points(block.mlp).forward(x)
