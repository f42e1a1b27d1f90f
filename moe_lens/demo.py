"""The main job on real text: verify a model, explain every routing decision over layers, count expert loads, test every
active expert at every token, and audit what is said to predict which of them matter.

`moe-lens demo` and `make demo` run this and write what it gives as `report.html`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from moe_lens.audit.audit_settings import AuditSettings
from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit.census_document import Settings
from moe_lens.audit.census_plan import CensusPlan, Documents
from moe_lens.audit.census_table import Census
from moe_lens.audit.model_audit import ModelAudit, audit_model
from moe_lens.audit.verification import Verification
from moe_lens.census_page import LossChange, largest_changes, mean_by_rank
from moe_lens.config import MoEConfig
from moe_lens.corpus import Document, TokenBatches, bos_by_default, bundled_documents, token_batches
from moe_lens.interventions.branches import Change
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.attribution import attribution_hooks, router_logit_attrs
from moe_lens.routing.contributions import RoutingContributions, contributions_of, corpus_of
from moe_lens.routing.load import ExpertLoad, LoadCounter
from moe_lens.routing.streaming import ContributionAccumulator
from moe_lens.routing_page_data import RoutingDecisions, routing_decisions

MINIMUM_DOCUMENTS = 40
MINIMUM_TOKENS = 8_000
COMPLETENESS_TOLERANCE = 1e-5

# What of a document is read at most, in tokens, where the model's context is longer.
_MAX_LENGTH = 512
_BATCH_SIZE = 8
_CENSUS_FLOPS = 4e12
"""What a census of all positions may take, about; of a larger model there is one of a sample of them."""
_PROGRESSIVE_POSITIONS = 4_000
"""At which several experts are removed together, at most."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        cfg: the model's facts; `n_parameters` and `stored_dtype` are its checkpoint's.
        contributions: over all documents.
        completeness_error: the largest over batches, routers and all ways of taking the sum (a cached batch at
            once, the stream, and the finer senders of `decisions`): max |sum of scores - logits| / max |logits|.
        load: of every expert.
        decisions: of a few documents, to look at one by one.
        audit: verification against transformers; then a census, in which every active expert is set to zero at one
            token, one at a time, at every position, or at a sample of them where that would take too long; and the
            audit of what predicts the census. A model that is not verified has no census and no audit.
        tables: the audit's numbers.
        largest_changes: the rows of the census where the loss rises most, in their text.
        documents: one row each: `document`, `topic`, `tokens`, `loss` (nats per token).
        loss: the mean over all tokens that have a next one, in nats.
        n_tokens, n_truncated_documents, n_truncated_tokens: of the corpus.
        seconds: the whole run.
    """

    cfg: MoEConfig
    n_parameters: int
    stored_dtype: torch.dtype
    contributions: RoutingContributions
    completeness_error: float
    load: ExpertLoad
    decisions: RoutingDecisions
    audit: ModelAudit
    tables: AuditTables
    largest_changes: list[LossChange]
    documents: pd.DataFrame
    loss: float
    n_tokens: int
    n_truncated_documents: int
    n_truncated_tokens: int
    seconds: float

    @property
    def closes(self) -> bool:
        """Whether every router's scores summed to its logits."""
        return self.completeness_error <= COMPLETENESS_TOLERANCE

    @property
    def verification(self) -> Verification:
        """Against transformers."""
        return self.audit.verification

    @property
    def census(self) -> Census | None:
        """None where verification failed."""
        return self.audit.censuses[0] if self.audit.censuses else None

    @property
    def passed(self) -> bool:
        return self.closes and self.verification.passed

    def top_senders(self, measure: str, n: int = 5) -> pd.DataFrame:
        """The senders of the largest measure (by size, at all tokens but the lead), averaged over the routers that
        they reach: columns `sender`, `mean`, `routers` (how many that is)."""
        values = self.contributions.measure(measure)["rest"]
        means = np.array([row[~np.isnan(row)].mean() for row in values])
        order = np.argsort(-np.abs(means), kind="stable")[:n]
        return pd.DataFrame(
            {
                "sender": [self.contributions.senders[i] for i in order],
                "mean": means[order],
                "routers": [int((~np.isnan(values[i])).sum()) for i in order],
            }
        )

    def summary(self) -> str:
        """A few lines for the terminal."""
        layer, expert = np.unravel_index(self.load.shares.argmin(), self.load.shares.shape)
        layer_, expert_ = np.unravel_index(self.load.shares.argmax(), self.load.shares.shape)
        checks = self.verification.checks
        lines = [
            f"{self.cfg.model_name}: stored in {_name(self.stored_dtype)}, run in {_name(self.cfg.dtype)}",
            f"corpus: {self.n_tokens} tokens in {len(self.documents)} documents; cut: {self.n_truncated_tokens} "
            f"tokens of {self.n_truncated_documents} documents",
            f"loss: {self.loss:.3f} nats per token",
            f"verification: {sum(check.passed for check in checks)} of {len(checks)} checks passed",
            f"router logits equal the sum over layers to {self.completeness_error:.1e} (tolerance "
            f"{COMPLETENESS_TOLERANCE:.0e}): {'ok' if self.closes else 'FAIL'}",
        ]
        for measure in ("variance", "aps", "ans"):
            top = self.top_senders(measure)
            named = ", ".join(f"{s} {m:.3g}" for s, m in zip(top["sender"], top["mean"], strict=True))
            lines.append(f"largest mean {measure} over later routers: {named}")
        lines.append(
            f"expert load: from {self.load.shares.min():.1%} of tokens (layer {self.load.layers[layer]}, expert "
            f"{expert}) to {self.load.shares.max():.1%} (layer {self.load.layers[layer_]}, expert {expert_}); even is "
            f"{self.load.uniform:.1%}"
        )
        if self.census is not None:
            lines += [self._census_line(self.census), self._audit_line()]
        lines.append(f"time: {self.seconds:.1f} s")
        return "\n".join(lines)

    def _census_line(self, census: Census) -> str:
        by_rank = mean_by_rank(census)
        of_ranks = ", ".join(f"rank {rank} {change:+.2g}" for rank, change in by_rank.items())
        sample = census.identity["sample"]
        where = "every position" if sample is None else f"a sample of {sample['n']:,} positions"
        largest = self.largest_changes[0]
        return (
            f"census: {len(census):,} ablations, each of one active expert at one token, at {where}; mean change "
            f"of the loss in nats: {of_ranks}; largest: {largest.delta_loss:+.2f} ({largest.name} at position "
            f"{largest.position} of {largest.document})"
        )

    def _audit_line(self) -> str:
        cells = self.audit.audits[0].cells
        parts = []
        for family, what in (("metrics", "metrics"), ("control", "controls")):
            of_family = cells.loc[cells["family"] == family]
            counts = of_family["verdict"].value_counts()
            named = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
            parts.append(f"of {len(of_family)} cells of {of_family['metric'].nunique()} {what}: {named}")
        return f"audit, does a metric say which active expert matters at a token: {'; '.join(parts)}"


