"""What a route experiment found: maps of contributions and losses, of each condition beside the unchanged one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr

from moe_lens.interventions.receipt import Receipt
from moe_lens.interventions.spec_base import Spec
from moe_lens.routing.queries import persistence
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.senders import ROUNDING

UNCHANGED = "unchanged"
Kind = Literal["attention", "mlp"]
_PREFIXES = {"attention": "A", "mlp": "M"}


@dataclass(frozen=True, eq=False)
class RouteCondition:
    """The corpus under some interventions, or under none.

    Attributes:
        name: of the condition; `"unchanged"`.
        specs: what was done.
        contributions: every sender's at every router. Its provenance names what was done as `interventions`.
        unread: an expert whose scores are not in them, because the routers were not given them; None: there is none.
        loss_sums: of each document, nats, over its tokens that have a next one.
        receipt: what fired, over all batches; None of the unchanged one.
    """

    name: str
    specs: tuple[Spec, ...]
    contributions: RoutingContributions
    unread: str | None
    loss_sums: Float[np.ndarray, " document"]
    receipt: Receipt | None


@dataclass(frozen=True, eq=False)
class RouteExperiment:
    """Conditions beside the unchanged run of the same corpus.

    Attributes:
        conditions: by name, `"unchanged"` first.
        n_losses: of each document, how many tokens have a next one.
        provenance: of what this is: `experiment`, `model`, `revision`, `dtype`, `weights` (a fingerprint), `by`,
            `corpus`, `tokens` (a fingerprint), and `conditions`: of each, its `interventions` and `fired`.
    """

    conditions: Mapping[str, RouteCondition]
    n_losses: Int[np.ndarray, " document"]
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        names = ", ".join(list(self.conditions)[1:])
        return (
            f"<RouteExperiment {self.provenance['experiment']} of {self.provenance['model']}: {names}; "
            f"{len(self.n_losses)} documents>"
        )

    def __getitem__(self, name: str) -> RouteCondition:
        """A condition.

        Raises:
            KeyError: there is none; those there are, are named.
        """
        if name not in self.conditions:
            raise KeyError(f"there is no condition {name!r}; there are {', '.join(self.conditions)}")
        return self.conditions[name]

    @property
    def unchanged(self) -> RouteCondition:
        return self.conditions[UNCHANGED]

    def to_frame(self, measure: str = "variance", position: str = "rest") -> pd.DataFrame:
        """One row per condition, the unchanged one first.

        Args:
            measure, position: of the map that is correlated with the unchanged one.

        Returns:
            Columns `condition`, `interventions`; `loss`, the mean over documents of their mean losses (nats), its
            change `delta_loss` and `delta_loss_standard_error` (over documents, paired); `token_loss`, the mean over
            all tokens, so that long documents count for more, `token_delta_loss` and its standard error, clustered by
            document; `correlation`, `correlation_attention`, `correlation_mlp`: see `correlation`; `fired`: how many
            changes were made.

        Raises:
            ValueError: no such measure or position.
        """
        counts = self.n_losses
        lines = []
        for name, condition in self.conditions.items():
            change = condition.loss_sums - self.unchanged.loss_sums
            line: dict[str, Any] = {"condition": name, "interventions": ", ".join(map(str, condition.specs))}
            line["loss"] = _document_mean(condition.loss_sums, counts)[0]
            line["delta_loss"], line["delta_loss_standard_error"] = _document_mean(change, counts)
            line["token_loss"] = _token_mean(condition.loss_sums, counts)[0]
            line["token_delta_loss"], line["token_delta_loss_standard_error"] = _token_mean(change, counts)
            line["correlation"] = self.correlation(name, measure, position)
            for kind in _PREFIXES:
                line[f"correlation_{kind}"] = self.correlation(name, measure, position, kind)  # type: ignore[arg-type]
            line["fired"] = 0 if condition.receipt is None else condition.receipt.fired
            lines.append(line)
        return pd.DataFrame(lines)

    def document_losses(self) -> pd.DataFrame:
        """One row per document that has a token with a next one: `document`, `tokens` (that have one), and of each
        condition its mean loss, nats."""
        there = self.n_losses > 0
        columns = {"document": np.flatnonzero(there), "tokens": self.n_losses[there]}
        losses = {n: c.loss_sums[there] / self.n_losses[there] for n, c in self.conditions.items()}
        return pd.DataFrame(columns | losses)

    def difference(
        self, name: str, measure: str = "variance", position: str = "rest"
    ) -> Float[np.ndarray, "sender receiver"]:
        """How much larger every sender's measure is at every router than in the unchanged run; NaN where the sender
        comes after the receiver.

        Raises:
            KeyError: there is no such condition.
            ValueError: no such measure or position.
        """
        return self._map(name, measure, position) - self._map(UNCHANGED, measure, position)

    def maps(self, measure: str = "variance", position: str = "rest") -> pd.DataFrame:
        """One row per (condition, sender, receiver that it reaches): `condition`, `sender`, `receiver`, the measure,
        its `_standard_error`, and `change`, it minus the unchanged one.

        Raises:
            ValueError: no such measure or position.
        """
        self._map(UNCHANGED, measure, position)
        frames: list[pd.DataFrame] = []
        for name, condition in self.conditions.items():
            every = condition.contributions.to_frame()
            columns = ["sender", "receiver", measure, f"{measure}_standard_error"]
            frame = every.loc[every["position"] == position, columns].reset_index(drop=True)
            base = frames[0] if frames else frame
            # Every condition is of the same senders and documents.
            frame["change"] = frame[measure] - base[measure]
            frame.insert(0, "condition", name)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def correlation(
        self, name: str, measure: str = "variance", position: str = "rest", kind: Kind | None = None
    ) -> float:
        """Spearman's correlation of a condition's map with the unchanged one, over all pairs of a sender and a router
        after it (the lower triangle). NaN for fewer than three pairs, or where a map is the same everywhere.

        Args:
            kind: over the `attention` senders alone, or those of the `mlp`s (experts and dense layers); None is over
                all, the embedding too.

        Raises:
            KeyError: there is no such condition.
            ValueError: no such measure, position or kind.
        """
        if kind is not None and kind not in _PREFIXES:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, _PREFIXES))}, or None")
        chosen = self._senders(kind)
        one, other = (self._map(of, measure, position)[chosen] for of in (UNCHANGED, name))
        there = ~np.isnan(one) & ~np.isnan(other)
        one, other = one[there], other[there]
        if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
            return float("nan")
        return float(spearmanr(one, other).statistic)  # type: ignore[union-attr]

    def stripes(self, measure: str = "variance", position: str = "rest", *, n: int = 3) -> pd.DataFrame:
        """The stripes of each condition's map, as numbers: `persistence` of every sender, beside a column `condition`.

        Args:
            n: how many senders of a router count as its top.

        Raises:
            ValueError: no such measure or position; n is not positive.
        """
        frames = []
        for name, condition in self.conditions.items():
            frame = persistence(condition.contributions, measure, position, n=n)
            frame.insert(0, "condition", name)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def _map(self, name: str, measure: str, position: str) -> Float[np.ndarray, "sender receiver"]:
        values = self[name].contributions.measure(measure)
        if position not in values:
            raise ValueError(f"position must be one of {', '.join(values)}, not {position!r}")
        return values[position]

    def _senders(self, kind: Kind | None) -> Bool[np.ndarray, " sender"]:
        """Those of a kind, without half precision's rounding, which is no component."""
        groups = self.unchanged.contributions.senders.groups
        wanted = [
            g.component != ROUNDING and (kind is None or g.component.startswith(_PREFIXES[kind]))
            for g in groups
        ]
        return np.repeat(wanted, [*map(len, groups)])


def _document_mean(
    sums: Float[np.ndarray, " document"], counts: Int[np.ndarray, " document"]
) -> tuple[float, float]:
    """The mean over documents of their means, and its standard error, NaN for fewer than two."""
    means = sums[counts > 0] / counts[counts > 0]
    error = np.nan if len(means) < 2 else means.std(ddof=1) / np.sqrt(len(means))
    return float(means.mean()), float(error)


def _token_mean(
    sums: Float[np.ndarray, " document"], counts: Int[np.ndarray, " document"]
) -> tuple[float, float]:
    """The mean over tokens, and its standard error clustered by document, as in a census; NaN for fewer than two."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    mean, n = sums.sum() / counts.sum(), len(counts)
    if n < 2:
        return float(mean), float("nan")
    variance = n / (n - 1) * np.square(sums - mean * counts).sum() / counts.sum() ** 2
    return float(mean), float(np.sqrt(variance))


def described(specs: Sequence[Spec]) -> list[str]:
    """Interventions, for provenance."""
    return [str(spec) for spec in specs]
