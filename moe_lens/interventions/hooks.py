"""Specs as hooks: `model.intervene(...)`, `run_with_interventions`, and `as_hooks` for those who compose their own.

A layer's hooks act in the order of its forward pass: the router's logits (`RouterOnly`), the choice (`ForceExperts`,
`ForbidExperts`, `TopK`, `SwapRanks`, `reroute`), the weights (`renormalize`, a swapped slot's), the experts' outputs
(`mean`, `resample`), their contributions (`zero`). Each counts what it changes where it changes it.

`intervene` puts its hooks on the model when a run begins and takes them off when it ends. They come before all others
at a hook point, so that a cache holds what they made of a value; what other hooks made of the values that they go by
(probabilities, the choice, what a sender wrote) they see, and an edit of the choice that would undo theirs raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.interventions.layer_hooks import Hook, LayerHooks
from moe_lens.interventions.receipt import Receipt, UnfiredIntervention
from moe_lens.interventions.router_only import RouterOnlyHooks
from moe_lens.interventions.spec import Ablate, ForbidExperts, ForceExperts, RouterOnly, Spec, SwapRanks, TopK
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.observers import Run, RunObserver

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
            if isinstance(spec, list | tuple):
                raise TypeError(
                    f"{spec!r} are several interventions; give each as an argument of its own, *specs"
                )
            if not isinstance(spec, _KINDS):
                raise TypeError(
                    f"{spec!r} is no intervention; there are {', '.join(kind.__name__ for kind in _KINDS)}"
                )
        if not model.cfg.moe_layers:
            raise ValueError(f"{model.cfg.model_name} has no MoE layer, so there is nothing to change")
        self.model, self.specs = model, tuple(specs)
        self.acts_at = {i: spec.moe_layers(model.cfg) for i, spec in enumerate(self.specs)}
        self.receipt = Receipt(self.specs)
        self.receipt.expect(self.acts_at)
        for spec in self.specs:
            spec.check(model)
        self.layers: dict[int, LayerHooks] = {}
        for layer in model.cfg.moe_layers:
            here = [
                (i, spec)
                for i, spec in enumerate(self.specs)
                if layer in self.acts_at[i] and not isinstance(spec, RouterOnly)
            ]
            if here:
                self.layers[layer] = LayerHooks(model, layer, here, self.receipt)
        self.routers = [
            RouterOnlyHooks(model, i, spec, self.receipt, self.layers)
            for i, spec in enumerate(self.specs)
            if isinstance(spec, RouterOnly)
        ]
        self._check_routers()
        self.run: Run | None = None
        self._adds_to: Receipt | None = None

    def _check_routers(self) -> None:
        for number, router in enumerate(self.routers):
            changed = [layer for layer in router.receivers if layer in self.layers]
            if router.spec.hold_outputs and changed:
                raise ValueError(
                    f"{router.spec} holds the output of layer {changed[0]}, which "
                    f"{self.layers[changed[0]].specs[0][1]} changes; drop one of the two"
                )
            for other in self.routers[:number]:
                both = sorted(set(router.receivers) & set(other.receivers))
                if both and router.spec.sender == other.spec.sender:
                    raise ValueError(
                        f"the router of layer {both[0]} loses {router.spec.sender} twice: {other.spec}, {router.spec}"
                    )
                if both and router.spec.hold_outputs != other.spec.hold_outputs:
                    raise ValueError(
                        f"layer {both[0]}: {other.spec} and {router.spec} contradict each other on hold_outputs"
                    )

    @property
    def changed(self) -> set[int]:
        """The layers that are acted on."""
        return {layer for layers in self.acts_at.values() for layer in layers}

    @property
    def edits(self) -> list[Hook]:
        """What changes values: before other hooks of the same point, in this order."""
        parts = [*self.routers, *self.layers.values()]
        return [hook for part in parts for hook in part.edits()]

    @property
    def witnesses(self) -> list[Hook]:
        """What looks at values: after other hooks of the same point."""
        parts = [*self.routers, *self.layers.values()]
        return [hook for part in parts for hook in part.witnesses()]

    def begin(self, run: Run) -> None:
        """Look at what is about to run, and raise for what cannot be done there.

        Raises:
            ValueError: a position past the sequence or padding; a layer that the run does not reach; a position in a
                generation, whose later steps have columns of their own; specs that contradict each other there.
        """
        places = {}
        for i, spec in enumerate(self.specs):
            if run.n_past is not None and spec.pos is not None:
                raise ValueError(
                    f"{spec} names a position, and a generation runs each new token as a column of its own"
                )
            beyond = [layer for layer in self.acts_at[i] if not run.first_layer <= layer < run.last_layer]
            if beyond:
                raise ValueError(
                    f"{spec} acts at layer {beyond[0]}, and this run goes through "
                    + (
                        f"layers {run.first_layer} to {run.last_layer - 1}"
                        if run.first_layer < run.last_layer
                        else "none"
                    )
                )
            places[i] = spec.places(run.real)
        for layer_hooks in self.layers.values():
            layer_hooks.begin(places, run)
        for router in self.routers:
            router.begin(places[router.index], run)

    def forget(self) -> None:
        """Let go of a run's values."""
        self.run = None
        for part in (*self.routers, *self.layers.values()):
            part.forget()

    def require_alone(self) -> None:
        """Raises:
        ValueError: an open `intervene` changes a layer that these change too: neither would see the other.
        """
        for observer in self.model.run_observers:
            other = getattr(observer, "__self__", None)
            if isinstance(other, Interventions) and other is not self:
                shared = sorted(other.changed & self.changed)
                if shared:
                    raise ValueError(
                        f"layer {shared[0]} is changed by an open intervene; give all its specs to one intervene"
                    )

    def apart(self) -> RunObserver:
        """What observes one of several runs that are under way at a time: the same specs with values of their own. A
        run that ends well is added to this receipt."""
        other = Interventions(self.model, self.specs)
        other._adds_to = self.receipt if self._adds_to is None else self._adds_to
        return other.observing

    @contextmanager
    def observing(self, run: Run) -> Iterator[None]:
        """A run under these interventions.

        Raises:
            RuntimeError: inside another run of theirs.
            UnfiredIntervention: at its end, not everything happened. A run that raises is not counted.
        """
        if self.run is not None:
            raise RuntimeError("a hook ran the model under interventions, inside a run under the same ones")
        counts = self.receipt.counts()
        try:
            self.begin(run)
            self.run = run
            with _hooked(self.model, self.edits, self.witnesses):
                yield
            self.receipt.n_runs += 1
            self.receipt.check()
            if self._adds_to is not None:
                self._adds_to.add_all(self.receipt)
        except BaseException:
            self.receipt.restore(counts)
            raise
        finally:
            self.forget()


