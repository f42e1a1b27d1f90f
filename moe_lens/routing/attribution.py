"""Why a router scored as it did: its logits as an exact sum over what earlier components wrote.

At receiving layer r and token t, with x the stream before the MoE, s_r its scale and R_r the folded readout,

    logits_r(t)  =  R_r x(t) / s_r(t)  =  sum over senders c of  R_r z_c(t) / s_r(t)

because x is the sum of its senders. Every sender is divided by the token's true scale; nothing is
approximated. The sum is checked against the readout of the stored stream, and every result carries the error.
Scores mean something up to a shift that all experts share.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 8-12,
which decompose a router's input into embedding, attention outputs and MoE outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.readout import check_receiver, router_readout
from moe_lens.routing.senders import ROUNDING, StreamSum, senders_before, stream_rounds


@dataclass(frozen=True, eq=False)
class RouterLogitAttrs:
    """The scores of one router, divided among the components that wrote them. In router logits, float32.

    Attributes:
        values: what each sender adds to each expert's logit; their sum over senders is `logits`.
        senders: names along `values`' first axis, in the order in which the stream adds them; `rounding`, last,
            only in half precision.
        logits: the readout of the stored `hook_resid_mid`, R_r x / s_r in float32.
        completeness_error: max |sum of values - logits| / max |logits|.
        rounding_ratio: max |rounding| over the most that rounding can be (see `StreamSum.rounding_ratio`); above
            1 something other than rounding is missing. None in float32, where rounding is no sender.
        model_logit_difference: max |logits - hook_router_logits|: what the gate's own arithmetic rounds.
        receiver: the MoE layer.
        by: the granularity.
    """

    values: Float[Tensor, "sender batch pos expert"]
    senders: tuple[str, ...]
    logits: Float[Tensor, "batch pos expert"]
    completeness_error: float
    rounding_ratio: float | None
    model_logit_difference: float
    receiver: int
    by: str

    def to_frame(self) -> pd.DataFrame:
        """One row per (sender, batch, position, expert): columns so named, and `score` in router logits."""
        axes = [np.arange(n) for n in self.values.shape]
        sender, batch, position, expert = (grid.ravel() for grid in np.meshgrid(*axes, indexing="ij"))
        return pd.DataFrame(
            {
                "sender": np.array(self.senders)[sender],
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
        senders = senders_before(model.cfg, receiver, by)
        names.update(dict.fromkeys([sender.hook for sender in senders] + _receiver_hooks(receiver)))
    return list(names)


def router_logit_attrs(
    model: HookedMoE, cache: ActivationCache | Mapping[str, Tensor], *, receiver: int, by: str = "layer"
) -> RouterLogitAttrs:
    """Divide the logits of one router among the components that wrote into the stream it reads.

    Args:
        model: the model that the cache is of; its router weights and norm gain are read.
        cache: of a run with at least the hooks of `attribution_hooks`; with its batch axis.
        receiver: the MoE layer whose router is explained.
        by: `"layer"`: the embedding, each attention layer and each MoE or dense layer.

    Returns:
        Scores `[sender, batch, pos, expert]` in router logits, with the error of their sum. Padded positions
        have scores like any other, which mean nothing.

    Raises:
        ValueError: the receiver is no MoE layer; an unknown granularity; the cache has no batch axis; a value
            is not finite.
        KeyError: the cache lacks a hook, which is named.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", eq. 8-12.
    """
    check_receiver(model, receiver)
    senders = senders_before(model.cfg, receiver, by)
    vectors = [_cached(cache, sender.hook) for sender in senders]
    resid_mid, scale, router_logits = (_cached(cache, name) for name in _receiver_hooks(receiver))

    stream = StreamSum(vectors[0], resid_mid.dtype)
    for vector in vectors[1:]:
        stream.add(vector)
    names, rounding_ratio = [sender.name for sender in senders], None
    if stream_rounds(resid_mid.dtype):
        names.append(ROUNDING)
        vectors.append(stream.rounding(resid_mid))
        rounding_ratio = stream.rounding_ratio(resid_mid)

    readout = router_readout(model, receiver).to(resid_mid.device)
    values = torch.stack([_scores(vector, readout, scale) for vector in vectors])
    logits = _scores(resid_mid, readout, scale)
    for name, tensor in (("the scores", values), ("the router's logits", logits)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} at layer {receiver} hold values that are not finite")
    return RouterLogitAttrs(
        values=values,
        senders=tuple(names),
        logits=logits,
        completeness_error=relative_error(values.sum(dim=0), logits),
        rounding_ratio=rounding_ratio,
        model_logit_difference=float((logits - router_logits.float()).abs().max()),
        receiver=receiver,
        by=by,
    )


def relative_error(got: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"]) -> float:
    """max |got - wanted| / max |wanted|; 0 where both are 0 everywhere, infinite where only `wanted` is."""
    error, size = float((got - wanted).abs().max()), float(wanted.abs().max())
    return error / size if size else (float("inf") if error else 0.0)


def _scores(
    vector: Float[Tensor, "batch pos d_model"],
    readout: Float[Tensor, "expert d_model"],
    scale: Float[Tensor, "batch pos 1"],
) -> Float[Tensor, "batch pos expert"]:
    return einsum(vector.float(), readout, "b p d_model, expert d_model -> b p expert") / scale.float()


def _receiver_hooks(receiver: int) -> list[str]:
    """The stream that the router reads, its scale, and what the router said."""
    points = ("hook_resid_mid", "ln2.hook_scale", "mlp.hook_router_logits")
    return [f"blocks.{receiver}.{point}" for point in points]


def _cached(cache: ActivationCache | Mapping[str, Tensor], name: str) -> Float[Tensor, "batch pos d"]:
    stored = cache.cache_dict if isinstance(cache, ActivationCache) else cache
    if name not in stored:
        raise KeyError(f"the cache lacks {name}; attribution_hooks(model, receivers) lists what is needed")
    value = stored[name].detach()
    if value.ndim != 3:
        raise ValueError(
            f"{name} in the cache is {tuple(value.shape)}, without its batch and position axes; cache with "
            f"remove_batch_dim=False and positions kept"
        )
    return value
