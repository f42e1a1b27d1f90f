"""An audit as text, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit_page.answers import positive_control_said, ranks_silent_said
from moe_lens.audit_page.experiments import (
    POSITIVE_CONTROL,
    VERDICTS,
    Experiment,
    counted,
    experiments_of,
    verdict_counts,
)
from moe_lens.audit_page.noise import noise_said
from moe_lens.audit_page.numbers import LOW, Row, rows_of
from moe_lens.audit_page.published import TITLES, said_by

WIDTH = 110
_LONGEST_NAME = 34
_MARKS = {"valid": ">", "inverted": "<", "disagreement": "x", "equivalent": "=", "inconclusive": "?"}
_LOW = " (low)"
_CELL = 8
_MEANING = (
    "equivalent: |d| is shown to be below the smallest effect (two one-sided tests at 5%, uncorrected for many\n"
    "  cells); it may still differ from zero, and may still help pruning. Other verdicts: p after Holm's correction"
)


def audit_text(tables: AuditTables) -> str:
    """What `moe-lens audit` prints: of each experiment d by metric and layer with a mark for the verdict, how many of
    each verdict there are, whether the positive control is seen; then ours beside the published audit's numbers.

    At most 110 columns wide, unless a model's name is longer. A model that failed verification has no result.
    """
    parts = [_verification(tables, one["label"], one["passed"]) for one in tables.provenance]
    experiments = experiments_of(tables)
    if experiments:
        parts.append(
            "d of each metric and layer; "
            + ", ".join(f"{_MARKS[name]} {name}" for name in VERDICTS)
            + "\n"
            + _MEANING
        )
    parts += [_experiment(one) for one in experiments]
    published = rows_of("published", tables.published)
    kinds = {row.name: one.kind for one in experiments for row in one.rows}
    for label in dict.fromkeys(row["label"] for row in published):
        parts.append(_published([row for row in published if row["label"] == label], kinds))
    return "\n\n".join(parts)


def _plain(text: object) -> str:
    """Without characters that a terminal would act on."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def _shown(row: Row, column: str) -> str:
    """With characters that every terminal has."""
    return row.shown(column).replace("−", "-").replace("–", "-").replace("∞", "inf")


def _cut(text: object, width: int = _LONGEST_NAME) -> str:
    plain = _plain(text)
    return plain if len(plain) <= width else f"{plain[: width - 2]}.."


def _verification(tables: AuditTables, label: str, passed: bool) -> str:
    rows = [row for row in rows_of("verification", tables.verification) if row["label"] == label]
    n_passed = sum(bool(row["passed"]) for row in rows)
    said = f"{_plain(label)}: {n_passed} of {len(rows)} checks against transformers passed"
    if passed:
        return said
    failed = "".join(
        f"\n  {row['check']}: {_shown(row, 'value')} {row['unit']}, must be {row['rule']} {_shown(row, 'tolerance')}"
        for row in rows
        if not row["passed"]
    )
    return f"{said}; verification FAILED, so there is no result of it{failed}"


