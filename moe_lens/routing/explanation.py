"""A routing decision as a sum: who pushed one expert in, or kept it out, against the expert at its boundary.

A router's scores mean something only up to a shift that all experts share, so the question is contrastive. A chosen
expert is held against the best that was left out, and one left out against the worst that was chosen: its *boundary*.
With S_c[e] what sender c adds to the logit of expert e,

    logit[expert] - logit[boundary]  =  sum over senders c of  S_c[expert] - S_c[boundary]

exactly, at every granularity; and a sender's own difference is the sum of those of its parts.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 8-11, whose
scores these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.routing.arguments import few, positive_integer
from moe_lens.routing.counterfactuals import without_senders
from moe_lens.routing.decision import Decision
from moe_lens.routing.explanation_text import summary_of
from moe_lens.routing.rank_shift import ranks
from moe_lens.routing.result import COMPLETENESS_TOLERANCE
from moe_lens.routing.rounding import rounding_bound, unit_roundoff
from moe_lens.routing.senders import ROUNDING, SenderGroup

if TYPE_CHECKING:
    import plotly.graph_objects as go

_AT_ONCE = 256


class PresentSender(NamedTuple):
    """A sender's name, its component's group (None of `rounding`), and its place among the group's present ones."""

    name: str
    group: SenderGroup | None
    place: int


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """One routing decision, or one sender's part in it, divided among senders. Scores are in router logits.

    Attributes:
        senders: names, in the order in which the stream adds them; `rounding`, last, only in half precision. Those
            that are zero because of what was chosen, or cannot be seen, are not listed (`n_absent`).
        contributions: `[sender]`, what each adds to the expert's logit less what it adds to the boundary's: positive
            pushes the expert in.
        scores: `[sender, 2]`, what it adds to the expert's and to the boundary's. A shift of both means nothing.
        margin: what the contributions sum to: `logit_difference`, or of a drilled explanation the contribution of the
            sender that was drilled into.
        logit_difference: the expert's exact logit less the boundary's.
        completeness_error: max |sum of scores - what they should sum to| / max |logits of the token|.
        rounding_ratio: max |rounding| over the most that rounding can be (see `StreamSum.rounding_ratio`); above 1
            something other than rounding is missing. None in float32, where rounding is no sender.
        model_logit_difference: max |exact logits - hook_router_logits|: what the gate's own arithmetic rounds.
        expert, boundary: the two that are compared.
        rank, boundary_rank: theirs among all experts by exact logit: 1 the best, ties to the lower index.
        selected: whether the router chooses the expert for the exact logits.
        chosen_by_model: whether it did so in the run, which may differ at a near tie in half precision, or where a
            hook edited the choice.
        routing_weight: with which the expert's output is applied, for the exact logits; 0 where it is not chosen.
        router: its layer.
        pos, token: the column, and the token as text (its id where there is no tokenizer).
        tokens: all tokens of the text, likewise.
        by: the granularity; of a drilled explanation, what was divided into.
        of: the sender that was drilled into, None for the whole decision.
        n_absent: how many senders of this granularity are not listed.
    """

    senders: tuple[str, ...]
    contributions: Float[np.ndarray, " sender"]
    scores: Float[np.ndarray, "sender 2"]
    margin: float
    logit_difference: float
    completeness_error: float
    rounding_ratio: float | None
    model_logit_difference: float
    expert: int
    boundary: int
    rank: int
    boundary_rank: int
    selected: bool
    chosen_by_model: bool
    routing_weight: float
    router: int
    pos: int
    token: str
    tokens: tuple[str, ...]
    by: str
    of: str | None
    n_absent: int
    _decision: Decision = field(repr=False)
    _senders: tuple[PresentSender, ...] = field(repr=False)
    _rounding: Float[Tensor, " d_model"] | None = field(repr=False)

    def __repr__(self) -> str:
        what = f"{self.of} in " if self.of else ""
        decision = "chosen" if self.selected else "left out"
        open_sum = "" if self.closes else ", which do not add up"
        return (
            f"<Explanation by {self.by}: {what}expert {self.expert} {decision} by the router of layer {self.router} "
            f"at token {self.pos} ({self.token!r}), {self.margin:+.3f} logits of {len(self.senders)} senders{open_sum}>"
        )

    # ---- reading ----

    @property
    def closes(self) -> bool:
        """Whether the scores sum to what they should: `completeness_error` is at most 1e-4, and in half precision
        `rounding_ratio` at most 1. Otherwise the stream holds what none of the senders wrote, and `summary` says so."""
        rounds = self.rounding_ratio is None or self.rounding_ratio <= 1
        return rounds and self.completeness_error <= COMPLETENESS_TOLERANCE

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The senders' names; of a source, with its token."""
        return tuple(
            name if token is None else f"{name} {token!r}"
            for name, token in zip(self.senders, self._source_tokens, strict=True)
        )

    @property
    def _source_tokens(self) -> list[str | None]:
        columns = [name.partition("<-")[2] for name in self.senders]
        return [self.tokens[int(column)] if column else None for column in columns]

    def table(self, n: int | None = None) -> pd.DataFrame:
        """The senders by |contribution|, largest first; all of them, or the first n.

        Returns:
            Columns `sender`, `contribution` (logits), `expert_score`, `boundary_score` (logits), `share`
            (|contribution| of the sum of |contributions|) and `cumulative` (the shares so far); where there are
            sources, `source_token` after the name.

        Raises:
            TypeError: n is no integer.
            ValueError: n is not positive.
        """
        n = None if n is None else positive_integer(n, "n")
        order = np.argsort(-np.abs(self.contributions), kind="stable")
        sizes = np.abs(self.contributions[order])
        shares = sizes / (sizes.sum() or 1.0)
        frame = pd.DataFrame(
            {
                "sender": [self.senders[i] for i in order],
                "contribution": self.contributions[order],
                "expert_score": self.scores[order, 0],
                "boundary_score": self.scores[order, 1],
                "share": shares,
                "cumulative": shares.cumsum(),
            }
        )
        tokens = self._source_tokens
        if any(token is not None for token in tokens):
            frame.insert(1, "source_token", [tokens[i] or "" for i in order])
        return frame if n is None else frame.head(n)

    def summary(self) -> str:
        """What was decided, by how much, who pushed which way, and how few senders make up most of it: a few plain
        sentences, with numbers."""
        return summary_of(self, self._decision)

    def waterfall(self, n: int = 15) -> go.Figure:
        """The contributions as steps from 0 to the margin: the n largest, and the rest as one.

        Args:
            n: how many senders have a step of their own.

        Raises:
            TypeError: n is no integer.
            ValueError: n is not positive.
        """
        from moe_lens.plots.waterfall import waterfall

        n = positive_integer(n, "n")
        what = f"{self.of}: expert" if self.of else "Expert"
        title = (
            f"{what} {self.expert} against {self.boundary}, router of layer {self.router}, token {self.pos}"
        )
        return waterfall(
            list(self.labels),
            self.contributions.tolist(),
            total=self.margin,
            title=title,
            unit="logits",
            n=n,
        )

    # ---- dividing further ----

    def drill(self, sender: str) -> Explanation:
        """One sender's contribution, divided among its parts, from the same forward pass.

        `M1` into experts (of a dense layer, into neurons), `M1E9` and `M1S` into neurons, `A3` into heads and the
        output bias, `A3H5` into source tokens. In half precision `rounding` is what the sender wrote beyond its parts.

        Args:
            sender: one of `senders`.

        Returns:
            An explanation whose `margin` is the sender's contribution.

        Raises:
            ValueError: no such sender here, or one that has no parts; those that can be divided are named. Weights
                that were changed since the run; a hook had the token attend to what it cannot see.
        """
        self._decision.token.check_weights()
        parent = self._senders[self._index(sender)]
        finer = self._parts_of(parent)
        if finer is None or parent.group is None:
            divisible = [s.name for s in self._senders if self._parts_of(s) is not None]
            named = (
                f"what can be divided here: {few(divisible)}" if divisible else "nothing here can be divided"
            )
            raise ValueError(f"{sender!r} has no parts; {named}")
        by, prefix = finer
        decision, token = self._decision, self._decision.token
        group = token.group(parent.group.component, by)
        parts = [
            PresentSender(name, group, i)
            for i, name in enumerate(token.names(group))
            if name.startswith(prefix)
        ]
        places = [part.place for part in parts]
        vector = token.vectors(parent.group, [parent.place])[0]
        rounding, ratio = None, None
        if decision.rounds:
            rounding = vector - token.vectors(group, places).sum(dim=0)
            sizes = token.written(group)[1]
            assert sizes is not None
            most = rounding_bound(sizes[0, 0], unit_roundoff(token.model.cfg.dtype))
            ratio = float((rounding.abs() / most).max())
        n_parts = {"whole": len(group), "heads": token.n_columns}.get(parent.group.kind, len(parts))
        return explanation_of(
            decision,
            parts,
            scores=token.scores(group, decision.rows)[places] / decision.scale,
            wanted=decision.rows @ vector / decision.scale,
            rounding=rounding,
            rounding_ratio=ratio,
            by=by,
            of=sender,
            n_absent=n_parts - len(parts),
            tokens=self.tokens,
        )

    def _parts_of(self, sender: PresentSender) -> tuple[str, str] | None:
        """The granularity that divides a sender, and how its parts' names begin."""
        group, name = sender.group, sender.name
        if group is None or group.layer is None:
            return None
        if group.kind == "whole":
            if name.startswith("A"):
                return "head", name
            dense = group.layer not in self._decision.token.model.cfg.moe_layers
            return ("neuron" if dense else "expert"), name
        if group.kind == "heads" and not name.endswith("bias"):
            return "source", f"{name}<-"
        if group.kind == "experts":
            return "neuron", f"{name}N"
        return None

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.senders)}

    def _index(self, sender: str) -> int:
        if sender in self._places:
            return self._places[sender]
        raise ValueError(
            f"there is no sender {sender!r} here; there are {few(self.senders)} (an expert that the token did not "
            f"choose, or a source that it cannot see, is zero and not listed)"
        )

    # ---- counterfactuals ----

    def verify(self, sender: str | Sequence[str] | None = None) -> pd.DataFrame:
        """What the router would have done without a sender, in two ways that need not agree.

        *frozen*: the sender's scores are taken from the exact logits, and everything else stays, the scale too. This
        is the paper's counterfactual (scores set to zero), exact arithmetic on the decomposition: the logit difference
        falls by the contribution, to rounding.

        *recomputed*: the sender's vector is taken from the stream at this token just before the router's norm, and
        norm and router are run again as the model runs them, in its dtype. The stream then has another length, so
        another scale divides all that is left. Hooks that the model carries do not act in this: what they did to the
        stream in the explained run is in it, but an edit of the scale, the logits or the choice is not repeated.
        Neither way has what the sender did to the components in between: they wrote what they wrote.

        Args:
            sender: one of `senders`, several, or None for all.

        Returns:
            A row for each sender: `sender`, `contribution`; and for each of `rank`, `selected`, `logit_difference` and
            `weight` (the expert's, after the removal) a column `_frozen`, one `_recomputed`, and, of all but
            `selected`, `_gap`, the second less the first. In half precision the gap also holds what the gate rounds.

        Raises:
            ValueError: no such sender here, or none; weights that were changed since the run.

        Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", section 7.2.
        """
        self._decision.token.check_weights()
        names = [sender] if isinstance(sender, str) else list(self.senders if sender is None else sender)
        if not names:
            raise ValueError("there is no sender to verify: the list is empty")
        indices = [self._index(name) for name in names]
        frames = []
        for start in range(0, len(indices), _AT_ONCE):
            some = indices[start : start + _AT_ONCE]
            frame = without_senders(self._decision, self._vectors(some))
            frame.insert(0, "sender", [self.senders[i] for i in some])
            frame.insert(1, "contribution", self.contributions[some])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def _vectors(self, indices: Sequence[int]) -> Float[Tensor, "sender d_model"]:
        """What some senders write, group by group."""
        found: dict[int, Tensor] = {}
        by_group: dict[str, list[int]] = {}
        for i in indices:
            group = self._senders[i].group
            by_group.setdefault(ROUNDING if group is None else group.component, []).append(i)
        for inside in by_group.values():
            group = self._senders[inside[0]].group
            if group is None:
                assert self._rounding is not None
                found |= dict.fromkeys(inside, self._rounding)
            else:
                vectors = self._decision.token.vectors(group, [self._senders[i].place for i in inside])
                found |= dict(zip(inside, vectors, strict=True))
        return torch.stack([found[i] for i in indices])


