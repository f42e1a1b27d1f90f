"""What one cell of the audit reads off a census's layer: arrays over all its positions at once, and no statistics yet.

Arrays are `[slot, position]`: a slot is one of the K active routed experts of a position, in the order of their routing
weights. Whatever orders experts does it by comparing slots pairwise, K (K - 1) / 2 comparisons of whole rows of
positions, which for the K of today's models is quicker than sorting each position, and knows of ties.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_lens.audit.census_summary import clustered_mean
from moe_lens.audit.census_table import Census


class Order(NamedTuple):
    """How the slots of each position compare.

    Attributes:
        signs: of each pair of slots (first, second), in the order of `combinations`: 1 where the first is larger.
        above: for each slot, how many are larger.
        below: how many are smaller.
    """

    signs: Int[np.ndarray, "pair position"]
    above: Int[np.ndarray, "slot position"]
    below: Int[np.ndarray, "slot position"]

    @classmethod
    def of(cls, values: Float[np.ndarray, "slot position"]) -> Order:
        k, n = values.shape
        pairs = list(combinations(range(k), 2))
        signs = np.empty((len(pairs), n), np.int8)
        above, below = np.zeros((k, n), np.int16), np.zeros((k, n), np.int16)
        for place, (first, second) in enumerate(pairs):
            larger, smaller = values[first] > values[second], values[first] < values[second]
            np.subtract(larger, smaller, out=signs[place], dtype=np.int8)
            below[first] += larger
            above[second] += larger
            above[first] += smaller
            below[second] += smaller
        return cls(signs, above, below)

    def at(self, kept: Int[np.ndarray, " kept"]) -> Order:
        return Order(self.signs[:, kept], self.above[:, kept], self.below[:, kept])

    @property
    def scores(self) -> Int[np.ndarray, "slot position"]:
        """Twice each slot's mean rank less its average over the slots: correlations of these are Spearman's."""
        return (self.below - self.above).astype(np.int32)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """A layer of a census, its positions a document after the other.

    Attributes:
        layer: which.
        document: of each position.
        expert: the routed experts active there.
        delta_loss: nats.
        columns: per-token quantities, one for each control.
    """

    layer: int
    document: Int[np.ndarray, " position"]
    expert: Int[np.ndarray, "slot position"]
    delta_loss: Float[np.ndarray, "slot position"]
    columns: dict[str, Float[np.ndarray, "slot position"]]

    @classmethod
    def of(cls, census: Census, layer: int, columns: tuple[str, ...]) -> LayerRows:
        """Shared experts are left out.

        Raises:
            ValueError: positions with unlike numbers of active routed experts; no routed experts.
        """
        read = ("document", "position", "rank", "expert", "delta_loss", *columns)
        rows = census.to_pandas([*dict.fromkeys(read)], layers=layer)
        arrays = {name: rows[name].to_numpy() for name in rows}
        routed = arrays["rank"] > 0
        if not routed.all():
            arrays = {name: values[routed] for name, values in arrays.items()}
        document, position = arrays["document"], arrays["position"]
        if len(document) == 0:
            raise ValueError(f"the census has no rows of routed experts at layer {layer}")
        new = np.concatenate([[True], (np.diff(document) != 0) | (np.diff(position) != 0)])
        starts = np.flatnonzero(new)
        active = np.diff(starts, append=len(document))
        if (active != active[0]).any():
            odd = starts[(active != active[0]).argmax()]
            raise ValueError(
                f"position {position[odd]} of document {document[odd]} has "
                f"{active[(active != active[0]).argmax()]} active routed experts at layer {layer}, and the first "
                f"position has {active[0]}; experts are compared where equally many are active"
            )
        k = int(active[0])

        def by_slot(name: str) -> np.ndarray:
            return np.ascontiguousarray(arrays[name].reshape(-1, k).T)

        return cls(
            layer,
            document[starts],
            by_slot("expert"),
            by_slot("delta_loss").astype(np.float64),
            {name: by_slot(name).astype(np.float64) for name in columns},
        )

    @property
    def k(self) -> int:
        return self.expert.shape[0]

    @property
    def n_positions(self) -> int:
        return self.expert.shape[1]

    @cached_property
    def loss_order(self) -> Order:
        return Order.of(self.delta_loss)

    def at(self, kept: Int[np.ndarray, " kept"]) -> LayerRows:
        """These positions of it."""
        return replace(
            self,
            document=self.document[kept],
            expert=self.expert[:, kept],
            delta_loss=self.delta_loss[:, kept],
            columns={name: values[:, kept] for name, values in self.columns.items()},
        )

    def sampled(self, n: int | None, seed: int, name: str) -> LayerRows:
        """All positions, or n of them without replacement, drawn for this cell alone: which they are does not depend
        on what else is audited.

        Raises:
            ValueError: there are fewer than n.
        """
        if n is None:
            return self
        if n > self.n_positions:
            raise ValueError(
                f"n={n} positions are wanted for each cell, and the census has {self.n_positions} at layer "
                f"{self.layer}"
            )
        generator = np.random.default_rng([seed, self.layer, zlib.crc32(name.encode())])
        return self.at(np.sort(generator.choice(self.n_positions, n, replace=False)))


@dataclass(frozen=True, eq=False)
class Pairs:
    """The positions of a cell at which highest and lowest can be told, and how many there are of the others.

    Attributes:
        document: of each pair.
        high: mean delta_loss of the experts that the metric places highest, nats.
        low: likewise of those that it places lowest.
        ratio: mean of the metric over the highest, over that of the lowest; infinite where the latter is 0.
        n_undefined: positions where an active expert has no value.
        n_ties: positions, other than those, where the highest or the lowest cannot be told from the next.
    """

    document: Int[np.ndarray, " pair"]
    high: Float[np.ndarray, " pair"]
    low: Float[np.ndarray, " pair"]
    ratio: Float[np.ndarray, " pair"]
    n_undefined: int
    n_ties: int


class Mean(NamedTuple):
    """A mean over positions, its standard error clustered by document, and over how many it is."""

    value: float
    standard_error: float
    n: int

    @classmethod
    def of(cls, values: Float[np.ndarray, " position"], document: Int[np.ndarray, " position"]) -> Mean:
        if len(values) == 0:
            return cls(np.nan, np.nan, 0)
        return cls(*clustered_mean(values, np.unique(document, return_index=True)[1]), len(values))


@dataclass(frozen=True)
class Beyond:
    """What a cell says of all active experts, and not of two of them.

    Attributes:
        spearman, kendall: mean over positions of the rank correlation between metric and delta_loss over the active
            experts; Kendall's is tau-b. Positions where either is the same for all experts have none.
        pruning_gain: mean over positions of what removing a random active expert does to the loss, less what removing
            the metric's lowest does, nats: above 0, the metric saves loss. Among experts that tie for the lowest one
            is taken at random, so a constant metric gains exactly nothing.
        random, lowest, best: mean delta_loss of a random active expert, of the metric's lowest, and of the one whose
            removal turns out to do least, which no rule can beat; nats.
    """

    spearman: Mean
    kendall: Mean
    pruning_gain: Mean
    random: float
    lowest: float
    best: float


def read_cell(
    rows: LayerRows, values: Float[np.ndarray, "slot position"], compare: int
) -> tuple[Pairs, Beyond]:
    """What a metric's values at every position make of a layer.

    Args:
        rows: the positions of the cell.
        values: of the metric, for each active expert; NaN where it has none.
        compare: how many of the highest are compared with how many of the lowest.
    """
    defined = np.logical_not(np.isnan(values).any(axis=0))
    n_undefined = int((~defined).sum())
    loss_order = rows.loss_order
    if n_undefined:
        kept = np.flatnonzero(defined)
        rows, values, loss_order = rows.at(kept), values[:, kept], loss_order.at(kept)
    order = Order.of(values)
    return (
        _pairs(rows, values, order, compare, n_undefined),
        _beyond(rows, order, loss_order),
    )


def _pairs(
    rows: LayerRows, values: Float[np.ndarray, "slot position"], order: Order, compare: int, n_undefined: int
) -> Pairs:
    # With a tie across the boundary, more than `compare` slots have fewer than `compare` above them.
    high, low = order.above < compare, order.below < compare
    told = (high.sum(axis=0) == compare) & (low.sum(axis=0) == compare)
    of_high, of_low = (_sums(rows.delta_loss, chosen)[told] / compare for chosen in (high, low))
    with np.errstate(divide="ignore"):
        ratio = _sums(values, high)[told] / _sums(values, low)[told]
    return Pairs(rows.document[told], of_high, of_low, ratio, n_undefined, int((~told).sum()))


def _sums(
    values: Float[np.ndarray, "slot position"], chosen: Bool[np.ndarray, "slot position"]
) -> Float[np.ndarray, " position"]:
    """Over the chosen slots of each position. A slot at a time, so that what is at work stays small."""
    total = np.zeros(values.shape[1])
    for of_slot, is_chosen in zip(values, chosen, strict=True):
        total += of_slot * is_chosen
    return total


def _beyond(rows: LayerRows, order: Order, loss_order: Order) -> Beyond:
    document, delta_loss = rows.document, rows.delta_loss
    scores, loss_scores = order.scores, loss_order.scores
    spreads = np.square(scores).sum(axis=0) * np.square(loss_scores).sum(axis=0)
    varies = spreads > 0
    spearman = (scores * loss_scores).sum(axis=0)[varies] / np.sqrt(spreads[varies])
    untied = (order.signs != 0).sum(axis=0) * (loss_order.signs != 0).sum(axis=0)
    concordance = (order.signs * loss_order.signs).sum(axis=0)  # int8 products are summed in 64 bits
    kendall = concordance[varies] / np.sqrt(untied[varies])
    lowest = order.below == 0
    of_lowest = _sums(delta_loss, lowest) / lowest.sum(axis=0)
    # Summed in the same order, so that where all tie, rounding is no gain.
    of_random = _sums(delta_loss, np.ones_like(lowest)) / rows.k
    gain = of_random - of_lowest
    some = len(document) > 0
    return Beyond(
        spearman=Mean.of(spearman, document[varies]),
        kendall=Mean.of(kendall, document[varies]),
        pruning_gain=Mean.of(gain, document),
        random=float(of_random.mean()) if some else np.nan,
        lowest=float(of_lowest.mean()) if some else np.nan,
        best=float(delta_loss.min(axis=0).mean()) if some else np.nan,
    )
