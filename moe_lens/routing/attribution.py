"""Why a router scored as it did: its logits as an exact sum over what earlier components wrote.

At receiving layer r and token t, with x the stream before the MoE, s_r its scale and R_r the folded readout,

    logits_r(t)  =  R_r x(t) / s_r(t)  =  sum over senders c of  R_r z_c(t) / s_r(t)

because x is the sum of its senders, however finely they are divided. Every sender is divided by the token's true
scale; nothing is approximated. The sum is checked against the readout of the stored stream, and every result
carries the error. Scores mean something up to a shift that all experts share.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 8-11,
which divide a router's input into embedding, attention and MoE outputs, heads, (head, source) pairs, experts and
neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.readout import check_receiver, router_readout
from moe_lens.routing.rounding import StreamSum, stream_rounds
from moe_lens.routing.senders import ROUNDING, Names, SenderGroup, Senders, senders_before
from moe_lens.routing.writes import group_in_memory, hooks_of, sender_scores, written_by

DENSE_LIMIT = 2**27
"""The most scores held at once, of a router or of logits: 128 Mi numbers, 512 MiB, and about three times that on the
way."""

ROUTER_HOOKS = "attribution_hooks(model, receivers, by=...)"
"""What errors name where a cache lacks what an attribution needs."""


@dataclass(frozen=True, eq=False)
class RouterLogitAttrs:
    """The scores of one router, divided among the components that wrote them. In router logits, float32.

    Attributes:
        values: what each sender adds to each expert's logit; their sum over senders is `logits`.
        senders: names along `values`' first axis, in the order in which the stream adds them; `rounding`, last,
            only in half precision. A source position is a column of the batch.
        logits: the readout of the stored `hook_resid_mid`, R_r x / s_r in float32.
        completeness_error: max |sum of values - logits| / max |logits|.
        rounding_ratio: max |rounding| over the most that rounding can be (see `StreamSum.rounding_ratio`); above
            1 something other than rounding is missing. None in float32, where rounding is no sender.
        model_logit_difference: max |logits - hook_router_logits|: what the gate's own arithmetic rounds.
        receiver: the MoE layer.
        by: the granularity.
    """

    values: Float[Tensor, "sender batch pos expert"]
    senders: Senders
    logits: Float[Tensor, "batch pos expert"]
    completeness_error: float
    rounding_ratio: float | None
    model_logit_difference: float
    receiver: int
    by: str

    def __repr__(self) -> str:
        return (
            f"<RouterLogitAttrs by {self.by}: {len(self.senders)} senders at the router of layer {self.receiver}, "
            f"{list(self.values.shape)}, completeness error {self.completeness_error:.1e}>"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per (sender, batch, position, expert): columns so named, and `score` in router logits."""
        axes = [np.arange(n) for n in self.values.shape]
        sender, batch, position, expert = (grid.ravel() for grid in np.meshgrid(*axes, indexing="ij"))
        return pd.DataFrame(
            {
                "sender": np.array(list(self.senders))[sender],
                "batch": batch,
                "position": position,
                "expert": expert,
                "score": self.values.cpu().numpy().ravel(),
            }
        )


def attribution_hooks(model: HookedMoE, receivers: Sequence[int], *, by: str = "layer") -> list[str]:
    """The hook names that `router_logit_attrs` reads for these receivers: a `names_filter` for the cache.

    Raises:
        ValueError: a receiver that is no MoE layer, or an unknown granularity.
    """
    names: dict[str, None] = {}
    for receiver in receivers:
        check_receiver(model, receiver)
        names.update(dict.fromkeys(sender_hooks(model, senders_before(model.cfg, receiver, by))))
        names.update(dict.fromkeys(receiver_hooks(receiver)))
    return list(names)


