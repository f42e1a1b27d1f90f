"""Documents as rows of a batch: which of their tokens count as what, and means over documents as a stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

POSITIONS = ("lead", "rest")
POPULATIONS = ("all", "active")
"""Whose tokens a mean is over: all of a document's (of a position class), or those where the sender is active."""


def real_tokens(
    tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None
) -> Bool[Tensor, "batch pos"]:
    """The mask as booleans on the tokens' device; all true where there is none.

    Raises:
        ValueError: tokens are not `[batch, pos]`, or the mask has another shape.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [batch, pos], one document a row, not {tuple(tokens.shape)}")
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"the mask {tuple(mask.shape)} must have the tokens' shape {tuple(tokens.shape)}")
    return mask.to(tokens.device).bool()


def position_classes(
    tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"], left_out: int | None = None
) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Each document's lead token, the first real one whatever the padding; and the rest of its real tokens.

    Args:
        left_out: a token id (BOS) that belongs to neither where a document begins with it; the next token then
            leads.
    """
    order = real.long().cumsum(dim=1)
    if left_out is None:
        counted = real
    else:
        counted = real & ~((order == 1) & (tokens == left_out))
        order = counted.long().cumsum(dim=1)
    lead = counted & (order == 1)
    return {"lead": lead, "rest": counted & ~lead}


class Moments:
    """Count, mean and squared deviations over documents, in float64, merged batch by batch.

    Chan, Golub and LeVeque's update (1983): no large sums are subtracted from each other, so a spread that is
    small beside the mean survives. A sender that a document does not have is not counted for it.

    Attributes:
        count: documents, `[sender]`.
        mean, squares: `[measure, receiver, sender]`.
    """

    def __init__(self, n_measures: int, n_receivers: int, n_senders: int, device: torch.device | None = None):
        shape = (n_measures, n_receivers, n_senders)
        self.count: Float[Tensor, " sender"] = torch.zeros(n_senders, dtype=torch.float64, device=device)
        self.mean: Float[Tensor, "measure receiver sender"] = torch.zeros(
            shape, dtype=torch.float64, device=device
        )
        self.squares = torch.zeros_like(self.mean)

    def add(
        self,
        values: Float[Tensor, "measure receiver document sender"],
        present: Bool[Tensor, "document sender"],
        receivers: slice = slice(None),
    ) -> None:
        """The values of a few more documents at some receivers, float64, and 0 where a sender is not present;
        `counted` when all receivers are in."""
        self.merge(*moments_of(values, present), receivers)

    def merge(
        self,
        counts: Float[Tensor, " sender"],
        mean: Float[Tensor, "measure receiver sender"],
        squares: Float[Tensor, "measure receiver sender"],
        receivers: slice = slice(None),
    ) -> None:
        """The moments of other documents."""
        total = (self.count + counts).clamp(min=1)
        delta = mean - self.mean[:, receivers]
        self.mean[:, receivers] += delta * (counts / total)
        self.squares[:, receivers] += squares + delta.square_() * (self.count * counts / total)

    def counted(self, documents: Float[Tensor, " sender"]) -> None:
        """So many documents more, once for all receivers."""
        self.count += documents

    def standard_error(
        self, measure: int, receivers: Sequence[int] | slice = slice(None)
    ) -> Float[Tensor, "receiver sender"]:
        """Standard deviation over documents (ddof 1) over the root of their number; NaN for fewer than two."""
        variance = self.squares[measure, receivers] / (self.count - 1).clamp(min=1)
        return (variance / self.count.clamp(min=1)).sqrt().masked_fill(self.count < 2, torch.nan)

    @classmethod
    def of(
        cls,
        count: Float[Tensor, " sender"],
        mean: Float[Tensor, "measure receiver sender"],
        squares: Float[Tensor, "measure receiver sender"],
    ) -> Moments:
        """Moments that were taken elsewhere."""
        moments = cls.__new__(cls)
        moments.count, moments.mean, moments.squares = count, mean, squares
        return moments

    def copy(self) -> Moments:
        return Moments.of(self.count.clone(), self.mean.clone(), self.squares.clone())

    def on_cpu(self, copy: bool) -> Moments:
        """The same on the CPU; `copy` where it must not follow what is added here."""
        moved = Moments.of(self.count.cpu(), self.mean.cpu(), self.squares.cpu())
        return moved.copy() if copy and moved.mean is self.mean else moved


def moments_of(
    values: Float[Tensor, "measure receiver document sender"], present: Bool[Tensor, "document sender"]
) -> tuple[
    Float[Tensor, " sender"],
    Float[Tensor, "measure receiver sender"],
    Float[Tensor, "measure receiver sender"],
]:
    """Count, mean and squared deviations of the values of a few documents, which are 0 where a sender is not
    present."""
    counts = present.sum(dim=0, dtype=torch.float64)
    if bool(present.all()):
        mean = values.mean(dim=2)
        return counts, mean, (values - mean[:, :, None]).square_().sum(dim=2)
    mean = values.sum(dim=2) / counts.clamp(min=1)
    return counts, mean, (values - mean[:, :, None]).mul_(present).square_().sum(dim=2)
