"""Made-up audits whose every number is known: what tables and pages are tested with, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from moe_lens.audit import Audit, Progressive, Redistribution
from moe_lens.audit.checks import Check
from moe_lens.audit.metric_formulas import PAPER_METRICS
from moe_lens.audit.model_audit import ModelAudit
from moe_lens.audit.protocol_table import _COLUMNS as CELL_COLUMNS
from moe_lens.audit.redistribution_correlations import PAIRS
from moe_lens.audit.verification import Verification

TEXTS = ("model", "scope", "how", "as_released", "family", "metric", "verdict")
CORPUS = "3 documents <of> a file"
COUNTS = ("layer", "n_positions", "n_undefined", "n_ties", "n_pairs", "n_documents", "n_zero", "n_family")


def made_audit(
    layers: Sequence[int],
    *,
    metrics: Sequence[str] = PAPER_METRICS,
    scope: str = "token",
    how: str = "zero",
    as_released: str = "",
    n_positions: int = 1234,
    compare: int = 1,
    seed: int = 0,
) -> Audit:
    """All columns of `Audit.cells`, each number drawn; rho is NaN but for the routing weight, as it is there."""
    rng = np.random.default_rng([seed, number_of(scope, how, as_released)])
    names = [("metrics", name) for name in metrics]
    names += [("control", "routing_weight"), ("control", "first_order")]
    lines = []
    for family, metric in names:
        for layer in layers:
            line: dict[str, Any] = {name: float(rng.normal()) for name in CELL_COLUMNS}
            line |= {name: int(rng.integers(1, 10**6)) for name in COUNTS}
            line |= {"model": "m", "scope": scope, "how": how, "family": family, "metric": metric}
            line |= {"as_released": as_released, "verdict": "inconclusive", "layer": layer}
            line |= {"n_positions": n_positions, "higher_is_more_important": True}
            if metric != "routing_weight":
                line["rho"] = np.nan
            lines.append(line)
    table = {
        "as_released": as_released or None,
        "definitions": {
            name: f"{'theirs' if as_released else 'ours'} of {name} <&> {seed}" for name in metrics
        },
    }
    provenance = {
        "kind": "audit",
        "scope": scope,
        "how": how,
        "settings": {"compare": compare},
        "metric_table": table,
        "census": {"n": [1, 2], "corpus": CORPUS, "dtype": "bfloat16"},
    }
    return Audit(pd.DataFrame(lines, columns=CELL_COLUMNS), provenance)


def number_of(*parts: str) -> int:
    return sum(i * ord(letter) for part in parts for i, letter in enumerate(f"{part};", start=1))


def made_progressive(layers: Sequence[int], most: int, *, scope: str = "token", seed: int = 0) -> Progressive:
    """12 documents with a position each."""
    rng = np.random.default_rng(seed)
    places = pd.MultiIndex.from_product(
        [range(12), [3], layers, range(1, most + 1)], names=["document", "position", "layer", "removed"]
    )
    rows = places.to_frame(index=False).astype({"layer": np.int16, "removed": np.int16})
    for name in ("gap_norm", "loss", "delta_loss"):
        rows[name] = rng.gamma(1.0, size=len(rows)).astype(np.float32)
    return Progressive(
        rows,
        {
            "scope": scope,
            "how": "renormalize",
            "layers": list(layers),
            "corpus": CORPUS,
            "dtype": "bfloat16",
            "sample": {"n": 12},
        },
    )


def made_redistribution(layers: Sequence[int], *, seed: int = 0) -> Redistribution:
    rng = np.random.default_rng(seed)
    lines = []
    for layer in layers:
        gap = float(rng.gamma(1.0))
        for x, y, given in PAIRS:
            line: dict[str, Any] = {"layer": layer, "x": x, "y": y, "given": given}
            line |= {name: float(rng.uniform(-1, 1)) for name in ("rho", "p", "low", "high")}
            line |= {"n_experts": int(rng.integers(5, 64)), "n_draws": 1000, "mean_gap_norm": gap}
            line |= {"low_experts": np.nan, "high_experts": np.nan, "n_draws_experts": 0}
            lines.append(line)
    provenance = {
        "layers": list(layers),
        "seed": seed,
        "corpus": CORPUS,
        "dtype": "bfloat16",
        "n_tokens": 4321,
    }
    return Redistribution(pd.DataFrame(), pd.DataFrame(lines), provenance)


def made_verification(passed: bool = True) -> Verification:
    checks = (
        Check("next-token loss", 1e-7, "<=", 1e-5, "nats", "the model is transformers'"),
        Check("distinct losses", 0.9 if passed else 0.1, ">", 0.5, "", "positions <differ>"),
        Check("hooks left on", 0.0, "==", 0.0, "", "nothing is left"),
    )
    return Verification(checks, "m", torch.bfloat16, 3, 456)


def made_model_audit(
    label: str,
    *,
    model: str | None = None,
    model_type: str = "olmoe",
    passed: bool = True,
    audits: Sequence[Audit] = (),
    progressive: Progressive | None = None,
    redistribution: Redistribution | None = None,
) -> ModelAudit:
    return ModelAudit(
        label=label,
        model=label if model is None else model,
        model_type=model_type,
        verification=made_verification(passed),
        audits=tuple(audits),
        progressive=progressive,
        redistribution=redistribution,
    )
