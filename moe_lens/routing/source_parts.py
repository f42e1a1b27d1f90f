"""(head, source token) senders of an attention layer, without ever making a score for each pair.

What head h writes at query q from source p is A[q, p] v_p W_O^h: a non-negative number times one vector for each
(head, source). So with s_r(q) the scale of receiver r,

    variance(q, p) = A[q, p]^2 variance(v_p W_O^h) / s_r(q)^2

and likewise, to the first power, every other measure: those of v_p W_O^h are taken once for each source. What is
left is a weighted sum of attention over queries. For one source position that is a matrix product,

    sum over q of  A[q, p]^n  1 / s_r(q)^n      times the measure of v_p

and for one distance o = q - p, a sum down a diagonal of the same, which no single product gives: diagonals are laid
side by side as rows `[p, o]`, and weighted by the scales laid out likewise.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 2 and 9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.routing.documents import POSITIONS
from moe_lens.routing.measures import MEASURES, SCALE_POWERS, chunk_size, score_measures
from moe_lens.routing.parts import DocumentSummer, DocumentSums, Measuring, Routed, Rows
from moe_lens.routing.senders import SourceAxis

# Weighted attention of this many (head, position, offset) entries is held at a time.
_DIAGONAL_CHUNK = 2**22


class SourcePart:
    """An attention layer's pattern, and the scores of what each source would write if it were fully attended to.

    Args:
        pattern: the attention pattern.
        scores: of v_p W_O^h, unscaled, `[batch, source, head, receiver, expert]`.
        norms: || gamma_r v_p W_O^h ||.
        bias: the output bias' scores `[receiver, expert]` and norms `[receiver]`; None where there is none.
        real: which positions are real tokens; each row's must be one run.
        n_sources: the length of the source axis among the senders.
        source_axis: what names a source: its position among the document's real tokens, or its distance.
        first: the first receiver that the layer reaches.
    """

    def __init__(
        self,
        pattern: Float[Tensor, "batch head query key"],
        scores: Float[Tensor, "batch key head receiver expert"],
        norms: Float[Tensor, "batch key head receiver"],
        bias: tuple[Float[Tensor, "receiver expert"], Float[Tensor, " receiver"]] | None,
        real: Bool[Tensor, "batch pos"],
        n_sources: int,
        source_axis: SourceAxis,
        first: int,
        measuring: Measuring,
    ):
        _check_pattern(pattern)
        self.first, self.measuring = first, measuring
        self.pattern, self.real = pattern, real
        self.n_sources, self.source_axis = n_sources, source_axis
        self.n_heads = pattern.shape[1]
        self.bias = bias
        self.lengths = real.sum(dim=1)
        self.starts = real.long().argmax(dim=1)
        if measuring.waits:
            self.scores, self.norms = scores, norms
        else:
            measures = score_measures(scores, norms)
            self.measures = rearrange(
                measures, "b p h measure receiver -> measure b h receiver p"
            ).contiguous()

    @property
    def n_senders(self) -> int:
        return self.n_heads * self.n_sources + (self.bias is not None)

    def document_sums(self, routed: Routed) -> Iterator[tuple[slice, DocumentSums]]:
        if self.measuring.waits:
            yield slice(None), self._by_rows(routed)
            return
        inverse = rearrange(1 / routed.scales[:, self.first :], "(b p) r -> b r p", b=len(self.real))
        members = [routed.classes[position].view(self.real.shape) for position in POSITIONS]
        weights = [inverse * member[:, None] for member in members]
        if self.source_axis == "offset":
            by_source = [self._by_offset(of_class) for of_class in weights]
        else:
            by_source = self._by_position(weights)
        sums, active = {}, {}
        for position, member, of_class, summed in zip(POSITIONS, members, weights, by_source, strict=True):
            sums[position] = rearrange(summed, "m b h r p -> m r b (h p)")
            active[position] = repeat(self._seen(member), "b p -> b (h p)", h=self.n_heads)
            if self.bias is not None:
                measures = score_measures(*self.bias)[:, :, None]
                powers = torch.tensor(SCALE_POWERS, device=inverse.device)[:, None, None, None]
                every = (of_class.double() ** powers).sum(dim=-1)
                bias_sums = measures.double() * rearrange(every, "m b r -> m r b")
                sums[position] = torch.cat((sums[position], bias_sums[..., None]), dim=-1)
                active[position] = torch.cat((active[position], member.sum(dim=1).double()[:, None]), dim=-1)
        yield slice(None), DocumentSums(sums, active, self._exists())

    def _by_position(
        self, weights: Sequence[Float[Tensor, "batch receiver query"]]
    ) -> list[Float[Tensor, "measure batch head receiver source"]]:
        """For each class of queries. All classes are weighted in one product: the pattern is what is large."""
        pattern = self.pattern.float()
        every = rearrange(list(weights), "position b receiver q -> b 1 (position receiver) q")
        squared, once = every.square() @ pattern.square(), every @ pattern
        seen = torch.stack([squared if power == 2 else once for power in SCALE_POWERS])
        by_class = rearrange(seen, "m b h (position r) p -> position m b h r p", position=len(weights))
        return [self._from_first_real((of_class * self.measures).double()) for of_class in by_class]

    def _by_offset(
        self, weights: Float[Tensor, "batch receiver query"]
    ) -> Float[Tensor, "measure batch head receiver source"]:
        n_batch, n_positions = self.real.shape
        n_receivers = weights.shape[1]
        out = torch.zeros(
            len(MEASURES), n_batch, self.n_heads, n_receivers, self.n_sources,
            dtype=torch.float64, device=weights.device,
        )  # fmt: skip
        # Row p of the diagonals holds q = p, p + 1, ...: a view of the transposed pattern, padded with zeros.
        padded_weights = F.pad(weights, (0, n_positions))
        ahead = padded_weights.unfold(-1, n_positions, 1)[:, :, :n_positions]
        n_kept = min(n_positions, self.n_sources)
        step = max(1, _DIAGONAL_CHUNK // (n_positions * n_positions * n_receivers))
        power_two = [i for i, power in enumerate(SCALE_POWERS) if power == 2]
        power_one = [i for i, power in enumerate(SCALE_POWERS) if power == 1]
        for row in range(n_batch):
            transposed = F.pad(self.pattern[row].float().transpose(-1, -2), (0, n_positions)).contiguous()
            for start in range(0, self.n_heads, step):
                heads = slice(start, min(start + step, self.n_heads))
                chunk = transposed[heads]
                diagonals = chunk.as_strided(
                    (chunk.shape[0], n_positions, n_positions),
                    (n_positions * 2 * n_positions, 2 * n_positions + 1, 1),
                    chunk.storage_offset(),
                )
                weighted = diagonals[:, None] * ahead[row]
                for powers, seen in ((power_one, weighted), (power_two, weighted.square())):
                    measures = rearrange(self.measures[powers, row, heads], "m h r p -> h r m p")
                    summed = rearrange(measures @ seen, "h r m o -> m h r o")
                    out[powers, row, heads, :, :n_kept] = summed[..., :n_kept].double()
        return out

    def _from_first_real(
        self, by_column: Float[Tensor, "measure batch head receiver column"]
    ) -> Float[Tensor, "measure batch head receiver source"]:
        """Columns of the batch as places among the document's real tokens: padding on the left is passed over, and
        what lies beyond the document is zero, as padded sources are never attended to."""
        places = torch.arange(self.n_sources, device=self.real.device)
        columns = self.starts[:, None] + places
        inside = places < self.lengths[:, None]
        index = columns.clamp(max=self.real.shape[1] - 1)[None, :, None, None]
        shape = (*by_column.shape[:-1], self.n_sources)
        return by_column.gather(-1, index.expand(shape)).masked_fill(~inside[None, :, None, None], 0.0)

    def _places(self) -> Int[Tensor, "batch pos"]:
        """Every column's place among the document's real tokens."""
        return torch.arange(self.real.shape[1], device=self.real.device) - self.starts[:, None]

    def _seen(self, member: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch source"]:
        """How many of these queries see each source, or have a source at each distance."""
        places = self._places()
        sources = torch.arange(self.n_sources, device=self.real.device)
        # A query sees sources up to its own place, and distances up to it: the same number, either way.
        return (member[:, :, None] & (places[:, :, None] >= sources)).sum(dim=1).double()

    def _exists(self) -> Bool[Tensor, "document sender"]:
        sources = torch.arange(self.n_sources, device=self.real.device)
        exists = repeat(sources < self.lengths[:, None], "b p -> b (h p)", h=self.n_heads)
        if self.bias is None:
            return exists
        return F.pad(exists, (0, 1), value=True)

    def _by_rows(self, routed: Routed) -> DocumentSums:
        """Every pair's scores, a few queries at a time: where measures need the receivers' own routing."""
        n_receivers = routed.scales.shape[1] - self.first
        summer = DocumentSummer(routed, self.measuring.n_measures, n_receivers, self.n_senders)
        receivers = slice(self.first, None)
        places, n_positions = self._places(), self.real.shape[1]
        per_query = n_positions * self.n_heads * n_receivers * self.scores.shape[-1]
        step = max(1, chunk_size(self.real.device) // per_query)
        heads = torch.arange(self.n_heads, device=self.real.device)
        for row in range(len(self.real)):
            columns = self.real[row].nonzero()[:, 0]
            for queries in columns.split(step):
                query, key = torch.meshgrid(queries, columns, indexing="ij")
                visible = key <= query
                query, key = query[visible], key[visible]
                attention = rearrange(self.pattern[row][:, query, key].float(), "h pair -> pair h")
                source = (
                    places[row, query] - places[row, key]
                    if self.source_axis == "offset"
                    else places[row, key]
                )
                senders = heads * self.n_sources + source[:, None]
                rows = Rows(
                    tokens=repeat(row * n_positions + query, "pair -> (pair h)", h=self.n_heads),
                    senders=senders.flatten(),
                    scores=(attention[..., None, None] * self.scores[row, key]).flatten(0, 1),
                    norms=(attention[..., None] * self.norms[row, key]).flatten(0, 1),
                )
                summer.add(rows.tokens, rows.senders, self.measuring.measured(rows, routed, receivers))
        if self.bias is not None:
            scores, norms = self.bias
            tokens = self.real.flatten().nonzero()[:, 0]
            rows = Rows(
                tokens=tokens,
                senders=torch.full_like(tokens, self.n_senders - 1),
                scores=scores.expand(len(tokens), *scores.shape),
                norms=norms.expand(len(tokens), *norms.shape),
            )
            summer.add(rows.tokens, rows.senders, self.measuring.measured(rows, routed, receivers))
        return summer.result(self._exists())


def _check_pattern(pattern: Float[Tensor, "batch head query key"]) -> None:
    """What is done here holds for attention weights: never negative, and 0 for what comes after the query. A hook may
    have made them otherwise.

    Raises:
        ValueError: it has.
    """
    if float(pattern.amin()) < 0:
        raise ValueError(
            "by='source' needs attention weights that are not negative; a hook has edited hook_pattern"
        )
    later = pattern.triu(diagonal=1)
    # What is not finite is refused as such.
    if bool(later.count_nonzero()) and bool((later.isfinite() & (later != 0)).any()):
        raise ValueError(
            "by='source' needs attention that sees no later token; a hook has edited hook_pattern or its scores"
        )
