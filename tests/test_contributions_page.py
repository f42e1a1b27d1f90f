"""The page of a corpus's measures: every granularity's figures and largest senders, and no name trusted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_lens.corpus import Document, token_batches
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing_page import contributions_page_html, write_contributions_page
from moe_lens.routing_page_data import routing_decisions

PART = re.compile(r"[AM]\d+(H\d+|bias|E\d+(N\d+)?|S(N\d+)?|N\d+)")
EVIL = "<script>alert('moe')</script>"
SENTENCE = "The router sends every token to the experts whose readouts score it highest. "


def test_contributions_page(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model = model_of("deepseek_v2_groups")
    documents = [Document(f"{i}", "", f"{i}: {SENTENCE * (1 + i)}") for i in range(3)]
    batches = token_batches(model, documents, batch_size=2, prepend_bos=True)
    results = routing_contributions(
        model, batches, by=["layer", "head", "expert", "neuron"], rank_shift=False
    )
    results = {
        by: replace(result, provenance={**result.provenance, "model": EVIL, "corpus": [EVIL]})
        for by, result in results.items()
    }
    page = contributions_page_html(results)
    assert page.count('class="plotly-graph-div"') == 6 + 2 + 2
    assert "<script>alert" not in page
    assert "3 documents" in page
    for by, result in results.items():
        assert f"<h2>Senders by {by}</h2>" in page
        # What a granularity adds: not the whole components that the section by layer has.
        parts = [name for name in result.senders if by == "layer" or PART.fullmatch(name)]
        assert len(parts) > len(result.receivers)
        for receiver in result.receivers:
            top = result.top(receiver, n=len(result.senders))
            top = top[top.sender.isin(parts)].head(6)
            section = page.split(f"<h2>Senders by {by}</h2>")[1].split("<h2>")[0]
            cells = [f"{sender} {value:.3g}" for sender, value in top[["sender", "variance"]].to_numpy()]
            cells = cells or ["none comes before it"]
            assert "".join(f"<td>{cell}</td>" for cell in [receiver, *cells]) in section
    assert 'id="routing-page"' not in page
    decisions = routing_decisions(model, batches)
    path = write_contributions_page({"layer": results["layer"]}, tmp_path / "index.html", routing=decisions)
    text = path.read_text(encoding="utf-8")
    assert decisions.json in text
    assert text.count('class="plotly-graph-div"') == 6
    # Without the section by layer, whole components have tables of their own.
    assert "The largest whole components at each router" not in page
    alone = contributions_page_html({"head": results["head"]})
    assert alone.index("The largest heads at each router") < alone.index(
        "The largest whole components at each router"
    )
    with pytest.raises(ValueError, match="no results"):
        contributions_page_html({})
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_contributions_page(results, tmp_path / "absent" / "index.html")


def test_how_well_the_sums_close(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    result = routing_contributions(model, [SENTENCE, SENTENCE * 2])
    closed = f"The scores sum to every router's logits to {result.completeness_error:.1e} of the largest."
    in_doubt = "So the senders are not all that the routers read."
    page = contributions_page_html({"layer": result})
    assert closed in page
    assert "rounding" not in page
    assert in_doubt not in page
    half = contributions_page_html({"layer": replace(result, rounding_ratio=0.3)})
    assert "rounding is at most 0.3 of what rounding can be" in half
    assert in_doubt not in half
    # In half precision the sums close whatever is missing, and only this ratio tells.
    assert in_doubt in contributions_page_html({"layer": replace(result, rounding_ratio=1.4)})
    assert in_doubt in contributions_page_html({"layer": replace(result, completeness_error=0.1)})
