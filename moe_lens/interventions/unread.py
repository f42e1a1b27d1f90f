"""Streams as routers read them where one expert's scores are silenced.

Under `RouterOnly` later routers do not see what an expert wrote, and the residual stream still holds it. Whoever
measures the stream measures the expert too. Inside of an `Unread`, listeners of a run are handed the stream, and what
is summed into it, without the expert; the run itself goes on with all of it. What they measure then are the scores
that the routers were given, and their sum is the logits that the routers had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.interventions.arguments import parse_expert
from moe_lens.interventions.expert_reference import SHARED
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.observers import Run

UNREAD_BY = ("layer", "head", "expert")
"""Granularities whose senders are all handed over without the expert."""


class Unread:
    """Listeners of `hook_expert_contrib`, `hook_shared_out`, `hook_mlp_out` of an expert's layer and of
    `hook_resid_mid` of all later ones are handed values without what the expert wrote.

    It must be opened before an `intervene` that it goes with, whose hooks see values as they are.

    Args:
        expert: `"M1E9"`, or `"M1S"` the shared experts.
    """

    def __init__(self, model: HookedMoE, expert: str):
        self.model, self.expert = model, parse_expert(expert)
        self._values: dict[str, Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Every run inside of this is handed over so."""
        self.model.run_observers.append(self._observing)
        try:
            yield
        finally:
            self.model.run_observers.remove(self._observing)

    @contextmanager
    def _observing(self, run: Run) -> Iterator[None]:
        layer = self.expert.layer
        mlp, shared = f"blocks.{layer}.mlp.", self.model.cfg.shared is not None
        shown: dict[str, Callable[[Tensor], Tensor]] = {mlp + "hook_expert_contrib": self._other_slots}
        if shared:
            shown[mlp + "hook_shared_out"] = self._other_shared
        shown[f"blocks.{layer}.hook_mlp_out"] = self._others_sum
        for later in range(max(layer + 1, run.first_layer), run.last_layer):
            shown[f"blocks.{later}.hook_resid_mid"] = self._without_it
        try:
            with ExitStack() as handles:
                handles.callback(self._put(mlp + "hook_expert_indices", self._remember, prepend=False))
                for name, show in shown.items():
                    handles.callback(self._put(name, self._hands_over(name, show), prepend=True))
                    handles.callback(self._put(name, self._as_it_was(name), prepend=False))
                yield
        finally:
            self._values.clear()

    def _put(
        self, name: str, hook: Callable[[Tensor], Tensor | None], *, prepend: bool
    ) -> Callable[[], None]:
        """Before or after all hooks of a point; returns what takes it off."""

        def on_point(point: nn.Module, given: Any, value: Tensor) -> Tensor | None:
            assert isinstance(point, HookPoint)
            return hook(value)

        return self.model.hook_dict[name].register_forward_hook(on_point, prepend=prepend).remove

    def _hands_over(self, name: str, show: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def hand_over(value: Tensor) -> Tensor:
            self._values[name] = value
            return show(value)

        return hand_over

    def _as_it_was(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda value: self._values.pop(name)

    def _remember(self, indices: Tensor) -> None:
        self._values["indices"] = indices

    # ---- what is shown ----

    def _other_slots(
        self, contrib: Float[Tensor, "batch pos k d_model"]
    ) -> Float[Tensor, "batch pos k d_model"]:
        is_expert = self._values["indices"] == self.expert.expert
        others = contrib.masked_fill(is_expert[..., None], 0.0)
        self._values["others"] = others.sum(dim=2)
        self._values["written"] = (contrib - others).sum(dim=2)
        return others

    def _other_shared(self, out: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.expert.expert != SHARED:
            self._values["others"] = self._values["others"] + out
            return out
        self._values["written"] = out
        return out.new_zeros(out.shape)

    def _others_sum(self, out: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Summed as the layer sums, not as the whole less a part, which could be by far the largest."""
        return self._values["others"]

    def _without_it(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return stream - self._values["written"]