def router_logit_attrs(
    model: HookedMoE, cache: ActivationCache | Mapping[str, Tensor], *, receiver: int, by: str = "layer"
) -> RouterLogitAttrs:
    """Divide the logits of one router among the components that wrote into the stream it reads.

    Args:
        model: the model that the cache is of; its router weights and norm gain are read, and for fine granularities
            the weights with which heads and neurons write.
        cache: of a run with at least the hooks of `attribution_hooks`; with its batch axis and all positions. It may
            be on another device than the model, where the scores are made.
        receiver: the MoE layer whose router is explained.
        by: how finely: `"layer"`, `"head"`, `"source"` (head and source token), `"expert"` or `"neuron"`.

    Returns:
        Scores `[sender, batch, pos, expert]` in router logits, with the error of their sum. Padded positions
        have scores like any other, which mean nothing.

    Raises:
        ValueError: the receiver is no MoE layer; an unknown granularity; the cache has no batch axis; a value
            is not finite; more than `DENSE_LIMIT` scores, for which there is `routing_contributions`.
        KeyError: the cache lacks a hook, which is named.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", eq. 8-11.
    """
    check_receiver(model, receiver)
    resid_mid, scale, router_logits = (
        cached(cache, name, 3).to(model.cfg.device) for name in receiver_hooks(receiver)
    )
    senders = senders_before(model.cfg, receiver, by, n_sources=resid_mid.shape[1])
    n_scores = len(senders) * resid_mid.shape[0] * resid_mid.shape[1] * model.cfg.n_experts
    check_dense(
        n_scores,
        by,
        f"routing_contributions(model, tokens, by={by!r}) measures them as a stream, and explain(...) takes one "
        f"token's decision apart",
    )
    values = group_values(model, cache, senders, resid_mid.shape[:2])

    readout = router_readout(model, receiver)
    scores, senders, rounding_ratio = scores_with_rounding(
        model,
        senders,
        values,
        resid_mid,
        of_group=lambda group: sender_scores(model, group, values, readout),
        of_vector=lambda vector: vector @ readout.T,
    )
    scale = scale.float()
    sent = scores / scale
    logits = resid_mid.float() @ readout.T / scale
    require_finite(sent, f"the scores at layer {receiver}")
    require_finite(logits, f"the router's logits at layer {receiver}")
    return RouterLogitAttrs(
        values=sent,
        senders=senders,
        logits=logits,
        completeness_error=relative_error(sent.sum(dim=0), logits),
        rounding_ratio=rounding_ratio,
        model_logit_difference=float((logits - router_logits.float()).abs().max()),
        receiver=receiver,
        by=by,
    )


def scores_with_rounding(
    model: HookedMoE,
    senders: Senders,
    values: Mapping[str, Tensor],
    stream: Float[Tensor, "batch pos d_model"],
    *,
    of_group: Callable[[SenderGroup], Float[Tensor, "sender batch pos *row"]],
    of_vector: Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos *row"]],
) -> tuple[Float[Tensor, "sender batch pos *row"], Senders, float | None]:
    """Every sender's scores, and in half precision those of `rounding`, last; not yet divided by a scale.

    Args:
        values: the senders' hook values, at the stream's places.
        stream: what the senders sum to, as the run stored it.
        of_group: how the senders of a group are scored.
        of_vector: how a vector is.

    Returns:
        The scores; the senders, with `rounding` where it is one; and `StreamSum.rounding_ratio`, None in float32.
    """
    if not stream_rounds(stream.dtype):
        return torch.cat([of_group(group) for group in senders.groups]), senders, None
    scores, summed = [], None
    for group in senders.groups:
        # For both, so that a streamed model's layer is read once.
        with group_in_memory(model, group):
            scores.append(of_group(group))
            written = written_by(model, group, values)
        if summed is None:
            summed = StreamSum(written[0], stream.dtype)
        else:
            summed.add(*written)
    assert summed is not None
    scores.append(of_vector(summed.rounding(stream))[None])
    return torch.cat(scores), with_rounding(senders), summed.rounding_ratio(stream)


