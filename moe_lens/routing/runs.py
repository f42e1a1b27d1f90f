"""Running a corpus through an accumulator: what it takes, planned before it begins, and kept on the way.

What a run keeps is one mean and one spread for each (sender, receiver) and measure, whatever the length of the corpus.
Where that is more than its memory budget, as for the neurons of a large model, the receivers are divided into chunks,
and the corpus is passed once for each. A pass can be killed at any time: its state is saved whole or not at all, and
the same call goes on from there and gives the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.corpus import TokenBatches
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.out_of_memory import InParts
from moe_lens.routing.documents import Moments, real_tokens
from moe_lens.routing.measures import MEASURES, RANK_MEASURES
from moe_lens.routing.progress import Progress
from moe_lens.routing.provenance import TokenDigest, weights_fingerprint
from moe_lens.routing.readout import check_receivers
from moe_lens.routing.result import RoutingContributions, measure_names
from moe_lens.routing.senders import senders_before
from moe_lens.routing.storage import read_arrays, write_atomically
from moe_lens.routing.streaming import ContributionAccumulator

# A mean and a spread in float64, for two position classes and two populations.
_BYTES_PER_CELL = 2 * 8 * 2 * 2
# A neuron's measures at a receiver are also a float32 table.
_BYTES_PER_TABLE_CELL = 4

_HELP = "a smaller batch_size, shorter documents, a smaller memory_budget, fewer granularities or receivers at a time"

Tokens = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"]


@dataclass
class Corpus:
    """Batches of (tokens, mask), what they are, and whether they can be gone through again."""

    source: TokenBatches | Iterable[Tensor | Sequence[Any]]
    can_be_repeated: bool
    description: str

    def __iter__(self) -> Iterator[tuple[Tokens, Mask | None]]:
        for batch in self.source:
            parts = [batch] if isinstance(batch, Tensor) else batch
            if not isinstance(parts, Sequence) or not parts or not isinstance(parts[0], Tensor):
                raise ValueError(
                    f"a batch is tokens, or a tuple that begins with them and their mask, not {batch!r}"
                )
            yield parts[0], parts[1] if len(parts) > 1 else None

    @property
    def n_batches(self) -> int | None:
        """None where it is not known."""
        return len(self.source) if isinstance(self.source, Sized) else None

    def longest(self) -> int:
        """Tokens of the longest document."""
        if not isinstance(self.source, (Sequence, TokenBatches)):
            raise ValueError(
                "by='source' over an iterator needs max_positions, the length of the longest document"
            )
        return max((int(real_tokens(tokens, mask).sum(dim=1).max()) for tokens, mask in self), default=1)


def contributions_of(
    accumulator: ContributionAccumulator,
    *,
    corpus: Sequence[str] = (),
    fingerprints: Sequence[str] = (),
    copy: bool = True,
) -> dict[str, RoutingContributions]:
    """What an accumulator has gathered, by granularity, on the CPU.

    Args:
        corpus, fingerprints: what the tokens were, for the provenance.
        copy: whether the results are to stay as they are when the accumulator goes on.

    Raises:
        ValueError: it has seen no batch.
    """
    if any(tally.n_documents["lead"] == 0 for tally in accumulator.tallies.values()):
        raise ValueError("there were no batches, so there is nothing to average over")
    cfg, measuring = accumulator.model.cfg, accumulator.measuring
    provenance = {
        "model": cfg.model_name,
        "revision": cfg.revision,
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "weights": weights_fingerprint(accumulator.model),
        "edited": sorted(accumulator.edited),
        "corpus": list(corpus),
        "fingerprints": list(fingerprints),
        "experts": accumulator.measured_experts,
        "source_axis": accumulator.source_axis if "source" in accumulator.by else None,
        "lead_token": "the first token of a document"
        if accumulator.left_out is None
        else f"the first token after BOS (token {accumulator.left_out}), which is left out",
        "moe_lens": version("moe-lens"),
    }
    results = {}
    for by, tally in accumulator.tallies.items():
        results[by] = RoutingContributions(
            by=by,
            senders=tally.senders,
            receivers=tuple(f"M{receiver}" for receiver in accumulator.receivers),
            measures=measure_names(measuring.rank_shift),
            n_documents=dict(tally.n_documents),
            n_tokens=dict(tally.n_tokens),
            completeness_error=tally.completeness_error,
            rounding_ratio=tally.rounding_ratio,
            model_logit_difference=tally.model_logit_difference,
            provenance=provenance,
            firsts=tally.firsts,
            moments={
                key: [moments.on_cpu(copy) for moments in groups] for key, groups in tally.moments.items()
            },
        )
    return results


# ---- the plan ----


class Group(NamedTuple):
    """Batches that go through the model together, and how often its layers are gone through for them."""

    batches: Sequence[tuple[Tokens, Mask | None]]
    n_readings: int = 1


class BatchesInParts:
    """Batches through a model in memory, each whole, or where memory runs out some of its documents at a time."""

    def __init__(self) -> None:
        self._tokens_at_once: int | None = None
        """Of a batch, since memory ran out at more."""

    def run(self, accumulator: ContributionAccumulator, tokens: Tokens, mask: Mask | None) -> None:
        """Let an accumulator listen to a batch."""
        # No later layer is read.
        stop = accumulator.receivers[-1] + 1

        def measure(rows: slice) -> None:
            some, some_mask = tokens[rows], None if mask is None else mask[rows]
            with torch.no_grad(), accumulator.listening(some, some_mask):
                accumulator.model(some, attention_mask=some_mask, stop_at_layer=stop)

        width = max(1, tokens.shape[1])
        affordable = None if self._tokens_at_once is None else max(1, self._tokens_at_once // width)
        in_parts = InParts("documents of a batch", _HELP, affordable)
        in_parts.run(measure, len(tokens), can_be_repeated=lambda: accumulator.whole)
        if in_parts.at_once != affordable and in_parts.at_once is not None:
            self._tokens_at_once = in_parts.at_once * width


@dataclass
class Plan:
    """Which receivers are measured in which pass, how much memory the largest takes, and how batches are run."""

    chunks: list[tuple[int, ...]]
    bytes_needed: int
    largest: int
    in_parts: BatchesInParts = field(default_factory=BatchesInParts, kw_only=True)

    unit: ClassVar[str] = "batch"
    """Of progress."""
    saves_every_group: ClassVar[bool] = False
    """Whether the state is saved after each group, whenever it was saved before."""

    @classmethod
    def make(
        cls,
        model: HookedMoE,
        by: Sequence[str],
        receivers: Sequence[int] | None,
        budget: int,
        rank_shift: bool,
        n_sources: int,
    ) -> Plan:
        chunks: list[list[int]] = [[]]
        sizes = [0]
        for receiver in check_receivers(model, receivers):
            size = accumulator_bytes(model, by, receiver, rank_shift, n_sources)
            if size > budget:
                raise ValueError(
                    f"one receiver, M{receiver}, needs {size:,} bytes of accumulators, over memory_budget={budget:,}"
                )
            if chunks[-1] and sizes[-1] + size > budget:
                chunks.append([])
                sizes.append(0)
            chunks[-1].append(receiver)
            sizes[-1] += size
        return cls([tuple(chunk) for chunk in chunks], sum(sizes), max(sizes))

    def groups(
        self, number: int, batches: Iterable[tuple[Tokens, Mask | None]], n_done: int
    ) -> Iterator[Group]:
        """The batches of a pass, after those that are done, as they are run: here, one by one."""
        return (Group([batch]) for batch in batches)

    def run(
        self,
        accumulator: ContributionAccumulator,
        group: Group,
        allow_incomplete: bool,
        stepped: Callable[[], object],
    ) -> None:
        """Let an accumulator listen to a group of batches.

        Args:
            allow_incomplete: see `routing_contributions`.
            stepped: called for every step of progress.
        """
        for tokens, mask in group.batches:
            self.in_parts.run(accumulator, tokens, mask)
            if not allow_incomplete:
                accumulator.require_closed()
            stepped()

    def n_steps(self, number: int, corpus: Corpus, n_done: int) -> int | None:
        """Of progress in a pass whose first batches are done; None where it is not known."""
        return None if corpus.n_batches is None else corpus.n_batches - n_done

    def describe(self, corpus: Corpus) -> str:
        n_batches = corpus.n_batches or "an unknown number of"
        return (
            f"corpus: {corpus.description}\n"
            f"plan: {len(self.chunks)} pass(es) over {n_batches} batches; accumulators take up to "
            f"{self.largest / 2**20:,.1f} MiB, and the result {self.bytes_needed / 2**20:,.1f} MiB"
        )


def accumulator_bytes(
    model: HookedMoE, by: Sequence[str], receiver: int, rank_shift: bool, n_sources: int
) -> int:
    """What the means of one receiver take."""
    n_measures = len(MEASURES) + (len(RANK_MEASURES) if rank_shift else 0)
    total = 0
    for name in by:
        n_senders = len(senders_before(model.cfg, receiver, name, n_sources=n_sources)) + 1
        cell = _BYTES_PER_CELL + (_BYTES_PER_TABLE_CELL if name == "neuron" else 0)
        total += n_measures * cell * n_senders
    return total


# ---- the run ----


class Run:
    """The passes of a plan, one after the other. Each keeps its state in a file of its own.

    Args:
        settings: of the accumulator.
        state, save_every, allow_incomplete, verbose: see `routing_contributions`.
        stepped: called for every step of progress (`Plan.n_steps`), beside the bar.
    """

    def __init__(
        self,
        model: HookedMoE,
        corpus: Corpus,
        plan: Plan,
        settings: dict[str, Any],
        state: Path | None,
        save_every: float,
        allow_incomplete: bool,
        verbose: bool,
        stepped: Callable[[], object] = lambda: None,
    ):
        self.model, self.corpus, self.plan, self.settings = model, corpus, plan, settings
        self.state, self.save_every, self.verbose = state, save_every, verbose
        self.allow_incomplete, self._stepped = allow_incomplete, stepped
        if state is not None and not state.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {str(state.parent)!r} to keep the state {state.name} in"
            )

    def results(self) -> dict[str, RoutingContributions]:
        chunks = []
        for number in range(len(self.plan.chunks)):
            chunks.append(self._pass(number))
            first, this = (
                next(iter(chunk.values())).provenance["fingerprints"] for chunk in (chunks[0], chunks[-1])
            )
            if this != first:
                raise ValueError(
                    f"pass {number + 1} of {len(self.plan.chunks)} met other tokens than the first: the batches must "
                    f"be the same each time, and those of a loader that shuffles are not; or give a larger "
                    f"memory_budget, for one pass"
                )
        return {by: joined_results([chunk.pop(by) for chunk in chunks]) for by in self.settings["by"]}

    def _pass(self, number: int) -> dict[str, RoutingContributions]:
        """One pass over the corpus, from where its state left it."""
        accumulator = ContributionAccumulator(self.model, receivers=self.plan.chunks[number], **self.settings)
        n_done, digest, edited = self._restore(number, accumulator)
        progress = Progress(n_done, digest, accumulator.n_rows)
        try:
            self._batches(number, accumulator, progress, edited)
        except BaseException:
            # Whatever ends a run, what is whole of it is kept: an interrupt, memory or a disk that is full.
            if self.state is not None and progress.to_save(
                accumulator, partial(self._require_closed, accumulator)
            ):
                self._save(number, accumulator, progress.at.n_batches, progress.at.digest)
            raise
        return contributions_of(
            accumulator, corpus=[self.corpus.description], fingerprints=[progress.at.digest], copy=False
        )

    def _batches(
        self, number: int, accumulator: ContributionAccumulator, progress: Progress, edited: set[str]
    ) -> None:
        """Those that are still to be run, saved now and then and at the end."""
        n_done, digest = progress.at.n_batches, progress.at.digest
        seen, saved_at, n_batches = TokenDigest(), time.monotonic(), 0
        batches = iter(self.corpus)
        for tokens, mask in islice(batches, n_done):
            seen.add(tokens, mask)
            n_batches += 1
        if n_batches < n_done:
            raise self._other_run(number, f"it had seen {n_done} batches, and now there are {n_batches}")
        if n_done and seen.hexdigest() != digest:
            raise self._other_run(number, "its tokens were others")
        with tqdm(
            total=self.plan.n_steps(number, self.corpus, n_done),
            disable=not self.verbose,
            unit=self.plan.unit,
        ) as bar:

            def step() -> None:
                bar.update()
                self._stepped()

            for group in self.plan.groups(number, batches, n_done):
                is_first, n_batches, n_rows = n_batches == n_done, n_batches + len(group.batches), 0
                for tokens, mask in group.batches:
                    seen.add(tokens, mask)
                    n_rows += len(tokens)
                progress.begins(n_batches, seen.hexdigest(), accumulator.n_rows + n_rows)
                self.plan.run(accumulator, group, self.allow_incomplete, step)
                if n_done and is_first and bool(accumulator.edited) != bool(edited):
                    raise self._other_run(
                        number,
                        f"hooks edited {edited or 'nothing'}, and now {accumulator.edited or 'nothing'}",
                    )
                accumulator.edited |= edited
                progress.ends()
                is_time = self.plan.saves_every_group or time.monotonic() - saved_at >= self.save_every
                if self.state is not None and is_time:
                    self._save(number, accumulator, n_batches, progress.at.digest)
                    progress.n_saved, saved_at = n_batches, time.monotonic()
        accumulator.edited |= edited
        if self.state is not None and n_batches > n_done:
            self._save(number, accumulator, n_batches, progress.at.digest)
            progress.n_saved = n_batches

    def _require_closed(self, accumulator: ContributionAccumulator) -> None:
        if not self.allow_incomplete:
            accumulator.require_closed()

    def _file(self, number: int) -> Path:
        assert self.state is not None
        n_passes = len(self.plan.chunks)
        return (
            self.state
            if n_passes == 1
            else self.state.with_name(f"{self.state.name}.{number + 1}-of-{n_passes}")
        )

    def _identity(self, number: int) -> dict[str, Any]:
        """What must be the same for a run to be gone on with; in JSON's terms, as it comes back from the file."""
        cfg = self.model.cfg
        return {
            "model": cfg.model_name,
            "revision": cfg.revision,
            "dtype": str(cfg.dtype),
            "weights": weights_fingerprint(self.model),
            "moe_lens": version("moe-lens"),
            "receivers": list(self.plan.chunks[number]),
            **self.settings,
        }

    def _save(self, number: int, accumulator: ContributionAccumulator, n_batches: int, digest: str) -> None:
        if any(tally.n_documents["lead"] == 0 for tally in accumulator.tallies.values()):
            return  # so far there was nothing but BOS, which is left out
        arrays: dict[str, Tensor] = {}
        results = {}
        for by, result in contributions_of(accumulator, copy=False).items():
            of_result, results[by] = result.to_arrays()
            arrays |= {f"{by}/{name}": array for name, array in of_result.items()}
        facts = {"run": self._identity(number), "batches": n_batches, "digest": digest, "results": results}
        write_atomically(self._file(number), arrays, facts)

    def _restore(self, number: int, accumulator: ContributionAccumulator) -> tuple[int, str, set[str]]:
        """Put the accumulator where its state left it: how many batches it has seen, their digest, and which hook
        points were edited meanwhile."""
        if self.state is None or not self._file(number).exists():
            return 0, "", set()
        arrays, facts = read_arrays(self._file(number))
        saved, now = facts.get("run", {}), self._identity(number)
        for name in [*now, *(saved.keys() - now.keys())]:
            if saved.get(name) != now.get(name):
                raise self._other_run(number, f"{name} was {saved.get(name)!r} and is {now.get(name)!r}")
        for by, tally in accumulator.tallies.items():
            of_result = {
                name.removeprefix(f"{by}/"): array
                for name, array in arrays.items()
                if name.startswith(f"{by}/")
            }
            result = RoutingContributions.from_arrays(
                of_result, facts["results"][by], str(self._file(number))
            )
            for key, groups in tally.moments.items():
                for mine, its in zip(groups, result.moments[key], strict=True):
                    for name in ("count", "mean", "squares"):
                        getattr(mine, name).copy_(getattr(its, name))
            tally.n_documents, tally.n_tokens = result.n_documents, result.n_tokens
            tally.completeness_error = result.completeness_error
            tally.rounding_ratio = result.rounding_ratio
            tally.model_logit_difference = result.model_logit_difference
        edited = next(iter(facts["results"].values()))["provenance"]["edited"]
        return facts["batches"], facts["digest"], set(edited)

    def _other_run(self, number: int, problem: str) -> ValueError:
        return ValueError(
            f"the state {str(self._file(number))!r} is of another run: {problem}; name another file, or delete this one"
        )


