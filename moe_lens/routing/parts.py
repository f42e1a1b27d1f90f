"""One component's share in a batch: every sender's measures, from its tokens to its documents.

A *part* is made when a component has run, before the receivers' scales are known, and holds what is needed of it.
When the batch is through, the part gives sums over each document's tokens, divided by the true scales.

`TokenPart` here is for whole components, heads and experts: a token has a few senders, each with a score for every
expert of every later router, and the measures are taken at once. `source_parts` and `neuron_parts` have too many
senders for that, and another way for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.config import RouterConfig
from moe_lens.routing.documents import POSITIONS
from moe_lens.routing.measures import MEASURES, RANK_MEASURES, SCALE_POWERS, chunk_size, score_measures
from moe_lens.routing.rank_shift import Choice, rank_shift


@dataclass
class Readouts:
    """What every receiver of a pass reads with: `rows` is `[receiver, expert, d_model]`, the gain folded in, over
    the experts that are measured; `gains` is `[receiver, d_model]`."""

    rows: Float[Tensor, "receiver expert d_model"]
    gains: Float[Tensor, "receiver d_model"]

    def later(self, first: int) -> Readouts:
        """Those of the receivers from the first-th on."""
        return Readouts(self.rows[first:], self.gains[first:])

    @property
    def flat(self) -> Float[Tensor, "row d_model"]:
        return rearrange(self.rows, "receiver expert d_model -> (receiver expert) d_model")

    def unflatten(self, scores: Float[Tensor, "*place row"]) -> Float[Tensor, "*place receiver expert"]:
        return scores.unflatten(-1, tuple(self.rows.shape[:2]))


@dataclass
class Routed:
    """What a finished pass knows of its tokens, flattened to `[token]` = `[batch pos]`.

    Attributes:
        classes: lead and rest, `[token]`.
        documents: each token's, `[token]`.
        n_documents: rows of the batch.
        scales: of every receiver.
        logits: every receiver's exact logits; None unless measures ask for them.
        choice: what every receiver makes of them; None likewise.
        chosen: the experts that every receiver chose in the run; None likewise.
    """

    classes: dict[str, Bool[Tensor, " token"]]
    documents: Int[Tensor, " token"]
    n_documents: int
    scales: Float[Tensor, "token receiver"]
    logits: Float[Tensor, "token receiver expert"] | None = None
    choice: Choice | None = None
    chosen: Int[Tensor, "token receiver k"] | None = None


@dataclass
class DocumentSums:
    """Sums over tokens for each document: of the measures, and of the tokens where the sender was active.

    Attributes:
        sums: position class to `[measure, receiver, document, sender]`, float64.
        active: position class to `[document, sender]`.
        exists: which documents have the sender at all; None where all do.
    """

    sums: dict[str, Float[Tensor, "measure receiver document sender"]]
    active: dict[str, Float[Tensor, "document sender"]]
    exists: Bool[Tensor, "document sender"] | None = None


class Part(Protocol):
    """See the top of this file. `first` is the first receiver that the component reaches."""

    first: int

    def document_sums(self, routed: Routed) -> Iterator[tuple[slice, DocumentSums]]:
        """Some receivers at a time, counted from the first that the component reaches: sums over each document's
        tokens."""
        ...


class Rows(NamedTuple):
    """Scores of (token, sender) pairs, not yet divided by the receivers' scales."""

    tokens: Int[Tensor, " row"]
    senders: Int[Tensor, " row"]
    scores: Float[Tensor, "row receiver expert"]
    norms: Float[Tensor, "row receiver"]


@dataclass
class Measuring:
    """How rows are measured where it takes the receivers' own routing: over the experts that each receiver chose
    (`selected`), and with the change of ranks (`rank_shift`)."""

    router: RouterConfig
    selected: bool = False
    rank_shift: bool = False

    @property
    def waits(self) -> bool:
        """Whether measures can only be taken when the receivers have run."""
        return self.selected or self.rank_shift

    @property
    def n_measures(self) -> int:
        return len(MEASURES) + (len(RANK_MEASURES) if self.rank_shift else 0)

    def measured(self, rows: Rows, routed: Routed, receivers: slice) -> Float[Tensor, "row measure receiver"]:
        """Every measure of every row, at the true scales."""
        scale = routed.scales[rows.tokens, receivers]
        scores, norms = rows.scores / scale[..., None], rows.norms / scale
        measured_scores = scores
        if self.selected:
            assert routed.chosen is not None
            measured_scores = scores.gather(-1, routed.chosen[rows.tokens, receivers])
        measures = score_measures(measured_scores, norms)
        if not self.rank_shift:
            return measures
        assert routed.logits is not None
        assert routed.choice is not None
        before = Choice(*(of_all[rows.tokens, receivers] for of_all in routed.choice))
        shift = rank_shift(routed.logits[rows.tokens, receivers], scores, self.router, before=before)
        # The overlap's complement, which is 0, as all measures are, where a sender writes nothing.
        shifts = torch.stack((shift.aarv, 1 - shift.overlap, shift.weight_change), dim=-2)
        return torch.cat((measures, shifts), dim=-2)