def run_demo(
    model: str | Path = "mini",
    *,
    documents: list[Document] | None = None,
    device: torch.device | str | None = None,
    verbose: bool = True,
) -> DemoResult:
    """Verify a model, take its routing apart on held-out text, and test its experts there; in float32.

    Args:
        model: a checkpoint directory, a hub id, or `"mini"`; weights stored in half precision are upcast.
        documents: None is the bundled demo subset.
        device: as in `HookedMoE.from_pretrained`.
        verbose: show progress.

    Raises:
        ValueError: fewer documents or tokens than a result could stand on; what `verify` raises.
    """
    start = time.monotonic()
    documents = bundled_documents(demo_only=True) if documents is None else documents
    if len(documents) < MINIMUM_DOCUMENTS:
        raise ValueError(f"the demo needs {MINIMUM_DOCUMENTS} documents; there are {len(documents)}")
    hooked = HookedMoE.from_pretrained(model, dtype=torch.float32, device=device, verbose=verbose)
    corpus = token_batches(
        hooked,
        documents,
        batch_size=_BATCH_SIZE,
        max_length=min(_MAX_LENGTH, hooked.cfg.n_ctx),
        prepend_bos=bos_by_default(hooked),
        truncate=True,
    )
    if corpus.n_tokens < MINIMUM_TOKENS:
        raise ValueError(f"the demo needs {MINIMUM_TOKENS} tokens; the documents have {corpus.n_tokens}")

    n = _n_census_positions(hooked, corpus)
    n_positions = corpus.n_tokens - len(corpus.documents) if n is None else n
    found = audit_model(
        hooked,
        model,
        corpus,
        settings=AuditSettings(positions=n, progressive_positions=min(n_positions, _PROGRESSIVE_POSITIONS)),
        verbose=verbose,
    )
    contributions, load, per_document, loss, error = _run_corpus(hooked, corpus)
    decisions = routing_decisions(hooked, corpus)
    return DemoResult(
        cfg=hooked.cfg,
        n_parameters=sum(parameter.numel() for parameter in hooked.parameters()),
        stored_dtype=_stored_dtype(model),
        contributions=contributions,
        completeness_error=max(error, contributions.completeness_error, decisions.completeness_error),
        load=load,
        decisions=decisions,
        audit=found,
        tables=AuditTables.of([found]),
        largest_changes=largest_changes(hooked, corpus, found.censuses[0]) if found.censuses else [],
        documents=per_document,
        loss=loss,
        n_tokens=corpus.n_tokens,
        n_truncated_documents=corpus.n_truncated_documents,
        n_truncated_tokens=corpus.n_truncated_tokens,
        seconds=time.monotonic() - start,
    )


