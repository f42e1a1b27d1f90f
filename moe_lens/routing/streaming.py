"""Listening to forward passes: from hook points to means over documents, for one or more granularities at once.

When a component has run, it is projected onto all later readouts and measured (`components`, `parts`); when a
receiver has run, the sums are held against the readout of the stream itself; when the pass is through, measures are
divided by the true scales and added to their documents, and those to the means (`documents.Moments`). Nothing
listens to anything but hook points, and nothing grows with the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interrupts import interrupts_held
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.attribution import relative_error, with_rounding
from moe_lens.routing.components import ComponentReader, Read
from moe_lens.routing.documents import position_classes, real_tokens
from moe_lens.routing.measures import normalised_lengths
from moe_lens.routing.parts import Measuring, Part, Readouts, Routed, TokenPart
from moe_lens.routing.provenance import edit_counts
from moe_lens.routing.rank_shift import choice_of
from moe_lens.routing.readout import Experts, check_experts, check_receivers, stacked_readouts
from moe_lens.routing.result import COMPLETENESS_TOLERANCE
from moe_lens.routing.rounding import StreamSum, stream_rounds
from moe_lens.routing.senders import (
    ROUNDING,
    Granularity,
    SenderGroup,
    Senders,
    SourceAxis,
    check_granularity,
    senders_before,
)
from moe_lens.routing.tally import Tally, per_document
from moe_lens.routing.writes import hooks_of, written_by

# At how many tokens of a batch a float32 sum over neurons is checked; see `ContributionAccumulator`.
NEURON_CHECKS = 16

# Where memory runs out, or an interrupt comes, before all that a pass adds has been made, the means are left as they
# were. All of it takes as much memory as the means; where that is more than these bytes, it is made and added one after
# the other.
MADE_AT_ONCE = 2**28

# In half precision the bound on rounding is made for sums in float32; kernels that round on the way exceed it by a
# little. A sender that is missing exceeds it a hundredfold.
FAR_BEYOND_ROUNDING = 16


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
        self._readouts = Readouts(readouts, gains)
        self._rounds = stream_rounds(model.cfg.dtype)
        self.n_rows = 0
        """Documents that have been added."""
        self.whole = True
        """Whether all of them have been wholly: false where adding one was cut off, and the means are spoilt."""
        self.edited: set[str] = set()
        """Hook points at which others edited a value during the passes so far."""
        device = model.cfg.device
        self.tallies: dict[Granularity, Tally] = {}
        self._readers: dict[tuple[str, str], ComponentReader] = {}
        for granularity in self.by:
            senders = self._senders(granularity)
            for group in senders.groups:
                key = (group.component, group.kind)
                if key not in self._readers:
                    self._readers[key] = self._reader(group)
            senders = with_rounding(senders) if self._rounds else senders
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
            ratio = tally.rounding_ratio or 0.0
            if tally.completeness_error > COMPLETENESS_TOLERANCE or ratio > FAR_BEYOND_ROUNDING:
                what = (
                    f"what is left over is {ratio:.0f} times as large as rounding can be"
                    if ratio > FAR_BEYOND_ROUNDING
                    else f"their scores miss the logits by {tally.completeness_error:.1e} of the largest"
                )
                raise ValueError(
                    f"the senders by {by} are not what the routers read: {what}. A hook that edits the stream "
                    f"itself (hook_resid_pre, hook_resid_mid, hook_resid_post) does this, or one that edits a "
                    f"component after it was read; allow_incomplete=True measures the senders all the same"
                )

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
            self._readouts,
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

    @contextmanager
    def listening(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None,
    ) -> Iterator[None]:
        """While open, exactly one forward pass of these tokens must be made; it is added when this closes.

        Raises:
            RuntimeError: not exactly one was.
            ValueError: a score is not finite, or a document is longer than `max_positions`; nothing is added.
        """
        tokens = tokens.to(self.model.cfg.device)
        batch = _Pass(self, tokens, real_tokens(tokens, mask))
        before = edit_counts(self.model)
        with self.model.hooks(batch.hooks()):
            yield
        self.edited |= {name for name, count in edit_counts(self.model).items() if count > before[name]}
        batch.finish()


class _Pass:
    """One forward pass."""

    def __init__(
        self,
        owner: ContributionAccumulator,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
    ):
        self.owner, self.real = owner, real
        if not bool(real.any(dim=1).all()):
            row = int((~real.any(dim=1)).nonzero()[0])
            raise ValueError(f"row {row} of a batch has no real token; every row must be a document")
        if "source" in owner.by:
            _check_documents(real, owner.max_positions)
        self.classes = {
            position: member.flatten()
            for position, member in position_classes(tokens, real, owner.left_out).items()
        }
        self.captured: dict[str, Tensor] = {}
        self.fired: list[str] = []
        self.parts: dict[tuple[str, str], Part] = {}
        every = real.flatten().nonzero()[:, 0]
        few = every[
            torch.linspace(0, len(every) - 1, min(NEURON_CHECKS, len(every)), device=real.device).long()
        ]
        self.checked: dict[Granularity, Tensor] = {
            by: few if by == "neuron" and not owner._rounds else every for by in owner.by
        }
        shape = owner._readouts.rows.shape[:2]
        self.sums = {
            by: torch.zeros(len(checked), *shape, device=real.device) for by, checked in self.checked.items()
        }
        self.streams: dict[Granularity, StreamSum] = {}
        self.rounding_parts = (
            {by: TokenPart(1, 0, owner.measuring) for by in owner.by} if owner._rounds else {}
        )
        self.roundings: dict[str, list[tuple[Tensor, Tensor]]] = {by: [] for by in owner.by}
        self.errors: dict[Granularity, float] = {}
        self.ratios: dict[Granularity, float] = {}
        self.finite = True
        self.difference = 0.0
        self.scales: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.chosen: list[Tensor] = []

    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """What listens: whatever components are read from, what they write, and the receivers."""
        points: dict[str, None] = {}
        written: dict[str, str] = {}
        for component, kind in self.owner._readers:
            group = self.owner._readers[component, kind].group
            points.update(dict.fromkeys(hooks_of(self.owner.model, group)))
            written[group.written_at] = component
        hooks: list[tuple[str, Callable[..., None]]] = [
            (name, self._capture) for name in points if name not in written
        ]
        hooks += [
            (name, lambda value, hook, c=component: self._component_ran(c, value, hook))
            for name, component in written.items()
        ]
        for place, receiver in enumerate(self.owner.receivers):
            at = f"blocks.{receiver}."
            hooks += [
                (at + "hook_resid_mid", lambda value, hook, i=place: self._stream_seen(i, value)),
                (at + "ln2.hook_scale", lambda value, hook, i=place: self._scale_known(i, value)),
            ]
            hooks.append(
                (at + "mlp.hook_router_logits", lambda value, hook, i=place: self._gate_ran(i, value))
            )
            if self.owner.measuring.selected:
                hooks.append((at + "mlp.hook_expert_indices", self._chose))
        return hooks

    def _capture(self, value: Tensor, hook: torch.nn.Module) -> None:
        self.captured[hook.name] = value.detach()  # type: ignore[attr-defined, index]

    def _component_ran(self, component: str, value: Tensor, hook: torch.nn.Module) -> None:
        """Everything inside a component has been captured: read it, for each granularity."""
        self._capture(value, hook)
        self.fired.append(component)
        owner = self.owner
        reads: dict[str, Read] = {}
        for by in owner.by:
            group = next(g for g in owner.tallies[by].senders.groups if g.component == component)
            reader = owner._readers[component, group.kind]
            if group.kind not in reads:
                reads[group.kind] = reader.read(self.captured, self.real, self.checked[by])
                self.parts[component, group.kind] = reads[group.kind].part
            summed = reads[group.kind].summed
            at_checked = summed if group.kind in ("neurons", "dense neurons") else summed[self.checked[by]]
            self.sums[by][:, reader.first :] += at_checked
            if owner._rounds:
                vector, rounded_inside = written_by(owner.model, group, self.captured)
                if by in self.streams:
                    self.streams[by].add(vector, rounded_inside)
                else:
                    self.streams[by] = StreamSum(vector, owner.model.cfg.dtype)
        self.captured.clear()

    def _stream_seen(self, place: int, resid_mid: Float[Tensor, "batch pos d_model"]) -> None:
        """The sum of the senders' scores, held against the readout of the stream itself."""
        owner, stream = self.owner, resid_mid.detach()
        vectors = stream.float().flatten(0, 1)
        readouts = Readouts(owner._readouts.rows[place : place + 1], owner._readouts.gains[place : place + 1])
        self.expected = vectors @ readouts.rows[0].T
        self.got = {by: self.sums[by][:, place] for by in owner.by}
        if owner.measuring.rank_shift:
            self.logits.append(self.expected)
        for by, so_far in self.streams.items():
            rounding = so_far.rounding(stream).flatten(0, 1)
            scores = rounding @ readouts.flat.T
            self.got[by] = self.got[by] + scores[self.checked[by]]
            self.roundings[by].append((scores, normalised_lengths(rounding, readouts.gains)[:, 0]))
            self.finite &= bool(self.got[by].isfinite().all())
            ratio = so_far.rounding_ratio(stream, self.real)
            self.ratios[by] = max(self.ratios.get(by, 0.0), ratio)

    def _scale_known(self, place: int, scale: Float[Tensor, "batch pos 1"]) -> None:
        self.fired.append(f"receiver {place}")
        flat = scale.detach().float().flatten(0, 1)
        for by, checked in self.checked.items():
            error = relative_error(self.got[by] / flat[checked], (self.expected / flat)[checked])
            self.errors[by] = max(self.errors.get(by, 0.0), error)
        self.finite &= bool((self.expected / flat)[self.real.flatten()].isfinite().all())
        self.scales.append(flat[:, 0])

    def _gate_ran(self, place: int, logits: Float[Tensor, "batch pos expert"]) -> None:
        """What the gate made of the same stream, in its own arithmetic (or a hook's)."""
        model_logits = logits.detach().float().flatten(0, 1)
        if self.owner.experts is not None:
            model_logits = model_logits[:, list(self.owner.experts)]
        difference = (self.expected / self.scales[place][:, None] - model_logits)[self.real.flatten()]
        self.difference = max(self.difference, float(difference.abs().max()))

    def _chose(self, indices: Int[Tensor, "batch pos k"], hook: torch.nn.Module) -> None:
        chosen = indices.detach().flatten(0, 1)
        if self.chosen and chosen.shape != self.chosen[0].shape:
            raise ValueError(
                f"{hook.name} chooses {chosen.shape[1]} experts and an earlier router {self.chosen[0].shape[1]}: "  # type: ignore[attr-defined]
                f"experts='selected' needs as many at each"
            )
        self.chosen.append(chosen)

    def finish(self) -> None:
        """Add the pass to the means, if it was a whole one with finite scores."""
        owner = self.owner
        whole = {component for component, _ in owner._readers}
        whole |= {f"receiver {place}" for place in range(len(owner.receivers))}
        if sorted(self.fired) != sorted(whole):
            raise RuntimeError("listening() must see exactly one whole forward pass of its tokens")
        scales = torch.stack(self.scales, dim=1)
        real = self.real.flatten()
        if not self.finite or not all(bool(sums.isfinite().all()) for sums in self.sums.values()):
            raise ValueError("scores of a batch hold values that are not finite; nothing of it was added")
        documents = torch.arange(len(self.real), device=real.device).repeat_interleave(self.real.shape[1])
        # Padding is in no class, but what it holds must not be read: 0 times infinity would be.
        routed = Routed(self.classes, documents, len(self.real), scales.masked_fill(~real[:, None], 1.0))
        if owner.measuring.rank_shift:
            routed.logits = torch.stack(self.logits, dim=1) / scales[..., None]
            routed.choice = choice_of(routed.logits, owner.model.cfg.router)
        if owner.measuring.selected:
            routed.chosen = torch.stack(self.chosen, dim=1)
        additions = self._additions(routed)
        if sum(tally.n_bytes for tally in owner.tallies.values()) <= MADE_AT_ONCE:
            additions = list(additions)
        with interrupts_held():
            owner.whole = False
            for add in additions:
                add()
            self._count(routed)
            owner.n_rows += len(self.real)
            owner.whole = True

    def _additions(self, routed: Routed) -> Iterator[Callable[[], None]]:
        """What adds the pass to the means, in order; made without changing anything."""
        for by, tally in self.owner.tallies.items():
            for place, group in enumerate(tally.senders.groups):
                if group.component == ROUNDING:
                    part = self._rounding_part(by)
                else:
                    part = self.parts[group.component, group.kind]
                yield from tally.additions(place, part, routed)

    def _count(self, routed: Routed) -> None:
        for by, tally in self.owner.tallies.items():
            tally.completeness_error = max(tally.completeness_error, self.errors[by])
            tally.model_logit_difference = max(tally.model_logit_difference, self.difference)
            if by in self.ratios:
                tally.rounding_ratio = max(tally.rounding_ratio or 0.0, self.ratios[by])
            for position, member in routed.classes.items():
                counts = per_document(member, routed)
                tally.n_documents[position] += int((counts > 0).sum())
                tally.n_tokens[position] += int(counts.sum())

    def _rounding_part(self, by: str) -> TokenPart:
        part = self.rounding_parts[by]
        scores, norms = (torch.stack(values, dim=1) for values in zip(*self.roundings[by], strict=True))
        tokens = torch.arange(len(scores), device=scores.device)
        part.add(tokens, torch.zeros_like(tokens)[:, None], scores[:, None], norms[:, None])
        return part


def _check_documents(real: Bool[Tensor, "batch pos"], max_positions: int) -> None:
    lengths = real.sum(dim=1)
    longest = int(lengths.max())
    if longest > max_positions:
        raise ValueError(f"a document of {longest} tokens is longer than max_positions={max_positions}")
    spans = real.long().cumsum(dim=1).masked_fill(~real, 0)
    places = torch.arange(real.shape[1], device=real.device) - real.long().argmax(dim=1, keepdim=True) + 1
    if bool(((spans != places) & real).any()):
        raise ValueError(
            "by='source' needs each document's real tokens in one run, padded on one side or both"
        )
