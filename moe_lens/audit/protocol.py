"""The audit: does a metric say which of the experts at work matters, token by token?

    found = audit(census, metric_table)
    found.verdicts()

At each position the active routed experts (never the shared ones) are ranked by the importance that the metric claims,
and what ablating the highest does to the loss is compared with what ablating the lowest does. "High" is throughout what
the metric claims to be most important: its highest value, or its lowest where `higher_is_more_important` is False. So a
`valid` gate_entropy means that low entropy marks the experts that matter, and `pruning_gain` is of removing the expert
that the metric would have removed. A metric is causally valid at a layer if the difference is reliably positive.

Controls go through the same machinery with a quantity of the token itself in the metric's place: its routing weight,
and, where the census has it, the first-order attribution, the positive control: a protocol that cannot see that one has
no power.

Columns of `Audit.cells`, one row per (family, metric, layer):

model, scope, how, as_released   of what: scope `token` and `sequence` are different experiments; `as_released` is whose
                    released definitions the metrics have, if any
family, metric, higher_is_more_important, layer   family `metrics`: of the table, a value per expert. Family `control`:
                    columns of the census, a value per expert and token, and a higher one claims more
n_positions         of the cell: all, or the sample
n_undefined         of these, dropped because an active expert has no value (never active in the metric's corpus)
n_ties              dropped because the metric ties where highest or lowest end
n_pairs             the rest; n_documents of these, n_zero with a difference of exactly zero
high_delta_loss, low_delta_loss   mean change of the loss, nats; mean_difference is of these, with standard_error
d, d_standard_error, d_low, d_high   Cohen's d of the paired differences and its interval
t, df, p_t, p_wilcoxon, rank_biserial   with documents as clusters
t_plain, p_t_plain, p_wilcoxon_plain    as published, positions taken for independent
log_bayes_factor, bayes_factor, p_tost, n_effective, detectable_d   see `moe_lens.audit.paired_tests`
n_family            cells that are corrected for: those of all metrics, or of this control. Each control answers a
                    question of its own, as the published one does over its five layers
p_t_holm, p_wilcoxon_holm, p_bh   corrected within these; Benjamini-Hochberg's is of p_t
p_t_bonferroni, p_t_plain_bonferroni   n_family p: at 4 metrics and 5 layers the published threshold of 0.05 / 20, and
                    0.05 / 5 for the control; the second one of the published test
p_tost_holm         likewise of p_tost. The verdict takes p_tost as it is: each cell that is called `equivalent` may be
                    wrong 5% of the time where its effect is as large as the bound
verdict             see `moe_lens.audit.corrections.verdict`
rho                 control routing_weight: Spearman's, over pairs, of w_high / w_low and the loss difference; NaN where
                    one of them does not vary
spearman, kendall   mean over positions of the rank correlation of claimed importance and loss change over all active
                    experts, each with _standard_error, and the n_correlations positions where both vary
pruning_gain        mean loss of removing a random active expert less that of removing the metric's lowest, nats, with
                    _standard_error: above 0, the metric saves loss. Of the n_positions - n_undefined positions, as are
                    random_delta_loss, lowest_delta_loss and best_delta_loss (the expert whose removal turns out best)
rank_slope          nats from the token's lowest expert to its highest, by regression of the loss change
                    on the within-token rank with document effects; rank_slope_standard_error is clustered by document,
                    infinite where the metric ties everywhere; rank_r_squared is within documents
log_odds            natural log Bayes factor against the empty model, in which no metric says anything
posterior           of this metric, among the empty model (posterior_empty) and all metrics of the table at this layer,
                    all equally likely to start with; a control is compared with the empty model alone. See
                    `moe_lens.audit.metric_comparison`
odds_design_effect  rows per independent row, by which log_odds is tempered; one for all that are compared
n_odds_rows         (position, active expert) of the comparison. Models must be of the same rows: those of positions at
                    which every metric compared has a value for all active experts. With n, each cell has positions of
                    its own, and so has the comparison of the metrics; a control's is of its cell's

A cell with fewer than two pairs has NaN in whatever needs them, counts in its family as p = 1, and is `inconclusive`.
Where fewer than two documents have rows to compare, the columns from rank_slope to odds_design_effect are NaN.

Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
(arXiv:2606.10703), section 2 and tables 1 to 6; there at n = 200 positions a cell, here at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from moe_lens.audit.audit_result import Audit
from moe_lens.audit.census_table import COLUMNS, Census
from moe_lens.audit.metric_comparison import EMPTY
from moe_lens.audit.metric_table import MetricTable
from moe_lens.audit.paired_tests import SMALLEST_EFFECT, check_levels, paired_test
from moe_lens.audit.protocol_cells import LayerRows, read_cell
from moe_lens.audit.protocol_odds import Odds, odds_alone, odds_between
from moe_lens.audit.protocol_table import Cell, Family, table_of
from moe_lens.routing.arguments import few, natural_number, positive_integer

__all__ = ["CONTROLS", "Audit", "audit"]

CONTROLS = ("routing_weight", "first_order")
"""Per-token quantities that are audited beside the metrics, where the census has them."""
_NO_CONTROL = tuple(name for name in COLUMNS if name not in ("routing_weight", "gap_norm"))
_OUTCOMES = ("kl", "null_delta_loss", "delta_")


@dataclass(frozen=True)
class _Asked:
    """What an audit is of, checked."""

    layers: tuple[int, ...]
    metrics: tuple[str, ...]
    controls: tuple[str, ...]
    n: int | None
    seed: int
    compare: int
    smallest_effect: float
    alpha: float


def audit(
    census: Census,
    metric_table: MetricTable | None,
    *,
    metrics: Sequence[str] | str | None = None,
    layers: Sequence[int] | int | None = None,
    controls: Sequence[str] | str | None = None,
    n: int | None = None,
    seed: int = 0,
    compare: int = 1,
    smallest_effect: float = SMALLEST_EFFECT,
    alpha: float = 0.05,
    verbose: bool = False,
) -> Audit:
    """Test every metric at every layer, and the controls. See the module for what comes out.

    A layer is read at a time. For 10^6 positions with 8 active experts that is about 1.2 GiB at its largest.

    Args:
        census: of every active expert at every token (`census(model, ...)`), zero ablation in the source.
        metric_table: population metrics of the same model (`expert_metrics(model, ...)`), of any corpus. None: the
            controls alone.
        metrics: names in the table; None is all.
        layers: None is all that the census has.
        controls: per-token columns of the census; None is `CONTROLS`, as far as the census has them. `gap_norm` and
            `direct` can be others.
        n: positions drawn for each cell, without replacement, before any is dropped; None is all.
        seed: of the draws.
        compare: the mean of so many of the highest is compared with the mean of so many of the lowest; each is ablated
            alone.
        smallest_effect: Cohen's d below which a metric is `equivalent` to none.
        alpha: of verdicts, intervals and detectable effects.
        verbose: show a progress bar.

    Raises:
        ValueError: census and metrics of other weights, or metrics of a model that hooks edited; layers, metrics or
            controls that are not there; a metric called "empty"; more positions wanted than there are; 2 compare above
            the number of active experts.
    """
    check_levels(smallest_effect, alpha)
    if metric_table is not None:
        _require_same_model(census, metric_table)
    asked = _Asked(
        layers=_layers(census, metric_table, layers),
        metrics=_metrics(metric_table, metrics),
        controls=_controls(census, controls),
        n=None if n is None else positive_integer(n, "n"),
        seed=natural_number(seed, "seed"),
        compare=positive_integer(compare, "compare"),
        smallest_effect=float(smallest_effect),
        alpha=float(alpha),
    )
    if not asked.metrics and not asked.controls:
        raise ValueError("there is neither a metric nor a control to audit")
    layers_shown = tqdm(asked.layers, desc="tests", unit="layer", disable=not verbose)
    cells = [cell for layer in layers_shown for cell in _of_layer(census, metric_table, layer, asked)]
    of = {name: str(census.provenance.get(name, "unknown")) for name in ("model", "scope", "how")}
    released = None if metric_table is None else metric_table.provenance.get("as_released")
    return Audit(
        table_of(cells, {**of, "as_released": released or ""}, asked.alpha),
        _provenance(asked, census, metric_table),
    )


# ---- what is asked for ----


def _require_same_model(census: Census, table: MetricTable) -> None:
    ours, theirs = census.provenance, table.provenance
    for what, of in (("census", ours), ("metric table", theirs)):
        if not of.get("weights"):
            raise ValueError(
                f"the {what} does not say of which weights it is, so whether the two belong together is unknown"
            )
    if ours["weights"] != theirs["weights"]:
        described = [
            f"{of.get('model')} (revision {of.get('revision')}, {of.get('dtype')}, weights {of['weights'][:12]})"
            for of in (ours, theirs)
        ]
        raise ValueError(
            f"the census is of {described[0]} and the metrics are of {described[1]}; both must be of the same "
            f"weights in the same dtype"
        )
    if theirs.get("edited"):
        raise ValueError(
            f"the metrics are of a model that hooks edited at {few(theirs['edited'])}, and the census is of the model "
            f"as it is"
        )


def _layers(census: Census, table: MetricTable | None, layers: Sequence[int] | int | None) -> tuple[int, ...]:
    asked = (
        census.layers if layers is None else (layers,) if isinstance(layers, (int, np.integer)) else layers
    )
    chosen = tuple(sorted({int(layer) for layer in asked}))
    if not chosen:
        raise ValueError("no layer is asked for, or the census has no rows")
    there = {"census": census.layers} | ({} if table is None else {"metric table": table.layers})
    for what, has in there.items():
        missing = [layer for layer in chosen if layer not in has]
        if missing:
            raise ValueError(
                f"the {what} has no layer {few(missing)}; it is of layers {few(has)}; layers= chooses some"
            )
    return chosen


def _metrics(table: MetricTable | None, metrics: Sequence[str] | str | None) -> tuple[str, ...]:
    there = () if table is None else table.metrics
    chosen = there if metrics is None else (metrics,) if isinstance(metrics, str) else tuple(metrics)
    unknown = [name for name in chosen if name not in there]
    if unknown:
        raise ValueError(f"the metric table has no {few(unknown)}; it has {', '.join(there) or 'nothing'}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"metrics must be asked for once each, not {list(chosen)}")
    if EMPTY in chosen:
        raise ValueError(f"{EMPTY!r} is the model without a metric, so no metric can be called that")
    return chosen


def _controls(census: Census, controls: Sequence[str] | str | None) -> tuple[str, ...]:
    # What an ablation did is no predictor of it, and position and clean loss are the same for all experts of a token.
    there = [name for name in census.columns if name not in _NO_CONTROL and not name.startswith(_OUTCOMES)]
    if controls is None:
        return tuple(name for name in CONTROLS if name in there)
    chosen = (controls,) if isinstance(controls, str) else tuple(controls)
    unknown = [name for name in chosen if name not in there]
    if unknown:
        raise ValueError(f"{few(unknown)} is no predictor that the census has; it has {', '.join(there)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"controls must be asked for once each, not {list(chosen)}")
    return chosen


# ---- what is done ----


def _of_layer(census: Census, table: MetricTable | None, layer: int, asked: _Asked) -> list[Cell]:
    rows = LayerRows.of(census, layer, asked.controls)
    if 2 * asked.compare > rows.k:
        raise ValueError(
            f"compare={asked.compare} needs {2 * asked.compare} active routed experts, and layer {layer} has "
            f"{rows.k}"
        )
    if table is not None and rows.expert.max() >= table.n_experts:
        raise ValueError(
            f"the census has M{layer}E{rows.expert.max()}, and the metric table {table.n_experts} experts"
        )
    cells = []
    if table is not None:
        of_layer = {name: table.importance(name)[table.layer_index(layer)] for name in asked.metrics}
        between = odds_between(rows.sampled(asked.n, asked.seed, "comparison metrics"), of_layer)
        for name, of_experts in of_layer.items():
            of_cell = rows.sampled(asked.n, asked.seed, f"metrics {name}")
            found = _cell("metrics", name, of_cell, of_experts[of_cell.expert], between[name], asked)
            cells.append(replace(found, higher_is_more_important=table.higher_is_more_important(name)))
    for name in asked.controls:
        of_cell = rows.sampled(asked.n, asked.seed, f"control {name}")
        odds = odds_alone(of_cell, name)
        cells.append(_cell("control", name, of_cell, of_cell.columns[name], odds, asked))
    return cells


def _cell(
    family: Family,
    name: str,
    rows: LayerRows,
    values: Float[np.ndarray, "slot position"],
    odds: Odds,
    asked: _Asked,
) -> Cell:
    pairs, beyond = read_cell(rows, values, asked.compare)
    test = None
    if len(pairs.high) >= 2:
        test = paired_test(
            pairs.high, pairs.low, pairs.document, smallest_effect=asked.smallest_effect, alpha=asked.alpha
        )
    return Cell(family, name, rows.layer, rows.n_positions, pairs, test, beyond, odds)


def _provenance(asked: _Asked, census: Census, table: MetricTable | None) -> dict[str, Any]:
    of = census.provenance
    tokens = of.get("tokens")
    return {
        "kind": "audit",
        "model": of.get("model"),
        "revision": of.get("revision"),
        "weights": of.get("weights"),
        "scope": of.get("scope"),
        "how": of.get("how"),
        "census_finished": census.finished,
        "same_corpus": None
        if table is None or tokens is None
        else tokens == table.provenance.get("fingerprint"),
        "settings": {
            "layers": list(asked.layers),
            "metrics": list(asked.metrics),
            "controls": list(asked.controls),
            "n": asked.n,
            "seed": asked.seed,
            "compare": asked.compare,
            "smallest_effect": asked.smallest_effect,
            "alpha": asked.alpha,
        },
        "census": of,
        "metric_table": None
        if table is None
        else {
            **table.provenance,
            "layers": list(table.layers),
            "n_tokens": table.n_tokens,
            "n_documents": table.n_documents,
        },
        "versions": {name: version(name) for name in ("moe-lens", "numpy", "scipy")},
    }
