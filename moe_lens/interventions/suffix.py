"""Branches at a few tokens of a document, on their way from the first changed layer to the logits, a layer at a time.

Whoever drives them says where the layers are and where the streams lie between two of them: `replay` has all layers in
memory, `replay_documents` reads each once for the branches of many documents. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.branches import Change, Starts, starts
from moe_lens.interventions.clean_run import CleanRun, MoEValues
from moe_lens.interventions.outcomes import Outcome, read_outcomes
from moe_lens.interventions.replay_attend import ReplayAttend
from moe_lens.model.attend import Attend
from moe_lens.out_of_memory import InParts

if TYPE_CHECKING:
    from moe_lens.interventions.replay import Branches


@dataclass(frozen=True)
class Read:
    """Of one `Branches`, at a run of rows: the outcomes by name, and the gap norm of the changed layer's output."""

    outcomes: dict[str, Float[Tensor, "n branch"]]
    gap_norm: Float[Tensor, "n branch"]


OfRows = tuple[list[Read], list[Read] | None]
"""Of some rows: what is read of each of the branches, in their order; and of the null branch beside each."""


def joined(parts: Sequence[Read]) -> Read:
    """Of runs of rows that follow one another."""
    outcomes = {name: torch.cat([part.outcomes[name] for part in parts]) for name in parts[0].outcomes}
    return Read(outcomes, torch.cat([part.gap_norm for part in parts]))


@dataclass
class Suffix:
    """Branches of one or several layers at a few tokens; they join as their layers are reached.

    Attributes:
        rows: the tokens, as places among the document's.
        change: how slots are changed.
        branches: with the slots that each changes at these rows.
        null_branch: whether one that changes nothing runs beside those of each layer.
    """

    rows: Int[Tensor, " n"]
    change: Change
    branches: Sequence[tuple[Branches, Bool[Tensor, "n branch k"]]]
    null_branch: bool
    _places: dict[int, slice] = field(default_factory=dict)
    _nulls: dict[int, slice] = field(default_factory=dict)
    _gaps: dict[int, Tensor] = field(default_factory=dict)

    @property
    def first_layer(self) -> int:
        return min(of.layer for of, _ in self.branches)

    @property
    def width(self) -> int:
        """How many branches arrive at the end, null branches among them."""
        n_nulls = len({of.layer for of, _ in self.branches}) if self.null_branch else 0
        return n_nulls + sum(removed.shape[1] for _, removed in self.branches)

    def step(
        self,
        clean: CleanRun,
        layer: int,
        streams: Float[Tensor, "n branch d_model"] | None,
        attend: Attend,
        values: MoEValues | None,
    ) -> Float[Tensor, "n wider d_model"] | None:
        """Take the branches through a layer, whose weights are in memory; those that it changes begin there.

        Args:
            clean: the document, with this layer's keys and values.
            layer: the next one.
            streams: before it; None where no branch has begun.
            attend: `ReplayAttend(clean, rows)`.
            values: what the layer did in the clean run; needed where branches begin.

        Returns:
            The streams after it, of the branches that had begun and then of those that begin; None where none has.
        """
        if streams is not None:
            streams = clean.model.blocks[layer](streams, attend)
        joining: list[Tensor] = []
        width = 0 if streams is None else streams.shape[1]
        here = [i for i, (of, _) in enumerate(self.branches) if of.layer == layer]
        if self.null_branch and here:
            # One for each layer: a branch that came from further up would carry the rounding of more layers.
            k = self.branches[here[0]][1].shape[2]
            nothing = torch.zeros(len(self.rows), 1, k, dtype=torch.bool, device=self.rows.device)
            joining.append(self._starts(clean, values, nothing, None).streams)
            self._nulls[layer] = slice(width, width + 1)
            width += 1
        for i in here:
            of, removed = self.branches[i]
            start = self._starts(clean, values, removed, of.shared_removed)
            self._places[i], self._gaps[i] = slice(width, width + removed.shape[1]), start.gap_norm
            width += removed.shape[1]
            joining.append(start.streams)
        if not joining:
            return streams
        return torch.cat(([] if streams is None else [streams]) + joining, dim=1)

    def step_in_parts(
        self,
        in_parts: InParts,
        clean: CleanRun,
        layer: int,
        streams: Float[Tensor, "n branch d_model"] | None,
        values: MoEValues | None,
    ) -> Float[Tensor, "n wider d_model"]:
        """`step` at a layer where branches are, with fewer rows at once where memory runs out."""

        def step(part: slice) -> tuple[Suffix, Tensor]:
            whole = part == slice(0, len(self.rows))
            some = self if whole else self._at(part)
            before = streams if streams is None or whole else streams[part]
            after = some.step(clean, layer, before, ReplayAttend(clean, some.rows), values)
            assert after is not None
            return some, after

        parts = in_parts.run(step, len(self.rows))
        if len(parts) == 1:
            return parts[0][1]
        first = parts[0][0]
        self._places |= first._places
        self._nulls |= first._nulls
        for i in first._gaps:
            self._gaps[i] = torch.cat([some._gaps[i] for some, _ in parts])
        return torch.cat([after for _, after in parts])

    def _at(self, part: slice) -> Suffix:
        """The same branches at some of the rows, of which nothing has been kept."""
        branches = [(of, removed[part]) for of, removed in self.branches]
        return Suffix(self.rows[part], self.change, branches, self.null_branch)

    def finish(
        self,
        clean: CleanRun,
        streams: Float[Tensor, "n branch d_model"],
        outcomes: Sequence[Outcome],
        memory_budget: int,
    ) -> OfRows:
        """What is read of the streams after the last layer.

        Args:
            clean: the document, with what its clean run ended with.
            outcomes: beside the loss.
            memory_budget: bytes for logits.
        """
        read = read_outcomes(clean, self.rows, streams, outcomes, memory_budget)
        of_branches = [
            Read({name: value[:, self._places[i]] for name, value in read.items()}, self._gaps[i])
            for i in range(len(self.branches))
        ]
        if not self.null_branch:
            return of_branches, None
        nothing_changed = torch.zeros_like(read["loss"][:, :1])
        of_nulls = [
            Read({name: value[:, self._nulls[of.layer]] for name, value in read.items()}, nothing_changed)
            for of, _ in self.branches
        ]
        return of_branches, of_nulls

    def _starts(
        self,
        clean: CleanRun,
        values: MoEValues | None,
        removed: Bool[Tensor, "n branch k"],
        shared: Bool[Tensor, " branch"] | None,
    ) -> Starts:
        assert values is not None
        return starts(clean, values, self.rows, removed, self.change, shared)
