"""Next-token cross-entropy, in nats, over real tokens only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

LOGITS_BUDGET = 2**28
"""Bytes of float32 logits that are made at a time, where nothing else is said."""


def loss_per_token(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos_minus_1"]:
    """-log p(token at t + 1 | tokens up to t), for every t but the last; float32, nats.

    NaN where the position or its next token is padding: such a position has no loss, and a statistic that
    would take it for one shows at once.
    """
    return real_only(negative_log_likelihood(logits[:, :-1], tokens[:, 1:]), attention_mask)


def negative_log_likelihood(
    logits: Float[Tensor, "batch pos d_vocab"], next_tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """-log p(the token that came next) at every position; float32, nats."""
    return F.cross_entropy(logits.float().transpose(1, 2), next_tokens, reduction="none")


def likelihood_in_parts(
    unembed: nn.Linear,
    normalized: Float[Tensor, "batch pos d_model"],
    tokens: Int[Tensor, "batch pos"],
    logits_budget: int = LOGITS_BUDGET,
) -> Float[Tensor, "batch pos_minus_1"]:
    """`negative_log_likelihood` of every token after the first, with the logits of some positions made at a time.

    Args:
        unembed: makes logits.
        normalized: the stream after the final norm.
        logits_budget: bytes of float32 logits at a time. In several parts, the last digit may be another.
    """
    n_batch, n_pos = tokens.shape
    step = max(1, logits_budget // (4 * n_batch * unembed.out_features))
    if step >= n_pos:
        return negative_log_likelihood(unembed(normalized)[:, :-1], tokens[:, 1:])
    parts = [slice(start, min(start + step, n_pos - 1)) for start in range(0, n_pos - 1, step)]
    return torch.cat(
        [negative_log_likelihood(unembed(normalized[:, part]), tokens[:, 1:][:, part]) for part in parts],
        dim=1,
    )


def real_only(
    nll: Float[Tensor, "batch pos_minus_1"], attention_mask: Bool[Tensor, "batch pos"] | None
) -> Float[Tensor, "batch pos_minus_1"]:
    """NaN where a position or its next token is padding."""
    if attention_mask is None:
        return nll
    return nll.masked_fill(~(attention_mask[:, :-1] & attention_mask[:, 1:]), torch.nan)


def mean_loss(
    per_token: Float[Tensor, "batch pos_minus_1"], attention_mask: Bool[Tensor, "batch pos"] | None = None
) -> Float[Tensor, ""]:
    """The mean over positions that have a loss, in nats.

    Which those are, the mask says, not the values: a NaN at a real position makes the mean NaN.

    Raises:
        ValueError: no position has one (a single token, or nothing but padding).
    """
    valid = per_token if attention_mask is None else per_token[attention_mask[:, :-1] & attention_mask[:, 1:]]
    if valid.numel() == 0:
        raise ValueError("no position has a next token, so there is no loss; give at least two real tokens")
    return valid.mean()
