"""Documents as rows of a batch: which of their tokens are real, and means over documents as a stream."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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


class DocumentMean:
    """Count, mean and squared deviations over documents, in float64, merged batch by batch.

    Chan, Golub and LeVeque's update (1983): no large sums are subtracted from each other, so a spread that is
    small beside the mean survives.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.count = 0
        self.mean: Float[np.ndarray, "*shape"] = np.zeros(shape)
        self._squares: Float[np.ndarray, "*shape"] = np.zeros(shape)

    def add(self, values: Float[np.ndarray, "*documents_and_shape"]) -> None:
        """The values of a few more documents, `[document, *shape]`."""
        n = len(values)
        if n == 0:
            return
        mean = values.mean(axis=0)
        squares = ((values - mean) ** 2).sum(axis=0)
        total, delta = self.count + n, mean - self.mean
        self._squares = self._squares + squares + delta**2 * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    @property
    def standard_error(self) -> Float[np.ndarray, "*shape"]:
        """Standard deviation over documents (ddof 1) over the root of their number; NaN for one document."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return np.sqrt(self._squares / (self.count - 1) / self.count)
