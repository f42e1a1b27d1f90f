"""Listening to forward passes: from hook points to means over documents, for one or more granularities at once.

When a component has run, it is projected onto all later readouts and measured (`components`, `parts`); when a
receiver has run, the sums are held against the readout of the stream itself; when the pass is through, measures are
divided by the true scales and added to their documents, and those to the means (`listener`, `documents.Moments`).
Nothing listens to anything but hook points, and nothing grows with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import StreamedMoE
from moe_lens.routing.attribution import with_rounding
from moe_lens.routing.components import ComponentReader
from moe_lens.routing.documents import real_tokens
from moe_lens.routing.listener import Listener, look_ahead, require_closed
from moe_lens.routing.parts import Measuring, Readouts, Routed
from moe_lens.routing.provenance import edit_counts
from moe_lens.routing.readout import Experts, check_experts, check_receivers, stacked_readouts
from moe_lens.routing.receivers import LookAhead
from moe_lens.routing.rounding import stream_rounds
from moe_lens.routing.senders import (
    Granularity,
    SenderGroup,
    Senders,
    SourceAxis,
    check_granularity,
    senders_before,
)
from moe_lens.routing.tally import Tally


class ContributionAccumulator:
    """Listens to forward passes and keeps the means; `routing_contributions` drives it over a corpus.

    Use it directly to measure something else in the same pass:

        with accumulator.listening(tokens, mask):
            _, cache = model.run_with_cache(tokens, attention_mask=mask)

    That scores sum to the logits is checked at every real token. The one exception: in float32, summing an MLP's
    neurons is the down-projection once more, so with `by="neuron"` it is done at 16 tokens of every batch. (In half
    precision it is done at all, because `rounding` is made of the sum.)

    Args:
        by: one granularity or several; see `routing_contributions`, also for the others.
        max_positions: for `by="source"`, the length of the longest document.
        left_out: the id of a token (BOS) that neither leads a document nor is of its rest.
    """

    def __init__(
        self,
        model: HookedMoE,
        *,
        by: str | Sequence[str] = "layer",
        receivers: Sequence[int] | None = None,
        experts: Experts = "all",
        rank_shift: bool = False,
        source_axis: SourceAxis = "position",
        max_positions: int | None = None,
        left_out: int | None = None,
    ):
        self.model = model
        names = [by] if isinstance(by, str) else list(by)
        self.by: tuple[Granularity, ...] = tuple([check_granularity(name) for name in names])
        if not self.by or len(set(self.by)) < len(self.by):
            raise ValueError(f"by={by!r} must name granularities, each once")
        self.receivers = check_receivers(model, receivers)
        self.experts = check_experts(model, experts, rank_shift=rank_shift)
        self.measuring = Measuring(
            model.cfg.router,
            selected=isinstance(experts, str) and experts == "selected",
            rank_shift=rank_shift,
        )
        self.source_axis: SourceAxis = source_axis
        self.left_out = left_out
        if "source" in self.by and max_positions is None:
            raise ValueError("by='source' needs max_positions, the length of the longest document in tokens")
        self.max_positions = max_positions or 0

        readouts = stacked_readouts(model, self.receivers)
        if self.experts is not None:
            readouts = readouts[:, list(self.experts)]
        gains = torch.stack([model.blocks[r].ln2.w.detach().float() for r in self.receivers])  # type: ignore[union-attr]
        self.readouts = Readouts(readouts, gains)
        self.rounds = stream_rounds(model.cfg.dtype)
        self.n_rows = 0
        """Documents that have been added."""
        self.whole = True
        """Whether all of them have been wholly: false where adding one was cut off, and the means are spoilt."""
        self.edited: set[str] = set()
        """Hook points at which others edited a value during the passes so far."""
        self._at_work: int | None = None
        device = model.cfg.device
        self.tallies: dict[Granularity, Tally] = {}
        self.readers: dict[tuple[str, str], ComponentReader] = {}
        for granularity in self.by:
            senders = self._senders(granularity)
            for group in senders.groups:
                key = (group.component, group.kind)
                if key not in self.readers:
                    self.readers[key] = self._reader(group)
            senders = with_rounding(senders) if self.rounds else senders
            self.tallies[granularity] = Tally(
                senders,
                [self.first_receiver(group) for group in senders.groups],
                self.measuring.n_measures,
                len(self.receivers),
                device,
            )

    def require_closed(self) -> None:
        """Refuse to go on where the senders are not what the routers read.

        Raises:
            ValueError: sums miss the logits by more than 1e-4 of the largest; or in half precision, where `rounding`
                closes every sum, it is many times what rounding can be.
        """
        for by, tally in self.tallies.items():
            require_closed(by, tally.completeness_error, tally.rounding_ratio)

    @property
    def measured_experts(self) -> str | list[int]:
        """Over which experts: `all`, `selected`, or a list."""
        if self.measuring.selected:
            return "selected"
        return "all" if self.experts is None else list(self.experts)

    def _senders(self, by: Granularity) -> Senders:
        return senders_before(
            self.model.cfg, self.receivers[-1], by, n_sources=self.max_positions, source_axis=self.source_axis
        )

    def _reader(self, group: SenderGroup) -> ComponentReader:
        return ComponentReader(
            self.model,
            group,
            self.first_receiver(group),
            self.readouts,
            self.measuring,
            source_axis=self.source_axis,
            n_sources=self.max_positions,
        )

    def first_receiver(self, group: SenderGroup) -> int:
        """The place among the receivers of the first that a component reaches: an MLP writes after its router."""
        if group.layer is None:
            return 0
        after = group.component.startswith("M")
        return next(i for i, receiver in enumerate(self.receivers) if receiver >= group.layer + after)

    def reader(self, group: SenderGroup) -> ComponentReader:
        """What reads a component that has just run."""
        if isinstance(self.model, StreamedMoE) and group.layer != self._at_work:
            for reader in self.readers.values():
                reader.let_go()
        self._at_work = group.layer
        return self.readers[group.component, group.kind]

    @contextmanager
    def listening(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None,
        known: Routed | None = None,
        must_close: bool = False,
    ) -> Iterator[None]:
        """While open, exactly one forward pass of these tokens must be made; it is added when this closes.

        Args:
            known: what `looking_ahead` at the same tokens gave. Then nothing of what is measured is held until the
                pass is through: each component is added as it has run. An accumulator in whose passes something was
                raised has taken in a part of a batch, and is of no use any more.
            must_close: raise as soon as `require_closed` would, rather than when it is called.

        Raises:
            RuntimeError: not exactly one was.
            ValueError: a score is not finite, or a document is longer than `max_positions`; nothing is added. Or the
                tokens gave other values than what is `known`.
        """
        tokens = tokens.to(self.model.cfg.device)
        batch = Listener(self, tokens, real_tokens(tokens, mask), known, must_close)
        before = edit_counts(self.model)
        with self.model.hooks(batch.hooks()):
            yield
        self.edited |= {name for name, count in edit_counts(self.model).items() if count > before[name]}
        batch.finish()

    @contextmanager
    def looking_ahead(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None,
    ) -> Iterator[LookAhead]:
        """While open, exactly one forward pass of these tokens must be made, up to the last receiver. Nothing is
        measured; afterwards `LookAhead.routed` is what the receivers know, for `listening` to the same tokens.

        Raises:
            RuntimeError: not exactly one was.
            ValueError: a scale is not finite, or a document is longer than `max_positions`.
        """
        tokens = tokens.to(self.model.cfg.device)
        ahead = look_ahead(self, tokens, real_tokens(tokens, mask))
        with self.model.hooks(ahead.hooks()):
            yield ahead
        ahead.finish()
