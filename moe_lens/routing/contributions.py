"""How much each component moves each later router, over a corpus: variance, APS and ANS, as a stream.

With S_e(t) what a sender adds to the logit of expert e at token t (`router_logit_attrs`), over the N experts
of the receiving router:

    variance = mean_e (S_e - mean_e S)^2      logits^2; how unequally the sender treats the experts
    APS      = mean_e max(S_e, 0)             logits; the average positive score: promotion
    ANS      = mean_e min(S_e, 0)             logits; the average negative score: inhibition

averaged over a document's tokens, then over documents. The lead position of a document, its first real token,
is kept apart from the rest: many models park a large constant there.

The scores of all senders at all receivers are never held together. When a sender runs, one matmul projects it
onto all later readouts, and its measures are taken there and then. The receiver's scale is one number per
token and not yet known; but variance goes with its inverse square, APS and ANS with its inverse, so they are
divided when the receiver runs. Everything listens at hook points and nothing else.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 8-12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.attribution import relative_error
from moe_lens.routing.documents import DocumentMean, real_tokens
from moe_lens.routing.readout import stacked_readouts
from moe_lens.routing.senders import ROUNDING, StreamSum, senders_before, stream_rounds

MEASURES = ("variance", "aps", "ans")
POSITIONS = ("lead", "rest")
# How each measure goes with the receiver's scale, on the axis `measure`.
_SCALE_POWERS = (2, 1, 1)

ByPosition = dict[str, Float[np.ndarray, "sender receiver"]]


@dataclass(frozen=True, eq=False)
class RoutingContributions:
    """Variance, APS and ANS of every sender at every receiving router, over documents.

    Attributes:
        variance, aps, ans: each `{"lead", "rest"}` -> `[sender, receiver]`, NaN where the sender comes after
            the receiver; variance in logits^2, the others in logits.
        standard_errors: over documents, `[measure][position]` -> `[sender, receiver]`; NaN for one document.
        senders, receivers: the names along the axes.
        n_documents: how many documents have such a position (one of a single token has no rest).
        n_tokens: how many such tokens there are.
        completeness_error: the largest over batches and receivers of max |sum of scores - logits| / max |logits|.
        rounding_ratio: see `RouterLogitAttrs`; the largest. None in float32.
    """

    variance: ByPosition
    aps: ByPosition
    ans: ByPosition
    standard_errors: dict[str, ByPosition]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    n_documents: dict[str, int]
    n_tokens: dict[str, int]
    completeness_error: float
    rounding_ratio: float | None
    by: str

    def measure(self, name: str) -> ByPosition:
        """One of `variance`, `aps`, `ans`.

        Raises:
            ValueError: another name.
        """
        if name not in MEASURES:
            raise ValueError(f"there is no measure {name!r}; the measures are {', '.join(MEASURES)}")
        return getattr(self, name)

    def to_frame(self) -> pd.DataFrame:
        """One row per (position, sender, receiver) that has a value: columns `position` (lead or rest), `sender`,
        `receiver`, and each measure with its `_standard_error`."""
        frames = []
        for position in POSITIONS:
            rows, columns = np.nonzero(~np.isnan(self.variance[position]))
            frame = {
                "position": position,
                "sender": np.array(self.senders)[rows],
                "receiver": np.array(self.receivers)[columns],
            }
            for measure in MEASURES:
                frame[measure] = self.measure(measure)[position][rows, columns]
                frame[f"{measure}_standard_error"] = self.standard_errors[measure][position][rows, columns]
            frames.append(pd.DataFrame(frame))
        return pd.concat(frames, ignore_index=True)


def routing_contributions(
    model: HookedMoE,
    batches: Iterable[Sequence[Any]],
    *,
    by: str = "layer",
    receivers: Sequence[int] | None = None,
) -> RoutingContributions:
    """Run a corpus and measure how much each component moves each later router.

    Args:
        model: run without gradients.
        batches: each begins with tokens `[batch, pos]` and the mask of real ones `[batch, pos]` (or None); what
            follows is not read. Every row is one document. `corpus.token_batches` makes them.
        by: `"layer"`: the embedding, each attention layer and each MoE or dense layer.
        receivers: MoE layers; None is all of them.

    Returns:
        Means over documents with their standard errors, lead token and rest apart.

    Raises:
        ValueError: a receiver that is no MoE layer; an unknown granularity; no batches; a score that is not
            finite.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", eq. 8-12.
    """
    accumulator = ContributionAccumulator(model, by=by, receivers=receivers)
    for tokens, mask, *_ in batches:
        with torch.no_grad(), accumulator.listening(tokens, mask):
            model(tokens, attention_mask=mask, return_type=None)
    return accumulator.result()


class ContributionAccumulator:
    """Listens to forward passes and keeps the sums; `routing_contributions` drives it over a corpus.

    Use it directly to measure something else in the same pass:

        with accumulator.listening(tokens, mask):
            _, cache = model.run_with_cache(tokens, attention_mask=mask)

    Args, errors: see `routing_contributions`.
    """

    def __init__(self, model: HookedMoE, *, by: str = "layer", receivers: Sequence[int] | None = None):
        self.model = model
        self.by = by
        self.receivers = tuple(model.cfg.moe_layers if receivers is None else receivers)
        if not self.receivers or list(self.receivers) != sorted(set(self.receivers)):
            raise ValueError(f"receivers must be layers in rising order, each once, not {self.receivers}")
        self._readouts = stacked_readouts(model, self.receivers)
        self._senders = senders_before(model.cfg, self.receivers[-1], by)
        self._rounds = stream_rounds(model.cfg.dtype)
        # The first receiver, by its place in `receivers`, that each sender reaches.
        reached = [
            {sender.name for sender in senders_before(model.cfg, receiver, by)} for receiver in self.receivers
        ]
        self._first = [next(i for i, names in enumerate(reached) if s.name in names) for s in self._senders]

        shape = (len(MEASURES), len(self._senders) + self._rounds, len(self.receivers))
        self._means: dict[str, DocumentMean] = {position: DocumentMean(shape) for position in POSITIONS}
        self._n_tokens: dict[str, int] = dict.fromkeys(POSITIONS, 0)
        self._completeness_error = 0.0
        self._rounding_ratio: float | None = None

    @contextmanager
    def listening(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None
    ) -> Iterator[None]:
        """While open, exactly one forward pass of these tokens must be made; it is added when this closes."""
        batch = _Batch(self, real_tokens(tokens, mask))
        with self.model.hooks(batch.hooks()):
            yield
        batch.finish()

    def _add(
        self, measures: Float[Tensor, "measure sender receiver batch pos"], real: Bool[Tensor, "batch pos"]
    ) -> None:
        """A batch's measures per token: to documents, to the means over documents."""
        # What padded positions hold is no matter, but 0 times infinity would be.
        measures = measures.masked_fill(~real, 0.0).double()
        is_lead = real & (real.long().cumsum(dim=1) == 1)
        for position, chosen in (("lead", is_lead), ("rest", real & ~is_lead)):
            counts = chosen.sum(dim=1)
            has_any = counts > 0
            weights = chosen[has_any].double() / counts[has_any][:, None].double()
            per_document = einsum(
                measures[:, :, :, has_any].double(),
                weights,
                "m s r document pos, document pos -> document m s r",
            )
            self._means[position].add(per_document.cpu().numpy())
            self._n_tokens[position] += int(counts.sum())

    def result(self) -> RoutingContributions:
        """What was measured so far.

        Raises:
            ValueError: nothing was.
        """
        if self._means["lead"].count == 0:
            raise ValueError("there were no batches, so there is nothing to average over")
        names = [sender.name for sender in self._senders] + [ROUNDING] * self._rounds
        comes_after = np.zeros((len(names), len(self.receivers)), dtype=bool)
        for sender, first in enumerate(self._first):
            comes_after[sender, :first] = True

        def by_position(values: Callable[[DocumentMean], np.ndarray], measure: int) -> ByPosition:
            return {
                position: np.where(comes_after, np.nan, values(mean)[measure])
                if mean.count
                else np.full(comes_after.shape, np.nan)
                for position, mean in self._means.items()
            }

        means = {name: by_position(lambda m: m.mean, i) for i, name in enumerate(MEASURES)}
        errors = {name: by_position(lambda m: m.standard_error, i) for i, name in enumerate(MEASURES)}
        return RoutingContributions(
            variance=means["variance"],
            aps=means["aps"],
            ans=means["ans"],
            standard_errors=errors,
            senders=tuple(names),
            receivers=tuple(f"M{receiver}" for receiver in self.receivers),
            n_documents={position: mean.count for position, mean in self._means.items()},
            n_tokens=dict(self._n_tokens),
            completeness_error=self._completeness_error,
            rounding_ratio=self._rounding_ratio,
            by=self.by,
        )


