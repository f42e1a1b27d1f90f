"""From what jobs give to `RoutingContributions`: added up, held against the logits, kept in a file meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lens.interop.nnsight.shipped.contributions import populations_of
from moe_lens.interop.nnsight.shipped.moments import merge_results
from moe_lens.routing.attribution import with_rounding
from moe_lens.routing.documents import POPULATIONS, POSITIONS, Moments
from moe_lens.routing.listener import FAR_BEYOND_ROUNDING
from moe_lens.routing.measures import MEASURES
from moe_lens.routing.result import COMPLETENESS_TOLERANCE, RoutingContributions, measure_names
from moe_lens.routing.rounding import stream_rounds
from moe_lens.routing.senders import ROUNDING, Senders
from moe_lens.routing.storage import read_arrays, write_atomically

_MOMENTS = ("count", "mean", "squares")
_STORED_TENSOR = 257
"""About what a stored tensor takes beside its numbers: its name, and its entries in the archive."""
_STORED_RESULT = 1000
"""About what a result takes beside its tensors."""


class Total:
    """The result of the jobs so far.

    Args:
        state: a file in which it is kept, or None. What is there already is read.
        identity: what must be the same for a state to be gone on with, in JSON's terms. None matches anything.
        allow_incomplete: see `routing_contributions`.

    Raises:
        FileNotFoundError: the state's folder does not exist.
        ValueError: the state is of another run.
    """

    def __init__(self, state: Path | None, identity: dict[str, Any], allow_incomplete: bool):
        self.state, self.identity, self.allow_incomplete = state, identity, allow_incomplete
        self.n_jobs = 0
        self.result: dict[str, Any] | None = None
        if state is None:
            return
        if not state.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {str(state.parent)!r} to keep the state {state.name} in"
            )
        if state.exists():
            self._restore(state)

    def add(self, number: int, results: list[Any]) -> None:
        """A job's result, which is taken out of the list, so that the results of all jobs are not held together.

        Raises:
            ValueError: a score is not finite; or the senders do not sum to the logits (see
                `ContributionAccumulator.require_closed`). Nothing of the job is kept then.
        """
        result = results.pop()
        if result["broken"] >= 0:
            raise ValueError(
                f"scores at layer {result['broken']} hold values that are not finite; nothing of job {number} was added"
            )
        if not self.allow_incomplete:
            _require_closed(result)
        self.result = result if self.result is None else merge_results([self.result, result])[0]
        self.n_jobs = number + 1
        if self.state is not None:
            self._save(self.state)

    def _save(self, state: Path) -> None:
        assert self.result is not None
        arrays = {
            f"{key}/{name}": value
            for key, moments in self.result["moments"].items()
            for name, value in moments.items()
        }
        facts = {name: value for name, value in self.result.items() if name != "moments"}
        write_atomically(state, arrays, {"run": self.identity, "jobs": self.n_jobs, "result": facts})

    def _restore(self, state: Path) -> None:
        arrays, facts = read_arrays(state)
        saved = facts.get("run", {})
        for name in [*self.identity, *(saved.keys() - self.identity.keys())]:
            was, is_now = saved.get(name), self.identity.get(name)
            only_planned = name in ("ran", "weights") and self.identity["ran"] is None
            if was != is_now and not only_planned:
                problem = (
                    "its batches were others"
                    if name == "batches"
                    else f"{name} was {was!r} and is {is_now!r}"
                )
                raise ValueError(
                    f"the state {str(state)!r} is of another run: {problem}; name another file, or delete this one"
                )
        moments: dict[str, dict[str, Tensor]] = {}
        for key, array in arrays.items():
            part, _, name = key.rpartition("/")
            moments.setdefault(part, {})[name] = array
        self.result = {"moments": moments, **facts["result"]}
        self.n_jobs = facts["jobs"]


def _require_closed(result: Mapping[str, Any]) -> None:
    for by, error in result["errors"].items():
        ratio = result["ratios"].get(by, 0.0)
        if error > COMPLETENESS_TOLERANCE or ratio > FAR_BEYOND_ROUNDING:
            what = (
                f"what is left over is {ratio:.0f} times as large as rounding can be"
                if ratio > FAR_BEYOND_ROUNDING
                else f"their scores miss the logits by {error:.1e} of the largest"
            )
            raise ValueError(
                f"the senders by {by} are not what the routers read: {what}. A model whose modules were changed does "
                f"this; allow_incomplete=True measures the senders all the same"
            )


def results_of(
    total: Mapping[str, Any],
    senders: Mapping[str, Senders],
    firsts: Mapping[str, Sequence[int]],
    receivers: Sequence[int],
    provenance: Mapping[str, Any],
) -> dict[str, RoutingContributions]:
    """A job's result (or that of several) by granularity.

    Args:
        total: see `shipped.contributions.measure_batch`.
        senders: of each granularity, without `rounding`.
        firsts: the place of the first receiver of each group of them.
    """
    results = {}
    for by, of in senders.items():
        rounds = by in total["ratios"]
        keys = [f"{group.component}/{group.kind}" for group in of.groups]
        keys += [f"{ROUNDING}/{by}"] if rounds else []
        results[by] = RoutingContributions(
            by=by,
            senders=with_rounding(of) if rounds else of,
            receivers=tuple(f"M{receiver}" for receiver in receivers),
            measures=measure_names(rank_shift=False),
            n_documents=dict(total["documents"]),
            n_tokens=dict(total["tokens"]),
            completeness_error=total["errors"][by],
            rounding_ratio=total["ratios"].get(by),
            model_logit_difference=total["difference"],
            provenance=dict(provenance),
            firsts=(*firsts[by], *((0,) if rounds else ())),
            moments={
                (position, population): [
                    _moments_of(total["moments"], key, position, population) for key in keys
                ]
                for position in POSITIONS
                for population in POPULATIONS
            },
        )
    return results


def _moments_of(
    moments: Mapping[str, Mapping[str, Tensor]], key: str, position: str, population: str
) -> Moments:
    """Of senders that are always active there is one population."""
    there = population if population in populations_of(key) else "all"
    found = moments[f"{key}/{position}/{there}"]
    return Moments.of(*(found[name].clone() for name in _MOMENTS))


def result_bytes(asked: Mapping[str, Any], dtype: torch.dtype) -> int:
    """How many bytes a job's result takes, to a few percent, before compression; whatever the documents.

    Args:
        asked: see `shipped.contributions.measure_batch`.
        dtype: of the stream, which says whether there is rounding.
    """
    n_receivers = len(asked["receivers"])
    parts = {
        f"{component}/{kind}": n_senders * (1 + 2 * len(MEASURES) * (n_receivers - first))
        for groups in asked["groups"].values()
        for component, (kind, n_senders, first) in groups.items()
    }
    if stream_rounds(dtype):
        parts |= {f"{ROUNDING}/{by}": 1 + 2 * len(MEASURES) * n_receivers for by in asked["groups"]}
    per_position = [
        len(populations_of(key)) * (8 * size + len(_MOMENTS) * _STORED_TENSOR) for key, size in parts.items()
    ]
    return _STORED_RESULT + len(POSITIONS) * sum(per_position)
