"""Tutorials run from the first cell to the last on the bundled model, quickly, and are kept without outputs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from moe_lens.page import POLICY

TUTORIALS = sorted((Path(__file__).parent.parent / "tutorials").glob("*.ipynb"))
SECONDS = 120


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_runs(
    path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell, in a kernel of its own; the figures are drawn, nothing is written beside the notebook, and the pages
    that it makes in a temporary folder load nothing from elsewhere."""
    # As in conftest.py: for so small a model, a second thread only waits.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    NotebookClient(
        notebook,
        timeout=3 * SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    print(f"{path.stem}: {time.monotonic() - start:.0f} s")
    figures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    drawn = [cell for cell in notebook.cells if cell.cell_type == "code" and _draws(cell.source)]
    assert len(figures) == len(drawn)
    assert list(tmp_path.iterdir()) == []
    pages = list(temporary.rglob("*.html"))
    assert bool(pages) == any("write_page(" in cell.source for cell in notebook.cells)
    for page in pages:
        assert POLICY in page.read_text(encoding="utf-8")


def _draws(source: str) -> bool:
    """Whether a cell ends with a figure."""
    last = source.strip().splitlines()[-1]
    figures = (
        "stripes(",
        "expert_lines(",
        "own_block_head_map(",
        "embedding_line(",
        "token_projection(",
        "name_mover_maps(",
        "effect_forest(",
        "control_lines(",
        "progressive_lines(",
        "redistribution_chains(",
        "scope_pairs(",
        "waterfall(",
    )
    return last.startswith(figures) or last.endswith(".waterfall()")
