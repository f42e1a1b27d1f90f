"""How far a pass over a corpus has come, so that it can be kept at any moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_lens.routing.streaming import ContributionAccumulator


@dataclass(frozen=True)
class Place:
    """After some batches of a corpus.

    Attributes:
        n_batches: how many.
        digest: of their tokens.
        n_rows: documents that the accumulator has added when all of them are.
    """

    n_batches: int
    digest: str
    n_rows: int


class Progress:
    """How far a pass has come: what its state is saved with.

    Attributes:
        at: after the batches that were added and found in order.
        n_saved: batches that the state on the disk has.
    """

    def __init__(self, n_batches: int, digest: str, n_rows: int):
        self.at = self._coming = Place(n_batches, digest, n_rows)
        self.n_begun_with = self.n_saved = n_batches

    def begins(self, n_batches: int, digest: str, n_rows: int) -> None:
        """A batch is being run, or a group of them; with it there are so many."""
        self._coming = Place(n_batches, digest, n_rows)

    def ends(self) -> None:
        """They were added, and found in order."""
        self.at = self._coming

    def to_save(self, accumulator: ContributionAccumulator, require_in_order: Callable[[], None]) -> bool:
        """Whether what the accumulator holds now, when the run is cut off, is these batches and no other is in part;
        and whether it is more than was saved."""
        if accumulator.whole and accumulator.n_rows == self._coming.n_rows and self.at is not self._coming:
            # The interrupt waited until all was added. The first after a state is held against that first.
            if self.at.n_batches == self.n_begun_with > 0:
                return False
            require_in_order()
            self.ends()
        is_whole = accumulator.whole and accumulator.n_rows == self.at.n_rows
        return is_whole and self.at.n_batches > self.n_saved
