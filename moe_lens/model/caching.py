"""Running with hooks and caches: TransformerLens's interface, with its silences made loud.

TransformerLens ignores a filter that matches nothing, and slices positions on a guessed axis. Here unknown
names raise, and every hook point knows its own position axis.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import NamesFilter
from transformer_lens.utilities.slice import Slice, SliceInput

from moe_lens.model.hook_point import HookPoint

HookName = str | Callable[[str], bool]


class HookedModel(HookedRootModule):
    """A `HookedRootModule` whose names are checked and whose caches are `ActivationCache`s."""

    hook_dict: dict[str, HookPoint]  # pyright: ignore[reportIncompatibleVariableOverride]

    def matching_hooks(self, names: NamesFilter) -> list[str]:
        """The hook names that a filter selects.

        Args:
            names: None for all, a name, a sequence of names, or a predicate. `attn.hook_result` costs
                `[batch, pos, head, d_model]` a layer, so None and predicates reach it only after
                `set_use_attn_result(True)`; its plain name always does.

        Raises:
            ValueError: a name that does not exist (the nearest ones are given), or a filter that matches
                nothing.
        """
        if isinstance(names, str):
            names = [names]
        if names is not None and not callable(names):
            names = list(names)
            for name in names:
                self._require_hook(name)
            if len(names) == 0:
                raise ValueError("the list of hook names is empty; None selects every hook")
            return list(dict.fromkeys(names))
        matched = [
            name
            for name in self.hook_dict
            if (names is None or names(name))
            and (self._attn_result_is_on or not name.endswith("hook_result"))
        ]
        if not matched:
            raise ValueError(
                "the names filter matches no hook of this model; `model.hook_dict` lists the names "
                "(`attn.hook_result` only after set_use_attn_result(True))"
            )
        return matched

    @property
    def _attn_result_is_on(self) -> bool:
        return self.cfg.use_attn_result  # type: ignore[attr-defined]

    def _require_hook(self, name: str) -> None:
        if name in self.hook_dict:
            return
        nearest = difflib.get_close_matches(name, self.hook_dict, n=3, cutoff=0.5)
        hint = f"; nearest are {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"this model has no hook named {name!r}{hint}")

    # Every TransformerLens way to add a hook comes through one of these three.

    def add_hook(self, name: HookName, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        for matched in self.matching_hooks(name):
            super().add_hook(matched, hook, *args, **kwargs)

    def add_caching_hooks(  # type: ignore[override]
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Add, and leave, the hooks that fill a cache on every run; see `run_with_cache`."""
        stored, forward_hooks, backward_hooks = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache
        )
        for name, hook in forward_hooks:
            self.hook_dict[name].add_hook(hook, "fwd")  # type: ignore[arg-type]
        for name, hook in backward_hooks:
            self.hook_dict[name].add_hook(hook, "bwd")  # type: ignore[arg-type]
        return stored

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[HookName, Callable[..., Any]]] = (),
        bwd_hooks: Sequence[tuple[HookName, Callable[..., Any]]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedRootModule]:
        """TransformerLens's context manager; a name or predicate that matches nothing raises first."""
        expanded = [
            [(name, hook) for names, hook in hooks for name in self.matching_hooks(names)]
            for hooks in (fwd_hooks, bwd_hooks)
        ]
        with super().hooks(expanded[0], expanded[1], reset_hooks_end, clear_contexts):  # type: ignore[arg-type]
            yield self

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[tuple[HookName, Callable[..., Any]]] = (),
        **kwargs: Any,
    ) -> Any:
        """TransformerLens's `run_with_hooks`; a forward hook given by its name that never ran raises.

        Raises:
            ValueError: an unknown name, or a predicate that matches nothing.
            RuntimeError: the run stopped before a named hook (`stop_at_layer`, `start_at_layer`).
        """
        witnessed, require_fired = self._witnessed(fwd_hooks)
        out = super().run_with_hooks(*model_args, fwd_hooks=witnessed, **kwargs)
        require_fired()
        return out

    @contextmanager
    def listening(self, fwd_hooks: Sequence[tuple[HookName, Callable[..., Any]]]) -> Iterator[None]:
        """Hooks around one forward pass, wherever that is made: `hooks`, and one given by its name that never ran
        raises at the end.

        Raises:
            ValueError: an unknown name, or a predicate that matches nothing.
            RuntimeError: the run stopped before a named hook.
        """
        witnessed, require_fired = self._witnessed(fwd_hooks)
        with self.hooks(witnessed):
            yield
        require_fired()

    def _witnessed(
        self, fwd_hooks: Sequence[tuple[HookName, Callable[..., Any]]]
    ) -> tuple[list[tuple[HookName, Callable[..., Any]]], Callable[[], None]]:
        """The same hooks, and what raises where one given by its name has not run."""
        fired: set[str] = set()

        def witnessed(hook_fn: Callable[..., Any]) -> Callable[..., Any]:
            def run(value: Tensor, hook: HookPoint) -> Any:
                fired.add(hook.name or "")
                return hook_fn(value, hook=hook)

            return run

        named = [name for name, _ in fwd_hooks if isinstance(name, str)]
        return (
            [(name, witnessed(hook)) for name, hook in fwd_hooks],
            lambda: self._require_fired(named, fired),
        )

    @staticmethod
    def _require_fired(named: Sequence[str], fired: set[str]) -> None:
        silent = [name for name in named if name not in fired]
        if silent:
            raise RuntimeError(
                f"these hooks were asked for and never ran in this forward pass: {', '.join(silent)}"
            )

    def run_with_cache(  # type: ignore[override]
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Slice | SliceInput | None = None,
        return_cache_object: bool = True,
        **model_kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """Run the model and keep what passed its hook points.

        In half precision, listening to `hook_attn_scores`, `hook_pattern` or `hook_result` changes the rounding
        of attention (it is then computed step by step), and a token whose experts were nearly tied may be
        routed otherwise than in a run that does not listen to them. Compare runs that listen to the same of
        these three, or run in float32.

        Args:
            model_args, model_kwargs: for `forward`.
            names_filter: see `matching_hooks`.
            device: where cached tensors are put; None leaves them where they are.
            remove_batch_dim: drop the batch axis, for a batch of one.
            incl_bwd: also run `backward()` on the output (a scalar, as with `return_type="loss"`), and cache
                gradients as `<name>_grad`. Integer hooks have none.
            pos_slice: positions to keep, on each hook's own (query) position axis. As in TransformerLens an
                int keeps the axis, with length 1; `Slice(int)` drops it.
            return_cache_object: False gives a plain dict.

        Returns:
            The model's output, and the cache.

        Raises:
            ValueError: an unknown name, a filter that matches nothing, or `remove_batch_dim` on a larger batch.
            RuntimeError: a hook asked for by name never ran.
        """
        cache, forward_hooks, backward_hooks = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        with self.hooks(forward_hooks, backward_hooks, reset_hooks_end, clear_contexts):
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                self._to_differentiate(out).backward()
        if names_filter is not None and not callable(names_filter):
            self._require_fired(self.matching_hooks(names_filter), set(cache))
        if not return_cache_object:
            return out, cache
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def _to_differentiate(self, out: Any) -> Tensor:
        """Of what `forward` returned, the scalar whose gradients `incl_bwd` caches."""
        return out

    def get_caching_hooks(  # type: ignore[override]
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput | None = None,
    ) -> tuple[dict[str, Tensor], list[tuple[str, Callable[..., Any]]], list[tuple[str, Callable[..., Any]]]]:
        """The hooks that fill a cache; see `run_with_cache` for the arguments. They are not yet added."""
        stored: dict[str, Tensor] = {} if cache is None else cache
        positions = Slice.unwrap(pos_slice)

        def save(value: Tensor, hook: HookPoint, suffix: str) -> None:
            value = value.detach()
            value = value if device is None else value.to(device)
            pos_dim = hook.pos_dim
            assert pos_dim is not None
            assert hook.name is not None
            if remove_batch_dim:
                if value.shape[0] != 1:
                    raise ValueError(
                        f"remove_batch_dim needs a batch of one; {hook.name} has {value.shape[0]} rows"
                    )
                value, pos_dim = value[0], pos_dim - 1
            stored[hook.name + suffix] = positions.apply(value, dim=pos_dim)

        names = self.matching_hooks(names_filter)
        forward_hooks = [(name, partial(save, suffix="")) for name in names]
        backward_hooks = [(name, partial(save, suffix="_grad")) for name in names] if incl_bwd else []
        self.is_caching = True
        return stored, forward_hooks, backward_hooks