def _experiment(one: Experiment) -> str:
    most = max(one.rows, key=lambda row: row["n_positions"])
    head = (
        f"{_plain(one.name)}: {most.shown('n_positions')} positions in "
        f"{max(row['n_documents'] for row in one.rows):,} documents"
    )
    by_place = {(row["family"], row["metric"], int(row["layer"])): row for row in one.rows}
    low = {row["metric"] for row in one.rows if row.direction}
    names = [
        f"{_cut(metric, _LONGEST_NAME - len(_LOW))}{_LOW}" if metric in low else _cut(metric)
        for _, metric in one.metrics
    ]
    width = max(map(len, names))
    at_once = max(1, (WIDTH - width) // _CELL)
    blocks = []
    for start in range(0, len(one.layers), at_once):
        layers = one.layers[start : start + at_once]
        # Each number ends before its mark.
        lines = ["".ljust(width) + "".join(f"M{layer}".rjust(_CELL - 1) + " " for layer in layers)]
        before = one.metrics[0][0]
        for (family, metric), name in zip(one.metrics, names, strict=True):
            if family != before:
                lines.append("controls")
                before = family
            cells = "".join(_cell(by_place.get((family, metric, layer))) for layer in layers)
            lines.append(name.ljust(width) + cells)
        blocks.append("\n".join(line.rstrip() for line in lines))
    said = [*_in_words(one), noise_said(one)]
    said += [f"(low): {LOW}"] if low else []
    wrapped = [part for line in said for part in textwrap.wrap(_plain(line), WIDTH, subsequent_indent="  ")]
    return "\n\n".join([head, *blocks, "\n".join(wrapped)])


def _cell(row: Row | None) -> str:
    if row is None:
        return " " * _CELL
    return _shown(row, "d").rjust(_CELL - 1) + _MARKS.get(row["verdict"], " ")


def _in_words(one: Experiment) -> list[str]:
    lines = [ranks_silent_said(one)]
    metrics = one.of(family="metrics")
    if metrics:
        lines.append(f"metrics: {_counts(metrics, one)}")
    for family, metric in one.metrics:
        if family != "control":
            continue
        rows = one.of(family=family, metric=metric)
        line = f"control {_plain(metric)}: {_counts(rows, one)}"
        wrong = positive_control_said(one) if metric == POSITIVE_CONTROL else ""
        lines.append(f"{line}; {wrong}" if wrong else line)
    if not one.of(family="control", metric=POSITIVE_CONTROL):
        lines.append(positive_control_said(one))
    return [line for line in lines if line]


def _counts(rows: Sequence[Row], one: Experiment) -> str:
    """How many of each verdict; of those that are equivalent, how many differ from zero all the same."""
    both = [row for row in one.of(verdict="equivalent", **one.by_both_tests) if row in rows]
    more = {"equivalent": f" ({len(both)} of them significant by both tests)"} if both else {}
    counts = [f"{n} {name}{more.get(name, '')}" for name, n in verdict_counts(rows).items()]
    return f"{', '.join(counts)}; {len(rows)} in all"


# ---- beside the published audit ----


def _published(rows: Sequence[Row], kinds: dict[str, str]) -> str:
    """A block for each of the paper's tables."""
    parts = [f"{_plain(rows[0]['label'])} beside the published audit (arXiv:2606.10703)"]
    for number in dict.fromkeys(row["table"] for row in rows):
        of_table = [row for row in rows if row["table"] == number]
        parts.append(_published_table(of_table, int(number), kinds))
    return "\n\n".join(parts)


def _published_table(rows: Sequence[Row], number: int, kinds: dict[str, str]) -> str:
    """What each side is; then a line for each number. Ours is in a column for each experiment, named by a letter."""
    ours = list(dict.fromkeys(_kind(row, kinds) for row in rows if row["ours_row"]))
    letters = {kind: f"({chr(97 + i)})" for i, kind in enumerate(ours)}
    lines = [f"table {number}: {TITLES.get(number, '')}"]
    defined: dict[tuple[str, ...], str] = {}
    lines += _side("paper", rows, "published", defined)
    for kind, letter in letters.items():
        own = [row for row in rows if row["ours_row"] and _kind(row, kinds) == kind]
        lines += _side(f"{letter} {kind}", own, "ours", defined)
    # Where there is a text without a number, it says why there is none.
    for why in dict.fromkeys(row["ours_definition"] for row in rows if not row["ours_row"]):
        lines += textwrap.wrap(_plain(why), WIDTH - 4, initial_indent="  ", subsequent_indent="    ")
    head = f"{'metric':<{_LONGEST_NAME}} {'layer':>5} {'k':>2}  {'quantity':<13} {'paper':>8}"
    if letters:
        lines.append(head + "".join(f" {letter:>8}" for letter in letters.values()))
    places: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        place = tuple(row[name] for name in ("metric", "layer", "removed", "quantity"))
        places.setdefault(place, []).append(row)
    without = 0
    for (metric, layer, removed, quantity), same in places.items():
        if not any(row["ours_row"] for row in same):
            without += 1
            continue
        values = {_kind(row, kinds): _shown(row, "ours") for row in same}
        line = f"{_cut(metric):<{_LONGEST_NAME}} {layer:>5} {removed or '':>2}  {quantity:<13} "
        line += f"{_shown(same[0], 'published'):>8}"
        lines.append(line + "".join(f" {values.get(kind, '-'):>8}" for kind in ours))
    if without:
        lines.append(f"{counted(without, 'number')} of the paper without one of ours: see published.parquet")
    return "\n".join(lines)


def _side(name: str, rows: Sequence[Row], of: str, defined: dict[tuple[str, ...], str]) -> list[str]:
    """What is said of one side, wrapped; definitions that another side has are not said again."""
    said = []
    for what in ("scope", "sampling", "corpus"):
        texts = dict.fromkeys(str(row[f"{of}_{what}"]) for row in said_by(rows, of, what))
        said.append(f"{what}: {' to '.join(texts)}")
    statistics = dict.fromkeys(f"{row['quantity']}: {row[f'{of}_statistic']}" for row in rows)
    said += statistics
    definitions: dict[str, None] = {}
    for row in rows:
        of_metric = f"{row['metric']}: " if row["family"] == "metrics" else ""
        definitions[f"{of_metric}{row[f'{of}_definition']}"] = None
    other = defined.setdefault(tuple(definitions), name)
    wrapped = [_plain(name)]
    for text in (*said, *(definitions if other == name else (f"definitions: those of {other}",))):
        wrapped += textwrap.wrap(_plain(text), WIDTH - 4, initial_indent="    ", subsequent_indent="      ")
    return [f"  {line}" if i == 0 else line for i, line in enumerate(wrapped)]


def _kind(row: Row, kinds: dict[str, str]) -> str:
    return kinds.get(row["ours_row"], "ours") if row["ours_row"] else ""
