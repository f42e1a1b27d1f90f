"""The runs of activation patching: one kind of activation of one pair of runs, and the metric under any patch of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from moe_lens.interventions.patch_sites import (
    AXES,
    CONTRIBUTIONS,
    INDICES,
    MLP_OUT,
    Site,
    contribution_of,
    experts_differ,
)
from moe_lens.interventions.positions import Positions, patched_places
from moe_lens.model.attend import Attend
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.text import Text

Metric = Callable[[Tensor], Tensor]
"""From logits `[batch, pos, d_vocab]` to one number."""
Cell = Mapping[str, int]
"""One index for each axis taken one at a time: `{"layer": 3, "head": 5}`."""


class Patcher:
    """One kind of activation of one pair of runs: `value(cell)` is the metric under that patch.

    Making one checks that the runs fit together, and makes the unpatched run.
    """

    def __init__(
        self,
        model: HookedMoE,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | None,
        clean_cache: ActivationCache | Mapping[str, Tensor],
        metric: Metric,
        site: Site,
        places: Bool[Tensor, "batch pos"],
    ):
        self.model, self.tokens, self.mask = model, tokens, mask
        self.metric, self.site, self.places = metric, site, places
        self.layers: Sequence[int | None] = site.layers or (None,)
        self.n_runs = 0
        self.clean = _clean_values(clean_cache, site, tokens.shape)
        # Where clean and corrupted values are not the same numbers; its axes are those of `selected`.
        self.differs: dict[int | None, Bool[Tensor, "*axes"]] = {}
        self.baseline = self._measure(dict(self._comparing_hooks()), "the unpatched run")

    @classmethod
    def of(
        cls,
        model: HookedMoE,
        tokens_or_text: Int[Tensor, "batch pos"] | Text,
        clean_cache: ActivationCache | Mapping[str, Tensor],
        metric: Metric,
        site: Site,
        *,
        attention_mask: Tensor | None,
        clean_attention_mask: Tensor | None,
        positions: Positions,
    ) -> Patcher:
        """See `activation_patch`."""
        if not isinstance(clean_cache, ActivationCache | Mapping):
            raise TypeError(
                f"clean_cache is what model.run_with_cache(clean_tokens) returns beside the logits, not "
                f"{type(clean_cache).__name__}"
            )
        tokens, mask = model.tokens_and_mask(tokens_or_text, attention_mask)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if clean_attention_mask is not None:
            clean_real = torch.as_tensor(clean_attention_mask).to(real.device).bool()
            if clean_real.shape != real.shape or not torch.equal(clean_real, real):
                raise ValueError(
                    "clean and corrupted tokens must be padded at the same places: the masks differ"
                )
        _check_padding(model, clean_cache, tokens, mask)
        return cls(model, tokens, mask, clean_cache, metric, site, patched_places(positions, real))

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Those along which cells are chosen: the value's, or experts in place of slots."""
        return ("batch", "pos", "expert") if self.site.by_identity else self.site.axes

    def labels(self, axis: str) -> tuple[int, ...]:
        """The indices that a cell can have along an axis."""
        if axis == "layer":
            assert self.site.layers is not None
            return self.site.layers
        if axis == "batch":
            return tuple(self.places.any(dim=1).nonzero()[:, 0].tolist())
        if axis == "pos":
            return tuple(self.places.any(dim=0).nonzero()[:, 0].tolist())
        if axis == "key" and self.mask is not None:
            return tuple(self.mask.any(dim=0).nonzero()[:, 0].tolist())
        return tuple(range(self.differs[self.layers[0]].shape[self.axes.index(axis)]))

    def selected(self, cell: Cell) -> Bool[Tensor, "*axes"]:
        """True at the numbers that a cell's patch replaces; broadcasts over the axes."""
        n_axes, pos_axis = len(self.axes), self.axes.index("pos")
        shape = [1] * n_axes
        shape[0], shape[pos_axis] = self.places.shape
        selected = self.places.view(shape)
        for axis, index in cell.items():
            if axis != "layer":
                at = self.axes.index(axis)
                along = torch.arange(self.differs[self.layers[0]].shape[at], device=selected.device) == index
                selected = selected & along.view([-1 if i == at else 1 for i in range(n_axes)])
        return selected

    @torch.no_grad()
    def value(self, cell: Cell) -> Float[Tensor, ""]:
        """The metric of the run in which one cell is what it was in the clean run."""
        selected = self.selected(cell)
        layers = [cell["layer"]] if "layer" in cell else self.layers
        # Nothing runs otherwise up to the first point whose value changes, so this holds for several layers too.
        if not any(bool((self.differs[layer] & selected).any()) for layer in layers):
            return self.baseline
        self.n_runs += 1
        hooks: dict[str, Callable[..., Any]] = {}
        for layer in layers:
            if self.site.by_identity:
                hooks |= self._expert_hooks(layer, cell["expert"], selected)
            else:
                hooks[self.site.name(layer)] = self._patch_hook(layer, selected)
        # The points patched elsewhere are listened to as well, as in the unpatched run: in half precision, listening
        # alone can change how attention rounds.
        hooks = {self.site.name(layer): _look for layer in self.layers} | hooks
        place = ", ".join(f"{axis} {index}" for axis, index in cell.items())
        return self._measure(
            hooks, f"the patch of {self.site.activation}" + (f" at {place}" if place else "")
        )

    # ---- hooks ----

    def _patch_hook(self, layer: int | None, selected: Tensor) -> Callable[..., Any]:
        def patch(value: Tensor, hook: Any) -> Tensor:
            return torch.where(selected, _like(self.clean[hook.name], value), value)

        return patch

    def _expert_hooks(
        self, layer: int | None, expert: int, selected: Bool[Tensor, "batch pos expert"]
    ) -> Iterator[tuple[str, Callable[..., Any]]]:
        at_tokens = selected.any(dim=-1, keepdim=True)
        own: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            own[hook.name] = value

        def exchange(value: Tensor, hook: Any) -> Tensor:
            clean, corrupted = (
                contribution_of(expert, values[contributions], values[indices])
                for values in (self.clean, own)
            )
            # Not rounded to half precision on the way.
            exact = torch.promote_types(value.dtype, torch.float32)
            patched = value.to(exact) + (clean.to(value.device, exact) - corrupted.to(exact))
            return torch.where(at_tokens, patched.to(value.dtype), value)

        contributions, indices = self.site.name(layer, CONTRIBUTIONS), self.site.name(layer, INDICES)
        yield contributions, keep
        yield indices, keep
        yield self.site.name(layer, MLP_OUT), exchange

    def _comparing_hooks(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """For the unpatched run: where its values are not the clean ones; and that they are of the same shapes."""
        seen: dict[str, Tensor] = {}

        def compare(value: Tensor, hook: Any, layer: int | None) -> None:
            clean = self.clean[hook.name]
            # By identity it does not matter how many slots there are.
            shapes = [v.shape[:2] + v.shape[3:] if self.site.by_identity else v.shape for v in (clean, value)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{hook.name} is {tuple(clean.shape)} in the clean cache and {tuple(value.shape)} in the "
                    f"corrupted run"
                )
            if not self.site.by_identity:
                self.differs[layer] = _like(clean, value) != value
                return
            seen[hook.name] = value
            names = [self.site.name(layer, kind) for kind in (CONTRIBUTIONS, INDICES)]
            if all(name in seen for name in names):
                contributions, indices = ((_like(self.clean[n], seen[n]), seen.pop(n)) for n in names)
                self.differs[layer] = experts_differ(contributions, indices, self.model.cfg.n_experts)

        for layer in self.layers:
            kinds = (INDICES, CONTRIBUTIONS) if self.site.by_identity else (self.site.activation,)
            for kind in kinds:
                yield self.site.name(layer, kind), lambda value, hook, at=layer: compare(value, hook, at)

    # ---- runs ----

    @torch.no_grad()
    def _measure(self, hooks: Mapping[str, Callable[..., Any]], what: str) -> Float[Tensor, ""]:
        fired: Counter[str] = Counter()

        def counted(name: str, hook_fn: Callable[..., Any]) -> Callable[..., Any]:
            def run(value: Tensor, hook: Any) -> Any:
                fired[name] += 1
                return hook_fn(value, hook=hook)

            return run

        logits = self.model.run_with_hooks(
            self.tokens,
            attention_mask=self.mask,
            fwd_hooks=[(name, counted(name, hook)) for name, hook in hooks.items()],
        )
        wrong = [f"{name} {fired[name]} times" for name in hooks if fired[name] != 1]
        if wrong:
            raise RuntimeError(f"{what}: each hook must run exactly once, and these ran: {', '.join(wrong)}")
        return checked_metric(self.metric(logits), what).detach().cpu()


def checked_metric(value: Any, what: str) -> Float[Tensor, ""]:
    """A metric's value, after it was found to be one number; `what` says of which run, for the error.

    Raises:
        ValueError: it is not, or it is NaN.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        described = (
            f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise ValueError(f"the metric must give one floating number as a tensor, and gave {described}")
    value = value.reshape(())
    if math.isnan(float(value.detach())):
        raise ValueError(f"the metric is NaN in {what}")
    return value


def _look(value: Tensor, hook: Any) -> None:
    """Listen, and change nothing."""


def _like(clean: Tensor, value: Tensor) -> Tensor:
    return clean.to(value.device, value.dtype)


def _clean_values(
    cache: ActivationCache | Mapping[str, Tensor], site: Site, shape: torch.Size
) -> dict[str, Tensor]:
    """The cached values of a site, after their batch and position axes were found to be the corrupted tokens'."""
    stored = cache.cache_dict if isinstance(cache, ActivationCache) else cache
    values = {}
    for name in site.cached_names():
        if name not in stored:
            raise KeyError(
                f"the clean cache lacks {name}; patch_hooks(model, activation, ...) lists what is needed"
            )
        value = values[name] = stored[name].detach()
        kind = name if site.layers is None else name.split(".", 2)[2]
        axes = ("batch", *AXES[kind])
        wanted = {"batch": shape[0], "pos": shape[1], "key": shape[1]}
        if value.ndim != len(axes) or any(
            axis in wanted and length != wanted[axis] for axis, length in zip(axes, value.shape, strict=True)
        ):
            raise ValueError(
                f"{name} in the clean cache is {tuple(value.shape)}; with corrupted tokens {tuple(shape)} it must be "
                f"[{', '.join(str(wanted.get(axis or '', axis or 1)) for axis in axes)}]"
            )
    return values


def _check_padding(
    model: HookedMoE,
    cache: ActivationCache | Mapping[str, Tensor],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
) -> None:
    """Where the cache holds attention, it tells which keys its run could see: they must be those seen here."""
    stored = cache.cache_dict if isinstance(cache, ActivationCache) else cache
    batch, length = tokens.shape
    attend = Attend(model.cfg.rotary, (batch, length), tokens.device, attention_mask=mask)
    visible = attend.visible(length, tokens.device)
    for point in ("hook_attn_scores", "hook_pattern"):
        name = next((name for name in stored if name.endswith(f"attn.{point}")), None)
        if name is None or stored[name].shape[0] != batch or stored[name].shape[-2:] != (length, length):
            continue
        value = stored[name].to(tokens.device)
        # A key that is seen may have a pattern of 0, but no score of minus infinity.
        agrees = (value.isneginf() == ~visible) if point == "hook_attn_scores" else (value == 0) | visible
        if not bool(agrees.all()):
            raise ValueError(
                f"{name} in the clean cache sees other keys than attention_mask lets the corrupted run see: clean and "
                f"corrupted tokens must be padded at the same places"
            )
