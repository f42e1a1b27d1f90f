"""Why the model said what it said: its logits as an exact sum over what components wrote (direct logit attribution).

At token t, with x the last residual stream, s its scale, gamma the final norm's gain and W_U the unembedding,

    logit of v at t  =  u x(t) / s(t)  =  sum over senders c of  u z_c(t) / s(t),       u = gamma * W_U[:, v]

because x is the sum of its senders. It is what `moe_lens.routing.attribution` does for a router, with the unembedding
in the router's place: every sender is divided by the token's true scale, nothing is approximated, and no family has
an unembedding bias. A logit difference is read along the difference of two directions u. *Direct* says that only the
path from a sender straight to the unembedding is counted, not what later layers make of it.

Source: the logit attributions of TransformerLens (`ActivationCache.logit_attrs`) and of "Interpretability in the Wild"
(arXiv:2211.00593), here down to experts and neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.attribution import (
    cached,
    check_dense,
    group_values,
    require_finite,
    scores_with_rounding,
    sender_hooks,
)
from moe_lens.routing.senders import Senders, senders_of_all
from moe_lens.routing.token_scores import along, scores_along

Tokens = str | int | Sequence[str | int] | Int[Tensor, "*shape"]
"""One token for all places, or one for each text, for each position, or for each of both; see `logit_attrs`."""

Positions = int | slice | Sequence[int] | Int[Tensor, "*shape"]
"""Columns of the cache, the same in each row of the batch, or for each row its own `[batch, n]`."""

LOGIT_HOOKS = "logit_attribution_hooks(model, by=...)"
"""What errors name where a cache lacks what an attribution needs."""

FEWER = "ask for fewer positions=, or by a coarser granularity"
"""What to do where there would be too many scores."""


@dataclass(frozen=True, eq=False)
class LogitAttrs:
    """Logits, or logit differences, divided among the components that wrote them. In logits, float32.

    Attributes:
        values: what each sender adds to the logit (difference); their sum over senders is `logits`.
        senders: names along `values`' first axis, in the order in which the stream adds them; `rounding`, last,
            only in half precision. A source position is a column of the cache.
        logits: the readout of the stored last `hook_resid_post`, u x / s in float32.
        tokens, incorrect_tokens: whose logit it is at every place, and whose is subtracted (None where none is).
        positions: the column of the cache at every place.
        completeness_error: max |sum of values - logits| / the largest of |logits| and |values|: a single logit
            difference may lie near 0, where senders that cancel leave no digits.
        rounding_ratio: max |rounding| over the most that rounding can be (see `StreamSum.rounding_ratio`); above
            1 something other than rounding is missing. None in float32, where rounding is no sender.
        model_logit_difference: max |logits - those of the stored `ln_final.hook_normalized` in the model's own
            precision|: what the final norm and the unembedding round.
        by: the granularity.
    """

    values: Float[Tensor, "sender batch pos"]
    senders: Senders
    logits: Float[Tensor, "batch pos"]
    tokens: Int[Tensor, "batch pos"]
    incorrect_tokens: Int[Tensor, "batch pos"] | None
    positions: Int[Tensor, "batch pos"]
    completeness_error: float
    rounding_ratio: float | None
    model_logit_difference: float
    by: str

    def __repr__(self) -> str:
        what = "logits" if self.incorrect_tokens is None else "logit differences"
        return (
            f"<LogitAttrs by {self.by}: {len(self.senders)} senders of {what}, {list(self.values.shape)}, "
            f"completeness error {self.completeness_error:.1e}>"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per (sender, batch, position): columns so named, `token` and (of a difference) `incorrect_token`
        as ids, and `score` in logits. `position` is the column of the cache."""
        sender, batch, place = (grid.ravel() for grid in np.indices(tuple(self.values.shape)))
        columns = {
            "sender": np.array(list(self.senders))[sender],
            "batch": batch,
            "position": self.positions.cpu().numpy()[batch, place],
            "token": self.tokens.cpu().numpy()[batch, place],
        }
        if self.incorrect_tokens is not None:
            columns["incorrect_token"] = self.incorrect_tokens.cpu().numpy()[batch, place]
        return pd.DataFrame({**columns, "score": self.values.cpu().numpy().ravel()})


def logit_attribution_hooks(model: HookedMoE, *, by: str = "layer") -> list[str]:
    """The hook names that `logit_attrs` reads: a `names_filter` for the cache.

    Raises:
        ValueError: an unknown granularity.
    """
    return [*sender_hooks(model, senders_of_all(model.cfg, by)), *final_hooks(model)]


