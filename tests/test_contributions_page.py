"""The page of a corpus's measures: every granularity's figures and largest senders, and no name trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_lens.corpus import Document, token_batches
from moe_lens.routing.contributions import routing_contributions
from moe_lens.routing_page import contributions_page_html, write_contributions_page
from moe_lens.routing_page_data import routing_decisions

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
        for receiver in result.receivers:
            for sender, value in result.top(receiver, n=6)[["sender", "variance"]].itertuples(index=False):
                assert f"<td>{sender} {value:.3g}</td>" in page
    assert 'id="routing-page"' not in page
    decisions = routing_decisions(model, batches)
    path = write_contributions_page({"layer": results["layer"]}, tmp_path / "index.html", routing=decisions)
    text = path.read_text(encoding="utf-8")
    assert decisions.json in text
    assert text.count('class="plotly-graph-div"') == 6
    with pytest.raises(ValueError, match="no results"):
        contributions_page_html({})
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_contributions_page(results, tmp_path / "absent" / "index.html")
