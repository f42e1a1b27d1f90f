"""Exact suffix replay of many documents on a model whose layers stay on disk: each layer is read once for all of them.

At every layer, in this order: all documents' clean streams go through it, and its stream before the MoE, its keys and
its values are kept; the branches that have begun go through it over those keys and values; the branches that it changes
begin; what was kept is let go. So no layer's keys and values are held but those of the one that is in memory. The
branches' streams lie between two layers in memory, or beyond a budget in a mapped file.

Every branch meets the same kernels in the same shapes as in `replay`, and gives the same numbers bit by bit, whatever
documents go with it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.branches import Change
from moe_lens.interventions.clean_run import CleanRun, Kept, MoEValues, next_token_loss, real_tokens_of
from moe_lens.interventions.cores import all_cores, pieces_at_once
from moe_lens.interventions.outcomes import Outcome
from moe_lens.interventions.replay import Branches, Replayed, assembled, check_replay
from moe_lens.interventions.replay_plan import HELP, ReplayPlan, branch_bytes
from moe_lens.interventions.suffix import OfRows, Read, Suffix
from moe_lens.model.attend import Attend
from moe_lens.model.block import Block
from moe_lens.model.freed_memory import FreedMemory
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layer_major import activation_bytes
from moe_lens.model.loss import LOGITS_BUDGET
from moe_lens.model.residual_streams import ResidualStreams
from moe_lens.model.streamed_moe import StreamedMoE
from moe_lens.out_of_memory import InParts, said_what_would_help


@dataclass(frozen=True, eq=False)
class ToReplay:
    """A document, and what `replay` takes of it.

    Attributes:
        tokens, mask: as `CleanRun.of` takes them.
        branches, rows, change, outcomes, null_branch, memory_budget: as `replay` takes them.
        name: what errors call the document.
    """

    tokens: Int[Tensor, " pos"]
    mask: Bool[Tensor, " pos"] | None
    branches: Sequence[Branches]
    rows: Int[Tensor, " n"] | None = None
    change: Change = field(default_factory=Change)
    outcomes: Sequence[Outcome] = ()
    null_branch: bool = True
    memory_budget: int = 2**30
    name: str = "the document"


@torch.no_grad()
def replay_documents(
    model: StreamedMoE,
    documents: Sequence[ToReplay],
    *,
    streams_budget: int = 2**31,
    spill_directory: str | Path | None = None,
    on_layer: Callable[[int, CleanRun, MoEValues], None] | None = None,
    advance: Callable[[int, float], object] | None = None,
) -> list[tuple[CleanRun, Replayed]]:
    """What `replay` gives of each document, with each layer of the model read once for all.

    Args:
        model: carries no hooks.
        documents: one or more.
        streams_budget: bytes of streams that are held in memory between two layers (`clean_bytes` and
            `branches_bytes`); beyond it the branches' lie in a mapped file.
        spill_directory: where that file is made, and removed at the end; None is the system's temporary directory.
        on_layer: is handed a document's number and what each changed layer did in its clean run, when that layer is
            there; of the `CleanRun`, `final` and `loss` are not known yet.
        advance: is told a document's number and what share of its work was done, at every layer.

    Returns:
        Of each document its clean run, with no layer's stream, keys and values any more, and its replay.

    Raises:
        ValueError: as `CleanRun.of` and `replay`, with the document's name; no documents.
        FloatingPointError: likewise.
        OSError: no room for the file of streams.
        RuntimeError: a run of this model is under way.
        NotEnoughMemory: the branches of one layer at one token do not fit, or a document's clean run.
        CheckpointChanged, CheckpointMismatch: as a run of a streamed model.
    """
    if not documents:
        raise ValueError("there are no documents to replay")
    try:
        return _Pass(model, documents, on_layer, advance).run(streams_budget, spill_directory)
    except _NotFinite as broken:
        document = documents[broken.number]
    # Run alone, with all its layers' streams kept, it raises by itself and says where the numbers come from.
    with _named(document):
        CleanRun.of(model, document.tokens, document.mask)
        raise FloatingPointError("the clean run is not finite; nothing can be measured against it")


def clean_bytes(model: HookedMoE, n_tokens: int) -> int:
    """Memory that the clean run of a document takes between and at layers: its stream, and the present layer's stream
    before the MoE, keys and values."""
    cfg = model.cfg
    attention = cfg.attention
    of_layer = cfg.d_model + attention.n_key_value_heads * (attention.d_head + attention.d_value)
    return n_tokens * (cfg.d_model + of_layer) * cfg.dtype.itemsize


def branches_bytes(model: HookedMoE, n_rows: int, n_branches: int) -> int:
    """What the streams of branches take after the last layer, null branches counted among them."""
    return n_rows * n_branches * model.cfg.d_model * model.cfg.dtype.itemsize


def working_bytes(model: HookedMoE, n_tokens: int) -> int:
    """Memory, about, that the clean run of a document takes at its widest place, beside `clean_bytes`: at a layer, what
    its experts read and put out, with what those of the document before put out; or logits at the end."""
    cfg = model.cfg
    at_layer = cfg.top_k * (5 * cfg.d_model + 3 * cfg.d_expert) * cfg.dtype.itemsize
    at_once = min(n_tokens, max(1, LOGITS_BUDGET // (4 * cfg.d_vocab)))
    at_end = at_once * cfg.d_vocab * (cfg.dtype.itemsize + 8)
    return max(n_tokens * at_layer, at_end)


def together(sizes: Sequence[int], budget: int) -> list[range]:
    """Which of consecutive things go together: as many as fit a budget, and one that does not fit by itself."""
    groups: list[range] = []
    held = 0
    for i, size in enumerate(sizes):
        if groups and held + size <= budget:
            groups[-1] = range(groups[-1].start, i + 1)
            held += size
        else:
            groups.append(range(i, i + 1))
            held = size
    return groups


_HELP = "shorter documents (max_length), or a smaller streams_budget"
"""Where a clean run meets the end of memory."""


class _NotFinite(Exception):
    """The clean run of a document holds NaN or infinity where it is read."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def _named(document: ToReplay) -> Iterator[None]:
    try:
        yield
    except (FloatingPointError, ValueError) as error:
        raise type(error)(f"{document.name}: {error}") from error


