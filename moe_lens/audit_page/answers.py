"""What an experiment found, in words: as HTML for a page, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moe_lens.audit.corrections import ENOUGH_DOCUMENTS
from moe_lens.audit_page.experiments import BASELINE, POSITIVE_CONTROL, Experiment
from moe_lens.audit_page.numbers import Row

_MOST_NAMED = 12


def answer(experiment: Experiment) -> str:
    """What it found, in words, as HTML."""
    silent = ranks_silent_said(experiment)
    first = f"{escape(silent)} " if silent else ""
    return (
        f"<p><b>{escape(experiment.name)}.</b> {first}{_verdicts(experiment)} {_best(experiment)}</p>"
        f"<p>{_positive_control(experiment)} {_others(experiment)}</p>"
    )


def ranks_silent_said(experiment: Experiment) -> str:
    """That no cell of the metrics can be valid, where there are too few documents, as text; else empty."""
    rows = experiment.of(family="metrics")
    if not rows or not all(experiment.ranks_are_silent(row) for row in rows):
        return ""
    most = max(int(row["n_documents"]) for row in rows)
    family = max(int(row["n_family"]) for row in rows)
    if most < ENOUGH_DOCUMENTS:
        return f"With under {ENOUGH_DOCUMENTS} documents ({most} here) every cell is inconclusive."
    return (
        f"With {most} documents the signed-rank test cannot reach {experiment.alpha:g} in a family of {family:,}: no "
        f"cell can be valid."
    )


def _verdicts(experiment: Experiment) -> str:
    if not experiment.of(family="metrics"):
        return "Only controls were audited."
    found = {"family": "metrics", "verdict": "equivalent"}
    differ = f" ({experiment.count(**found, **experiment.by_both_tests)} of them still differ from zero by both tests)"
    said = {
        "valid": "valid",
        "inverted": "inverted",
        "disagreement": "where the two tests disagree",
        "equivalent": f"of which |d| is shown to be below {experiment.smallest_effect:g}{differ}",
        "inconclusive": "inconclusive",
    }
    parts = [
        f"{experiment.count(family='metrics', verdict=name)} {text}"
        for name, text in said.items()
        if name in ("valid", "inverted") or experiment.of(family="metrics", verdict=name)
    ]
    return f"Of {experiment.count(family='metrics')} cells (metric and layer): {listed(parts)}."


def _best(experiment: Experiment) -> str:
    sentences = []
    if experiment.of(family="metrics") and not experiment.of(family="metrics", verdict="valid"):
        sentences.append(_none_valid(experiment))
    for verdict in ("valid", "inverted"):
        cells = experiment.of(family="metrics", verdict=verdict)
        if not cells:
            continue
        cells.sort(key=lambda row: -abs(row["d"]))
        named = [_cell_named(row) for row in cells[:_MOST_NAMED]]
        first = "" if len(cells) <= _MOST_NAMED else ", the largest of them"
        sentences.append(f"{verdict.capitalize()}{first}: {listed(named)}.")
    return " ".join(sentences)


def _cell_named(row: Row) -> str:
    return f"<code>{escape(row['metric'])}</code> at M{row.html('layer')} (d&nbsp;{row.html('d', link=row.anchor)})"


def _none_valid(experiment: Experiment) -> str:
    """Bold only where that is what was found, and not where too little was seen to say."""
    said = "No metric is shown to be valid at any layer"
    unclear = experiment.of(family="metrics", verdict="inconclusive")
    if not unclear:
        return f"<b>{said}.</b>"
    all_of = experiment.count(family="metrics")
    text = (
        f"{said}; {experiment.count(family='metrics', verdict='inconclusive')} of {all_of} cells are inconclusive, "
        f"which is no evidence of absence"
    )
    tested = sorted((row for row in unclear if row["detectable_d"] > 0), key=lambda row: row["detectable_d"])
    if tested:
        middle = tested[len(tested) // 2]
        text += f" (a single cell of them would show |d| from about {middle.html('detectable_d')} on)"
    return f"{text}."


# ---- the controls ----


def _positive_control(experiment: Experiment) -> str:
    cells = experiment.of(family="control", metric=POSITIVE_CONTROL)
    name = f"<code>{POSITIVE_CONTROL}</code>"
    if not cells:
        return f"There is no positive control ({name}) here, so whether this could have seen an effect is not shown."
    valid = [row for row in cells if row["verdict"] == "valid"]
    unseen = [row for row in cells if row["verdict"] != "valid" and not _apart_from_zero(row)]
    other = [row for row in cells if row["verdict"] != "valid" and _apart_from_zero(row)]
    if len(unseen) == len(cells):
        return (
            f'<b class="bad">The positive control, {name}, is not seen at any layer (the interval of d includes zero): '
            f"so this protocol had no power here, and what it does not find may be there.</b>"
        )
    seen = {"family": "control", "metric": POSITIVE_CONTROL}
    said = (
        f"The positive control, {name}, is valid at {experiment.count(**seen, verdict='valid')} of "
        f"{experiment.count(**seen)} layers"
    )
    if valid:
        low, high = min(valid, key=lambda row: row["d"]), max(valid, key=lambda row: row["d"])
        said += f" (d&nbsp;{low.html('d')} to {high.html('d')})"
    parts = [said]
    if other:
        at = [
            f"M{row.html('layer')} (d&nbsp;{row.html('d')}, {escape(tests_said(experiment, row))})"
            for row in other
        ]
        parts.append(f"not <code>valid</code>, though its interval is apart from zero, at {listed(at)}")
    if unseen:
        at = listed([f"M{row.html('layer')}" for row in unseen])
        parts.append(
            f'<b class="bad">not seen at {at}, where the interval of d includes zero and this protocol had no power</b>'
        )
    if len(parts) == 1:
        parts[0] += (
            ": effects of this size are seen; of smaller ones see the column <code>detectable_d</code>"
        )
    return f"{'; '.join(parts)}."


def _apart_from_zero(row: Row) -> bool:
    return bool(row["d_low"] > 0 or row["d_high"] < 0)


def tests_said(experiment: Experiment, row: Row) -> str:
    """What each test says of a cell that is not valid, as text."""
    if row["verdict"] == "equivalent":
        return f"|d| shown to be below {experiment.smallest_effect:g}"
    by_t = "significant" if row["p_t_holm"] <= experiment.alpha else "not significant"
    if experiment.ranks_are_silent(row):
        by_ranks = "cannot be"
    else:
        by_ranks = "significant" if row["p_wilcoxon_holm"] <= experiment.alpha else "not significant"
    return f"t: {by_t}; ranks: {by_ranks}"


def positive_control_said(experiment: Experiment) -> str:
    """What is wrong with the positive control, as text; empty where it is valid at some layer."""
    rows = experiment.of(family="control", metric=POSITIVE_CONTROL)
    if not rows:
        return "no positive control: whether this could have seen an effect is not shown"
    if any(row["verdict"] == "valid" for row in rows):
        return ""
    if not any(map(_apart_from_zero, rows)):
        return "the positive control is NOT SEEN (intervals of d include zero), so this protocol had no power here"
    why: dict[str, list[int]] = {}
    for row in rows:
        why.setdefault(tests_said(experiment, row), []).append(int(row["layer"]))
    at = "; ".join(f"{', '.join(f'M{layer}' for layer in layers)} ({text})" for text, layers in why.items())
    return f"the positive control is not `valid` at any layer: {at}"


def _others(experiment: Experiment) -> str:
    sentences = []
    for family, name in experiment.metrics:
        if family == "control" and name != POSITIVE_CONTROL:
            of = {"family": family, "metric": name}
            sentences.append(
                f"The control <code>{escape(name)}</code> is valid at {experiment.count(**of, verdict='valid')} of "
                f"{experiment.count(**of)} layers."
            )
    rows = experiment.of(family="metrics", metric=BASELINE)
    if rows:
        found = [row for row in rows if _significant(experiment, row)]
        cells = [
            f"M{row.html('layer')} (d&nbsp;{row.html('d', link=row.anchor)}, {row['verdict']})"
            for row in found
        ]
        sentences.append(
            f"The baseline <code>{BASELINE}</code> is one fixed order of each layer’s experts, drawn by chance; as "
            f"experts differ, such an order can have an effect of its own, so it is no null. "
            + (
                f"A test finds something of it at {listed(cells)}."
                if found
                else "No test finds anything of it at any layer."
            )
        )
    return " ".join(sentences)


def _significant(experiment: Experiment, row: Row) -> bool:
    return bool(row["p_t_holm"] <= experiment.alpha or row["p_wilcoxon_holm"] <= experiment.alpha)


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
