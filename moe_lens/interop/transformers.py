"""Hook points on the routing of any transformers MoE that uses transformers' experts interface.

`attach(model)` registers an experts implementation for as long as its context lasts. That implementation has the
class's own code do all arithmetic: the layer's output comes from the implementation with which the model was loaded,
and each slot's output from the same one, called with the slots as tokens of one expert each and a weight of one. So
biases, transposed layouts, clamped gates and norms after the experts are what they are in the model. In every run
the weighted slots are summed and compared with the layer's output; a difference raises.

Routers are run by their own code too: see `router_trace`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_lens.interop.expert_layers import ExpertLayer, expert_layers, require_transformers_model
from moe_lens.interop.router_trace import run_traced
from moe_lens.interop.slot_sum import SlotSumError, check_sum
from moe_lens.model.caching import HookedModel
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.moe import check_forced_indices

__all__ = ["AttachedModel", "SlotSumError", "attach"]

_ATTACHED = "_moe_lens_attached"


@contextmanager
def attach(hf_model: PreTrainedModel) -> Iterator[AttachedModel]:
    """Give a transformers MoE this library's hook points, for the time of the context.

    For layer `l` (the model's own index; only MoE layers have points), with leading axes `batch pos`:

    | hook point | shape | an edit |
    |---|---|---|
    | `blocks.{l}.mlp.hook_router_logits` | `b p expert` | re-routes, by the router's own code |
    | `blocks.{l}.mlp.hook_expert_indices` | `b p k` | forces the choice; weights are read for it |
    | `blocks.{l}.mlp.hook_routing_weights` | `b p k` | acts last |
    | `blocks.{l}.mlp.hook_expert_out` | `b p k d` | E_i(x), before its weight |
    | `blocks.{l}.mlp.hook_expert_contrib` | `b p k d` | g_i E_i(x), what is summed |

    Slots are sorted by routing weight, heaviest first; forced indices keep the caller's order. Logits are what the
    router returns as such (after a soft cap or a multiplier, before biases that only choose), or, where it returns
    probabilities, what those are made of. Where nothing is edited the model gives exactly what it gives unattached.
    A model with several stacks of MoE layers has their names in front (`vision_moe.blocks.{l}.mlp...`). A layer
    that is given a flat list of tokens, as vision towers are, has a batch of one.

    A router may not allow an edit: its choice may not follow from its logits (experts chosen by token), or its
    weights may not be read for the experts it returns. Its values can still be read, and the edit raises.

    Args:
        hf_model: a loaded transformers model, in eval mode where anything is edited. Its config, its modules and
            transformers' registry of experts implementations are as before when the context ends, also by an
            exception.

    Returns:
        A context manager; what it gives has `hook_dict`, `hooks`, `run_with_hooks` and `run_with_cache`, and is
        called as the model is. The model itself, called inside the context, runs with the same hooks.
        `run_with_cache(incl_bwd=True)` takes the gradient of the model's own loss, for which it wants `labels=`.

    Raises:
        TypeError: not a transformers model.
        ValueError: the model does not use transformers' experts interface (it names what is missing), a layer's
            router is not found, or the model is attached already.
        RouterNotUnderstood: in a run, a router that does not return logits, weights and indices, or an edit that it
            does not allow, by name.
        SlotSumError: in a run, the slots of a layer do not sum to its output; the layer and the error are named.
        RuntimeError: what the context gave is run after the context ended.
    """
    require_transformers_model(
        hf_model,
        "For a TransformerBridge there is moe_lens.interop.transformer_lens.attach, for a model in nnsight "
        "moe_lens.interop.nnsight, and a HookedMoE has these hook points itself",
    )
    if hasattr(hf_model, _ATTACHED):
        raise ValueError(f"{type(hf_model).__name__} is attached already; use what the first attach gave")
    attached = AttachedModel(hf_model, expert_layers(hf_model))
    with ExitStack() as restore:
        object.__setattr__(hf_model, _ATTACHED, True)
        restore.callback(object.__delattr__, hf_model, _ATTACHED)
        _install(attached, restore)
        try:
            yield attached
        finally:
            attached.reset_hooks(including_permanent=True)
            attached.has_ended = True


def _install(attached: AttachedModel, restore: ExitStack) -> None:
    """Put the layers' code in the model's place, with what takes it out again."""
    layers = {id(layer.where.experts): layer for layer in attached.layers}
    name = f"moe_lens_{uuid.uuid4().hex}"
    own_names: dict[int, Any] = {}

    def implementation(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        own = ALL_EXPERTS_FUNCTIONS.get_interface(
            own_names[id(experts.config)], type(experts).forward.__wrapped__
        )
        layer = layers.get(id(experts))
        # Another model may have been made from the same config.
        if layer is None:
            return own(experts, x, indices, weights)
        return layer.run_experts(lambda *inputs: own(experts, *inputs), x, indices, weights)

    ALL_EXPERTS_FUNCTIONS[name] = implementation
    restore.callback(ALL_EXPERTS_FUNCTIONS.pop, name)
    for layer in attached.layers:
        layer.implementation = name
        config = layer.where.experts.config
        if id(config) not in own_names:
            own_names[id(config)] = config._experts_implementation
            # The private field: the setter would also set every sub-config's.
            restore.callback(
                setattr, config, "_experts_implementation_internal", config._experts_implementation
            )
            config._experts_implementation_internal = name
        handle = layer.where.block.register_forward_pre_hook(layer.see_input, with_kwargs=True)
        restore.callback(handle.remove)
        restore.callback(layer.where.block.register_forward_hook(layer.see_output).remove)
        _wrap_forward(layer.where.router, layer.run_router, restore)


def _wrap_forward(module: nn.Module, wrapper: Callable[..., Any], restore: ExitStack) -> None:
    """Have `wrapper(forward, *args, **kwargs)` run in place of a module's forward."""
    own = module.forward
    # Others, such as accelerate, put a forward on the instance as well.
    was_its_own = "forward" in module.__dict__

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper(own, *args, **kwargs)

    module.forward = forward
    if was_its_own:
        restore.callback(setattr, module, "forward", own)
    else:
        restore.callback(delattr, module, "forward")


class AttachedModel(HookedModel):
    """A transformers model with hook points on its MoE layers; made by `attach`.

    Attributes:
        hf_model: the model.
        layers: its MoE layers, in order.
        hook_dict: name -> hook point.
        has_ended: whether the context that made it did; the points then see nothing more.
    """

    def __init__(self, hf_model: PreTrainedModel, layers: list[ExpertLayer]):
        super().__init__()
        # In a tuple, so that the model's modules are not taken for hook points' owners.
        self._held = (hf_model,)
        self.has_ended = False
        self.cfg = SimpleNamespace(device=hf_model.device, model_name=hf_model.config.model_type)  # type: ignore[assignment]
        self.layers = [AttachedLayer(where, MoEPoints()) for where in layers]
        for layer in self.layers:
            _put(self, layer.where.name, layer.points)
        self.setup()

    @property
    def hf_model(self) -> PreTrainedModel:
        return self._held[0]

    @property
    def _attn_result_is_on(self) -> bool:
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers model's own forward, with its arguments and what it returns.

        Raises:
            RuntimeError: the context ended, so that no hook would run.
            TypeError: text, or a tokenizer's whole answer.
        """
        if self.has_ended:
            raise RuntimeError(
                "the context of attach has ended, so that no hook would run; attach again, and use what that gives"
            )
        if args and isinstance(args[0], str | list | tuple | Mapping):
            raise TypeError(
                f"a transformers model takes tokens, a tensor [batch, pos], not {type(args[0]).__name__}; for text, "
                f"attached(**tokenizer(text, return_tensors='pt'))"
            )
        return self.hf_model(*args, **kwargs)

    def _to_differentiate(self, out: Any) -> Tensor:
        loss = getattr(out, "loss", None)
        if loss is None:
            raise ValueError(
                "incl_bwd=True takes the gradient of the model's loss, and it gave none; give labels= (the tokens "
                "themselves, for the loss of each next one)"
            )
        return loss


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module under a dotted name."""
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(last, module)


class MoEPoints(nn.Module):
    """The hook points of one MoE layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_router_logits = HookPoint()
        self.hook_expert_indices = HookPoint(may_change_shape=True)
        self.hook_routing_weights = HookPoint()
        self.hook_expert_out = HookPoint()
        self.hook_expert_contrib = HookPoint()


@dataclass
class _Routing:
    """What a layer's router has given to its experts: weights and indices as they go there, and which slot of
    those is shown in which place."""

    weights: Tensor
    indices: Tensor
    order: Int[Tensor, "batch pos k"]


class AttachedLayer:
    """One MoE layer while its model is attached: what runs in its router's and in its experts' place."""

    def __init__(self, where: ExpertLayer, points: MoEPoints):
        self.where = where
        self.points = points
        self.implementation: str | None = None
        """The name under which `run_experts` is registered."""
        self._leading: tuple[int, int] | None = None
        self._routing: _Routing | None = None
        self._ran = False

    def see_input(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Batch and positions of the tokens that come: of the first tensor that the block is given. None where it
        gets a flat list of tokens."""
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
        self._leading = (x.shape[0], x.shape[1]) if x.ndim == 3 else None
        self._routing, self._ran = None, False

    def see_output(self, block: nn.Module, args: Any, output: Any) -> None:
        """A block that did without its experts module (a fused kernel in its place) would leave the points silent."""
        if not self._ran:
            raise RuntimeError(
                f"{self.where}: {type(block).__name__} ran without running its experts module, so nothing of it can be "
                f"seen; load the model without a kernel in its place"
            )

    def _shown(self, flat: Tensor) -> Tensor:
        """Tokens in batch and positions, with a router's or experts' last axis kept."""
        assert self._leading is not None
        return flat.reshape(*self._leading, flat.shape[-1])

    def run_router(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The router, with hooks on its logits, its choice and its weights."""
        named = self.where.experts.config._experts_implementation
        if named != self.implementation:
            raise RuntimeError(
                f"{self.where}: the experts implementation was set to {named!r} while attached; set it before attach"
            )
        returned, trace = run_traced(forward, str(self.where), args, kwargs)
        n_tokens = trace.weights.shape[:-1].numel()
        if self._leading is None or self._leading[0] * self._leading[1] != n_tokens:
            self._leading = (1, n_tokens)

        def again(logits: Tensor | None, indices: Tensor | None) -> Any:
            if self.where.router.training:
                raise RuntimeError(
                    f"{self.where}: its router runs again for an edit, which its noise in training would change; "
                    f"call eval() on the model first"
                )
            return trace.run_again(forward, args, kwargs, logits, indices)

        logits, logits_are_new = _through(
            self.points.hook_router_logits, self._shown(trace.logits), why_fixed=trace.why_logits_are_fixed
        )
        if logits_are_new:
            returned = again(logits, None)
        _, weights, indices = returned[:3]

        order = self._shown(weights).argsort(dim=-1, descending=True, stable=True)
        chosen, choice_is_new = _through(
            self.points.hook_expert_indices, self._shown(indices).gather(-1, order)
        )
        if choice_is_new:
            assert self.points.hook_expert_indices.name is not None
            check_forced_indices(
                chosen, int(self.where.experts.num_experts), self.points.hook_expert_indices.name
            )
            returned = again(logits if logits_are_new else None, chosen)
            _, weights, indices = returned[:3]
            order = torch.arange(chosen.shape[-1], device=chosen.device).expand(chosen.shape)

        seen, weights_are_new = _through(
            self.points.hook_routing_weights, self._shown(weights).gather(-1, order)
        )
        if weights_are_new:
            weights = torch.zeros_like(seen).scatter(-1, order, seen).reshape(weights.shape)
            returned = type(returned)((returned[0], weights, *returned[2:]))
        self._routing = _Routing(weights, indices, order)
        return returned

    def run_experts(
        self,
        own: Callable[[Tensor, Tensor, Tensor], Tensor],
        x: Float[Tensor, "token d"],
        indices: Int[Tensor, "token k"],
        weights: Float[Tensor, "token k"],
    ) -> Float[Tensor, "token d"]:
        """The experts, with hooks on each slot's output and contribution."""
        routing, self._routing, self._ran = self._routing, None, True
        if routing is None:
            raise RuntimeError(
                f"{self.where}: its experts ran without its router, so their choice is not known"
            )
        if not _same(routing.indices, indices) or not _same(routing.weights, weights):
            raise RuntimeError(
                f"{self.where}: its experts were given other indices or weights than its router returned"
            )
        n_slots = indices.shape[-1]
        layer_out = own(x, indices, weights)
        slots = own(
            repeat(x, "token d -> (token k) d", k=n_slots),
            rearrange(indices, "token k -> (token k) 1"),
            torch.ones_like(rearrange(weights, "token k -> (token k) 1")),
        )
        slots = rearrange(slots, "(token k) d -> token k d", k=n_slots)
        check_sum(weights[..., None] * slots, layer_out, str(self.where))

        order = rearrange(routing.order, "b p k -> (b p) k")
        in_order = slots.gather(1, order[..., None].expand_as(slots))
        shown = in_order.reshape(*routing.order.shape, -1)
        expert_out, out_is_new = _through(self.points.hook_expert_out, shown)
        heaviest_first = weights.gather(1, order).reshape(routing.order.shape)
        contrib, contrib_is_new = _through(
            self.points.hook_expert_contrib, (heaviest_first[..., None] * expert_out).to(slots.dtype)
        )
        if not out_is_new and not contrib_is_new:
            return layer_out
        return contrib.sum(dim=2).reshape(layer_out.shape).to(layer_out.dtype)


def _through(point: HookPoint, value: Tensor, why_fixed: str | None = None) -> tuple[Tensor, bool]:
    """A value after its hook point, and whether what follows must be made from it anew: because it was edited, or
    because a listener may ask for its gradient."""
    uncounted = value.is_inference() and point.is_listened_to
    before = value.clone() if uncounted else value
    n_edits = point.n_edits
    seen = point(value)
    edited = point.n_edits != n_edits or (uncounted and not torch.equal(before, seen))
    carries_grad = point.is_listened_to and torch.is_grad_enabled() and value.requires_grad
    return seen, edited or (carries_grad and why_fixed is None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))
