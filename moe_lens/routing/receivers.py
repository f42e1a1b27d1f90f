"""What the receivers of a pass know of its tokens: gathered as they run, needed before any sender is added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.config import RouterConfig
from moe_lens.routing.parts import Measuring, Readouts, Routed
from moe_lens.routing.rank_shift import choice_of

Hooks = list[tuple[str, Callable[..., None]]]
"""As `HookedMoE.hooks` takes them."""


class ReceiverValues:
    """Scales, and where measures ask for them logits and choices, of every receiver in one forward pass.

    Args:
        readouts: what the receivers read with.
        measuring: what is measured.
        router: the model's `cfg.router`.
        real: which tokens are.
        classes: lead and rest, flattened.
    """

    def __init__(
        self,
        readouts: Readouts,
        measuring: Measuring,
        router: RouterConfig,
        real: Bool[Tensor, "batch pos"],
        classes: dict[str, Bool[Tensor, " token"]],
    ):
        self.readouts, self.measuring, self.router = readouts, measuring, router
        self.real, self.classes = real, classes
        self._scales: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def unscaled(
        self, place: int, resid_mid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "token expert"]:
        """The stream's own readout, not yet divided by the scale."""
        return resid_mid.float().flatten(0, 1) @ self.readouts.rows[place].T

    def keep_logits(self, unscaled: Float[Tensor, "token expert"]) -> None:
        self._logits.append(unscaled)

    def keep_scale(self, scale: Float[Tensor, "batch pos 1"]) -> None:
        self._scales.append(scale.detach().float().flatten())

    def keep_choice(self, indices: Int[Tensor, "batch pos k"], hook: torch.nn.Module) -> None:
        chosen = indices.detach().flatten(0, 1)
        if self._chosen and chosen.shape != self._chosen[0].shape:
            raise ValueError(
                f"{hook.name} chooses {chosen.shape[1]} experts and an earlier router {self._chosen[0].shape[1]}: "  # type: ignore[attr-defined]
                f"experts='selected' needs as many at each"
            )
        self._chosen.append(chosen)

    @property
    def scales(self) -> Float[Tensor, "token receiver"]:
        return torch.stack(self._scales, dim=1)

    def let_go(self) -> None:
        """Drop everything."""
        for values in (self._scales, self._logits, self._chosen):
            values.clear()

    def routed(self) -> Routed:
        """What the pass knows, when it is through."""
        n_documents, n_positions = self.real.shape
        documents = torch.arange(n_documents, device=self.real.device).repeat_interleave(n_positions)
        scales = self.scales
        # Padding is in no class, but what it holds must not be read: 0 times infinity would be.
        routed = Routed(
            self.classes, documents, n_documents, scales.masked_fill(~self.real.flatten()[:, None], 1.0)
        )
        if self.measuring.rank_shift:
            routed.logits = torch.stack(self._logits, dim=1) / scales[..., None]
            routed.choice = choice_of(routed.logits, self.router)
        if self.measuring.selected:
            routed.chosen = torch.stack(self._chosen, dim=1)
        return routed


class LookAhead:
    """One forward pass of which only the receivers are listened to: for a second one, which then knows the scales.

    Args:
        receivers: MoE layers.
        values: of them.
        points: where the second pass will listen. Something listens there in this one too, for a layer computes in
            another way, and rounds differently, where it has to hand out more.

    Attributes:
        routed: what they know; there when the pass is through.
    """

    def __init__(self, receivers: Sequence[int], values: ReceiverValues, points: Iterable[str]):
        self.receivers, self.values, self.points = receivers, values, points
        self.routed: Routed | None = None
        self._n_heard = 0

    def hooks(self) -> Hooks:
        measuring = self.values.measuring
        hooks: Hooks = [(name, _unread) for name in self.points]
        for place, receiver in enumerate(self.receivers):
            at = f"blocks.{receiver}."
            if measuring.rank_shift:
                hooks.append((at + "hook_resid_mid", lambda value, hook, i=place: self._seen(i, value)))
            hooks.append((at + "ln2.hook_scale", self._scale_known))
            if measuring.selected:
                hooks.append((at + "mlp.hook_expert_indices", self.values.keep_choice))
        return hooks

    def _seen(self, place: int, resid_mid: Float[Tensor, "batch pos d_model"]) -> None:
        self.values.keep_logits(self.values.unscaled(place, resid_mid.detach()))

    def _scale_known(self, scale: Float[Tensor, "batch pos 1"], hook: torch.nn.Module) -> None:
        self._n_heard += 1
        self.values.keep_scale(scale)

    def finish(self) -> None:
        if self._n_heard != len(self.receivers):
            raise RuntimeError("looking_ahead() must see exactly one whole forward pass of its tokens")
        if not bool(self.values.scales[self.values.real.flatten()].isfinite().all()):
            raise ValueError("scales of a batch hold values that are not finite; nothing of it was added")
        self.routed = self.values.routed()
        # It may be long before the second pass.
        self.values.let_go()


def _unread(value: Tensor, hook: torch.nn.Module) -> None:
    """Something listens."""
