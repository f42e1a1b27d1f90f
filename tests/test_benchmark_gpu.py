"""benchmarks/gpu.py runs, at a tiny size and on a CPU: what it measures there means nothing."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module; it and what it imports beside it are forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("gpu")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.slow
def test_small(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every row is there and a number, answers were checked, and nothing but what was asked for is written."""
    before = sorted(BENCHMARKS.rglob("*.json"))
    output = tmp_path / "new" / "small.json"
    options = ["--small", "--rounds", "2", "--directory", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    gpu.main()
    results = json.loads(output.read_text())
    assert results["measured"]["versions"]["torch"] == torch.__version__
    assert results["measured"]["rounds"] == 2
    rows = {**results["rows"], **results["loading"]["rows"]}
    assert [name.split(",")[0] for name in rows] == [
        "matmul peak",
        *["forward"] * 5,
        *["contributions"] * 2,
        *["census"] * 3,
        "reading the files",
        "loading",
        "loading / reading",
    ]
    for name, values in rows.items():
        assert 0 < values["25%"] <= values["median"] <= values["75%"] < math.inf, name
    assert results["checked"]["ablations"] == 2 * 23 * 2
    if not torch.cuda.is_available():
        assert results["checked"]["census, nats"] <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert sorted(BENCHMARKS.rglob("*.json")) == before


@pytest.mark.slow
def test_answers_are_checked(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed of a model that gives other logits."""
    right = gpu.models_of

    def wrong(*arguments: Any) -> Any:
        hf, model = right(*arguments)
        with torch.no_grad():
            model.blocks[1].mlp.experts.W_down.mul_(1.01)
        return hf, model

    monkeypatch.setattr(gpu, "models_of", wrong)
    monkeypatch.setattr(gpu, "interleaved", lambda *arguments: pytest.fail("something was timed"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(AssertionError, match="HookedMoE differs from transformers by"), torch.no_grad():
        gpu.on_device(gpu.small_config(), torch.float32, device, (2, 8), 1, 64)


@pytest.mark.slow
def test_without_a_device(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert "there is no CUDA device here; --small runs" in capsys.readouterr().err


@pytest.mark.slow
def test_where_results_go(gpu: Any) -> None:
    path = gpu.results_path("NVIDIA A100-SXM4-80GB", "2026-01-02T03:04:05+00:00")
    assert path == BENCHMARKS / "results" / "nvidia-a100-sxm4-80gb-2026-01-02.json"
