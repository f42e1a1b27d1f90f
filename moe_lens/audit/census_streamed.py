"""The census of a model whose layers stay on disk: documents go in groups, and each group reads every layer once.

Between two layers all branches of a group's documents are held, and they are more with every layer. A group has as many
documents as fit a budget; a document that does not fit alone is a group of its own, whose streams lie in a mapped file
as far as they are beyond the budget. That is cheaper than one large file: a pass reads every layer, the file is read
and written as often as there are layers. The numbers are those of a model in memory, whatever the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.audit.census_document import (
    Columns,
    Settings,
    add_changes,
    joined_layers,
    of_layer,
    token_branches,
)
from moe_lens.audit.census_plan import Documents, no_rows
from moe_lens.audit.streamed_noise import float32_bytes, require_streamed_float32, stays_in_memory
from moe_lens.interventions.clean_run import CleanRun, MoEValues
from moe_lens.interventions.first_order import final_scale
from moe_lens.interventions.streamed_replay import (
    ToReplay,
    branches_bytes,
    clean_bytes,
    replay_documents,
    together,
    working_bytes,
)
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import StreamedMoE
from moe_lens.routing.arguments import positive_integer

STREAMS_BUDGET = 2**31
"""Bytes of streams that are held between two layers, where nothing else is said."""


def require_streamable(model: StreamedMoE, settings: Settings, noise_samples: int) -> None:
    """Raises:
    ValueError: what is asked for cannot be measured on a streamed model.
    NotEnoughMemory: there is no room for what the noise floor is measured with.
    """
    wrong = None
    if settings.scope == "sequence":
        wrong = (
            "scope='sequence' goes through all later layers for every expert, and is not made layer by layer"
        )
    elif "later_loss" in settings.outcomes:
        wrong = "outcome='later_loss' goes through all later layers for every position, and is not made layer by layer"
    if wrong is not None:
        raise ValueError(f"{wrong}; leave it out, or load the model without stream=True")
    if settings.null_branch and noise_samples:
        require_streamed_float32(model)


@dataclass(frozen=True)
class Passes:
    """Which documents go through the layers together.

    Attributes:
        model: whose layers are read.
        groups: the documents' numbers; each group is one pass, but those without positions to measure need none.
        streams: of each group, the bytes of its streams after the last layer.
        clean: those of them that are always in memory, whatever the budget: the clean runs'.
        longest: tokens of the longest document that is measured.
        budget: the bytes that are held in memory.
        spill_directory: where the rest is; None is the system's temporary directory.
    """

    model: StreamedMoE
    groups: list[list[int]]
    streams: list[int]
    clean: list[int]
    longest: int
    budget: int
    spill_directory: str | Path | None

    @classmethod
    def of(
        cls,
        model: StreamedMoE,
        documents: Documents,
        numbers: Sequence[int],
        positions: Sequence[Int[Tensor, " n"]],
        settings: Settings,
        budget: int,
        spill_directory: str | Path | None,
    ) -> Passes:
        """In the documents' order, as many in a group as fit the budget.

        Args:
            numbers: of the documents.
            positions: of all documents.
        """
        per_position = len(settings.layers) * (model.cfg.top_k + settings.shared + settings.null_branch)
        measured = [len(positions[number]) > 0 for number in numbers]
        lengths = [int(documents.rows[number][1].sum()) for number in numbers]
        clean = [clean_bytes(model, length) * of for length, of in zip(lengths, measured, strict=True)]
        streams = [
            branches_bytes(model, len(positions[number]), per_position) + its
            for number, its in zip(numbers, clean, strict=True)
        ]
        groups = together(streams, budget)
        return cls(
            model,
            [[numbers[i] for i in group] for group in groups],
            [sum(streams[i] for i in group) for group in groups],
            [sum(clean[i] for i in group) for group in groups],
            max((length for length, of in zip(lengths, measured, strict=True) if of), default=0),
            budget,
            spill_directory,
        )

    @staticmethod
    def joined(parts: Sequence[Passes]) -> Passes:
        """Those of several processes, one or more."""
        return replace(
            parts[0],
            groups=[group for part in parts for group in part.groups],
            streams=[size for part in parts for size in part.streams],
            clean=[size for part in parts for size in part.clean],
            longest=max(part.longest for part in parts),
        )

    @property
    def n_passes(self) -> int:
        return sum(map(bool, self.streams))

    @property
    def bytes_read(self) -> int:
        """From disk, in all passes."""
        return self.n_passes * self.model.stored_bytes(range(self.model.cfg.n_layers))

    @property
    def most_spilled(self) -> int:
        """Bytes, about, of the largest file of streams: whole pieces of work lie in it."""
        sizes = zip(self.streams, self.clean, strict=True)
        return max([0, *(streams - max(self.budget, clean) for streams, clean in sizes)])

    @property
    def most_held(self) -> int:
        """Bytes of streams that are in memory at most."""
        sizes = zip(self.streams, self.clean, strict=True)
        return max((max(min(streams, self.budget), clean) for streams, clean in sizes), default=0)

    def describe(self, noise_samples: int = 0, n_processes: int = 1) -> str:
        """For whoever waits for it.

        Args:
            noise_samples: of the noise floor; 0 where none is measured.
            n_processes: that divide the passes.
        """
        of_each = "" if n_processes == 1 else f" of each of {n_processes} processes"
        model, cfg = self.model, self.model.cfg
        plural = "" if self.n_passes == 1 else "es"
        lines = [
            f"streamed: {self.n_passes:,} pass{plural} over {cfg.n_layers} layers, with "
            f"{max(map(len, self.groups), default=0):,} documents at most; {_gib(self.bytes_read)} to read "
            f"({model.reading_time(self.bytes_read)}), after what was never read yet is read once for its fingerprint",
            f"memory{of_each} beside the branches at work: {_gib(model.layer_memory)} for two layers, "
            f"{_gib(stays_in_memory(model))} for embeddings and what else stays, "
            f"{_gib(self.most_held)} for the streams between layers (of {_gib(self.budget)}), "
            f"about {_gib(working_bytes(model, self.longest))} for what a document's own run makes",
        ]
        if self.most_spilled:
            where = (
                "the temporary directory" if self.spill_directory is None else repr(str(self.spill_directory))
            )
            lines.append(
                f"spill: about {_gib(self.most_spilled)} in a file in {where}, for a document whose streams do not fit"
            )
        if noise_samples:
            lines.append(
                f"noise floor: three passes more, and others where the clean runs of {noise_samples} samples do "
                f"not fit the budget; the last by a second streamed model, which takes "
                f"{_gib(float32_bytes(model))} in float32"
            )
        return "\n".join(lines)

    def rows(
        self,
        documents: Documents,
        positions: Sequence[Int[Tensor, " n"]],
        settings: Settings,
        advance: Callable[[int, float], object],
    ) -> Iterator[list[tuple[int, Mapping[str, np.ndarray | Tensor]]]]:
        """Of each group, its documents' numbers and rows, as `CensusWriter.add_document` takes them.

        Args:
            advance: is told a document's number and what share of its work was done.

        Raises:
            FloatingPointError: something is NaN or infinite; its document and place are named.
            OSError: no room for the file of streams.
            CheckpointChanged: a file is no longer what it was when the model was loaded.
        """
        for group in self.groups:
            measured = [number for number in group if len(positions[number])]
            columns = self._pass(measured, documents, positions, settings, advance) if measured else {}
            yield [(number, columns.pop(number, None) or no_rows(settings)) for number in group]

    @torch.no_grad()
    def _pass(
        self,
        numbers: Sequence[int],
        documents: Documents,
        positions: Sequence[Int[Tensor, " n"]],
        settings: Settings,
        advance: Callable[[int, float], object],
    ) -> dict[int, Columns]:
        model = self.model
        branches = token_branches(settings, model.cfg.top_k, model.cfg.device)
        asked = [
            ToReplay(
                *documents.rows[number],
                branches,
                positions[number],
                settings.change,
                settings.read,
                settings.null_branch,
                settings.memory_budget,
                documents.name(number),
            )
            for number in numbers
        ]
        layers: list[dict[int, Columns]] = [{} for _ in asked]
        rows = [positions[number].to(model.cfg.device) for number in numbers]

        def measured(i: int, clean: CleanRun, values: MoEValues) -> None:
            layers[i][values.layer] = of_layer(clean, values, rows[i], None, settings, is_finished=False)

        replayed = replay_documents(
            model,
            asked,
            streams_budget=self.budget,
            spill_directory=self.spill_directory,
            on_layer=measured,
            advance=lambda i, share: advance(numbers[i], share),
        )
        made = {}
        for i, (clean, result) in enumerate(replayed):
            for of in layers[i].values():
                of["loss"] = clean.loss[rows[i]][:, None].expand_as(of["loss"])
                if "direct" in of:
                    of["direct"] = of["direct"] / final_scale(clean, rows[i])
            add_changes(clean, rows[i], settings, result, layers[i])
            made[numbers[i]] = joined_layers(layers[i], settings)
            layers[i] = {}
        return made


PassesOf = Callable[[Sequence[int]], Passes]
"""How some documents, by their numbers, go through the layers of a streamed model."""


def streamed_passes(
    model: HookedMoE,
    documents: Documents,
    positions: Sequence[Int[Tensor, " n"]],
    settings: Settings,
    streams_budget: int | None,
    spill_directory: str | Path | None,
) -> PassesOf | None:
    """None where the model is in memory.

    Args:
        streams_budget: None is `STREAMS_BUDGET`.

    Raises:
        ValueError: of a model in memory there are no streams to hold.
    """
    if not isinstance(model, StreamedMoE):
        if streams_budget is not None or spill_directory is not None:
            name = "spill_directory" if streams_budget is None else "streams_budget"
            raise ValueError(
                f"{name} is of a streamed model, and this one is in memory; memory_budget is of both"
            )
        return None
    budget = STREAMS_BUDGET if streams_budget is None else positive_integer(streams_budget, "streams_budget")
    return lambda numbers: Passes.of(model, documents, numbers, positions, settings, budget, spill_directory)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB"