def joined_results(chunks: Sequence[RoutingContributions]) -> RoutingContributions:
    """Results for runs of receivers, as one for all: a sender's receivers follow one another."""
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    offsets = [0]
    for chunk in chunks:
        offsets.append(offsets[-1] + len(chunk.receivers))
    firsts, moments = [], {key: [] for key in last.moments}
    for group in last.senders.groups:
        with_group = [
            (offset, chunk, chunk.senders.groups.index(group))
            for offset, chunk in zip(offsets, chunks, strict=False)
            if group in chunk.senders.groups
        ]
        offset, chunk, place = with_group[0]
        firsts.append(offset + chunk.firsts[place])
        for key in moments:
            # Each part is let go as it is joined, so that no second copy of everything is held.
            parts = [chunk.moments[key][place] for _, chunk, place in with_group]
            for _, chunk, place in with_group:
                chunk.moments[key][place] = _NOTHING
            moments[key].append(
                Moments.of(
                    parts[0].count,
                    torch.cat([part.mean for part in parts], dim=1),
                    torch.cat([part.squares for part in parts], dim=1),
                )
            )
    ratios = [chunk.rounding_ratio for chunk in chunks if chunk.rounding_ratio is not None]
    return replace(
        last,
        receivers=tuple(receiver for chunk in chunks for receiver in chunk.receivers),
        firsts=tuple(firsts),
        moments=moments,
        completeness_error=max(chunk.completeness_error for chunk in chunks),
        rounding_ratio=max(ratios) if ratios else None,
        model_logit_difference=max(chunk.model_logit_difference for chunk in chunks),
    )


_NOTHING = Moments(0, 0, 0)
