"""What a corpus says of every sender at every router: a table of means over documents, with its provenance."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.routing.arguments import positive_integer
from moe_lens.routing.documents import POPULATIONS, POSITIONS, Moments
from moe_lens.routing.measures import MEASURES, RANK_MEASURES
from moe_lens.routing.senders import Names, SenderGroup, Senders
from moe_lens.routing.storage import read_arrays, whole_or_not, write_atomically

FORMAT = 1
COMPLETENESS_TOLERANCE = 1e-4

ByPosition = dict[str, Float[np.ndarray, "sender receiver"]]


@dataclass(frozen=True, eq=False)
class RoutingContributions:
    """Every sender's measures at every receiving router, as means over documents.

    Each measure is a mapping `{"lead", "rest"}` to an array `[sender, receiver]`, NaN where the sender comes after the
    receiver or no document has it. `lead` is over each document's lead token, `rest` over its other tokens: averaged
    over a document's tokens first, then over documents. See `moe_lens.routing.measures` for units.

    Attributes:
        by: the granularity.
        senders: names along the first axis, in the order in which the stream adds them; `rounding` last, only in
            half precision.
        receivers: names along the second (`M0`, `M1`, ...).
        measures: those there are; the three of rank shift only where they were asked for.
        n_documents: how many documents have such a position (one of a single token has no rest).
        n_tokens: how many such tokens there are.
        completeness_error: the largest over batches and receivers of max |sum of scores - logits| / max |logits|.
        rounding_ratio: see `RouterLogitAttrs`; the largest. None in float32.
        model_logit_difference: the largest |exact logit - hook_router_logits|: what the gate's own arithmetic rounds,
            or a hook changed. Measures are of the exact logits.
        provenance: of what this is: `model`, `revision`, `dtype`, `weights` (a fingerprint), `edited` (the hook
            points at which hooks edited the run), `corpus` (a list of descriptions), `fingerprints`, `experts`,
            `lead_token`, `source_axis`, `moe_lens` (the version); of a model in nnsight also where it `ran`.
    """

    by: str
    senders: Senders
    receivers: tuple[str, ...]
    measures: tuple[str, ...]
    n_documents: dict[str, int]
    n_tokens: dict[str, int]
    completeness_error: float
    rounding_ratio: float | None
    model_logit_difference: float
    provenance: Mapping[str, Any]
    firsts: tuple[int, ...]
    """For each group of senders, the place of the first receiver that it reaches."""
    moments: Mapping[tuple[str, str], list[Moments]]
    """For each position class and population (`all`, `active`), those of each group, from its first receiver on."""

    def __repr__(self) -> str:
        return (
            f"<RoutingContributions by {self.by}: {len(self.senders)} senders at {len(self.receivers)} receivers, "
            f"{self.n_documents['lead']} documents; {', '.join(self.measures)}>"
        )

    @property
    def closes(self) -> bool:
        """Whether the senders make up what the routers read: no sum misses a logit by more than 1e-4 of the largest,
        and in half precision, where `rounding` closes every sum, rounding is no larger than it can be."""
        return self.completeness_error <= COMPLETENESS_TOLERANCE and (self.rounding_ratio or 0.0) <= 1

    @property
    def variance(self) -> ByPosition:
        return self.measure("variance")

    @property
    def aps(self) -> ByPosition:
        return self.measure("aps")

    @property
    def ans(self) -> ByPosition:
        return self.measure("ans")

    @property
    def mean(self) -> ByPosition:
        return self.measure("mean")

    @property
    def norm(self) -> ByPosition:
        return self.measure("norm")

    @property
    def aarv(self) -> ByPosition:
        return self.measure("aarv")

    @property
    def overlap(self) -> ByPosition:
        return self.measure("overlap")

    @property
    def weight_change(self) -> ByPosition:
        return self.measure("weight_change")

    def measure(self, name: str) -> ByPosition:
        """A measure over all tokens of a position class; where a sender is not active it counts as what it then is:
        0, and an overlap of 1.

        Raises:
            ValueError: there is no such measure here; those there are, are named.
        """
        return self._by_position(name, "all", "mean")

    def when_active(self, measure: str) -> ByPosition:
        """A measure over the tokens where the sender is active: an expert and its neurons where it was chosen, a
        source where the query can see it, anything else everywhere. A document's mean is over such tokens of it, and
        a document that has none is not averaged over.

        Raises:
            ValueError: see `measure`.
        """
        return self._by_position(measure, "active", "mean")

    def standard_error(self, measure: str, *, when_active: bool = False) -> ByPosition:
        """Of a measure's mean, over documents; NaN where fewer than two have it.

        Raises:
            ValueError: see `measure`.
        """
        return self._by_position(measure, "active" if when_active else "all", "standard error")

    def documents_with(self, position: str, *, when_active: bool = False) -> Float[np.ndarray, " sender"]:
        """Over how many documents each sender's means are."""
        moments = self.moments[_position(position), "active" if when_active else "all"]
        return torch.cat([group.count for group in moments]).cpu().numpy()

    def sel(
        self,
        *,
        sender: str | Sequence[str] | None = None,
        receiver: str | int | Sequence[str | int] | None = None,
        when_active: bool = False,
    ) -> pd.DataFrame:
        """The rows of `to_frame` for these senders and receivers (None: all).

        Raises:
            ValueError: a sender or receiver that there is not; some that there are, are named.
        """
        senders = None if sender is None else [self.senders.index(s) for s in _listed(sender)]
        receivers = None if receiver is None else [self.receiver_index(r) for r in _listed(receiver)]
        return self._frame(senders, receivers, when_active)

    def to_frame(self, *, when_active: bool = False) -> pd.DataFrame:
        """One row per (position, sender, receiver) that has a value: columns `position` (lead or rest), `sender`,
        `receiver`, each measure with its `_standard_error`; over all tokens, or those where the sender is active."""
        return self._frame(None, None, when_active)

    def write_table(self, path: str | Path) -> Path:
        """Write the rows of `to_frame` to a Parquet file, whole or not at all: those over all tokens and those over
        the tokens where the sender is active, told apart by a column `tokens` (`all`, `active`). It is written a
        receiver at a time, so that a million neurons fit.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        with whole_or_not(path) as unfinished:
            writer = None
            for receiver in range(len(self.receivers)):
                for tokens in POPULATIONS:
                    frame = self._frame(None, [receiver], tokens == "active")
                    frame.insert(0, "tokens", tokens)
                    rows = pa.Table.from_pandas(frame, preserve_index=False)
                    writer = writer or pq.ParquetWriter(unfinished, rows.schema)
                    writer.write_table(rows)
            assert writer is not None
            writer.close()
        return Path(path)

    def top(
        self,
        receiver: str | int,
        measure: str = "variance",
        n: int = 10,
        *,
        position: str = "rest",
        when_active: bool = False,
    ) -> pd.DataFrame:
        """The n senders of the largest measure (by size; for the overlap, the smallest) at a receiver: columns
        `sender`, the measure, `standard_error`, `documents`.

        Raises:
            ValueError: no such receiver, measure or position; n is not positive.
        """
        n = positive_integer(n, "n")
        column, population = self.receiver_index(receiver), "active" if when_active else "all"
        values, errors = (
            self._by_position(measure, population, what, [column])[_position(position)][:, 0]
            for what in ("mean", "standard error")
        )
        there = np.flatnonzero(~np.isnan(values))
        size = 1 - values[there] if measure == "overlap" else np.abs(values[there])
        best = there[np.argsort(-size, kind="stable")[:n]]
        return pd.DataFrame(
            {
                "sender": [self.senders[int(i)] for i in best],
                measure: values[best],
                "standard_error": errors[best],
                "documents": self.documents_with(position, when_active=when_active)[best].astype(int),
            }
        )

    def receiver_index(self, receiver: str | int) -> int:
        """The place of a receiver, given as `"M3"` or as its layer 3.

        Raises:
            ValueError: there is none.
        """
        name = receiver if isinstance(receiver, str) else f"M{operator.index(receiver)}"
        if name not in self.receivers:
            raise ValueError(f"there is no receiver {receiver!r}; there are {', '.join(self.receivers)}")
        return self.receivers.index(name)

    # ---- together, and on disk ----

    def __add__(self, other: RoutingContributions) -> RoutingContributions:
        """The means over both corpora's documents.

        Raises:
            ValueError: they are of different models, settings or versions, or of the same tokens.
        """
        if not isinstance(other, RoutingContributions):
            return NotImplemented
        self._require_alike(other)
        twice = set(self.provenance["fingerprints"]) & set(other.provenance["fingerprints"])
        if twice:
            raise ValueError("these cannot be added: both hold the same tokens, which would be counted twice")
        moments = {key: [mine.copy() for mine in groups] for key, groups in self.moments.items()}
        provenance = dict(self.provenance)
        for name in ("corpus", "fingerprints"):
            provenance[name] = [*self.provenance[name], *other.provenance[name]]
        return replace(self, moments=moments, provenance=provenance).merged(other)

    def merged(self, other: RoutingContributions) -> RoutingContributions:
        """The means over both corpora's documents, in this result's own arrays, which it loses, and with its
        provenance. The last bits depend on the order in which results are merged.

        Raises:
            ValueError: they are of different models, settings or versions.
        """
        self._require_alike(other)
        for key, groups in self.moments.items():
            for mine, its in zip(groups, other.moments[key], strict=True):
                mine.merge(its.count, its.mean, its.squares)
                mine.counted(its.count)
        ratios = [r for r in (self.rounding_ratio, other.rounding_ratio) if r is not None]
        return replace(
            self,
            n_documents={p: self.n_documents[p] + other.n_documents[p] for p in POSITIONS},
            n_tokens={p: self.n_tokens[p] + other.n_tokens[p] for p in POSITIONS},
            completeness_error=max(self.completeness_error, other.completeness_error),
            rounding_ratio=max(ratios) if ratios else None,
            model_logit_difference=max(self.model_logit_difference, other.model_logit_difference),
        )

    def _require_alike(self, other: RoutingContributions) -> None:
        for name in ("by", "senders", "receivers", "measures"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"these cannot be added: {name} is {getattr(self, name)!r} here and {getattr(other, name)!r} there"
                )
        for name in dict.fromkeys([*self.provenance, *other.provenance]):
            mine, its = self.provenance.get(name), other.provenance.get(name)
            if name not in ("corpus", "fingerprints") and mine != its:
                raise ValueError(f"these cannot be added: {name} is {mine!r} here and {its!r} there")

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, whole or not at all.

        Raises:
            FileNotFoundError: its folder does not exist.
        """
        return write_atomically(path, *self.to_arrays())

    @classmethod
    def load(cls, path: str | Path) -> RoutingContributions:
        """What `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or of another format.
        """
        return cls.from_arrays(*read_arrays(path), str(path))

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Arrays and JSON data that `from_arrays` makes the same of."""
        arrays = {}
        for (position, population), groups in self.moments.items():
            for i, moments in enumerate(groups):
                at = f"{position}/{population}/{i}/"
                arrays |= {
                    at + "count": moments.count,
                    at + "mean": moments.mean,
                    at + "squares": moments.squares,
                }
        names = (
            "by",
            "receivers",
            "measures",
            "n_documents",
            "n_tokens",
            "completeness_error",
            "rounding_ratio",
            "model_logit_difference",
        )
        facts = {name: getattr(self, name) for name in (*names, "firsts")}
        groups = [
            [group.component, group.layer, group.kind, [[run.prefix, run.axes] for run in group.names]]
            for group in self.senders.groups
        ]
        return arrays, {"format": FORMAT, **facts, "groups": groups, "provenance": dict(self.provenance)}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any], source: str
    ) -> RoutingContributions:
        """See `to_arrays`.

        Raises:
            ValueError: another format, or arrays that are not there; `source` says whose.
        """
        if facts.get("format") != FORMAT:
            raise ValueError(f"{source} holds no routing contributions of format {FORMAT}")
        try:
            groups = [
                SenderGroup(
                    component, layer, kind,
                    tuple(Names(prefix, tuple((label, n) for label, n in axes)) for prefix, axes in runs),
                )
                for component, layer, kind, runs in facts["groups"]
            ]  # fmt: skip
            moments = {
                (position, population): [
                    Moments.of(
                        *(arrays[f"{position}/{population}/{i}/{n}"] for n in ("count", "mean", "squares"))
                    )
                    for i in range(len(groups))
                ]
                for position in POSITIONS
                for population in POPULATIONS
            }
            return cls(
                by=facts["by"],
                senders=Senders(groups),
                receivers=tuple(facts["receivers"]),
                measures=tuple(facts["measures"]),
                n_documents=facts["n_documents"],
                n_tokens=facts["n_tokens"],
                completeness_error=facts["completeness_error"],
                rounding_ratio=facts["rounding_ratio"],
                model_logit_difference=facts["model_logit_difference"],
                provenance=facts["provenance"],
                firsts=tuple(facts["firsts"]),
                moments=moments,
            )
        except KeyError as error:
            raise ValueError(
                f"{source} lacks {error}: it was written by another version, or is damaged"
            ) from error

    # ---- arrays ----

    def _by_position(
        self, measure: str, population: str, what: str, receivers: Sequence[int] | None = None
    ) -> ByPosition:
        """Means or standard errors at some receivers (None: all)."""
        if measure not in self.measures:
            wanted = " (rank_shift=True measures it)" if measure in RANK_MEASURES else ""
            raise ValueError(
                f"there is no measure {measure!r} here{wanted}; the measures are {', '.join(self.measures)}"
            )
        index = self.measures.index(measure)
        columns = range(len(self.receivers)) if receivers is None else receivers
        out = {}
        for position in POSITIONS:
            values = torch.full((len(columns), len(self.senders)), torch.nan, dtype=torch.float64)
            start = 0
            for first, group in zip(self.firsts, self.moments[position, population], strict=True):
                place = slice(start, start + len(group.count))
                start = place.stop
                reached = [(row, column - first) for row, column in enumerate(columns) if column >= first]
                if not reached:
                    continue
                rows, inside = map(list, zip(*reached, strict=True))
                if what == "mean":
                    mean = group.mean[index, inside]
                    mean = 1 - mean if measure == "overlap" else mean
                    values[rows, place] = mean.masked_fill(group.count == 0, torch.nan)
                else:
                    values[rows, place] = group.standard_error(index, inside)
            out[position] = values.numpy().T
        return out

    def _frame(
        self, senders: Sequence[int] | None, receivers: Sequence[int] | None, when_active: bool = False
    ) -> pd.DataFrame:
        rows = np.arange(len(self.senders)) if senders is None else np.array(senders, dtype=int)
        columns = np.arange(len(self.receivers)) if receivers is None else np.array(receivers, dtype=int)
        population = "active" if when_active else "all"
        means = {m: self._by_position(m, population, "mean", columns.tolist()) for m in self.measures}
        errors = {
            m: self._by_position(m, population, "standard error", columns.tolist()) for m in self.measures
        }
        names = np.array([self.senders[int(i)] for i in rows], dtype=object)
        frames = []
        for position in POSITIONS:
            row, column = np.nonzero(~np.isnan(means["variance"][position][rows]))
            frame: dict[str, Any] = {
                "position": position,
                "sender": names[row],
                "receiver": np.array(self.receivers, dtype=object)[columns[column]],
            }
            for measure in self.measures:
                frame[measure] = means[measure][position][rows[row], column]
                frame[f"{measure}_standard_error"] = errors[measure][position][rows[row], column]
            frames.append(pd.DataFrame(frame))
        return pd.concat(frames, ignore_index=True)


def _listed(names: Any) -> list[Any]:
    return list(names) if isinstance(names, Sequence) and not isinstance(names, str) else [names]


def _position(position: str) -> str:
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, not {position!r}")
    return position


def measure_names(rank_shift: bool) -> tuple[str, ...]:
    """The measures of a run."""
    return (*MEASURES, *RANK_MEASURES) if rank_shift else MEASURES