class DocumentSummer:
    """Adds measured rows to their documents."""

    def __init__(self, routed: Routed, n_measures: int, n_receivers: int, n_senders: int):
        self.routed, self.n_senders = routed, n_senders
        device = routed.documents.device
        n_cells = routed.n_documents * n_senders
        self._sums = {
            position: torch.zeros(n_cells, n_measures, n_receivers, dtype=torch.float64, device=device)
            for position in POSITIONS
        }
        self._active = {
            position: torch.zeros(n_cells, dtype=torch.float64, device=device) for position in POSITIONS
        }

    def add(
        self,
        tokens: Int[Tensor, " row"],
        senders: Int[Tensor, " row"],
        measures: Float[Tensor, "row measure receiver"],
    ) -> None:
        cells = self.routed.documents[tokens] * self.n_senders + senders
        for position, member in self.routed.classes.items():
            counted = member[tokens]
            self._sums[position].index_add_(0, cells[counted], measures[counted].double())
            self._active[position].index_add_(
                0, cells[counted], torch.ones_like(cells[counted], dtype=torch.float64)
            )

    def result(self, exists: Bool[Tensor, "document sender"] | None = None) -> DocumentSums:
        shape = "(document sender) measure receiver -> measure receiver document sender"
        return DocumentSums(
            sums={p: rearrange(s, shape, sender=self.n_senders) for p, s in self._sums.items()},
            active={p: rearrange(a, "(d s) -> d s", s=self.n_senders) for p, a in self._active.items()},
            exists=exists,
        )


class TokenPart:
    """Some senders of every token: `tokens x slots` rows, the slot's sender given for each (or for all alike).

    Chunks of tokens are fed to `add`; their measures are taken there and then, or their scores kept where
    measures must wait for the receivers.
    """

    def __init__(self, n_senders: int, first: int, measuring: Measuring):
        self.n_senders, self.first, self.measuring = n_senders, first, measuring
        self._tokens: list[Tensor] = []
        self._senders: list[Tensor] = []
        self._measures: list[Tensor] = []
        self._rows: list[Rows] = []

    def add(
        self,
        tokens: Int[Tensor, " token"],
        senders: Int[Tensor, "token slot"],
        scores: Float[Tensor, "token slot receiver expert"],
        norms: Float[Tensor, "token slot receiver"],
    ) -> None:
        rows = Rows(
            tokens[:, None].expand_as(senders).flatten(),
            senders.flatten(),
            scores.flatten(0, 1),
            norms.flatten(0, 1),
        )
        if self.measuring.waits:
            self._rows.append(rows)
            return
        self._tokens.append(rows.tokens)
        self._senders.append(rows.senders)
        self._measures.append(score_measures(rows.scores, rows.norms))

    def document_sums(self, routed: Routed) -> Iterator[tuple[slice, DocumentSums]]:
        n_receivers = routed.scales.shape[1] - self.first
        receivers = slice(self.first, None)
        summer = DocumentSummer(routed, self.measuring.n_measures, n_receivers, self.n_senders)
        for rows in self._rows:
            summer.add(rows.tokens, rows.senders, self.measuring.measured(rows, routed, receivers))
        powers = torch.tensor(SCALE_POWERS, device=routed.scales.device)
        for tokens, senders, measures in zip(self._tokens, self._senders, self._measures, strict=True):
            scales = routed.scales[tokens, receivers]
            summer.add(tokens, senders, measures / scales[:, None] ** powers[:, None])
        yield slice(None), summer.result()


def token_chunks(n_tokens: int, scores_per_token: int, device: torch.device) -> Iterator[slice]:
    """Runs of tokens whose scores are made at once."""
    step = max(1, chunk_size(device) // max(1, scores_per_token))
    return (slice(start, min(start + step, n_tokens)) for start in range(0, n_tokens, step))
