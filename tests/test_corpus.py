"""Documents and their batches: nothing cut, dropped or joined in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.corpus import (
    Document,
    bos_by_default,
    bundled_documents,
    read_documents,
    read_text,
    token_batches,
)
from tests.families import BOS

TEXTS = [
    "The router sends every token.",
    "Mary",
    "When Mary and John went to the store, John gave a drink to Mary.",
]
DOCUMENTS = [Document(f"document {i}", "tests", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> HookedMoE:
    return HookedMoE.from_pretrained(checkpoint("mixtral"), verbose=False)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_hold_every_token_once(model: HookedMoE, batch_size: int) -> None:
    corpus = token_batches(model, DOCUMENTS, batch_size=batch_size, prepend_bos=True)
    seen = []
    for tokens, mask, documents in corpus:
        assert tokens.shape == mask.shape
        assert len(tokens) == len(documents) <= batch_size
        for row, real, document in zip(tokens, mask, documents, strict=True):
            assert real[: int(real.sum())].all(), "padding is on the right"
            ids = row[real].tolist()
            assert ids[0] == BOS
            assert model.to_string(ids[1:]) == document.text
            seen.append(document)
    assert seen == DOCUMENTS
    assert len(list(corpus)) == len(corpus) == -(-3 // batch_size)
    assert corpus.n_tokens == sum(int(mask.sum()) for _, mask, _ in corpus)
    assert (corpus.n_truncated_documents, corpus.n_truncated_tokens) == (0, 0)


def test_bos_is_as_asked(model: HookedMoE) -> None:
    assert bos_by_default(model) is True
    first = next(iter(token_batches(model, DOCUMENTS, batch_size=3, prepend_bos=False)))
    assert BOS not in first.tokens[first.mask].tolist()


def test_cutting_is_asked_for_and_counted(model: HookedMoE) -> None:
    whole = token_batches(model, DOCUMENTS, batch_size=3)
    with pytest.raises(ValueError, match=r"2 documents are longer than 5 tokens, the longest 'document 2'"):
        token_batches(model, DOCUMENTS, batch_size=3, max_length=5)
    cut = token_batches(model, DOCUMENTS, batch_size=3, max_length=5, truncate=True)
    assert cut.n_truncated_documents == 2
    assert cut.n_truncated_tokens == whole.n_tokens - cut.n_tokens
    assert torch.equal(next(iter(cut)).tokens, next(iter(whole)).tokens[:, :5])


def test_clear_errors(model: HookedMoE) -> None:
    with pytest.raises(ValueError, match="holds no documents"):
        token_batches(model, [], batch_size=1)
    with pytest.raises(ValueError, match="2 documents are named 'document 0'"):
        token_batches(model, [DOCUMENTS[0], DOCUMENTS[0]], batch_size=1)
    with pytest.raises(ValueError, match="'empty' is empty"):
        token_batches(model, [Document("empty", "tests", "")], batch_size=1)
    with pytest.raises(ValueError, match="within the context of 256"):
        token_batches(model, DOCUMENTS, batch_size=1, max_length=257)
    with pytest.raises(ValueError, match="must be positive"):
        token_batches(model, DOCUMENTS, batch_size=0)


def test_reading_documents(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    rows = [
        {"document": "a", "topic": "t", "text": "x", "demo": True},
        {"document": "b", "topic": "t", "text": "y"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_documents(path) == [Document("a", "t", "x", True), Document("b", "t", "y", False)]
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "absent.jsonl")
    for bad, message in (
        ("{", "line 1"),
        ('["a", "t", "x"]', "line 1"),
        ('{"document": "a", "topic": "t"}', "text"),
        ('{"document": "a", "topic": "t", "text": 3}', "must be strings"),
        ("", "no documents"),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=message):
            read_documents(path)


def test_reading_text(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("First.\n\n\n\nSecond,\non two lines.\n")
    assert [d.text for d in read_text(path)] == ["First.", "Second,\non two lines."]
    path.write_text(" \n\n ")
    with pytest.raises(ValueError, match="no documents"):
        read_text(path)


def test_bundled_documents() -> None:
    everything, demo = bundled_documents(), bundled_documents(demo_only=True)
    assert 40 <= len(demo) < len(everything)
    assert set(demo) < set(everything)
    assert all(document.demo for document in demo)