class _Batch:
    """One forward pass: measures per token, unscaled until their receiver's scale is known."""

    def __init__(self, owner: ContributionAccumulator, real: Bool[Tensor, "batch pos"]):
        self.owner = owner
        self.real = real
        self.readouts = owner._readouts.to(real.device)
        n_receivers, n_experts, _ = self.readouts.shape
        n_senders = len(owner._senders) + owner._rounds
        self.measures = torch.zeros(len(MEASURES), n_senders, n_receivers, *real.shape, device=real.device)
        self.sums = torch.zeros(*real.shape, n_receivers, n_experts, device=real.device)
        self.stream: StreamSum | None = None
        self.fired: list[str] = []

    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """What listens: every sender, and at every receiver the stream and its scale."""

        def sender_hook(index: int) -> Callable[..., None]:
            return lambda value, hook: self.sender_ran(index, value)

        def stream_hook(place: int) -> Callable[..., None]:
            return lambda value, hook: self.stream_seen(place, value)

        def scale_hook(place: int) -> Callable[..., None]:
            return lambda value, hook: self.scale_known(place, value)

        hooks = [(sender.hook, sender_hook(index)) for index, sender in enumerate(self.owner._senders)]
        for place, receiver in enumerate(self.owner.receivers):
            hooks.append((f"blocks.{receiver}.hook_resid_mid", stream_hook(place)))
            hooks.append((f"blocks.{receiver}.ln2.hook_scale", scale_hook(place)))
        return hooks

    def sender_ran(self, index: int, value: Float[Tensor, "batch pos d_model"]) -> None:
        sender, first = self.owner._senders[index], self.owner._first[index]
        self.fired.append(sender.name)
        if self.stream is None:
            self.stream = StreamSum(value.detach(), self.owner.model.cfg.dtype)
        else:
            self.stream.add(value.detach())
        scores = self._project(value, self.readouts[first:])
        self.sums[:, :, first:] += scores
        self.measures[:, index, first:] = _measures(scores)

    def stream_seen(self, place: int, resid_mid: Float[Tensor, "batch pos d_model"]) -> None:
        """The sum of the senders is checked against the readout of the stream itself."""
        assert self.stream is not None
        readout = self.readouts[place : place + 1]
        total = self.sums[:, :, place]
        if self.owner._rounds:
            rounding = self._project(self.stream.rounding(resid_mid), readout)
            self.measures[:, -1, place : place + 1] = _measures(rounding)
            total = total + rounding[:, :, 0]
            ratio = self.stream.rounding_ratio(resid_mid, self.real)
            self.owner._rounding_ratio = max(self.owner._rounding_ratio or 0.0, ratio)
        self.expected = self._project(resid_mid, readout)[:, :, 0]
        self.got = total

    def scale_known(self, place: int, scale: Float[Tensor, "batch pos 1"]) -> None:
        self.fired.append(f"receiver {place}")
        scale = scale.detach().float()
        error = relative_error((self.got / scale)[self.real], (self.expected / scale)[self.real])
        self.owner._completeness_error = max(self.owner._completeness_error, error)
        for measure, power in enumerate(_SCALE_POWERS):
            self.measures[measure, :, place] /= scale[..., 0] ** power

    def finish(self) -> None:
        """Add the pass to the means, if it was a whole one with finite scores.

        Raises:
            RuntimeError: not exactly one forward pass was made.
            ValueError: a score is not finite.
        """
        whole = [sender.name for sender in self.owner._senders]
        whole += [f"receiver {place}" for place in range(len(self.owner.receivers))]
        if sorted(self.fired) != sorted(whole):
            raise RuntimeError("listening() must see exactly one whole forward pass of its tokens")
        if not bool(self.measures[..., self.real].isfinite().all()):
            raise ValueError("scores of a batch hold values that are not finite; nothing of it was added")
        self.owner._add(self.measures, self.real)

    @staticmethod
    def _project(
        vector: Float[Tensor, "batch pos d_model"], readouts: Float[Tensor, "receiver expert d_model"]
    ) -> Float[Tensor, "batch pos receiver expert"]:
        return einsum(
            vector.detach().float(), readouts, "b p d_model, receiver expert d_model -> b p receiver expert"
        )


def _measures(
    scores: Float[Tensor, "batch pos receiver expert"],
) -> Float[Tensor, "measure receiver batch pos"]:
    """Variance, APS and ANS over the experts, in the order of `MEASURES`."""
    stacked = torch.stack(
        (scores.var(dim=-1, correction=0), scores.clamp(min=0).mean(dim=-1), scores.clamp(max=0).mean(dim=-1))
    )
    return stacked.movedim(-1, 1)