@dataclass(frozen=True)
class _Piece:
    """Branches that go together, at some rows: the numbers of the `Branches`, and where they are."""

    group: list[int]
    suffix: Suffix


class _OnTheWay:
    """A document between two layers: its clean stream, and the branches in the pieces that `replay` would make."""

    def __init__(self, model: StreamedMoE, asked: ToReplay):
        self.model, self.asked = model, asked
        tokens, columns = real_tokens_of(model, asked.tokens, asked.mask)
        device = tokens.device
        self.kept = Kept()
        self.stream: Float[Tensor, "one pos d_model"] = model.embed(tokens[None])
        self.clean = CleanRun(
            model,
            tokens,
            columns,
            **vars(self.kept),
            final=self.stream.new_empty(0, model.cfg.d_model),
            loss=torch.full(columns.shape, torch.nan, device=device),
        )
        self.rows = self.clean.has_next.nonzero()[:, 0] if asked.rows is None else asked.rows.to(device)
        self.branches = [of.to(device) for of in asked.branches]
        self.layers = {of.layer for of in self.branches}
        check_replay(self.clean, self.branches, self.rows, asked.change, asked.outcomes)
        n_at_once = pieces_at_once(device)
        self.budget = max(1, asked.memory_budget // n_at_once)
        plan = ReplayPlan.make(
            model,
            [(of.layer, of.n_branches) for of in self.branches],
            len(self.rows),
            len(tokens),
            self.budget,
            asked.null_branch,
            n_at_once,
        )
        self.pieces: list[_Piece] = []
        for group in plan.groups:
            for start in range(0, len(self.rows), plan.rows_at_once):
                rows = self.rows[start : start + plan.rows_at_once]
                at_rows = [
                    (self.branches[i], self.branches[i].at(slice(start, start + len(rows)), len(rows)))
                    for i in group
                ]
                self.pieces.append(_Piece(group, Suffix(rows, asked.change, at_rows, asked.null_branch)))
        self.experts: dict[int, Tensor] = {}
        self.in_parts = InParts("rows of a replay", HELP)

    def share_at(self, layer: int) -> float:
        """Which part of the work is done at a layer: branches that go through it, of all at all layers; predictions
        are counted as one more."""
        n_layers = self.model.cfg.n_layers
        below = [sum(of.n_branches for of in self.branches if of.layer < at) for at in range(n_layers + 1)]
        return below[layer] / sum(below)

    def made_at(self, layer: int) -> int:
        """Bytes, about, that the branches' activations take and leave at a layer; and, where some begin there, the
        layer's clean run once more."""
        n_branches = sum(of.n_branches for of in self.branches if of.layer < layer)
        made = len(self.rows) * n_branches * branch_bytes(self.model, 0)
        if layer in self.layers:
            made += activation_bytes(self.model, len(self.clean.tokens))
        return made

    def step_clean(self, block: Block, layer: int) -> bool:
        """Take the clean stream through a layer, and keep what the branches read there; whether that is finite."""
        clean = self.clean
        attend = Attend(
            self.model.cfg.rotary,
            (1, len(clean.tokens)),
            clean.tokens.device,
            positions=clean.columns[None],
        )
        with self.model.hooks(self.kept.hooks(layer)):
            self.stream = self.model.run_block(block, self.stream, attend)
        return bool(clean.resid_mid[layer][clean.has_next].isfinite().all())

    def step(
        self, piece: _Piece, layer: int, values: MoEValues | None, streams: ResidualStreams, number: int
    ) -> None:
        """Take a piece's branches through a layer, from and to their place among the streams."""
        before = streams[number].to(self.stream.device) if piece.suffix.first_layer < layer else None
        streams[number] = piece.suffix.step_in_parts(self.in_parts, self.clean, layer, before, values)

    def finish_clean(self) -> bool:
        """Read the clean loss; whether it is finite wherever there is one."""
        loss = next_token_loss(self.model, self.stream, self.clean.tokens, self.clean.columns)
        self.clean = replace(self.clean, final=self.stream[0], loss=loss)
        return bool(loss[self.clean.has_next].isfinite().all())

    def finish(self, piece: _Piece, streams: ResidualStreams, number: int) -> OfRows:
        final = streams[number].to(self.stream.device)
        return piece.suffix.finish(self.clean, final, self.asked.outcomes, self.budget)

    def result(self, of_pieces: Sequence[OfRows]) -> Replayed:
        parts: list[list[Read]] = [[] for _ in self.branches]
        nulls: list[list[Read]] = [[] for _ in self.branches]
        for piece, (reads, of_nulls) in zip(self.pieces, of_pieces, strict=True):
            for place, i in enumerate(piece.group):
                parts[i].append(reads[place])
                if of_nulls is not None:
                    nulls[i].append(of_nulls[place])
        return assembled(
            self.clean,
            self.rows,
            self.branches,
            parts,
            nulls if self.asked.null_branch else None,
            self.experts,
        )


class _Pass:
    """Documents that go through the layers together."""

    def __init__(
        self,
        model: StreamedMoE,
        documents: Sequence[ToReplay],
        on_layer: Callable[[int, CleanRun, MoEValues], None] | None,
        advance: Callable[[int, float], object] | None,
    ):
        self.model, self.documents = model, documents
        self.on_layer, self.advance = on_layer, advance
        self.on_the_way: list[_OnTheWay] = []
        for document in documents:
            with _named(document):
                self.on_the_way.append(_OnTheWay(model, document))
        self.freed = FreedMemory()
        self.shapes: list[tuple[int, int]] = []
        self.numbers: list[range] = []
        """Of each document: which streams are those of its pieces."""
        for of in self.on_the_way:
            self.numbers.append(range(len(self.shapes), len(self.shapes) + len(of.pieces)))
            self.shapes += [(len(piece.suffix.rows), piece.suffix.width) for piece in of.pieces]

    def run(self, streams_budget: int, spill_directory: str | Path | None) -> list[tuple[CleanRun, Replayed]]:
        model = self.model
        of_clean = sum(clean_bytes(model, len(of.clean.tokens)) for of in self.on_the_way)
        with ResidualStreams(
            self.shapes,
            model.cfg.d_model,
            model.cfg.dtype,
            max(0, streams_budget - of_clean),
            spill_directory,
            budget_name="streams_budget",
        ) as streams:
            with model.layers_in_memory(range(model.cfg.n_layers)) as blocks:
                for layer, block in enumerate(blocks):
                    for i, of in enumerate(self.on_the_way):
                        with said_what_would_help(self.documents[i].name, _HELP):
                            is_finite = of.step_clean(block, layer)
                        if not is_finite:
                            raise _NotFinite(i)
                        self.freed.add(activation_bytes(model, len(of.clean.tokens)))
                    self._step_branches(layer, streams)
                    for of in self.on_the_way:
                        of.kept.clear()
                    self.freed.give_back()
            return [self._end(i, streams) for i in range(len(self.on_the_way))]

    def _step_branches(self, layer: int, streams: ResidualStreams) -> None:
        at_work: deque[tuple[int, list[Future[None]]]] = deque()

        def take_oldest() -> None:
            i, futures = at_work.popleft()
            with _named(self.documents[i]):
                for future in futures:
                    future.result()
            self._advance(i, layer)
            self.freed.add(self.on_the_way[i].made_at(layer))

        with all_cores(self.model.cfg.device) as cores:
            for i, of in enumerate(self.on_the_way):
                # What the experts of two documents put out is held at most, so that no core waits for the next.
                if len(at_work) == 2:
                    take_oldest()
                with _named(self.documents[i]):
                    with said_what_would_help(self.documents[i].name, _HELP):
                        values = of.clean.moe(layer) if layer in of.layers else None
                        if values is not None:
                            of.experts[layer] = values.indices[of.rows]
                            if self.on_layer is not None:
                                self.on_layer(i, of.clean, values)
                    futures = [
                        cores.submit(partial(of.step, piece, layer, values, streams, number))
                        for piece, number in zip(of.pieces, self.numbers[i], strict=True)
                        if piece.suffix.first_layer <= layer
                    ]
                at_work.append((i, futures))
            while at_work:
                take_oldest()

    def _end(self, i: int, streams: ResidualStreams) -> tuple[CleanRun, Replayed]:
        of = self.on_the_way[i]
        with said_what_would_help(self.documents[i].name, _HELP):
            is_finite = of.finish_clean()
        if not is_finite:
            raise _NotFinite(i)
        with _named(self.documents[i]), all_cores(self.model.cfg.device) as cores:
            futures = [
                cores.submit(partial(of.finish, piece, streams, number))
                for piece, number in zip(of.pieces, self.numbers[i], strict=True)
            ]
            result = of.result([future.result() for future in futures])
        self.freed.add(
            4 * sum(math.prod(self.shapes[number]) for number in self.numbers[i]) * self.model.cfg.d_vocab
        )
        for number in self.numbers[i]:
            streams.drop(number)
        self._advance(i, self.model.cfg.n_layers)
        return of.clean, result

    def _advance(self, i: int, layer: int) -> None:
        if self.advance is not None:
            self.advance(i, self.on_the_way[i].share_at(layer))
