"""Running a corpus through an accumulator on a model whose layers stay on disk: how often they are read.

Batches go through the model layer by layer (`model.layer_major`), each layer read once for all of them. What is
measured of a component can only be added when the scales of all later receivers are known, and there are two ways:

    one reading     every part is held until its batch is through: memory for each token, sender and later receiver
    two readings    the first gathers the scales, at little memory; in the second every part is added at once

A pass divides its batches into groups that fit into memory, and takes for each group the way that reads less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from moe_lens.corpus import TokenBatches
from moe_lens.model.corpus_passes import CorpusBatch
from moe_lens.model.streamed_moe import OnDisk, StreamedMoE
from moe_lens.out_of_memory import InParts
from moe_lens.routing.held import Held
from moe_lens.routing.readout import check_receivers
from moe_lens.routing.receivers import LookAhead
from moe_lens.routing.runs import Corpus, Group, Mask, Plan, Tokens, accumulator_bytes

if TYPE_CHECKING:
    from moe_lens.routing.streaming import ContributionAccumulator

# Which shares of the memory budget the accumulators may take; the rest is for what batches hold.
_SHARES = (1 / 4, 1 / 2, 3 / 4)

_HELP = "a smaller memory_budget, a smaller batch_size, shorter documents, fewer granularities at a time"


@dataclass
class StreamedPlan(Plan):
    """A plan for a streamed model.

    Attributes:
        model: the model.
        held: what batches hold.
        held_budget: how many bytes those of a group may hold together.
        at_once: how many batches of a group go through the layers together, since memory ran out at more.
    """

    model: StreamedMoE
    held: Held
    held_budget: int
    at_once: int | None = field(default=None, kw_only=True)

    unit: ClassVar[str] = "batch-layer"
    # What cuts off a second reading spoils the means that are in memory; and a group takes long.
    saves_every_group: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        model: StreamedMoE,
        corpus: Corpus,
        held: Held,
        budget: int,
        n_sources: int,
    ) -> StreamedPlan:
        """The plan that reads least.

        Args:
            held: of all receivers.
            budget: bytes for accumulators and for what batches hold.
            n_sources: see `senders_before`.

        Raises:
            ValueError: a receiver's accumulators do not fit.
        """
        receivers = check_receivers(model, held.receivers)
        rank_shift = held.rank_shift
        largest = max(accumulator_bytes(model, held.by, r, rank_shift, n_sources) for r in receivers)
        if largest > _SHARES[-1] * budget:
            raise ValueError(
                f"one receiver needs {largest:,} bytes of accumulators; with a streamed model they may take three "
                f"quarters of memory_budget={budget:,}, for the batches that are under way need the rest"
            )
        plans: list[StreamedPlan] = []
        for share in _SHARES:
            if largest <= share * budget:
                plan = Plan.make(model, held.by, receivers, int(share * budget), rank_shift, n_sources)
                plans.append(cls(**vars(plan), model=model, held=held, held_budget=budget - plan.largest))
        shapes = shapes_of(corpus)
        return min(plans, key=lambda plan: plan._cost(shapes))

    def _cost(self, shapes: list[tuple[int, int]] | None) -> tuple[int, ...]:
        """Bytes to read, then tokens to run; passes, where the corpus is not known."""
        if shapes is None:
            return (len(self.chunks),)
        return self.bytes_to_read(shapes), self._n_steps(shapes)

    # ---- groups ----

    def groups(
        self, number: int, batches: Iterable[tuple[Tokens, Mask | None]], n_done: int
    ) -> Iterator[Group]:
        """The batches of a pass in groups.

        Raises:
            ValueError: one that is no batch of tokens, by its number.
        """
        checked = (CorpusBatch.of(self.model, i, batch) for i, batch in enumerate(batches, start=n_done))
        for chosen, n_readings in self._grouped(number, checked, lambda batch: _shape(batch.tokens)):
            yield Group([(batch.tokens, batch.mask) for batch in chosen], n_readings)

    def group_sizes(self, number: int, shapes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of a pass over batches of these shapes: how many batches each group has, and how often layers are read
        for it."""
        grouped = self._grouped(number, shapes, lambda shape: shape)
        return [(len(chosen), n_readings) for chosen, n_readings in grouped]

    def _grouped(
        self, number: int, batches: Iterable[Any], shape_of: Callable[[Any], tuple[int, int]]
    ) -> Iterator[tuple[list[Any], int]]:
        """Batches, with the number of readings, as many at a time as are worth it. A batch that alone holds more than
        there is room for is a group nevertheless."""
        held, coming = self.held.with_receivers(self.chunks[number]), iter(batches)
        waiting: deque[_Waiting] = deque()
        total, is_over = 0, False
        while True:
            while not is_over and total <= self.held_budget:
                batch = next(coming, None)
                if batch is None:
                    is_over = True
                    break
                n_batch, n_pos = shape_of(batch)
                one, two = (held.bytes(n_batch, n_pos, n_readings) for n_readings in (1, 2))
                waiting.append(_Waiting(batch, n_batch * n_pos, one, two))
                total += two
            if not waiting:
                return
            n_two, tokens_two = _fitting(((w.n_tokens, w.two) for w in waiting), self.held_budget)
            n_one, tokens_one = _fitting(((w.n_tokens, w.one) for w in waiting), self.held_budget)
            # Two groups that are read once get as far, or further, than one that is read twice.
            once = not held.needs_two_readings and n_one > 0 and 2 * tokens_one >= tokens_two
            chosen = [waiting.popleft() for _ in range(n_one if once else max(1, n_two))]
            total -= sum(w.two for w in chosen)
            yield [w.batch for w in chosen], 1 if once else 2

    def n_layers(self, number: int) -> int:
        """How many layers a pass goes through: none after its last receiver."""
        return self.chunks[number][-1] + 1

    def n_steps(self, number: int, corpus: Corpus, n_done: int) -> int | None:
        shapes = shapes_of(corpus)
        if shapes is None:
            return None
        sizes = self.group_sizes(number, shapes[n_done:])
        return self.n_layers(number) * sum(n_batches * n_readings for n_batches, n_readings in sizes)

    def _n_steps(self, shapes: list[tuple[int, int]]) -> int:
        return sum(
            self.n_layers(number) * n_batches * n_readings
            for number in range(len(self.chunks))
            for n_batches, n_readings in self.group_sizes(number, shapes)
        )

    def layers_to_read(self, shapes: list[tuple[int, int]]) -> list[int]:
        """Of all passes over batches of these shapes."""
        layers: list[int] = []
        for number in range(len(self.chunks)):
            n_readings = sum(n for _, n in self.group_sizes(number, shapes))
            layers += list(range(self.n_layers(number))) * n_readings
        return layers

    def bytes_to_read(self, shapes: list[tuple[int, int]]) -> int:
        return self.model._required_store().stored_bytes(self.layers_to_read(shapes))

    # ---- running ----

    def run(
        self,
        accumulator: ContributionAccumulator,
        group: Group,
        allow_incomplete: bool,
        stepped: Callable[[], object],
    ) -> None:
        """As `Plan.run`. Where memory runs out and nothing of the group was added yet, fewer of its batches go through
        the layers together, and of later groups too; no batch is divided."""
        n_rows = accumulator.n_rows

        def together(part: slice) -> None:
            nonlocal n_rows
            n_rows = accumulator.n_rows
            self._run(accumulator, group._replace(batches=group.batches[part]), allow_incomplete, stepped)

        in_parts = InParts("batches that go through the layers together", _HELP, self.at_once)
        in_parts.run(
            together,
            len(group.batches),
            can_be_repeated=lambda: accumulator.whole and accumulator.n_rows == n_rows,
        )
        self.at_once = in_parts.at_once

    def _run(
        self,
        accumulator: ContributionAccumulator,
        group: Group,
        allow_incomplete: bool,
        stepped: Callable[[], object],
    ) -> None:
        batches, stop = group.batches, accumulator.receivers[-1] + 1

        def heard(listening: Callable[[int], AbstractContextManager[Any]]) -> None:
            """Go through the layers once for all batches."""
            self.model.run_corpus(
                batches,
                lambda i: self._stepping(listening(i), stop, stepped),
                stop_at_layer=stop,
                memory_budget=self.held_budget,
            )

        ahead: dict[int, LookAhead] = {}

        @contextmanager
        def looking_ahead(i: int) -> Iterator[None]:
            with accumulator.looking_ahead(*batches[i]) as ahead[i]:
                yield

        if group.n_readings == 2:
            heard(looking_ahead)
        heard(
            lambda i: accumulator.listening(
                *batches[i],
                known=ahead.pop(i).routed if ahead else None,
                must_close=not allow_incomplete,
            )
        )
        if not allow_incomplete:
            accumulator.require_closed()

    @contextmanager
    def _stepping(
        self, listening: AbstractContextManager[Any], n_layers: int, stepped: Callable[[], object]
    ) -> Iterator[None]:
        def step(value: Tensor, hook: Any) -> None:
            stepped()

        ends = [(f"blocks.{layer}.hook_resid_post", step) for layer in range(n_layers)]
        with listening, self.model.hooks(ends):
            yield

    # ---- what it takes ----

    def describe(self, corpus: Corpus) -> str:
        store, shapes = self.model._required_store(), shapes_of(corpus)
        resident = {id(p): p.nbytes for p in self.model.parameters() if not isinstance(p, OnDisk)}
        lines = [f"corpus: {corpus.description}"]
        if shapes is None:
            lines.append(
                f"plan: {len(self.chunks)} pass(es); how many batches go through the layers together, and how often "
                f"these are read, shows as they come"
            )
        else:
            sizes = [size for number in range(len(self.chunks)) for size in self.group_sizes(number, shapes)]
            layers = self.layers_to_read(shapes)
            lines.append(
                f"plan: {len(self.chunks)} pass(es) over {len(shapes)} batches, in {len(sizes)} group(s) that go "
                f"through the layers together, {sum(n for _, n in sizes)} time(s) in all: {len(layers)} layers are "
                f"read, {_size(store.stored_bytes(layers))} from disk "
                f"({self.model.reading_time(store.stored_bytes(layers))})"
            )
        lines.append(
            f"memory: two layers {_size(store.bytes_needed)}, other weights {_size(sum(resident.values()))}, "
            f"accumulators up to {_size(self.largest)} (the result {_size(self.bytes_needed)}), and what batches hold "
            f"up to {_size(self.held_most(shapes))}; beside that, what one batch needs while it is in a layer"
        )
        return "\n".join(lines)

    def held_most(self, shapes: list[tuple[int, int]] | None) -> int:
        """The most that the batches of a group hold together."""
        if shapes is None:
            return self.held_budget
        most = 0
        for number, receivers in enumerate(self.chunks):
            held, start = self.held.with_receivers(receivers), 0
            for n_batches, n_readings in self.group_sizes(number, shapes):
                group = shapes[start : start + n_batches]
                most = max(most, sum(held.bytes(*shape, n_readings) for shape in group))
                start += n_batches
        return most


def shapes_of(corpus: Corpus) -> list[tuple[int, int]] | None:
    """Of every batch, where they can be looked at without being used up, or made anew."""
    if not isinstance(corpus.source, (Sequence, TokenBatches)):
        return None
    return [_shape(tokens) for tokens, _ in corpus]


def _shape(tokens: Tokens) -> tuple[int, int]:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [batch, pos], one document a row, not {tuple(tokens.shape)}")
    return tokens.shape[0], tokens.shape[1]


class _Waiting(NamedTuple):
    """A batch that is in no group yet, and what it holds in one reading and in two."""

    batch: Any
    n_tokens: int
    one: int
    two: int


def _fitting(tokens_and_sizes: Iterable[tuple[int, int]], budget: int) -> tuple[int, int]:
    """How many of the first fit together, and their tokens."""
    number = n_tokens = total = 0
    for n, size in tokens_and_sizes:
        total += size
        if total > budget:
            break
        number, n_tokens = number + 1, n_tokens + n
    return number, n_tokens


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"
