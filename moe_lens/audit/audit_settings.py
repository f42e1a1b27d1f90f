"""What a model's audit is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lens.audit.census_document import Scope
from moe_lens.audit.paired_tests import SMALLEST_EFFECT
from moe_lens.interventions.arguments import Layers
from moe_lens.interventions.branches import How


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What `audit_model` does; every field has a default.

    Attributes:
        layers: MoE layers; None is all.
        scopes: `token`, `sequence`, or both, each a census and audits of its own.
        how: what becomes of an expert, `zero`, `renormalize` or `reroute`; see `Ablate`.
        positions: of the census, a uniform sample of so many without replacement; None is all.
        metrics: names; None is all that are registered.
        as_released: audit also the four metrics of the paper as its released code computes them for the model's
            family, or for the one that is named.
        n: positions of each cell, drawn from the census; None is all.
        compare, smallest_effect, alpha: see `audit`.
        progressive: whether to take away the k heaviest experts together.
        progressive_layers, progressive_positions: of that; None is those of the census.
        per_document, min_context: of that, see `progressive`.
        redistribution: whether to analyse it.
        redistribution_layers: of that; None is those of the census.
        seed: of samples, draws and resampling.
        memory_budget: bytes for the branches at work.
    """

    layers: Layers = None
    scopes: Sequence[Scope] = ("token",)
    how: How = "zero"
    positions: int | None = None
    metrics: Sequence[str] | None = None
    as_released: str | bool = False
    n: int | None = None
    compare: int = 1
    smallest_effect: float = SMALLEST_EFFECT
    alpha: float = 0.05
    progressive: bool = True
    progressive_layers: Layers = None
    progressive_positions: int | None = None
    per_document: int | None = None
    min_context: int = 0
    redistribution: bool = True
    redistribution_layers: Layers = None
    seed: int = 0
    memory_budget: int = 2**30