def check_dense(n_scores: int, by: str, instead: str) -> None:
    """See that so many scores can be held at once.

    Args:
        n_scores: how many are to be made.
        by: the granularity.
        instead: what to do otherwise, for the error.

    Raises:
        ValueError: more than `DENSE_LIMIT`.
    """
    if n_scores > DENSE_LIMIT:
        raise ValueError(
            f"by={by!r} makes {n_scores:,} scores here, over the {DENSE_LIMIT:,} that are held at once; {instead}"
        )


def require_finite(tensor: Float[Tensor, "*shape"], name: str) -> None:
    """See that every value of a tensor is finite.

    Args:
        name: what it holds, in the plural, for the error.

    Raises:
        ValueError: a value is not finite.
    """
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} hold values that are not finite")


def relative_error(got: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"]) -> float:
    """max |got - wanted| / max |wanted|; 0 where both are 0 everywhere, infinite where only `wanted` is."""
    error, size = float((got - wanted).abs().max()), float(wanted.abs().max())
    return error / size if size else (float("inf") if error else 0.0)


def with_rounding(senders: Senders) -> Senders:
    """The same senders, and `rounding` last."""
    return Senders([*senders.groups, SenderGroup(ROUNDING, None, "whole", (Names(ROUNDING),))])


def sender_hooks(model: HookedMoE, senders: Senders) -> list[str]:
    """The hook points that the senders, and the components they are parts of, are read from."""
    names = [name for group in senders.groups for name in (*hooks_of(model, group), group.written_at)]
    return list(dict.fromkeys(names))


def receiver_hooks(receiver: int) -> list[str]:
    """The stream that the router reads, its scale, and what the router said."""
    points = ("hook_resid_mid", "ln2.hook_scale", "mlp.hook_router_logits")
    return [f"blocks.{receiver}.{point}" for point in points]


def group_values(
    model: HookedMoE,
    cache: ActivationCache | Mapping[str, Tensor],
    senders: Senders,
    batch_and_pos: Sequence[int],
    *,
    listed_by: str = ROUTER_HOOKS,
) -> dict[str, Tensor]:
    """The cached values of every group, after their batch and position axes were found to be the stream's.

    Args:
        listed_by: the call that lists the hooks, for the error where one is missing.

    Raises:
        KeyError, ValueError: see `router_logit_attrs`.
    """
    values: dict[str, Tensor] = {}
    for name in sender_hooks(model, senders):
        value = values[name] = cached(cache, name, listed_by=listed_by).to(model.cfg.device)
        # The pattern's positions are its queries, and as many keys.
        places = (value.shape[0], *value.shape[2:]) if name.endswith("hook_pattern") else value.shape[:2]
        wanted = (*batch_and_pos, batch_and_pos[1]) if name.endswith("hook_pattern") else tuple(batch_and_pos)
        if tuple(places) != tuple(wanted):
            raise ValueError(
                f"{name} in the cache is {tuple(value.shape)}, which is not of the {tuple(batch_and_pos)} batch "
                f"rows and positions of the stream that is read"
            )
    return values


def cached(
    cache: ActivationCache | Mapping[str, Tensor],
    name: str,
    n_axes: int | None = None,
    *,
    listed_by: str = ROUTER_HOOKS,
) -> Float[Tensor, "*shape"]:
    """A cached value, without its gradient.

    Raises:
        KeyError: it is not in the cache.
        ValueError: it has another number of axes than it should.
    """
    stored = cache.cache_dict if isinstance(cache, ActivationCache) else cache
    if name not in stored:
        raise KeyError(f"the cache lacks {name}; {listed_by} lists what is needed")
    value = stored[name].detach()
    if n_axes is not None and value.ndim != n_axes:
        raise ValueError(
            f"{name} in the cache is {tuple(value.shape)}, without its batch and position axes; cache with "
            f"remove_batch_dim=False and positions kept"
        )
    return value
