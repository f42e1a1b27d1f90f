"""From the sums of a batch to means over documents, for all senders of one granularity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.routing.documents import POPULATIONS, POSITIONS, Moments, moments_of
from moe_lens.routing.parts import DocumentSums, Part, Routed
from moe_lens.routing.senders import Senders


class Tally:
    """What one granularity has gathered so far.

    Attributes:
        senders: names, with `rounding` last where the stream rounds.
        firsts: for each group of them, the place of the first receiver that it reaches.
        moments: for each position class and population, those of every group, from its first receiver on.
        n_bytes: memory of all moments.
        n_documents, n_tokens: of each position class.
        completeness_error, rounding_ratio, model_logit_difference: the largest so far.
    """

    def __init__(
        self, senders: Senders, firsts: Sequence[int], n_measures: int, n_receivers: int, device: torch.device
    ):
        self.senders, self.firsts = senders, tuple(firsts)
        self.n_measures, self.n_receivers = n_measures, n_receivers
        self.moments = {
            (position, population): [
                Moments(n_measures, n_receivers - first, len(group), device)
                for group, first in zip(senders.groups, firsts, strict=True)
            ]
            for position in POSITIONS
            for population in POPULATIONS
        }
        self.n_bytes = sum(
            m.mean.nbytes + m.squares.nbytes for groups in self.moments.values() for m in groups
        )
        self.n_documents: dict[str, int] = dict.fromkeys(POSITIONS, 0)
        self.n_tokens: dict[str, int] = dict.fromkeys(POSITIONS, 0)
        self.completeness_error = 0.0
        self.rounding_ratio: float | None = None
        self.model_logit_difference = 0.0

    def additions(self, group: int, part: Part, routed: Routed) -> Iterator[Callable[[], None]]:
        """What adds the sums of one group of senders to its means over documents: each is to be called once, in
        order. They are made without changing anything."""
        counts: dict[tuple[str, str], Tensor] = {}
        n_tokens = {p: per_document(member, routed) for p, member in routed.classes.items()}
        for receivers, sums in part.document_sums(routed):
            for key, moments in self.moments.items():
                position, population = key
                present, values = _document_means(sums, position, population, n_tokens[position])
                yield partial(moments[group].merge, *moments_of(values, present), receivers)
                counts[key] = present.sum(dim=0, dtype=torch.float64)
        for key, count in counts.items():
            yield partial(self.moments[key][group].counted, count)


def _document_means(
    sums: DocumentSums, position: str, population: str, n_tokens: Float[Tensor, " document"]
) -> tuple[Bool[Tensor, "document sender"], Float[Tensor, "measure receiver document sender"]]:
    """Each document's mean, and whether it has one."""
    active = sums.active[position]
    counts = n_tokens[:, None].expand_as(active) if population == "all" else active
    present = counts > 0
    if population == "all" and sums.exists is not None:
        present = present & sums.exists
    return present, sums.sums[position] / counts.clamp(min=1)


def per_document(member: Bool[Tensor, " token"], routed: Routed) -> Float[Tensor, " document"]:
    counts = torch.zeros(routed.n_documents, dtype=torch.float64, device=member.device)
    return counts.index_add_(0, routed.documents, member.double())
