"""Bigram and trigram language models with interpolated Kneser-Ney smoothing: the baselines of the bundled model.

They are counted and scored on arrays of token numbers, with one absolute discount at every order.
"""

from collections.abc import Sequence

import numpy as np


class KneserNey:
    """An interpolated Kneser-Ney model of one order, from 1 to 3.

    The highest order counts occurrences; the orders below count distinct left neighbours (continuation counts);
    below order 1 stands the uniform distribution over the vocabulary.

    Args:
        tokens: Training tokens, a one-dimensional integer array.
        vocabulary_size: How many token numbers there are; all of `tokens` must be below it.
        order: 1, 2 or 3.
        discount: Taken from every count above zero, between 0 and 1.

    Raises:
        ValueError: The order or the discount is out of range, or a token number is.
    """

    def __init__(self, tokens: np.ndarray, vocabulary_size: int, order: int, discount: float = 0.75) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, and is {order}")
        if not 0 < discount < 1:
            raise ValueError(f"discount must be between 0 and 1, and is {discount}")
        if len(tokens) < order or tokens.min() < 0 or tokens.max() >= vocabulary_size:
            raise ValueError("tokens must be token numbers of the vocabulary, at least as many as the order")
        self.vocabulary_size = vocabulary_size
        self.discount = discount
        tokens = tokens.astype(np.int64)
        keys, counts = np.unique(self._join(tokens, order), return_counts=True)
        tables = [(keys, counts)]
        for _ in range(order - 1):
            # A key without its leftmost token, once for every distinct leftmost token that it was seen with.
            keys, counts = np.unique(keys % vocabulary_size ** (order - 1), return_counts=True)
            tables.append((keys, counts))
            order -= 1
        self._tables = [self._with_contexts(keys, counts) for keys, counts in reversed(tables)]

    def _join(self, tokens: np.ndarray, order: int) -> np.ndarray:
        """One integer for each run of `order` tokens."""
        joined = np.zeros(len(tokens) - order + 1, dtype=np.int64)
        for offset in range(order):
            joined = joined * self.vocabulary_size + tokens[offset : len(tokens) - order + 1 + offset]
        return joined

    def _with_contexts(self, keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        contexts, starts = np.unique(keys // self.vocabulary_size, return_index=True)
        totals = np.add.reduceat(counts, starts)
        kinds = np.diff(np.append(starts, len(keys)))
        return keys, counts, contexts, totals, kinds

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """The negative log-probability, in nats, of every token of one document but the first.

        A token with fewer tokens before it than the order needs is scored by the lower order.

        Args:
            tokens: One document, a one-dimensional integer array.

        Returns:
            An array one shorter than `tokens`.
        """
        tokens = tokens.astype(np.int64)
        probability = np.full(len(tokens), 1 / self.vocabulary_size)
        for order, (keys, counts, contexts, totals, kinds) in enumerate(self._tables, start=1):
            if len(tokens) < order:
                break
            joined = self._join(tokens, order)
            count = _look_up(keys, counts, joined)
            total = _look_up(contexts, totals, joined // self.vocabulary_size)
            kind = _look_up(contexts, kinds, joined // self.vocabulary_size)
            lower = probability[order - 1 :]
            with np.errstate(divide="ignore", invalid="ignore"):
                mixed = (np.maximum(count - self.discount, 0) + self.discount * kind * lower) / total
            probability[order - 1 :] = np.where(total > 0, mixed, lower)
        return -np.log(probability[1:])

    def loss(self, documents: Sequence[np.ndarray]) -> float:
        """Mean nats per token over all tokens of the documents but each one's first."""
        scores = [self.nats(document) for document in documents if len(document) > 1]
        if not scores:
            raise ValueError("no document has two tokens")
        return float(np.concatenate(scores).mean())


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key among the sorted keys, 0 where there is none."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
