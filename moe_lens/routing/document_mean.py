"""The mean over documents of something measured per document, with its standard error, as a stream."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


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