def explanation_of(
    decision: Decision,
    senders: list[PresentSender],
    *,
    scores: Float[Tensor, "sender 3"],
    wanted: Float[Tensor, " 3"],
    rounding: Float[Tensor, " d_model"] | None,
    rounding_ratio: float | None,
    by: str,
    of: str | None,
    n_absent: int,
    tokens: tuple[str, ...],
) -> Explanation:
    """An explanation of scores against `decision.rows`, and of what they should sum to; all in logits."""
    if rounding is not None:
        senders = [*senders, PresentSender(ROUNDING, None, 0)]
        scores = torch.cat((scores, (rounding @ decision.rows.T / decision.scale)[None]))
    rank = ranks(decision.logits)
    expert, boundary, token = decision.expert, decision.boundary, decision.token
    return Explanation(
        senders=tuple(sender.name for sender in senders),
        contributions=scores[:, 2].cpu().double().numpy(),
        scores=scores[:, :2].cpu().double().numpy(),
        margin=float(wanted[2]),
        logit_difference=float(decision.logits[expert] - decision.logits[boundary]),
        completeness_error=float((scores.sum(dim=0) - wanted).abs().max() / decision.logits.abs().max()),
        rounding_ratio=rounding_ratio,
        model_logit_difference=decision.model_logit_difference,
        expert=expert,
        boundary=boundary,
        rank=int(rank[expert]),
        boundary_rank=int(rank[boundary]),
        selected=bool(decision.chosen[expert]),
        chosen_by_model=decision.chosen_by_model,
        routing_weight=float(decision.weights[expert]),
        router=token.receiver,
        pos=token.pos,
        token=tokens[token.pos],
        tokens=tokens,
        by=by,
        of=of,
        n_absent=n_absent,
        _decision=decision,
        _senders=tuple(senders),
        _rounding=rounding,
    )
