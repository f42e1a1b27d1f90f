"""How far a pass over a corpus has come, so that it can be kept at any moment."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lens.routing.streaming import ContributionAccumulator


@dataclass
class Progress:
    """How far a pass has come: what its state is saved with.

    Attributes:
        n_batches: that were added and found in order.
        digest: of their tokens.
        n_rows: documents that the accumulator had added then.
        n_saved: batches that the state on the disk has.
    """

    n_batches: int
    digest: str
    n_rows: int

    def __post_init__(self) -> None:
        self.n_saved = self.n_batches

    def reached(self, n_batches: int, digest: str, n_rows: int) -> None:
        self.n_batches, self.digest, self.n_rows = n_batches, digest, n_rows

    def is_of(self, accumulator: ContributionAccumulator) -> bool:
        """Whether the accumulator holds these batches, no more and none in part."""
        return accumulator.whole and accumulator.n_rows == self.n_rows
