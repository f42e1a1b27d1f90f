"""The documents of a census, the positions of them that are measured, and what measuring them takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.audit.census_document import Settings
from moe_lens.audit.census_rows import dtypes_with
from moe_lens.interventions.replay_plan import branch_bytes
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.documents import real_tokens
from moe_lens.routing.provenance import TokenDigest
from moe_lens.routing.runs import Corpus


@dataclass(frozen=True)
class Documents:
    """Rows of tokens with their masks, one document each.

    Attributes:
        rows: (tokens, mask).
        fingerprint: of all real tokens, whatever the padding.
        columns: a fingerprint of where they stand, which positions are read off.
        names: where the corpus has them.
    """

    rows: list[tuple[Int[Tensor, " pos"], Bool[Tensor, " pos"]]]
    fingerprint: str
    columns: str
    names: list[str] | None

    @classmethod
    def of(cls, model: HookedMoE, corpus: Corpus) -> Documents:
        """All documents of a corpus, checked.

        Raises:
            ValueError: tokens that the model cannot take; no documents.
        """
        rows, digest, columns = [], TokenDigest(), TokenDigest()
        for given, given_mask in corpus:
            tokens, mask = model.tokens_and_mask(given, given_mask)
            real = real_tokens(tokens, mask)
            digest.add(tokens, real)
            columns.add(torch.arange(tokens.shape[1]).expand(tokens.shape), real.cpu())
            rows += list(zip(tokens.cpu(), real.cpu(), strict=True))
        if not rows:
            raise ValueError("there are no documents, so there is nothing to count")
        listed = getattr(corpus.source, "documents", None)
        names = None if listed is None else [document.name for document in listed]
        return cls(rows, digest.hexdigest(), columns.hexdigest(), names)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"document {number}" + ("" if self.names is None else f" ({self.names[number]})")

    def measurable(self) -> Iterator[Int[Tensor, " n"]]:
        """Of each document: the tokens that have a next one, as places among its real ones."""
        for _, real in self.rows:
            columns = real.nonzero()[:, 0]
            yield (columns[1:] == columns[:-1] + 1).nonzero()[:, 0]

    def sampled(
        self, n: int | None, seed: int, *, per_document: int | None = None, min_context: int = 0
    ) -> list[Int[Tensor, " n"]]:
        """The tokens to be measured, of each document: all, or a uniform sample without replacement.

        With `per_document` the draw has two steps: of each document with more than so many, so many are drawn
        uniformly, the others give all they have; `n` of these are then drawn uniformly. So with `per_document=1`
        every n documents that have a token to give are equally likely, and of each every such token; with more,
        tokens of one document are still equally likely, and those of a long document less so than those of a short one.

        Args:
            n: how many; None is all that `per_document` leaves.
            per_document: at most so many of a document; None is no limit.
            min_context: tokens of the document before the one that is predicted, the measured token being the last
                of them.

        Raises:
            ValueError: there are none, or fewer than n.
        """
        measurable = list(self.measurable())
        total = sum(map(len, measurable))
        if total == 0:
            raise ValueError("no position has a next token, so there is no loss to measure")
        every = [places[places + 1 >= min_context] for places in measurable]
        if not any(map(len, every)):
            longest = max(int(real.sum()) for _, real in self.rows)
            raise ValueError(
                f"min_context={min_context} tokens are wanted before the one that is predicted, and no position of "
                f"the corpus has so many: its longest document has {longest}"
            )
        n_eligible = sum(map(len, every))
        if n is None and per_document is None:
            return every
        random = np.random.default_rng(seed)
        if per_document is not None:
            every = [_drawn(places, per_document, random) for places in every]
        if n is None:
            return every
        lengths = list(map(len, every))
        if n > sum(lengths):
            there = f"{total} with a next token"
            if min_context > 0:
                there += f", {n_eligible} of them after min_context={min_context} tokens"
            if per_document is not None:
                n_documents = sum(map(bool, lengths))
                there += (
                    f", and per_document={per_document} leaves {sum(lengths)}, of {n_documents} documents"
                )
            raise ValueError(f"n={n} positions are wanted, and the corpus has {there}")
        chosen = torch.zeros(sum(lengths), dtype=torch.bool)
        chosen[random.choice(sum(lengths), n, replace=False)] = True
        return [places[kept] for places, kept in zip(every, torch.split(chosen, lengths), strict=True)]


def _drawn(places: Int[Tensor, " n"], at_most: int, random: np.random.Generator) -> Int[Tensor, " chosen"]:
    """At most so many of a document's places, uniformly without replacement, in their order."""
    if len(places) <= at_most:
        return places
    return places[np.sort(random.choice(len(places), at_most, replace=False))]


