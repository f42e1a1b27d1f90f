"""The whole audit of one model: verification, and then every experiment, each kept as soon as it is done.

    found = audit_model(model, "mini", corpus, output="out")
    found.audits[0].verdicts()

Verification comes first, and without it there is nothing else: a model that is not the one that transformers runs has
no result. Then, on the same documents:

census           what every active expert does to the loss, one at a time, with the first-order attribution beside it
metrics          population metrics of every expert, as they are defined here; on request also as the published audit's
                 released code computes them
audit            of these metrics and of the controls, for each scope and each set of definitions: an `Audit` each
progressive      the k heaviest experts at once
redistribution   what the other experts' output does against the one that is taken away

In a folder a run can be killed at any time: what is there is gone on from, and gives the same numbers.

Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
(arXiv:2606.10703), with all positions instead of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from moe_lens.audit.audit_result import Audit
from moe_lens.audit.audit_settings import AuditSettings
from moe_lens.audit.audit_stages import AuditStages, verified
from moe_lens.audit.census_table import Census
from moe_lens.audit.progressive import Progressive
from moe_lens.audit.protocol import audit
from moe_lens.audit.redistribution import Redistribution
from moe_lens.audit.verification import Verification
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.contributions import Batches

__all__ = ["AuditSettings", "ModelAudit", "audit_model"]


@dataclass(frozen=True, eq=False)
class ModelAudit:
    """What `audit_model` found.

    Attributes:
        label: what the model is called, in tables and on pages.
        model: its name, from its config.
        model_type: its family.
        verification: against transformers. Where it failed there is nothing else.
        censuses: what the audits are of: those that were given, or one for each scope.
        audits: one for each census and each set of definitions.
        progressive, redistribution: where asked for.
    """

    label: str
    model: str
    model_type: str
    verification: Verification
    censuses: tuple[Census, ...] = ()
    audits: tuple[Audit, ...] = ()
    progressive: Progressive | None = None
    redistribution: Redistribution | None = None

    @property
    def passed(self) -> bool:
        return self.verification.passed


def audit_model(
    model: HookedMoE,
    reference: nn.Module | str | Path,
    batches_or_texts: Batches,
    *,
    settings: AuditSettings | None = None,
    metrics_corpus: Batches | None = None,
    progressive_corpus: Batches | None = None,
    redistribution_corpus: Batches | None = None,
    censuses: Sequence[Census] = (),
    label: str | None = None,
    output: str | Path | None = None,
    verbose: bool = False,
) -> ModelAudit:
    """Verify a model, and audit it.

    Args:
        model: it must carry no hooks.
        reference: transformers' model of the same checkpoint and dtype, or the checkpoint (a directory, a hub id,
            `"mini"`), which is loaded for verification.
        batches_or_texts: the documents of the census, as `census` takes them.
        settings: what is done.
        metrics_corpus, progressive_corpus, redistribution_corpus: other documents for these; None is the same.
        censuses: finished ones of this model instead of new ones; `settings.scopes` and `positions` then say nothing of
            them, and `layers` chooses among theirs. With progressive removal they must be of `settings.how`.
        label: what the model is called in tables and on pages; None is its name.
        output: a folder, made where it is not there, in which censuses and tables are kept.
        verbose: print plans, show progress.

    Raises:
        ValueError: what makes no sense, before anything runs; a file in `output` of another run; a census of another
            model.
        FloatingPointError: a NaN or an infinity on the way.
    """
    asked = AuditSettings() if settings is None else settings
    stages = AuditStages.of(
        model,
        asked,
        (batches_or_texts, metrics_corpus, progressive_corpus, redistribution_corpus),
        censuses,
        None if output is None else Path(output),
        verbose,
    )
    name = model.cfg.model_name
    found = ModelAudit(
        label=name if label is None else label,
        model=name,
        model_type=model.cfg.model_type,
        verification=verified(model, reference, stages.of_census),
    )
    if not found.passed:
        return found
    tables = stages.metric_tables()
    measured = stages.censuses()
    audits = [
        audit(
            one,
            table,
            layers=None if asked.layers is None else stages.layers,
            n=asked.n,
            seed=asked.seed,
            compare=asked.compare,
            smallest_effect=asked.smallest_effect,
            alpha=asked.alpha,
            verbose=verbose,
        )
        for one in measured
        for table in tables
    ]
    return replace(
        found,
        censuses=tuple(measured),
        audits=tuple(audits),
        progressive=stages.progressive() if asked.progressive else None,
        redistribution=stages.redistribution(measured) if asked.redistribution else None,
    )
