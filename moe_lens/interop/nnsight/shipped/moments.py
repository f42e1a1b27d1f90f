"""Means over documents and their spread, of one batch and of several; see `moe_lens.routing.documents`.

*Moments* are a dict of `count` `[sender]`, how many documents, and `mean` and `squares` (of deviations)
`[measure, receiver, sender]`, in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def document_moments(
    measures: Tensor, senders: Tensor, n_senders: int, documents: Tensor, n_documents: int, when_active: bool
) -> dict[str, Tensor]:
    """The moments of each document's mean over its tokens.

    Args:
        measures: of some tokens, `[token, slot, receiver, measure]`.
        senders: who is in each slot, `[token, slot]`.
        n_senders: how many there are.
        documents: each token's, `[token]`.
        n_documents: how many there are; one without such a token has no mean.
        when_active: average over the tokens at which a sender is in a slot; else over all, and it counts as 0
            elsewhere.
    """
    cells = (documents[:, None] * n_senders + senders).flatten()
    flat = rearrange(measures, "token slot receiver measure -> (token slot) (receiver measure)").double()
    sums = flat.new_zeros(n_documents * n_senders, flat.shape[1]).index_add_(0, cells, flat)
    if when_active:
        active = flat.new_zeros(n_documents * n_senders)
        active.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))
        n_tokens = active.view(n_documents, n_senders)
    else:
        counted = flat.new_zeros(n_documents)
        counted.index_add_(0, documents, torch.ones_like(documents, dtype=torch.float64))
        n_tokens = counted[:, None].expand(n_documents, n_senders)
    present = (n_tokens > 0)[..., None]
    means = sums.view(n_documents, n_senders, -1) / n_tokens[..., None].clamp(min=1)
    count = present.sum(dim=0, dtype=torch.float64)
    mean = means.sum(dim=0) / count.clamp(min=1)
    squares = ((means - mean) * present).square().sum(dim=0)
    shape, n_measures = "sender (receiver measure) -> measure receiver sender", measures.shape[-1]
    return {
        "count": count[:, 0],
        "mean": rearrange(mean, shape, measure=n_measures).contiguous(),
        "squares": rearrange(squares, shape, measure=n_measures).contiguous(),
    }


def merged_moments(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the documents of both: Chan, Golub and LeVeque's update, which subtracts no large sums."""
    count = one["count"] + other["count"]
    total = count.clamp(min=1)
    delta = other["mean"] - one["mean"]
    return {
        "count": count,
        "mean": one["mean"] + delta * (other["count"] / total),
        "squares": one["squares"]
        + other["squares"]
        + delta.square() * (one["count"] * other["count"] / total),
    }


def merge_results(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several batches' results as one: the fold of a job."""
    merged = results[0]
    for other in results[1:]:
        merged = merged_results(merged, other)
    return [merged]


def merged_results(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The result of the documents of both."""
    if one["moments"].keys() != other["moments"].keys():
        raise ValueError("some batches ran in half precision and others did not, so they cannot be averaged")
    if one["dtype"] != other["dtype"]:
        raise ValueError(
            f"some batches ran in {one['dtype']} and others in {other['dtype']}, so they cannot be averaged"
        )
    return {
        "moments": {
            key: merged_moments(moments, other["moments"][key]) for key, moments in one["moments"].items()
        },
        **{
            name: {position: n + other[name][position] for position, n in one[name].items()}
            for name in ("documents", "tokens")
        },
        **{
            name: {by: max(value, other[name][by]) for by, value in one[name].items()}
            for name in ("errors", "ratios")
        },
        "difference": max(one["difference"], other["difference"]),
        "broken": one["broken"] if one["broken"] >= 0 else other["broken"],
        "dtype": one["dtype"],
    }
