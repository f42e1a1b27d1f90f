"""Runs that are left and taken up again: what a context put on a model is there only while its run is at work.

Where many batches go through a model layer by layer, each is in the middle of its run while the others take their
turn. Its hooks, its observers and what the model knows of it must not be there in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from moe_lens.model.hooked_moe import HookedMoE

# Where torch keeps the hooks of a module. Handles know these dicts, so their content is exchanged, not they.
_TORCH_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# TransformerLens's own lists of the same hooks.
_LENS_HOOKS = ("fwd_hooks", "bwd_hooks")


class _Listeners:
    """All that contexts put on a model, as it was at one moment."""

    def __init__(self, model: HookedMoE):
        self.hooks: dict[tuple[str, str], Any] = {}
        for name, point in model.hook_dict.items():
            attributes = point.__dict__
            for kind in _TORCH_HOOKS:
                if attributes[kind]:
                    self.hooks[name, kind] = dict(attributes[kind])
            for kind in _LENS_HOOKS:
                if attributes[kind]:
                    self.hooks[name, kind] = list(attributes[kind])
        self.observers = list(model.run_observers)
        self.run = model.current_run
        # TransformerLens takes off hooks by the depth of the context that put them on.
        self.depth, self.is_caching = model.context_level, model.is_caching

    def put_on(self, model: HookedMoE, instead_of: _Listeners) -> None:
        for name, kind in {**instead_of.hooks, **self.hooks}:
            hooks = self.hooks.get((name, kind), {} if kind in _TORCH_HOOKS else [])
            if kind in _LENS_HOOKS:
                setattr(model.hook_dict[name], kind, list(hooks))
                continue
            on_point = getattr(model.hook_dict[name], kind)
            on_point.clear()
            on_point.update(hooks)
        model.run_observers[:] = self.observers
        model.current_run = self.run
        model.context_level, model.is_caching = self.depth, self.is_caching


class SuspendedRun:
    """Contexts that are open for one run, and on the model only inside of `resumed`.

        with suspended.resumed() as contexts:
            contexts.enter_context(model.hooks(...))
        with suspended.resumed():
            ...  # those hooks fire
        suspended.close()

    `close` has the signature of an `__exit__`, so that an `ExitStack` can be given it.
    """

    def __init__(self, model: HookedMoE):
        self._model = model
        self._contexts = ExitStack()
        self._listeners: _Listeners | None = None

    @contextmanager
    def resumed(self) -> Iterator[ExitStack]:
        """What it put on the model is there; what others of its kind did is not."""
        outside = _Listeners(self._model)
        if self._listeners is not None:
            self._listeners.put_on(self._model, outside)
        try:
            yield self._contexts
        finally:
            self._listeners = _Listeners(self._model)
            outside.put_on(self._model, self._listeners)

    def close(self, *exception: Any) -> None:
        """Leave the contexts, as after this exception if there was one. Closing twice does nothing more."""
        with self.resumed():
            self._contexts.__exit__(*(exception or (None, None, None)))
        self._listeners = None