def logit_attrs(
    model: HookedMoE,
    cache: ActivationCache | Mapping[str, Tensor],
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    by: str = "layer",
    positions: Positions | None = None,
) -> LogitAttrs:
    """Divide the logits of some tokens, or their difference from those of others, among the components that wrote
    them.

    Args:
        model: the model that the cache is of; its unembedding and final gain are read, and for fine granularities
            the weights with which heads and neurons write.
        cache: of a run with at least the hooks of `logit_attribution_hooks`; with its batch axis. It may be on
            another device than the model, where the scores are made.
        tokens: the tokens whose logits are divided, as text (a single token each) or ids, read as TransformerLens's
            `ActivationCache.logit_attrs` reads them: one for all places; `[batch]`, one for each text; a list of
            another length, one for each position; `[batch, pos]` (an axis of length 1 is shared), one for each
            place. They belong to the positions asked for: the next tokens of a text are
            `logit_attrs(model, cache, text_tokens[:, 1:], positions=slice(0, -1))`.
        incorrect_tokens: tokens whose logits are subtracted, in any of these forms.
        by: how finely: `"layer"`, `"head"`, `"source"` (head and source token), `"expert"` or `"neuron"`.
        positions: columns of the cache, negative from its end: one, a slice or a list of them for all rows, or an
            integer tensor `[batch, n]` with each row's own (the last real tokens of a padded batch, say). None: all.

    Returns:
        Scores `[sender, batch, pos]` in logits, with the error of their sum; an expert that was not chosen adds 0.
        Padded positions have scores like any other, which mean nothing.

    Raises:
        ValueError: text that is not one token, tokens outside the vocabulary or of a shape that does not fit; no such
            position; an unknown granularity; the cache has no batch axis; a value is not finite; more than
            `DENSE_LIMIT` scores.
        KeyError: the cache lacks a hook, which is named.
        TypeError: tokens or positions that are no integers.

    Source: TransformerLens's `ActivationCache.logit_attrs`; "Interpretability in the Wild" (arXiv:2211.00593).
    """
    stream, scale, normalized = (
        cached(cache, name, 3, listed_by=LOGIT_HOOKS).to(model.cfg.device) for name in final_hooks(model)
    )
    n_batch, n_columns = stream.shape[:2]
    senders = senders_of_all(model.cfg, by, n_sources=n_columns)
    columns = columns_of(positions, n_batch, n_columns).to(model.cfg.device)
    correct = token_ids(model, tokens, columns.shape, "tokens")
    incorrect = None
    if incorrect_tokens is not None:
        incorrect = token_ids(model, incorrect_tokens, columns.shape, "incorrect_tokens")
    n_scores = len(senders) * columns.numel()
    check_dense(n_scores, by, FEWER)

    values = group_values(model, cache, senders, (n_batch, n_columns), listed_by=LOGIT_HOOKS)
    if positions is not None:
        values = {name: _at(value, columns, name) for name, value in values.items()}
        stream, scale, normalized = (_at(value, columns) for value in (stream, scale, normalized))
    directions = logit_directions(model, correct, incorrect)
    scores, senders, rounding_ratio = scores_with_rounding(
        model,
        senders,
        values,
        stream,
        of_group=lambda group: scores_along(model, group, values, directions),
        of_vector=lambda vector: along(vector, directions),
    )
    scale = scale.float()[..., 0]
    sent, logits = scores / scale, along(stream, directions) / scale
    require_finite(sent, "the scores")
    require_finite(logits, "the logits")
    by_model = logits_as_rounded(model, normalized, correct)
    if incorrect is not None:
        by_model = by_model - logits_as_rounded(model, normalized, incorrect)
    return LogitAttrs(
        values=sent,
        senders=senders,
        logits=logits,
        tokens=correct,
        incorrect_tokens=incorrect,
        positions=columns,
        completeness_error=sum_error(sent, logits),
        rounding_ratio=rounding_ratio,
        model_logit_difference=float((logits - by_model).abs().max()),
        by=by,
    )


def sum_error(values: Float[Tensor, " sender *place"], logits: Float[Tensor, "*place"]) -> float:
    """`LogitAttrs.completeness_error`: of the senders' sum, beside the largest score or logit."""
    error, size = (
        (values.sum(dim=0) - logits).abs().max(),
        torch.stack((logits.abs().max(), values.abs().max())),
    )
    # Where no sender writes anything along the directions, there is nothing to be off.
    return float(error / size.max()) if bool(size.any()) else 0.0