@torch.no_grad()
def _run_corpus(
    model: HookedMoE, corpus: TokenBatches
) -> tuple[RoutingContributions, ExpertLoad, pd.DataFrame, float, float]:
    """One pass over the documents: contributions, load, losses, and the worst error of a cached batch's sums."""
    receivers = model.cfg.moe_layers
    hooks = attribution_hooks(model, receivers)
    accumulator, counter = ContributionAccumulator(model), LoadCounter(model)
    rows, error = [], 0.0
    for tokens, mask, documents in corpus:
        with accumulator.listening(tokens, mask), counter.listening(tokens, mask):
            per_token, cache = model.run_with_cache(
                tokens, attention_mask=mask, names_filter=hooks, return_type="loss", loss_per_token=True
            )
        for receiver in receivers:
            error = max(error, router_logit_attrs(model, cache, receiver=receiver).completeness_error)
        for document, losses, real in zip(documents, per_token, mask, strict=True):
            # By the mask, not by the values: a NaN at a real position must show.
            valid = losses[real[:-1] & real[1:]].double()
            rows.append((document.name, document.topic, int(real.sum()), len(valid), float(valid.sum())))
    frame = pd.DataFrame(rows, columns=["document", "topic", "tokens", "predicted", "loss"])
    loss = sum(row[4] for row in rows) / sum(row[3] for row in rows)
    # A document of one token predicts nothing: its loss is NaN, and shows as such.
    frame["loss"] = frame["loss"] / frame["predicted"].where(frame["predicted"] > 0)
    contributions = contributions_of(
        accumulator, corpus=[corpus.description], fingerprints=[corpus.fingerprint]
    )["layer"]
    return contributions, counter.result(), frame.drop(columns="predicted"), loss, error


def _n_census_positions(model: HookedMoE, corpus: TokenBatches) -> int | None:
    """As many as `_CENSUS_FLOPS` buys, spread over the documents; None where that is all of them.

    The estimate is that of the census's own plan. It is the same on every machine, and so is the sample.
    """
    documents = Documents.of(model, corpus_of(model, corpus, None, _BATCH_SIZE))
    positions = documents.sampled(None, 0)
    settings = Settings(
        layers=model.cfg.moe_layers,
        change=Change(),
        scope="token",
        shared=False,
        outcomes=(),
        predictors=(),
        null_branch=False,
        memory_budget=2**30,
    )
    flops = CensusPlan.of(model, documents, positions, settings, 0).flops
    total = sum(map(len, positions))
    return None if flops <= _CENSUS_FLOPS else max(1, int(total * _CENSUS_FLOPS / flops))


def _stored_dtype(model: str | Path) -> torch.dtype:
    from moe_lens.converters.loading import find_checkpoint, read_hf_config

    config = read_hf_config(find_checkpoint(model, None), str(model))
    return getattr(config, "dtype", None) or torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
