"""The slow, obvious redistribution: every layer run again without each expert, and lists of what came of it.

The forward pass is transformers' own, and so is the layer that is run again. Nothing of moe_lens is imported here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from tests.reference_metrics import clustered, norm
from tests.transformers_hooks import forward_hooks

QUANTITIES = ("routing_weight", "gap_norm", "cosine", "relative_compensation")


class Use(NamedTuple):
    """One expert at one token at which it is active. None stands for a value that is undefined."""

    document: int
    routing_weight: float
    gap_norm: float
    cosine: float | None
    relative_compensation: float | None


Uses = dict[tuple[int, int], list[Use]]
"""By (layer, expert)."""


@torch.no_grad()
def uses_of(hf_model: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> Uses:
    """Every use of every expert at a real token.

    A layer reads what it reads in transformers' forward pass, and chooses as it does there. It is then run in float64,
    once as it is, and once for each active expert with that one's weight set to 0.
    """
    uses: Uses = {}
    for layer, block in enumerate(hf_model.model.layers):
        if not hasattr(block.mlp, "experts"):
            continue
        exact = copy.deepcopy(block.mlp).double()
        for expert in range(block.mlp.experts.down_proj.shape[0]):
            uses[layer, expert] = []
        first = 0
        for tokens, mask in batches:
            seen: dict[str, Any] = {}
            with forward_hooks(
                (block.mlp, lambda module, args, out, seen=seen: seen.update(x=args[0])),
                (block.mlp.gate, lambda module, args, out, seen=seen: seen.update(gate=out)),
            ):
                hf_model(tokens, attention_mask=mask, use_cache=False)
            _, weights, chosen = (part.reshape(-1, part.shape[-1]) for part in seen["gate"])
            for row, column in mask.nonzero().tolist():
                token = row * tokens.shape[1] + column
                x = seen["x"][row, column].double()[None, None]
                whole = run_with(exact, x, weights[token], chosen[token])
                for slot, expert in enumerate(chosen[token].tolist()):
                    less = weights[token].clone()
                    less[slot] = 0
                    remaining = run_with(exact, x, less, chosen[token])
                    use = use_of(first + row, float(weights[token, slot]), whole - remaining, remaining)
                    uses[layer, expert].append(use)
            first += len(tokens)
    return uses


def run_with(mlp: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> np.ndarray:
    """The layer's output at one token with these weights on these experts."""
    given = weights.double()[None], chosen[None]
    with forward_hooks((mlp.gate, lambda module, args, out: (out[0], *given))):
        return mlp(x)[0, 0].numpy()


def use_of(document: int, weight: float, gap: np.ndarray, remaining: np.ndarray) -> Use:
    cosine = compensation = None
    if norm(gap) > 0 and norm(remaining) > 0:
        cosine = float(gap @ remaining) / (norm(gap) * norm(remaining))
        compensation = norm(remaining) * max(cosine, 0.0) / norm(gap)
    elif norm(gap) > 0:
        compensation = 0.0
    return Use(document, weight, norm(gap), cosine, compensation)


def means_of(uses: Uses) -> dict[str, dict[tuple[int, int], float]]:
    """Every column of `Redistribution.experts`, by (layer, expert)."""
    table: dict[str, dict[tuple[int, int], float]] = {}
    for key, of in uses.items():
        found: dict[str, float] = {
            "n_tokens": len(of),
            "n_documents": len({use.document for use in of}),
            "n_undefined": sum(use.cosine is None for use in of),
            "n_zero_gap": sum(use.relative_compensation is None for use in of),
        }
        for name in QUANTITIES:
            there = [(getattr(use, name), use.document) for use in of if getattr(use, name) is not None]
            mean, error = clustered([value for value, _ in there], [document for _, document in there])
            found[name], found[f"{name}_standard_error"] = mean, error
        for name, value in found.items():
            table.setdefault(name, {})[key] = value
    return table


def drawn(uses: Uses, documents: Sequence[int]) -> Uses:
    """The uses of a corpus that consists of these documents, some of which come again."""
    return {key: [use for d in documents for use in of if use.document == d] for key, of in uses.items()}


def rho_of(x: Sequence[float], y: Sequence[float], given: Sequence[float] | None = None) -> float:
    """Spearman's rho over the places where all have a value. With `given`, of the residuals of ranks regressed on
    its ranks. NaN for fewer than 4 places, or without variation."""
    columns = [np.array(column, dtype=float) for column in (x, y, *([] if given is None else [given]))]
    there = ~np.any([np.isnan(column) for column in columns], axis=0)
    columns = [column[there] for column in columns]
    if there.sum() < 4 or any(len(set(column.tolist())) == 1 for column in columns):
        return float("nan")
    if given is None:
        return float(np.asarray(stats.spearmanr(*columns))[0])
    ranks = [stats.rankdata(column) for column in columns]
    design = np.stack([np.ones(len(ranks[2])), ranks[2]], axis=1)
    residuals = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2]]
    if any(norm(residual) < 1e-9 for residual in residuals):
        return float("nan")
    return float(np.corrcoef(*residuals)[0, 1])
