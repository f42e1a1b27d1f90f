"""Listening to one forward pass of a batch: from hook points to the tallies of an accumulator.

When a component has run, it is projected onto all later readouts and measured; when a receiver has run, the sums are
held against the readout of the stream itself. What a component's part gives can only be added when the scales of all
receivers are known: the parts are held until the pass is through, or, where an earlier pass of the same tokens knows
the scales already, added at once and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interrupts import interrupts_held
from moe_lens.routing.attribution import relative_error
from moe_lens.routing.components import Read
from moe_lens.routing.documents import position_classes
from moe_lens.routing.measures import normalised_lengths
from moe_lens.routing.parts import Part, Readouts, Routed, TokenPart
from moe_lens.routing.receivers import Hooks, LookAhead, ReceiverValues
from moe_lens.routing.result import COMPLETENESS_TOLERANCE
from moe_lens.routing.rounding import StreamSum
from moe_lens.routing.senders import ROUNDING, Granularity
from moe_lens.routing.tally import per_document
from moe_lens.routing.writes import hooks_of, written_by

if TYPE_CHECKING:
    from moe_lens.routing.streaming import ContributionAccumulator

# At how many tokens of a batch a float32 sum over neurons is checked; see `ContributionAccumulator`.
NEURON_CHECKS = 16

# Where memory runs out, or an interrupt comes, before all that a pass adds has been made, the means are left as they
# were. All of it takes as much memory as the means; where that is more than these bytes, it is made and added one after
# the other.
MADE_AT_ONCE = 2**28

# By how much the scales of two passes of the same tokens may differ: kernels may sum in another order each time. What
# changes more is no rounding.
SAME_SCALES = 1e-2


# In half precision the bound on rounding is made for sums in float32; kernels that round on the way exceed it by a
# little. A sender that is missing exceeds it a hundredfold.
FAR_BEYOND_ROUNDING = 16


def require_closed(by: str, error: float, rounding_ratio: float | None) -> None:
    """Refuse to go on where the senders are not what the routers read.

    Args:
        by: the granularity.
        error: by how much sums of scores miss the logits, of the largest.
        rounding_ratio: see `StreamSum.rounding_ratio`; None in float32.

    Raises:
        ValueError: they are not.
    """
    ratio = rounding_ratio or 0.0
    if error <= COMPLETENESS_TOLERANCE and ratio <= FAR_BEYOND_ROUNDING:
        return
    what = (
        f"what is left over is {ratio:.0f} times as large as rounding can be"
        if ratio > FAR_BEYOND_ROUNDING
        else f"their scores miss the logits by {error:.1e} of the largest"
    )
    raise ValueError(
        f"the senders by {by} are not what the routers read: {what}. A hook that edits the stream "
        f"itself (hook_resid_pre, hook_resid_mid, hook_resid_post) does this, or one that edits a "
        f"component after it was read; allow_incomplete=True measures the senders all the same"
    )


def look_ahead(
    owner: ContributionAccumulator, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> LookAhead:
    """Of a pass, the receivers alone; see `ContributionAccumulator.looking_ahead`."""
    points, written = component_points(owner)
    return LookAhead(owner.receivers, _receiver_values(owner, tokens, real), {**points, **written})


def component_points(owner: ContributionAccumulator) -> tuple[dict[str, None], dict[str, str]]:
    """The hook points that components are read from, and those at which each has been written."""
    points: dict[str, None] = {}
    written: dict[str, str] = {}
    for (component, _), reader in owner.readers.items():
        points.update(dict.fromkeys(hooks_of(owner.model, reader.group)))
        written[reader.group.written_at] = component
    return points, written


def _receiver_values(
    owner: ContributionAccumulator, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> ReceiverValues:
    if not bool(real.any(dim=1).all()):
        row = int((~real.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {row} of a batch has no real token; every row must be a document")
    if "source" in owner.by:
        _check_documents(real, owner.max_positions)
    classes = {
        position: member.flatten()
        for position, member in position_classes(tokens, real, owner.left_out).items()
    }
    return ReceiverValues(owner.readouts, owner.measuring, owner.model.cfg.router, real, classes)


class Listener:
    """One forward pass.

    Args:
        owner: whose tallies it adds to.
        tokens, real: of the batch.
        known: what an earlier pass of them knows; None holds every part until this one is through.
        must_close: whether to refuse to go on as soon as senders are not what a router reads.
    """

    def __init__(
        self,
        owner: ContributionAccumulator,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        known: Routed | None = None,
        must_close: bool = False,
    ):
        self.owner, self.real, self.known, self.must_close = owner, real, known, must_close
        self.values = _receiver_values(owner, tokens, real)
        self.captured: dict[str, Tensor] = {}
        self.fired: list[str] = []
        self.parts: dict[tuple[str, str], Part] = {}
        every = real.flatten().nonzero()[:, 0]
        few = every[
            torch.linspace(0, len(every) - 1, min(NEURON_CHECKS, len(every)), device=real.device).long()
        ]
        self.checked: dict[Granularity, Tensor] = {
            by: few if by == "neuron" and not owner.rounds else every for by in owner.by
        }
        shape = owner.readouts.rows.shape[:2]
        self.sums = {
            by: torch.zeros(len(checked), *shape, device=real.device) for by, checked in self.checked.items()
        }
        self.streams: dict[Granularity, StreamSum] = {}
        self.rounding_parts = (
            {by: TokenPart(1, 0, owner.measuring) for by in owner.by} if owner.rounds else {}
        )
        self.roundings: dict[str, list[tuple[Tensor, Tensor]]] = {by: [] for by in owner.by}
        self.errors: dict[Granularity, float] = {}
        self.ratios: dict[Granularity, float] = {}
        self.finite = True
        self.difference = 0.0

    def hooks(self) -> Hooks:
        """What listens: whatever components are read from, what they write, and the receivers."""
        points, written = component_points(self.owner)
        hooks: Hooks = [(name, self._capture) for name in points if name not in written]
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
            if self.owner.measuring.selected and self.known is None:
                hooks.append((at + "mlp.hook_expert_indices", self.values.keep_choice))
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
            groups = owner.tallies[by].senders.groups
            place, group = next((i, g) for i, g in enumerate(groups) if g.component == component)
            reader = owner.reader(group)
            if group.kind not in reads:
                reads[group.kind] = reader.read(self.captured, self.real, self.checked[by])
                if self.known is None:
                    self.parts[component, group.kind] = reads[group.kind].part
            if self.known is not None:
                # Until the batch is through.
                owner.whole = False
                for add in owner.tallies[by].additions(place, reads[group.kind].part, self.known):
                    add()
            summed = reads[group.kind].summed
            at_checked = summed if group.kind in ("neurons", "dense neurons") else summed[self.checked[by]]
            self.sums[by][:, reader.first :] += at_checked
            if owner.rounds:
                vector, rounded_inside = written_by(owner.model, group, self.captured)
                if by in self.streams:
                    self.streams[by].add(vector, rounded_inside)
                else:
                    self.streams[by] = StreamSum(vector, owner.model.cfg.dtype)
        self.captured.clear()

    def _stream_seen(self, place: int, resid_mid: Float[Tensor, "batch pos d_model"]) -> None:
        """The sum of the senders' scores, held against the readout of the stream itself."""
        owner, stream = self.owner, resid_mid.detach()
        self.expected = self.values.unscaled(place, stream)
        readouts = Readouts(owner.readouts.rows[place : place + 1], owner.readouts.gains[place : place + 1])
        self.got = {by: self.sums[by][:, place] for by in owner.by}
        if owner.measuring.rank_shift and self.known is None:
            self.values.keep_logits(self.expected)
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
            if self.must_close:
                require_closed(by, self.errors[by], self.ratios.get(by))
        self.finite &= bool((self.expected / flat)[self.real.flatten()].isfinite().all())
        self.values.keep_scale(scale)
        self.expected, self.got = self.expected / flat, {}

    def _gate_ran(self, place: int, logits: Float[Tensor, "batch pos expert"]) -> None:
        """What the gate made of the same stream, in its own arithmetic (or a hook's)."""
        model_logits = logits.detach().float().flatten(0, 1)
        if self.owner.experts is not None:
            model_logits = model_logits[:, list(self.owner.experts)]
        difference = (self.expected - model_logits)[self.real.flatten()]
        self.difference = max(self.difference, float(difference.abs().max()))
        # Many passes may be under way at a time.
        del self.expected

    def finish(self) -> None:
        """Add the pass to the means, if it was a whole one with finite scores."""
        owner = self.owner
        whole = {component for component, _ in owner.readers}
        whole |= {f"receiver {place}" for place in range(len(owner.receivers))}
        if sorted(self.fired) != sorted(whole):
            raise RuntimeError("listening() must see exactly one whole forward pass of its tokens")
        if not self.finite or not all(bool(sums.isfinite().all()) for sums in self.sums.values()):
            raise ValueError(
                "scores of a batch hold values that are not finite"
                + ("; nothing of it was added" if self.known is None else "")
            )
        if self.known is not None:
            self._require_same_scales(self.known)
        routed = self.values.routed() if self.known is None else self.known
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
                    yield from tally.additions(place, self._rounding_part(by), routed)
                elif self.known is None:
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

    def _require_same_scales(self, known: Routed) -> None:
        real = self.real.flatten()
        before, now = known.scales[real], self.values.scales[real]
        if bool(((now - before).abs() > SAME_SCALES * before).any()):
            raise ValueError(
                "the same tokens gave other values the second time: a hook that does not do the same each time cannot "
                "be measured in two readings; a larger memory_budget, or smaller batches, may do with one"
            )


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