@contextmanager
def _hooked(model: HookedMoE, first: Sequence[Hook], last: Sequence[Hook]) -> Iterator[None]:
    """Hooks on a model, some before and some after those that it has."""
    with ExitStack() as handles:
        # Each goes before those that are there, the former ones of these too.
        for (name, hook), is_first in [*((h, True) for h in reversed(first)), *((h, False) for h in last)]:
            handle = model.hook_dict[name].register_forward_hook(_as_torch_hook(hook), prepend=is_first)
            handles.callback(handle.remove)
        yield


def _as_torch_hook(hook: Callable[..., Any]) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    return lambda point, _, value: hook(value, hook=point)


@contextmanager
def intervene(model: HookedMoE, *specs: Spec) -> Iterator[Receipt]:
    """Every forward pass inside of this is changed by the specs; see `HookedMoE.intervene`."""
    interventions = Interventions(model, specs)
    interventions.require_alone()
    model.run_observers.append(interventions.observing)
    try:
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
        TypeError: something that is no spec.
        ValueError: what makes no sense in this model or for these tokens, before the model runs.
        UnfiredIntervention: not everything that was asked for happened.
    """
    specs = [specs] if isinstance(specs, Spec | str) else list(specs)  # type: ignore[list-item]
    with intervene(model, *specs) as receipt:
        return model(tokens_or_text, **forward_arguments), receipt


class InterventionHooks(list[Hook]):
    """`(name, hook)` pairs for `run_with_hooks`; `receipt` says what they did, and `receipt.check()` raises unless all
    of it happened."""

    receipt: Receipt


def as_hooks(model: HookedMoE, *specs: Spec) -> InterventionHooks:
    """The specs as hooks, to be composed with others in `model.run_with_hooks(tokens, fwd_hooks=...)`.

    They act in the order in which they are added, so they go after hooks that edit what they go by: probabilities, the
    choice, what a sender writes. They are all needed, in their order, and serve for any number of runs.

    Raises:
        TypeError: something that is no spec.
        ValueError: what makes no sense in this model. What makes none for the tokens (a position past the sequence)
            raises at the first hook, before any layer has run.
    """
    interventions = Interventions(model, specs)

    def begin(value: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
        if model.current_run is None:
            raise RuntimeError("these hooks were made for another model, or are not in a forward pass of it")
        interventions.require_alone()
        interventions.begin(model.current_run)
        interventions.receipt.n_runs += 1

    hooks = InterventionHooks([("hook_embed", begin), *interventions.edits, *interventions.witnesses])
    hooks.receipt = interventions.receipt
    return hooks