def final_hooks(model: HookedMoE) -> list[str]:
    """The last stream, its scale, and what the final norm made of it."""
    return [
        f"blocks.{model.cfg.n_layers - 1}.hook_resid_post",
        "ln_final.hook_scale",
        "ln_final.hook_normalized",
    ]


def logit_directions(
    model: HookedMoE, tokens: Int[Tensor, "*place"], incorrect_tokens: Int[Tensor, "*place"] | None = None
) -> Float[Tensor, "*place d_model"]:
    """u = gamma * W_U[:, v] in float32, without a gradient, or the difference of two: a stream's product with it,
    over the stream's scale, is the token's logit. (`tokens_to_residual_directions` is the same in the model's
    dtype.)"""
    rows = model.unembed.weight.detach()
    direction = rows[tokens].float()
    if incorrect_tokens is not None:
        direction = direction - rows[incorrect_tokens].float()
    return direction * model.ln_final.w.detach().float()


def token_ids(
    model: HookedMoE, tokens: Tokens, shape: Sequence[int], name: str = "tokens"
) -> Int[Tensor, "batch pos"]:
    """Tokens as ids at every place.

    Args:
        tokens: see `logit_attrs`.
        shape: (batch, positions).
        name: of the argument, for errors.

    Raises:
        ValueError, TypeError: see `logit_attrs`.
    """
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    elif isinstance(tokens, (list, tuple)):
        tokens = [model.to_single_token(t) if isinstance(t, str) else t for t in tokens]
    ids = _integers(tokens, name)
    # TransformerLens: [batch] is one for each text; any other list is one for each position.
    table = ids[:, None] if ids.ndim == 1 and len(ids) == shape[0] else ids
    try:
        table = torch.broadcast_to(table, tuple(shape))
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(ids.shape)} do not fit {shape[0]} texts at {shape[1]} positions each: give one "
            f"token, one for each text, one for each position, or [{shape[0]}, {shape[1]}]"
        ) from None
    outside = table[(table < 0) | (table >= model.cfg.d_vocab)]
    if len(outside):
        raise ValueError(
            f"{name} hold {int(outside[0])}, which lies outside the vocabulary, 0..{model.cfg.d_vocab - 1}"
        )
    return table.to(model.cfg.device)


def columns_of(positions: Positions | None, n_batch: int, n_columns: int) -> Int[Tensor, "batch n"]:
    """Positions as a column for every place of every row.

    Raises:
        ValueError, TypeError: see `logit_attrs`.
    """
    every = torch.arange(n_columns)
    if positions is None or isinstance(positions, slice):
        columns = every if positions is None else every[positions]
    else:
        columns = _integers(positions, "positions")
    if columns.ndim < 2:
        columns = columns.reshape(1, -1)
    if columns.ndim != 2 or columns.shape[0] not in (1, n_batch) or not columns.numel():
        described = (
            f"of shape {tuple(positions.shape)}" if isinstance(positions, Tensor) else f"{positions!r}"
        )
        raise ValueError(
            f"positions {described} must be one column or more, the same for all rows, or [{n_batch}, n] columns"
        )
    outside = columns[(columns < -n_columns) | (columns >= n_columns)]
    if len(outside):
        raise ValueError(f"there is no position {int(outside[0])} among the {n_columns} of the cache")
    return (columns % n_columns).expand(n_batch, -1)


def _integers(numbers: object, name: str) -> Int[Tensor, "*shape"]:
    try:
        table = torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers, not {numbers!r}: {error}") from None
    if table.numel() == 0:
        table = table.long()  # an empty list has no type; its shape is found wrong later
    if table.dtype == torch.bool or table.is_floating_point() or table.is_complex():
        raise TypeError(f"{name} must be integers, not {table.dtype} {tuple(table.shape)}")
    return table.detach().long().cpu()


def _at(value: Tensor, columns: Int[Tensor, "batch n"], name: str = "") -> Tensor:
    """A hook value at each row's columns. What is attended to stays whole: values, and the keys of the pattern."""
    if name.endswith("attn.hook_v"):
        return value
    rows = torch.arange(len(value), device=value.device)[:, None]
    if name.endswith("attn.hook_pattern"):
        return value.transpose(1, 2)[rows, columns].transpose(1, 2)
    return value[rows, columns]


def logits_as_rounded(
    model: HookedMoE, normalized: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """The logits as the model rounds them: after the gain, and after the product."""
    dtype = model.cfg.dtype
    read = model.ln_final.w.detach() * normalized.to(dtype)
    return along(read, model.unembed.weight.detach()[tokens].float()).to(dtype).float()
