"""Specs as hooks: `model.intervene(...)`, `run_with_interventions`, and `as_hooks` for those who compose their own.

A layer's hooks act in the order of its forward pass: the router's logits (`RouterOnly`), the choice (`ForceExperts`,
`ForbidExperts`, `TopK`, `SwapRanks`, `reroute`), the weights (`renormalize`, a swapped slot's), the experts' outputs
(`mean`, `resample`), their contributions (`zero`). Each counts what it changes where it changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.layer_hooks import LayerHooks
from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.router_only import RouterOnlyHooks, sender_hooks
from moe_lens.interventions.spec import Ablate, ForbidExperts, ForceExperts, RouterOnly, Spec, SwapRanks, TopK
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.observers import Run

Hook = tuple[str, Callable[..., Any]]
_KINDS = (Ablate, ForceExperts, ForbidExperts, SwapRanks, TopK, RouterOnly)


class Interventions:
    """Specs, checked against a model, and the hooks that carry them out.

    Raises:
        TypeError: something that is no spec.
        ValueError: what makes no sense in this model, or two specs that contradict each other.
    """

    def __init__(self, model: HookedMoE, specs: Sequence[Spec]):
        if not specs:
            raise ValueError("there is no intervention; give one or more specs")
        for spec in specs:
            if not isinstance(spec, _KINDS):
                raise TypeError(
                    f"{spec!r} is no intervention; there are {', '.join(kind.__name__ for kind in _KINDS)}"
                )
        self.model, self.specs = model, tuple(specs)
        self.receipt = Receipt(self.specs)
        sizes = self._choice_sizes()
        for spec in self.specs:
            layers = spec.moe_layers(model.cfg)
            spec.check(model, min(sizes.get(layer, model.cfg.top_k) for layer in layers))
        self.layers = {
            layer: LayerHooks(
                model,
                layer,
                [
                    (i, spec)
                    for i, spec in enumerate(self.specs)
                    if not isinstance(spec, RouterOnly) and layer in spec.moe_layers(model.cfg)
                ],
                self.receipt,
            )
            for layer in model.cfg.moe_layers
        }
        self.layers = {layer: hooks for layer, hooks in self.layers.items() if hooks.specs}
        self.routers = [
            RouterOnlyHooks(model, i, spec, self.receipt)
            for i, spec in enumerate(self.specs)
            if isinstance(spec, RouterOnly)
        ]
        for router in self.routers:
            held = [layer for layer in router.receivers if layer in self.layers and router.spec.hold_outputs]
            if held:
                raise ValueError(
                    f"{router.spec} holds the output of layer {held[0]}, which "
                    f"{self.layers[held[0]].specs[0][1]} changes; drop one of the two"
                )
        self._is_ready = False

    def _choice_sizes(self) -> dict[int, int]:
        """How many experts a layer takes at every position, at least, where a TopK is applied."""
        sizes: dict[int, int] = {}
        for spec in self.specs:
            if not isinstance(spec, TopK):
                continue
            for layer in spec.moe_layers(self.model.cfg):
                if layer in sizes:
                    raise ValueError(f"layer {layer}: two TopK contradict each other")
                sizes[layer] = spec.k if spec.pos is None else min(spec.k, self.model.cfg.top_k)
        return sizes

    def hooks(self) -> list[Hook]:
        """All of them, in the order of the forward pass within each layer."""
        hooks: list[Hook] = []
        for router in self.routers:
            hooks += sender_hooks(self.model, router)
        for layer_hooks in self.layers.values():
            hooks += layer_hooks.hooks()
        for router in self.routers:
            hooks += router.hooks()
        # RouterOnly's edit of the logits comes before the choice whatever the order here: another hook point.
        return hooks

    def begin(self, run: Run) -> None:
        """Look at what is about to run, and raise for what cannot be done there.

        Raises:
            ValueError: a position past the sequence or padding; a layer that the run does not reach; a position in a
                generation, whose later steps have columns of their own.
        """
        for i, spec in enumerate(self.specs):
            if run.n_past and spec.pos is not None:
                raise ValueError(
                    f"{spec} names a position, and a generation runs each new token as a column of its own"
                )
            places = spec.places(run.real)
            beyond = [
                layer
                for layer in spec.moe_layers(self.model.cfg)
                if not run.first_layer <= layer < run.last_layer
            ]
            if beyond:
                raise ValueError(
                    f"{spec} acts at layer {beyond[0]}, and this run goes through layers {run.first_layer} to "
                    f"{run.last_layer - 1}"
                )
            for layer_hooks in self.layers.values():
                layer_hooks.begin(i, spec, places, run)
        for router in self.routers:
            router.begin(router.spec.places(run.real), run)
        self._is_ready = True

    def end(self) -> None:
        """After a run: everything must have happened.

        Raises:
            UnfiredIntervention: something did not.
        """
        self._is_ready = False
        self.receipt.n_runs += 1
        self.receipt.check()

    def require_alone(self) -> None:
        """Raises:
        ValueError: an open `intervene` changes a layer that these change too: neither would see the other.
        """
        for observer in self.model.run_observers:
            other = getattr(observer, "__self__", None)
            if isinstance(other, Interventions):
                shared = sorted(other.changed & self.changed)
                if shared:
                    raise ValueError(
                        f"layer {shared[0]} is changed by an open intervene; give all its specs to one intervene"
                    )

    @property
    def changed(self) -> set[int]:
        """The layers that are acted on."""
        return {layer for spec in self.specs for layer in spec.moe_layers(self.model.cfg)}

    @contextmanager
    def observing(self, run: Run) -> Iterator[None]:
        self.begin(run)
        yield
        self.end()


@contextmanager
def intervene(model: HookedMoE, *specs: Spec) -> Iterator[Receipt]:
    """Every forward pass inside of this is changed by the specs; see `HookedMoE.intervene`."""
    interventions = Interventions(model, specs)
    interventions.require_alone()
    model.run_observers.append(interventions.observing)
    try:
        with model.hooks(interventions.hooks()):
            yield interventions.receipt
    finally:
        model.run_observers.remove(interventions.observing)
    if interventions.receipt.n_runs == 0:
        raise UnfiredIntervention(f"no forward pass was run with {', '.join(map(str, specs))}")


def run_with_interventions(
    model: HookedMoE, tokens_or_text: Any, specs: Spec | Sequence[Spec], **forward_arguments: Any
) -> tuple[Any, Receipt]:
    """One forward pass under interventions.

    Args:
        tokens_or_text: as `model.forward` takes it.
        specs: one, or several.
        forward_arguments: for `model.forward`: `attention_mask`, `return_type`, `loss_per_token`, ...

    Returns:
        What the forward pass returns, and the receipt.

    Raises:
        ValueError: what makes no sense in this model or for these tokens, before the model runs.
        UnfiredIntervention: not everything that was asked for happened.
    """
    specs = [specs] if isinstance(specs, Spec) else list(specs)
    with intervene(model, *specs) as receipt:
        return model(tokens_or_text, **forward_arguments), receipt


class InterventionHooks(list[Hook]):
    """`(name, hook)` pairs for `run_with_hooks`; `receipt` says what they did, and `receipt.check()` raises unless all
    of it happened."""

    receipt: Receipt


def as_hooks(
    model: HookedMoE,
    *specs: Spec,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
) -> InterventionHooks:
    """The specs as hooks, to be composed with others in `model.run_with_hooks(tokens, fwd_hooks=...)`.

    Args:
        attention_mask: of the tokens that will be run; hooks do not see it.

    Raises:
        ValueError: what makes no sense in this model. What makes none for the tokens (a position past the sequence)
            raises at the first hook, before any layer has run.
    """
    interventions = Interventions(model, specs)
    mask = None if attention_mask is None else torch.as_tensor(attention_mask).bool().to(model.cfg.device)

    def begin(value: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
        real = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device) if mask is None else mask
        if real.shape != value.shape[:2]:
            raise ValueError(
                f"as_hooks was given an attention_mask {list(real.shape)}, and the tokens are {list(value.shape[:2])}"
            )
        interventions.begin(Run(real, 0, model.cfg.n_layers, None))
        interventions.receipt.n_runs += 1

    hooks = InterventionHooks([("hook_embed", begin), *interventions.hooks()])
    hooks.receipt = interventions.receipt
    return hooks
