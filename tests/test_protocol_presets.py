"""The published settings, the lines that they choose, and that they can be run by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_lens.audit.census import census
from moe_lens.audit.metrics import metric_names
from moe_lens.audit.progressive import progressive
from moe_lens.audit.protocol_presets import (
    AUDIT_PRESETS,
    PROGRESSIVE_PRESET,
    REDISTRIBUTION_PRESETS,
    WIKITEXT_2,
    Lines,
)
from moe_lens.corpus import Document, read_lines
from moe_lens.corpus_presets import PRESETS, corpus_batches, preset_batches


def test_published_settings() -> None:
    """Section 2 and appendix C: 20 cells a model at n = 200; depths of 16, 24 and 27 layers, of which DeepSeek's first
    is dense."""
    depths = {"olmoe": 16, "qwen2_moe": 24, "deepseek_v2": 27}
    assert AUDIT_PRESETS.keys() == depths.keys()
    for family, preset in AUDIT_PRESETS.items():
        assert len(preset.layers) * len(preset.metrics) == 20
        assert preset.layers[0] == (1 if family == "deepseek_v2" else 0)
        assert preset.layers[-1] == depths[family] - 1
        assert preset.n == 200
        assert set(preset.metrics) <= set(metric_names())
        assert preset.corpus == Lines(50, 100, None, 512, WIKITEXT_2)
    assert (PROGRESSIVE_PRESET.n, PROGRESSIVE_PRESET.removed) == (500, (1, 2, 3, 4, 5, 6, 7))
    assert PROGRESSIVE_PRESET.corpus == Lines(100, None, 33, 256, WIKITEXT_2)
    assert (PROGRESSIVE_PRESET.per_document, PROGRESSIVE_PRESET.min_context) == (1, 32)
    for preset in REDISTRIBUTION_PRESETS.values():
        assert preset.corpus == Lines(100, 200, None, 256, WIKITEXT_2)
    assert (WIKITEXT_2.name, WIKITEXT_2.config, WIKITEXT_2.split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert REDISTRIBUTION_PRESETS["qwen2_moe"].layers == AUDIT_PRESETS["qwen2_moe"].layers


def test_lines() -> None:
    lines = ["", " = Title = ", " " + "a" * 50 + " \n", "b" * 51, "c" * 60, "d" * 52]
    assert Lines(50, 2, None, 512).choose(lines) == ["b" * 51, "c" * 60]
    assert Lines(50, None, None, 512).choose(lines) == lines[3:]
    assert Lines(0, 3, None, 256).choose(lines) == lines[1:4]
    with pytest.raises(
        ValueError, match="the first 2 lines of at least 33 tokens cannot be told without a tokenizer"
    ):
        Lines(50, 2, 33, 256).choose(lines)


def test_lines_are_those_of_a_corpus_preset(model_of: Callable[[str], Any]) -> None:
    """The numbers stand in one place, and both ways of choosing by them are the same."""
    texts = [f" line {i} " + "the cat sat " * (i % 11) + "\n" for i in range(900)]
    documents = [Document(str(i), "t", text) for i, text in enumerate(texts)]
    model = model_of("mixtral")
    for preset in (*AUDIT_PRESETS.values(), PROGRESSIVE_PRESET, *REDISTRIBUTION_PRESETS.values()):
        chosen = preset.corpus.choose(texts)
        recipe = PRESETS[preset.corpus_preset]
        # The tiny model's context is shorter than the published cut.
        of_preset = corpus_of_texts(model, recipe, documents)
        least = preset.corpus.min_tokens or 1
        assert of_preset == [text for text in chosen if model.tokenize(text)[0].shape[1] >= least]
        assert 0 < len(of_preset) < len(texts)
    for name in ("bundled", "routing-paper-tokens"):
        with pytest.raises(ValueError, match=f"'{name}' takes no lines of a dataset in their order"):
            Lines.of(PRESETS[name])


def corpus_of_texts(model: Any, recipe: Any, documents: list[Document]) -> list[str]:
    cut = replace(recipe, max_length=min(recipe.max_length, model.cfg.n_ctx))
    got = preset_batches(model, cut, documents=documents, prepend_bos=None)
    return [document.text for document in got.documents]


def test_a_position_of_a_line_has_its_context() -> None:
    """The shortest line of the corpus has just one position to give: 32 tokens, and the one they predict."""
    preset = PROGRESSIVE_PRESET
    assert preset.corpus.min_tokens == preset.min_context + 1
    assert {"n", "per_document", "min_context"} <= set(inspect.signature(progressive).parameters)


def test_the_published_progressive_experiment_runs_by_name(
    model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model, preset = model_of("olmoe"), PROGRESSIVE_PRESET
    path = tmp_path / "wiki.test.raw"
    path.write_text("".join(f" line {i} " + "the cat sat on it " * (4 * i) + "\n" for i in range(9)))
    corpus = preset_batches(model, preset.corpus_preset, documents=read_lines(path), prepend_bos=None)
    by_source = corpus_batches(model, f"{preset.corpus_preset}@lines:{path}", batch_size=8, prepend_bos=None)
    assert corpus.fingerprint == by_source.fingerprint
    n = len(corpus.documents)
    assert 2 < n < 9
    found = progressive(
        model,
        corpus,
        layers=0,
        n=n,
        per_document=preset.per_document,
        min_context=preset.min_context,
    )
    assert sorted(set(found.rows["document"])) == list(range(n))
    assert found.rows.groupby("document")["position"].nunique().eq(1).all()
    assert found.rows["position"].min() >= 31
    assert census(model, corpus, layers=0, n=5).identity["sample"] == {"n": 5, "seed": 0}