def no_rows(settings: Settings) -> dict[str, np.ndarray]:
    """The columns of a document without positions to measure."""
    return {
        name: np.zeros(0, dtype)
        for name, dtype in dtypes_with(settings.columns).items()
        if name != "document"
    }


@dataclass(frozen=True)
class CensusPlan:
    """What a census takes.

    Attributes:
        ablations: rows of each document.
        layer_tokens: tokens that go through one later layer, over everything: the work.
        passes: under scope `sequence`, the most suffix passes there can be: one per (document, layer, expert).
        model: for the sizes.
        settings, noise_samples: as asked for.
    """

    ablations: list[int]
    layer_tokens: int
    passes: int
    model: HookedMoE
    settings: Settings
    noise_samples: int

    @classmethod
    def of(
        cls,
        model: HookedMoE,
        documents: Documents,
        positions: Sequence[Int[Tensor, " n"]],
        settings: Settings,
        noise_samples: int,
    ) -> CensusPlan:
        cfg = model.cfg
        per_position = cfg.top_k + settings.shared
        ablations = [len(places) * per_position * len(settings.layers) for places in positions]
        depth = sum(cfg.n_layers - 1 - layer for layer in settings.layers)
        layer_tokens, passes = 0, 0
        for (_, real), places in zip(documents.rows, positions, strict=True):
            if len(places) == 0:
                continue
            n_tokens = int(real.sum())
            n_experts = min(cfg.n_experts, len(places) * cfg.top_k) + settings.shared
            if settings.scope == "sequence":
                passes += n_experts * len(settings.layers)
                layer_tokens += n_experts * n_tokens * depth
            else:
                layer_tokens += len(places) * per_position * depth
            if "later_loss" in settings.outcomes:
                layer_tokens += int((n_tokens - places).sum()) * per_position * depth
        return cls(ablations, layer_tokens, passes, model, settings, noise_samples)

    def describe(self, corpus: str) -> str:
        settings, cfg = self.settings, self.model.cfg
        lines = [
            f"corpus: {corpus}",
            f"plan: {sum(self.ablations):,} ablations ({settings.change.how}, scope {settings.scope}) at "
            f"{len(settings.layers)} layers; {self.layer_tokens:,} tokens through a later layer and "
            f"{sum(self.ablations):,} predictions over {cfg.d_vocab:,} tokens; about "
            + (f"{self.flops / 1e12:,.1f} TFLOP" if self.flops > 1e12 else f"{self.flops / 1e9:,.1f} GFLOP"),
            f"memory: branches take up to {settings.memory_budget / 2**30:,.2f} GiB, "
            f"{branch_bytes(self.model, 0) / 2**10:,.0f} KiB each",
        ]
        if settings.scope == "sequence":
            lines.append(
                f"scope sequence: up to {self.passes:,} suffix passes, one per (document, layer, expert)"
            )
        if settings.null_branch:
            noise = (
                f"noise floor from {self.noise_samples} ablations in full forward passes, and in float32"
                if self.noise_samples
                else "noise floor not measured (noise_samples=0)"
            )
            lines.append(f"half precision: changes are counted from a null branch; {noise}")
        return "\n".join(lines)

    @property
    def flops(self) -> float:
        """Floating-point operations of the later layers' matrices and the predictions, two for each multiply-add."""
        block: Any = self.model.blocks[self.model.cfg.moe_layers[-1]]
        cfg = self.model.cfg
        experts = sum(p.numel() for p in block.mlp.experts.parameters()) * cfg.top_k / cfg.n_experts
        rest = sum(p.numel() for p in block.parameters()) - sum(
            p.numel() for p in block.mlp.experts.parameters()
        )
        predictions = sum(self.ablations) * cfg.d_model * cfg.d_vocab
        return 2.0 * (self.layer_tokens * (experts + rest) + predictions)


def runs_of(numbers: Sequence[int], ablations: Sequence[int], n: int) -> list[list[int]]:
    """Documents in at most `n` runs of about as many ablations each.

    Args:
        numbers: of the documents, ascending.
        ablations: of each document of the corpus.
    """
    work = [max(ablations[number], 1) for number in numbers]
    total, before = sum(work), 0
    runs: dict[int, list[int]] = {}
    for number, its in zip(numbers, work, strict=True):
        runs.setdefault((2 * before + its) * n // (2 * total), []).append(number)
        before += its
    return list(runs.values())
