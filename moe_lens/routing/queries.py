"""Questions that routing contributions answer: who moves a router most, for how long, which way, and really.

All are read from a `RoutingContributions`; no model runs. A sender's *size* at a receiver is the absolute value of a
measure (of the overlap, 1 less it), and its *rank* there is among all senders that reach the receiver, 1 the largest,
ties to the earlier sender.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), sections 5 to 7.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import spearmanr

from moe_lens.routing.arguments import positive_integer
from moe_lens.routing.result import RoutingContributions


def top_senders(
    contributions: RoutingContributions,
    receiver: str | int,
    measure: str = "variance",
    n: int = 10,
    *,
    position: str = "rest",
    when_active: bool = False,
) -> pd.DataFrame:
    """The n senders that move a router most.

    Args:
        receiver: `"M5"`, or its layer.
        measure: see `moe_lens.routing.measures` for units.
        n: how many.
        position: `lead` or `rest`.
        when_active: over the tokens where a sender is active, rather than all.

    Returns:
        Columns `rank`, `sender`, the measure, `standard_error` (over documents), `documents`.

    Raises:
        TypeError: n is no integer.
        ValueError: no such receiver, measure or position; n is not positive.

    Source: section 5.3 and figure 5, where senders are compared by their variance.
    """
    n = positive_integer(n, "n")
    frame = contributions.top(receiver, measure, n, position=position, when_active=when_active)
    frame.insert(0, "rank", np.arange(1, len(frame) + 1))
    return frame


def persistence(
    contributions: RoutingContributions,
    measure: str = "variance",
    position: str = "rest",
    *,
    n: int = 10,
    when_active: bool = False,
) -> pd.DataFrame:
    """For how many routers each sender is among the n that move them most: the paper's stripes, as numbers.

    Args:
        measure, position, when_active: see `top_senders`.
        n: how many senders of a receiver count as its top.

    Returns:
        A row for each sender that reaches a receiver: `sender`, `receivers` (that it reaches), `in_top` (of how many it
        is among the top n), `longest_run` (of how many consecutive ones, dense layers between them not counted),
        `mean_rank`, `best_rank`, `mean_share` (the mean over receivers of its size over the sum of all senders' sizes;
        sizes do not add up to anything, so this is a comparison only) and `peak` (the receiver at which its size is
        largest). Longest runs first, then lower mean ranks.

    Raises:
        TypeError: n is no integer.
        ValueError: no such measure or position; n is not positive.

    Source: section 5.3, "stripes", and section 7.1, experts whose influence persists. The paper shows them and gives no
    number; these are counts of what it shows.
    """
    n = positive_integer(n, "n")
    sizes = _sizes(contributions, measure, position, when_active)
    ranks = _ranks(sizes)
    totals = np.nansum(sizes, axis=0)
    shares = np.divide(sizes, totals, out=np.zeros_like(sizes), where=totals > 0)
    there = ~np.isnan(sizes)
    with np.errstate(invalid="ignore"):
        in_top = ranks <= n
    reached = np.flatnonzero(there.any(axis=1))
    longest, run = np.zeros(len(sizes), dtype=int), np.zeros(len(sizes), dtype=int)
    for column in in_top.T:
        run = np.where(column, run + 1, 0)
        longest = np.maximum(longest, run)
    peaks = np.nanargmax(sizes[reached], axis=1) if len(reached) else []
    frame = pd.DataFrame(
        {
            "sender": [contributions.senders[int(i)] for i in reached],
            "receivers": there[reached].sum(axis=1),
            "in_top": in_top[reached].sum(axis=1),
            "longest_run": longest[reached],
            "mean_rank": np.nanmean(ranks[reached], axis=1),
            "best_rank": np.nanmin(ranks[reached], axis=1).astype(int),
            "mean_share": np.nanmean(np.where(there, shares, np.nan)[reached], axis=1),
            "peak": [contributions.receivers[int(i)] for i in peaks],
        }
    )
    return frame.sort_values(
        ["longest_run", "mean_rank"], ascending=[False, True], kind="stable", ignore_index=True
    )


class PromoteInhibit(NamedTuple):
    """Attributes:
    pairs: a row for each sender and receiver that it reaches.
    by_distance: those, averaged over senders of one kind at one distance.
    """

    pairs: pd.DataFrame
    by_distance: pd.DataFrame


def promote_inhibit(contributions: RoutingContributions, position: str = "rest") -> PromoteInhibit:
    """Whether senders promote experts or inhibit them, near and far.

    The balance of a sender is (APS + ANS) / (APS - ANS), from -1, which only inhibits, to 1, which only promotes; NaN
    for one that does neither. Scores count with their shift, as in the paper: what a sender adds to all experts alike
    promotes (or inhibits) them all, and routes nothing.

    Args:
        position: `lead` or `rest`.

    Returns:
        `pairs`: columns `sender`, `receiver`, `kind` (`embed`, `attention`, `mlp` or `rounding`), `distance` (the
        receiver's layer less the sender's: 0 is an attention layer of the router's own block; NaN of embed and
        rounding), `aps`, `ans_size` (|ANS|, both in logits) and `balance`.
        `by_distance`: columns `kind`, `distance`, `pairs` (how many), `aps` and `ans_size` (means over pairs) and
        `balance` (of those means).

    Raises:
        ValueError: no such position.

    Source: section 5.3, "Scoring pattern of layers" (figure 3): promotion tends to be local, inhibition global.
    """
    aps, ans = (_values(contributions, measure, position, False) for measure in ("aps", "ans"))
    layers, kinds = _layers_and_kinds(contributions)
    receiver_layers = np.array([int(name.removeprefix("M")) for name in contributions.receivers])
    row, column = np.nonzero(~np.isnan(aps))
    pairs = pd.DataFrame(
        {
            "sender": [contributions.senders[int(i)] for i in row],
            "receiver": np.array(contributions.receivers, dtype=object)[column],
            "kind": kinds[row],
            "distance": receiver_layers[column] - layers[row],
            "aps": aps[row, column],
            "ans_size": -ans[row, column],
        }
    )
    pairs["balance"] = _balance(pairs)
    with_distance = pairs.dropna(subset=["distance"])
    by_distance = with_distance.groupby(["kind", "distance"], as_index=False).agg(
        pairs=("aps", "size"), aps=("aps", "mean"), ans_size=("ans_size", "mean")
    )
    by_distance["distance"] = by_distance["distance"].astype(int)
    by_distance["balance"] = _balance(by_distance)
    return PromoteInhibit(pairs, by_distance)


def own_block_heads(contributions: RoutingContributions, position: str = "rest") -> pd.DataFrame:
    """Every head at the router of its own block.

    Args:
        contributions: by head.
        position: `lead` or `rest`.

    Returns:
        Columns `layer`, `head`, and every measure there is; a row for each head of each layer whose router was
        measured. Pivoted by layer and head, a measure is a panel of the paper's figure.

    Raises:
        ValueError: another granularity, or no such position.

    Source: section 6.2, figures 4 and 18.
    """
    _require_by(contributions, "head", "own_block_heads")
    values = {m: _values(contributions, m, position, False) for m in contributions.measures}
    rows = []
    for group in contributions.senders.groups:
        receiver = f"M{group.layer}"
        if group.kind != "heads" or receiver not in contributions.receivers:
            continue
        start = contributions.senders.slice_of(group.component).start
        column = contributions.receivers.index(receiver)
        for head in range(group.names[0].count):
            measured = {m: values[m][start + head, column] for m in contributions.measures}
            rows.append({"layer": group.layer, "head": head, **measured})
    return pd.DataFrame(rows, columns=["layer", "head", *contributions.measures])


class ExpertRank(NamedTuple):
    """Attributes:
    expert, receiver: names.
    rank: of the expert's measure at the receiver among the routed experts of its own layer, 1 the largest.
    n_experts: how many were ranked.
    value: the measure.
    """

    expert: str
    receiver: str
    rank: int
    n_experts: int
    value: float


def expert_variance_rank(
    contributions: RoutingContributions,
    expert: str,
    receiver: str | int | None = None,
    *,
    measure: str = "variance",
    position: str = "rest",
    when_active: bool = False,
) -> ExpertRank:
    """The rank of one expert among the experts of its layer, by how much it moves a router.

    By default the mean is over all tokens, where an expert that a token did not choose counts 0; that is the mean of
    the paper's section 5.1, and favours experts that are often chosen. With `when_active` it is over the tokens that
    chose the expert, and experts that none chose are not ranked.

    Args:
        contributions: by expert.
        expert: a routed expert, `"M1E9"`.
        receiver: None is the first measured router after the expert's layer.
        measure, position, when_active: see `top_senders`.

    Raises:
        ValueError: another granularity; no routed expert of this name; a receiver that it does not reach; with
            `when_active`, an expert that was never chosen.

    Source: appendix H, table 2, of super experts toward the next MoE layer.
    """
    _require_by(contributions, "expert", "expert_variance_rank")
    index = contributions.senders.index(expert)
    group = contributions.senders.group_of(index)
    places = contributions.senders.slice_of(group.component)
    if group.layer is None or group.kind != "experts" or index - places.start >= group.names[0].count:
        raise ValueError(f"{expert!r} is no routed expert, so it has no rank among those of its layer")
    column = (
        _next_receiver(contributions, group.layer)
        if receiver is None
        else contributions.receiver_index(receiver)
    )
    if column is None:
        raise ValueError(f"no measured router comes after layer {group.layer}, that of {expert}")
    name = contributions.receivers[column]
    if int(name.removeprefix("M")) <= group.layer:
        raise ValueError(f"{expert} writes after the router of {name} has read")
    sizes = _sizes(contributions, measure, position, when_active)[:, column]
    routed = sizes[places.start : places.start + group.names[0].count, None]
    rank = _ranks(routed)[index - places.start, 0]
    if np.isnan(rank):
        raise ValueError(
            f"no token ({position}) chose {expert}, so it has no {measure} at {name} when active"
        )
    value = _values(contributions, measure, position, when_active)[index, column]
    return ExpertRank(expert, name, int(rank), int((~np.isnan(routed)).sum()), float(value))


class RankCorrelation(NamedTuple):
    """Attributes:
    rho: Spearman's rank correlation; NaN, like `p_value`, where one of the two does not vary.
    p_value: two-sided, of no association.
    n_experts: over how many.
    """

    rho: float
    p_value: float
    n_experts: int


def variance_rank_correlation(
    contributions: RoutingContributions,
    component: str,
    receiver: str | int,
    position: str = "rest",
    *,
    when_active: bool = False,
) -> RankCorrelation:
    """Whether the experts of a layer whose scores vary most at a router also move its chosen experts most.

    Spearman's correlation, over the routed experts of one MoE layer, between their variance at the receiver and the
    AARV there: by how many ranks its top-K move when the expert's scores are set to zero.

    Args:
        contributions: by expert, with `rank_shift=True`.
        component: an MoE layer, `"M1"`.
        receiver: a later router, `"M5"` or its layer.
        position: `lead` or `rest`.
        when_active: over the tokens where an expert was chosen; those that none chose are left out. Otherwise over all
            tokens, where both measures are 0 for an expert that was not chosen: they then share how often it was.

    Raises:
        ValueError: another granularity; no rank shift; no such layer or receiver; one that does not reach the other;
            fewer than three experts.

    Source: section 7.2, figure 6, and appendix N.
    """
    _require_by(contributions, "expert", "variance_rank_correlation")
    if "aarv" not in contributions.measures:
        raise ValueError("these contributions have no AARV; measure it with rank_shift=True")
    places, column = contributions.senders.slice_of(component), contributions.receiver_index(receiver)
    group = contributions.senders.group_of(places.start)
    if group.layer is None or group.kind != "experts":
        raise ValueError(f"{component!r} has no routed experts")
    if int(contributions.receivers[column].removeprefix("M")) <= group.layer:
        raise ValueError(f"{component} writes after the router of {contributions.receivers[column]} has read")
    routed = slice(places.start, places.start + group.names[0].count)
    variance, aarv = (
        _values(contributions, measure, position, when_active)[routed, column]
        for measure in ("variance", "aarv")
    )
    there = ~np.isnan(variance) & ~np.isnan(aarv)
    if there.sum() < 3:
        raise ValueError(f"{int(there.sum())} experts of {component} were chosen; a correlation takes three")
    if np.ptp(variance[there]) == 0 or np.ptp(aarv[there]) == 0:
        return RankCorrelation(np.nan, np.nan, int(there.sum()))
    found = spearmanr(variance[there], aarv[there])
    return RankCorrelation(float(found.statistic), float(found.pvalue), int(there.sum()))  # type: ignore[union-attr]


# ---- arrays ----


def _values(
    contributions: RoutingContributions, measure: str, position: str, when_active: bool
) -> Float[np.ndarray, "sender receiver"]:
    values = (contributions.when_active if when_active else contributions.measure)(measure)
    if position not in values:
        raise ValueError(f"position must be one of {', '.join(values)}, not {position!r}")
    return values[position]


def _sizes(
    contributions: RoutingContributions, measure: str, position: str, when_active: bool
) -> Float[np.ndarray, "sender receiver"]:
    values = _values(contributions, measure, position, when_active)
    return 1 - values if measure == "overlap" else np.abs(values)


def _ranks(sizes: Float[np.ndarray, "sender receiver"]) -> Float[np.ndarray, "sender receiver"]:
    """Of each column, 1 the largest, ties to the earlier row; NaN where there is no size."""
    order = np.argsort(np.where(np.isnan(sizes), np.inf, -sizes), axis=0, kind="stable")
    ranks = np.empty(sizes.shape)
    np.put_along_axis(ranks, order, np.arange(1.0, len(sizes) + 1)[:, None], axis=0)
    return np.where(np.isnan(sizes), np.nan, ranks)


def _layers_and_kinds(contributions: RoutingContributions) -> tuple[np.ndarray, np.ndarray]:
    """Each sender's layer (NaN of embed and rounding), and what kind of component it is of."""
    groups = contributions.senders.groups
    kinds = {"A": "attention", "M": "mlp"}
    layers = np.repeat([np.nan if g.layer is None else float(g.layer) for g in groups], [*map(len, groups)])
    names = [g.component if g.layer is None else kinds[g.component[0]] for g in groups]
    return layers, np.repeat(np.array(names, dtype=object), [*map(len, groups)])


def _balance(frame: pd.DataFrame) -> Float[np.ndarray, " row"]:
    aps, ans_size = (frame[name].to_numpy(dtype=float) for name in ("aps", "ans_size"))
    total = aps + ans_size
    return np.divide(aps - ans_size, total, out=np.full(len(frame), np.nan), where=total > 0)


def _next_receiver(contributions: RoutingContributions, layer: int) -> int | None:
    later = [i for i, r in enumerate(contributions.receivers) if int(r.removeprefix("M")) > layer]
    return later[0] if later else None


def _require_by(contributions: RoutingContributions, by: str, function: str) -> None:
    if contributions.by != by:
        raise ValueError(f"{function} reads contributions by {by!r}, and these are by {contributions.by!r}")
