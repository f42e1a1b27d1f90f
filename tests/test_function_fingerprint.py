"""The fingerprint of a metric's function: other once the code is, and otherwise the same, in another process too."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens.audit.function_fingerprint import function_fingerprint
from moe_lens.audit.metric_registry import Metric, find_metrics, metric_names

SOURCE = """
def made(factor=2.0):
    def formula(statistics, power=1, *, offset=0.5):
        text = {"a", "b", "c", "d", "e"}
        inner = lambda value: value ** power + 3
        try:
            return inner(statistics.count) * factor + offset
        except KeyError:
            return "x" in {"p", "q", "r", "s"}
    return formula
"""


def made(source: str, **closure: Any) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(source, names)
    return names["made"](**closure)


def test_the_same_source_is_the_same() -> None:
    one, other = made(SOURCE), made("\n\n# elsewhere\n" + SOURCE)
    assert function_fingerprint(one) == function_fingerprint(other)
    assert len(function_fingerprint(one)) == 16
    assert function_fingerprint(one) == function_fingerprint(made(SOURCE.replace("inner", "within")))
    # Python rewrites bytecode that runs often.
    before = function_fingerprint(one)
    for _ in range(200):
        one(type("Statistics", (), {"count": 1}))
    assert function_fingerprint(one) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("offset=0.5", "offset=0.25"),  # a default by name
        ("power=1", "power=2"),  # a default
        ("power=1", "power=1.0"),
        ("+ 3", "+ 4"),  # a constant of a function within
        ("** power", "* power"),  # an operator within
        (") * factor", ") / factor"),  # an operator
        ("statistics.count", "statistics.n_tokens"),  # a name
        ("factor=2.0", "factor=3.0"),  # what the closure holds
        ('"r", "s"', '"r", "t"'),  # a set, which has no order
        ("KeyError", "ValueError"),
        ("power=1, *,", "power=1,"),
        ("return formula", "return formula.__get__(3)"),
    ],
)
def test_a_change_is_another(old: str, new: str) -> None:
    assert old in SOURCE
    assert function_fingerprint(made(SOURCE)) != function_fingerprint(made(SOURCE.replace(old, new)))


class Called:
    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, statistics: Any) -> Any:
        return statistics.count * self.factor


def doubled(value: float) -> float:
    return 2 * value


def halved(value: float) -> float:
    return value / 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.arange(5000.0), np.where(np.arange(5000) == 2500, 0, np.arange(5000.0))),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
        (doubled, halved),
        ([doubled], [halved]),
        ({"a": 1}, {"a": 2}),
        (Called(1.0), Called(2.0)),
        ("1", 1),
        ((1, (2, 3)), ((1, 2), 3)),
    ],
)
def test_what_a_closure_holds(one: Any, other: Any) -> None:
    assert function_fingerprint(made(SOURCE, factor=one)) != function_fingerprint(made(SOURCE, factor=other))
    assert function_fingerprint(made(SOURCE, factor=one)) == function_fingerprint(made(SOURCE, factor=one))


def test_whatever_can_be_called() -> None:
    found = [doubled, halved, Called(1.0), Called(2.0), Called(1.0).__call__, np.sum, np.mean]
    found += [
        functools.partial(doubled, 1),
        functools.partial(doubled, 2),
        functools.partial(halved, value=1),
    ]
    prints = [function_fingerprint(one) for one in found]
    assert len(set(prints)) == len(found)
    assert prints[2] == function_fingerprint(Called(1.0))
    # Objects that say nothing of themselves but where they lie.
    assert function_fingerprint(made(SOURCE, factor=object())) == function_fingerprint(
        made(SOURCE, factor=object())
    )


def recursive(depth: int) -> Callable[[int], int]:
    def itself(n: int) -> int:
        return depth if n == 0 else itself(n - 1)

    return itself


def test_a_function_that_calls_itself() -> None:
    assert function_fingerprint(recursive(3)) == function_fingerprint(recursive(3))
    assert function_fingerprint(recursive(3)) != function_fingerprint(recursive(4))


def test_metrics_have_fingerprints_of_their_own() -> None:
    prints = {one.name: one.fingerprint for one in find_metrics(None)}
    assert tuple(prints) == metric_names()
    assert len(set(prints.values())) == len(prints)
    assert Metric("mine", doubled).fingerprint == function_fingerprint(doubled)


@pytest.mark.slow
def test_another_process_has_the_same() -> None:
    code = (
        "from tests.test_function_fingerprint import *\n"
        "print(function_fingerprint(made(SOURCE)), function_fingerprint(made(SOURCE, factor=Called(2.0))))\n"
        "import moe_lens.audit.metric_formulas\n"
        "print([one.fingerprint for one in find_metrics(None)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert function_fingerprint(made(SOURCE)) in runs.pop()
