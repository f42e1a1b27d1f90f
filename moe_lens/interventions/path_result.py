"""What path patching found, sender by sender."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor


class RouterChange(NamedTuple):
    """What a router's logits, and the choice that it would make of them, are after the change.

    Attributes:
        variance: of the change, over all experts, logits²: a shift that all experts share routes nothing.
        aarv: mean absolute rank change of the experts that were chosen, in ranks.
        overlap: the share of the top-K that would stay chosen, 0 to 1.
        weight_change: the sum over experts of |routing weight before - after|.

    NaN where nothing was replaced because nothing was asked for, and for senders that come after the router.
    """

    variance: Float[Tensor, "sender batch pos"]
    aarv: Float[Tensor, "sender batch pos"]
    overlap: Float[Tensor, "sender batch pos"]
    weight_change: Float[Tensor, "sender batch pos"]


@dataclass(frozen=True, eq=False)
class PathPatching:
    """The effect of each sender on each receiver; `to_frame()` is a table of it.

    Attributes:
    senders: their names.
    receivers: `logits`, `M3`, ...
    freeze: the rule for what lay between.
    positions: where the senders' outputs were replaced.
    changed: where that made a difference: elsewhere a sender wrote the same in both runs.
    clean_metric: of the clean run; None without logits.
    effect: the metric with the sender replaced minus the clean one, in the metric's unit; one for each row where the
        metric gives so many. None without logits.
    routers: what is measured of each receiving router.
    router_logit_changes: of each receiving router, after minus before, in logits, where they were asked for; NaN as
        in `RouterChange`.
    null_change: the largest change of any receiver's value when nothing at all is replaced. It is rounding: smaller
        changes mean nothing.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    freeze: str
    positions: Bool[Tensor, "batch pos"]
    changed: Bool[Tensor, "sender batch pos"]
    clean_metric: Float[Tensor, ...] | None
    effect: Float[Tensor, "sender ..."] | None
    routers: dict[str, RouterChange]
    router_logit_changes: dict[str, Float[Tensor, "sender batch pos expert"]] = field(repr=False)
    null_change: float

    def __repr__(self) -> str:
        senders = self.senders[0] if len(self.senders) == 1 else f"{len(self.senders)} senders"
        return (
            f"<PathPatching of {senders} to {', '.join(self.receivers)} at {int(self.positions.sum())} positions, "
            f"freeze {self.freeze!r}; rounding {self.null_change:.1g}>"
        )

    def to_frame(self) -> pd.DataFrame:
        """A row for every sender and receiver that it reaches.

        Returns:
            Columns `sender`, `receiver`, `replaced` and `changed` (positions); with logits `effect` (the mean over
            rows where there is one for each) and `standard_error` (over rows, NaN where there is one number alone);
            with routers the means over the replaced positions of `variance`, `aarv`, `overlap` and `weight_change`.
            What a receiver does not have is NaN.
        """
        rows = []
        for index, sender in enumerate(self.senders):
            for receiver in self.receivers:
                row: dict[str, object] = {
                    "sender": sender,
                    "receiver": receiver,
                    "replaced": int(self.positions.sum()),
                    "changed": int(self.changed[index].sum()),
                }
                if self.effect is not None:
                    mean, error = (values[index] for values in self._effects)
                    row |= (
                        {"effect": mean, "standard_error": error}
                        if receiver == "logits"
                        else {"effect": np.nan, "standard_error": np.nan}
                    )
                if receiver in self.routers:
                    means = [float(of[index][self.positions].mean()) for of in self.routers[receiver]]
                    if np.isnan(means[0]) and bool(self.routers[receiver].variance[index].isnan().all()):
                        continue  # The sender comes after this router.
                    row |= dict(zip(RouterChange._fields, means, strict=True))
                rows.append(row)
        return pd.DataFrame(rows)

    def head_map(
        self, measure: str = "effect", receiver: str | None = None
    ) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """Heads by layer and head, and the standard errors: NaN where a head was no sender.

        Args:
            measure: `effect` of the logits, or one of `RouterChange`, whose errors are over replaced positions.
            receiver: of a router's measure; None where there is one router alone.

        Raises:
            ValueError: no head was a sender; there is no such measure or receiver.
        """
        heads = {
            index: tuple(map(int, match.groups()))
            for index, match in enumerate(re.fullmatch(r"A(\d+)H(\d+)", name) for name in self.senders)
            if match
        }
        if not heads:
            raise ValueError("no head was a sender, so there is no map of heads")
        values, errors = self._measure(measure, receiver)
        shape = tuple(1 + max(place[axis] for place in heads.values()) for axis in range(2))
        maps = np.full(shape, np.nan), np.full(shape, np.nan)
        for index, place in heads.items():
            maps[0][place], maps[1][place] = values[index], errors[index]
        return maps

    def _measure(self, measure: str, receiver: str | None) -> tuple[np.ndarray, np.ndarray]:
        if measure == "effect" and receiver in (None, "logits") and self.effect is not None:
            return self._effects
        routers = list(self.routers)
        if measure in RouterChange._fields and routers:
            if receiver is None and len(routers) > 1:
                raise ValueError(f"receiver= must be one of {', '.join(routers)}")
            name = routers[0] if receiver is None else receiver
            if name not in routers:
                raise ValueError(f"there is no router {name!r} here; there are {', '.join(routers)}")
            return _mean_and_error(getattr(self.routers[name], measure)[:, self.positions])
        there = (["effect"] if self.effect is not None else []) + (
            list(RouterChange._fields) if routers else []
        )
        raise ValueError(
            f"there is no {measure!r} of {receiver or 'this result'}; there are {', '.join(there)}"
        )

    @property
    def _effects(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.effect is not None
        return _mean_and_error(self.effect.reshape(len(self.senders), -1))


def _mean_and_error(values: Float[Tensor, "sender n"]) -> tuple[np.ndarray, np.ndarray]:
    """Means, and standard deviations (ddof 1) over the root of their number; NaN of a single one."""
    values = values.double().cpu()
    n = values.shape[1]
    errors = torch.full(values.shape[:1], torch.nan, dtype=torch.float64)
    if n > 1:
        errors = values.std(dim=1) / n**0.5
    return values.mean(dim=1).numpy(), errors.numpy()
