"""Datasets, recipes and what a command line may name: the right documents, counted, and clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_lens import HookedMoE
from moe_lens.corpus import Document, bundled_documents, read_lines, token_batches
from moe_lens.corpus_presets import (
    PRESETS,
    WIKITEXT_2,
    CorpusPreset,
    HubDataset,
    corpus_batches,
    corpus_kind,
    preset_batches,
    read_dataset,
    stream_dataset,
)
from moe_lens.indirect_object import indirect_object_prompts

HUB_PRESETS = [name for name, preset in PRESETS.items() if isinstance(preset.dataset, HubDataset)]
SHUFFLED = [name for name in HUB_PRESETS if PRESETS[name].n is not None and PRESETS[name].choice == "random"]
IN_ORDER = [name for name in HUB_PRESETS if name not in SHUFFLED]
ROWS = 60
TEXTS = [f"Row {i}: " + "Mary gave a drink to John. " * (i % 9) for i in range(ROWS)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves anything in the cache of the `datasets` library, or waits for its threads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # It sleeps five seconds after a stream of parquet files.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2, raising=False)


@pytest.fixture(scope="module")
def mini() -> HookedMoE:
    return HookedMoE.from_pretrained("mini", verbose=False, device="cpu")


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Path]) -> HookedMoE:
    return HookedMoE.from_pretrained(checkpoint("mixtral"), verbose=False, device="cpu")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A local dataset in three files."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    for shard in range(3):
        rows = range(shard * ROWS // 3, (shard + 1) * ROWS // 3)
        lines = [json.dumps({"text": TEXTS[i], "number": i}) for i in rows]
        (directory / f"train-{shard:05d}-of-00003.jsonl").write_text("\n".join(lines))
    return directory


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """A local dataset of JSON lines with two splits, a null and an empty text."""
    directory = tmp_path / "lines"
    directory.mkdir()
    for split, texts in (("train", ["one \u2028 line", None, "", "four"]), ("validation", ["held out"])):
        rows = [json.dumps({"body": text, "other": 1}, ensure_ascii=False) for text in texts]
        (directory / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return directory


def names(batches: Any) -> list[str]:
    return [document.name for document in batches.documents]


def test_a_whole_dataset_keeps_its_order_and_row_numbers(sharded: Path) -> None:
    documents = read_dataset(sharded)
    assert [d.text for d in documents] == TEXTS
    assert [d.name for d in documents] == [f"{sharded}[train]#{i}" for i in range(ROWS)]
    assert {d.topic for d in documents} == {str(sharded)}


def test_a_part_of_a_dataset_is_shuffled_by_its_seed(sharded: Path) -> None:
    part = read_dataset(sharded, n_documents=20, seed=1)
    assert part == read_dataset(str(sharded), n_documents=20, seed=1)
    assert [d.name for d in part] == [f"{sharded}[train]#{i}" for i in range(20)]
    texts = [d.text for d in part]
    assert len(set(texts)) == 20
    assert set(texts) < set(TEXTS)
    assert texts != TEXTS[:20]
    assert texts != [d.text for d in read_dataset(sharded, n_documents=20, seed=2)]
    assert sorted(d.text for d in read_dataset(sharded, n_documents=ROWS)) == sorted(TEXTS)
    assert sorted(d.text for d in read_dataset(sharded, n_documents=ROWS, buffer_size=3)) == sorted(TEXTS)
    with pytest.raises(ValueError, match=f"has {ROWS} rows in its split 'train', and 61 were asked for"):
        read_dataset(sharded, n_documents=ROWS + 1)


@pytest.mark.parametrize("n", [None, 9])
def test_a_parquet_dataset(tmp_path: Path, n: int | None) -> None:
    directory = tmp_path / "parquet"
    directory.mkdir()
    pq.write_table(pa.table({"body": TEXTS[:9], "number": range(9)}), directory / "train.parquet")
    documents = read_dataset(directory, text_field="body", n_documents=n)
    assert sorted(d.text for d in documents) == sorted(TEXTS[:9])
    assert [d.name for d in documents] == [f"{directory}[train]#{i}" for i in range(9)]


def test_splits_fields_and_empty_texts(jsonl: Path) -> None:
    assert [d.text for d in read_dataset(jsonl, text_field="body")] == ["one \u2028 line", "", "", "four"]
    assert [d.text for d in read_dataset(jsonl, text_field="body", split="validation")] == ["held out"]
    streamed = read_dataset(jsonl, text_field="body", n_documents=4)
    assert sorted(d.text for d in streamed) == ["", "", "four", "one \u2028 line"]


@pytest.mark.parametrize("n", [None, 2])
def test_what_a_dataset_lacks_is_named(jsonl: Path, tmp_path: Path, n: int | None) -> None:
    with pytest.raises(ValueError, match=r"no field 'text'.*; its fields are \['body', 'other'\]"):
        read_dataset(jsonl, n_documents=n)
    with pytest.raises(ValueError, match="'other' must be text, and is int"):
        read_dataset(jsonl, text_field="other", n_documents=n)
    with pytest.raises(ValueError, match=r"split 'test'\) cannot be read"):
        read_dataset(jsonl, text_field="body", split="test", n_documents=n)
    with pytest.raises(ValueError, match=r"config 'absent', split 'train'\) cannot be read"):
        read_dataset(jsonl, text_field="body", config="absent", n_documents=n)
    with pytest.raises(OSError, match=r"nowhere'.* cannot be read: it is no directory with data files here"):
        read_dataset(tmp_path / "nowhere", n_documents=n)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(OSError, match=r"hollow'.* cannot be read"):
        read_dataset(tmp_path / "hollow", n_documents=n)


def test_arguments_of_datasets_are_checked(sharded: Path) -> None:
    with pytest.raises(ValueError, match="n_documents=0 must be positive"):
        read_dataset(sharded, n_documents=0)
    with pytest.raises(ValueError, match="buffer_size=0 must be positive"):
        stream_dataset(sharded, buffer_size=0)


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, mini: HookedMoE) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach it on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = r"dataset 'allenai/c4' \(config 'en', split 'validation'\) cannot be read: .*Couldn't reach it"
    with pytest.raises(OSError, match=message):
        preset_batches(mini, "routing-paper-tokens")
    with pytest.raises(OSError, match=message):
        corpus_batches(mini, "hf:allenai/c4:en:validation", batch_size=2)


def test_the_presets_are_what_the_paper_says() -> None:
    assert all(name == preset.name for name, preset in PRESETS.items())
    numbers = {name: (p.n, p.min_length, p.max_length) for name, p in PRESETS.items()}
    chosen = {name: (p.longer_than, p.choice) for name, p in PRESETS.items() if p.longer_than is not None}
    assert chosen == {
        "causal-audit": (50, "first"),
        "causal-audit-progressive": (100, "random"),
        "causal-audit-redistribution": (100, "first"),
    }
    assert {PRESETS[name].dataset for name in chosen} == {WIKITEXT_2}
    assert {p.choice for name, p in PRESETS.items() if name not in chosen} == {"random"}
    assert numbers == {
        "routing-paper-tokens": (1000, 32, 32),
        "routing-paper-layers": (5000, 32, 32),
        "routing-paper-indirect-object": (5000, None, None),
        "routing-paper-math": (1000, 32, 32),
        "causal-audit": (100, None, 512),
        "causal-audit-progressive": (None, 33, 256),
        "causal-audit-redistribution": (200, None, 256),
        "bundled": (None, None, 512),
        "bundled-demo": (None, None, 512),
        "bundled-32": (None, 32, 32),
    }
    with pytest.raises(FrozenInstanceError):
        PRESETS["bundled"].n = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_runs_on_documents_in_hand(mini: HookedMoE, name: str) -> None:
    preset, documents = PRESETS[name], bundled_documents(demo_only=True)
    got = preset_batches(mini, name, documents=iter(documents), n=20, batch_size=7)
    assert len(got.documents) == 20
    assert len(got) == 3
    assert set(got.documents) <= set(documents)
    first = preset.choice == "first"
    assert (got.documents == tuple(documents[:20])) == first
    assert got.n_considered_documents == (20 if first else len(documents))
    drawn = "the first 20 suitable ones" if first else f"drawn with seed {preset.seed}"
    assert got.description.startswith(
        f"{name} (documents given): 20 of {got.n_considered_documents} documents, {drawn}"
    )
    bos = mini.tokenizer.bos_token_id
    for tokens, mask, _ in got:
        assert (tokens[:, 0] == bos).all()
        assert mask.sum(dim=1).max() <= (preset.max_length or mini.cfg.n_ctx)
        assert mask.sum(dim=1).min() >= (preset.min_length or 1)
    same = preset_batches(mini, name, documents=documents, n=20, batch_size=3, seed=preset.seed)
    assert same.fingerprint == got.fingerprint
    other = preset_batches(mini, name, documents=documents, n=20, seed=preset.seed + 1)
    assert (other.fingerprint == got.fingerprint) == first
    bare = preset_batches(mini, name, documents=documents, n=20, prepend_bos=False)
    assert bos not in next(iter(bare)).tokens[:, 0]


@pytest.mark.parametrize("name", SHUFFLED)
def test_a_dataset_preset_streams_its_dataset(
    mini: HookedMoE, sharded: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The hub is not reached in tests: a local dataset stands in for it."""
    dataset, calls, load = PRESETS[name].dataset, [], datasets.load_dataset
    assert isinstance(dataset, HubDataset)

    def local(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        stream = load(str(sharded), split="train", streaming=True)
        return stream.rename_column("text", dataset.text_field) if dataset.text_field != "text" else stream

    monkeypatch.setattr(datasets, "load_dataset", local)
    got = preset_batches(mini, name, n=10)
    assert calls == [
        ((dataset.name, dataset.config), {"split": dataset.split, "revision": None, "streaming": True})
    ]
    assert got.n_tokens == 10 * 32
    assert got.n_considered_documents == 10 + got.n_too_short_documents < ROWS
    assert got.description.startswith(f"{name} ({dataset}, shuffled with seed 0): 10 of ")
    with pytest.raises(
        ValueError, match=rf"with at least 32 tokens, of {ROWS}, and {PRESETS[name].n} were asked"
    ):
        preset_batches(mini, name)
    everything = preset_batches(mini, name, allow_fewer=True)
    assert everything.n_considered_documents == ROWS
    assert 0 < len(everything.documents) == ROWS - everything.n_too_short_documents


@pytest.mark.parametrize("name", IN_ORDER)
def test_a_dataset_is_read_in_its_order_where_the_first_or_all_are_taken(
    mini: HookedMoE, sharded: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    preset, calls, load = PRESETS[name], [], datasets.load_dataset

    def local(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return load(str(sharded), split="train", streaming=kwargs["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", local)
    got = preset_batches(mini, replace(preset, n=preset.n and 10), seed=3)
    assert calls == [
        (
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
            {"split": "test", "revision": None, "streaming": False},
        )
    ]
    texts = [d.text for d in got.documents]
    long = [text for text in TEXTS if len(text.strip()) > (preset.longer_than or 0)]
    assert 0 < len(long) < ROWS
    if preset.n is None:
        enough = {d.text for d in got.documents}
        assert texts == [text for text in long if text in enough]
        lengths = {text: mini.tokenize(text, prepend_bos=True)[0].shape[1] for text in long}
        assert texts == [text for text in long if lengths[text] >= 33]
        assert got.n_considered_documents == ROWS
        # Asked for some of them, it draws.
        assert preset_batches(mini, name, n=2, seed=0).description.startswith(
            f"{name} ({WIKITEXT_2}, shuffled with seed 0): 2 of "
        )
    else:
        assert texts == long[:10]
        assert got.n_considered_documents == TEXTS.index(texts[-1]) + 1
        assert f"{name} ({WIKITEXT_2}): 10 of " in got.description
        assert f"the first 10 suitable ones, of more than {preset.longer_than} characters" in got.description
        with pytest.raises(
            ValueError,
            match=rf"there are {len(long)} documents of more than {preset.longer_than} characters, of {ROWS}, and "
            rf"{preset.n} were asked for",
        ):
            preset_batches(mini, name)


def test_the_indirect_object_preset_is_of_generated_prompts(mini: HookedMoE) -> None:
    got = preset_batches(mini, "routing-paper-indirect-object", n=40, seed=4)
    prompts = indirect_object_prompts(40, seed=4)
    assert [d.text for d in got.documents] == [p.text for p in prompts]
    assert [d.topic for d in got.documents] == [p.order for p in prompts]
    assert got.n_truncated_documents == 0
    assert "prompts generated with seed 4" in got.description
    assert len(preset_batches(mini, "routing-paper-indirect-object", batch_size=64).documents) == 5000
    for n in (0, -1):
        with pytest.raises(ValueError, match=r"must be positive|must not be negative"):
            preset_batches(mini, "routing-paper-indirect-object", n=n)
    with pytest.raises(ValueError, match="so it needs an n"):
        preset_batches(mini, replace(PRESETS["routing-paper-indirect-object"], n=None))


def test_the_bundled_presets(mini: HookedMoE) -> None:
    whole = preset_batches(mini, "bundled", batch_size=64)
    by_hand = token_batches(
        mini, bundled_documents(), batch_size=8, max_length=512, prepend_bos=True, truncate=True
    )
    assert whole.fingerprint == by_hand.fingerprint
    assert len(preset_batches(mini, "bundled-demo").documents) == len(bundled_documents(demo_only=True))
    short = preset_batches(mini, "bundled-32")
    assert short.n_tokens == 32 * len(short.documents)
    assert short.n_considered_documents == len(whole.documents)
    assert short.n_too_short_documents == short.n_considered_documents - len(short.documents) > 0


def test_a_preset_that_is_none_or_does_not_fit(mini: HookedMoE, tiny: HookedMoE) -> None:
    with pytest.raises(ValueError, match=r"no preset 'nothing'; there are routing-paper-tokens, "):
        preset_batches(mini, "nothing")
    with pytest.raises(ValueError, match="max_length=512 within the context of 256"):
        preset_batches(tiny, "bundled-demo")
    with pytest.raises(ValueError, match="n=0 must be positive"):
        preset_batches(mini, "routing-paper-tokens", n=0)
    own = CorpusPreset("own", "", "bundled-demo", 3, 8, 16, 5, "")
    assert preset_batches(tiny, own).n_tokens == 3 * 16


def test_a_corpus_is_a_preset(mini: HookedMoE) -> None:
    assert (
        corpus_batches(mini, "bundled-32", batch_size=4).fingerprint
        == preset_batches(mini, "bundled-32").fingerprint
    )
    got = corpus_batches(mini, "bundled-32", batch_size=4, n=5, seed=2, max_length=20, min_length=10)
    assert got.n_tokens == 5 * 20
    assert "drawn with seed 2, of at least 10 tokens" in got.description
    with pytest.raises(ValueError, match=r"documents are longer than 32 tokens"):
        corpus_batches(mini, "bundled-32", batch_size=4, truncate=False)
    with pytest.raises(ValueError, match="the preset bundled takes none"):
        corpus_batches(mini, "bundled", batch_size=4, text_field="body")


@pytest.mark.parametrize("suffix", [".jsonl", ".json-lines", ".JSONL", ".json"])
def test_a_corpus_is_a_file_of_json_lines(tiny: HookedMoE, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text("\n".join(json.dumps({"body": text}) for text in ["Mary", "", "Mary and John went"]))
    with pytest.raises(ValueError, match="is empty; with a min_length"):
        corpus_batches(tiny, path, batch_size=2, text_field="body")
    got = corpus_batches(tiny, path, batch_size=2, text_field="body", min_length=1)
    assert [d.text for d in got.documents] == ["Mary", "Mary and John went"]
    assert got.n_too_short_documents == 1
    assert got.description.startswith(f"rows{suffix}: 2 of 3 documents")
    assert next(iter(got)).tokens[0, 0] == tiny.tokenizer.bos_token_id
    bare = corpus_batches(tiny, path, batch_size=2, text_field="body", min_length=1, prepend_bos=None)
    assert bare.n_tokens == got.n_tokens - 2
    with pytest.raises(ValueError, match=r"no field 'text'"):
        corpus_batches(tiny, path, batch_size=2)


def test_a_corpus_is_a_text_file(tiny: HookedMoE, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("First one.\r\n\r\nSecond, e\u0301.\n\n\nThird.\n", encoding="utf-8")
    got = corpus_batches(tiny, str(path), batch_size=2)
    assert [d.text for d in got.documents] == ["First one.", "Second, e\u0301.", "Third."]
    drawn = corpus_batches(tiny, path, batch_size=2, n=2, seed=1, max_length=3)
    assert len(drawn.documents) == 2
    assert drawn.n_tokens == 6
    with pytest.raises(ValueError, match="there are 3 documents, of 3, and 4 were asked for"):
        corpus_batches(tiny, path, batch_size=2, n=4)
    with pytest.raises(ValueError, match=r"the text file notes.txt takes none"):
        corpus_batches(tiny, path, batch_size=2, text_field="body")
    path.write_bytes(b"\x1f\x8b\x08\x00\xff")
    with pytest.raises(ValueError, match=r"notes.txt is not text in UTF-8"):
        corpus_batches(tiny, path, batch_size=2)


def test_a_corpus_is_a_dataset(tiny: HookedMoE, sharded: Path, jsonl: Path) -> None:
    whole = corpus_batches(tiny, f"hf:{sharded}", batch_size=8)
    assert [d.text for d in whole.documents] == TEXTS
    for source in (f"hf:{sharded}", f"hf:{sharded}::train", f"hf:{sharded}:default:train"):
        part = corpus_batches(tiny, source, batch_size=8, n=10, min_length=8, max_length=12, seed=3)
        assert len(part.documents) == 10
        assert part.n_considered_documents == 10 + part.n_too_short_documents
        assert (
            f"{sharded}, config default, split train, field text, shuffled with seed 3: 10"
            in part.description
        )
        again = corpus_batches(tiny, source, batch_size=3, n=10, min_length=8, max_length=12, seed=3)
        assert (again.fingerprint, names(again)) == (part.fingerprint, names(part))
    held_out = corpus_batches(tiny, f"hf:{jsonl}::validation", batch_size=8, text_field="body")
    assert [d.text for d in held_out.documents] == ["held out"]


def test_a_dataset_is_not_opened_for_arguments_that_cannot_be(
    mini: HookedMoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("a dataset was opened"))
    for n in (None, 3):
        for wrong in ({"max_length": 513}, {"min_length": 0}, {"batch_size": 0}):
            with pytest.raises(ValueError, match="must be"):
                corpus_batches(mini, "hf:some/where", n=n, **{"batch_size": 2, **wrong})


@pytest.mark.parametrize("source", ["nothing", "absent.jsonl", "hf:", "hf:a:b", "hf:a:b:c:d"])
def test_an_unknown_corpus_lists_what_is_accepted(mini: HookedMoE, source: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{source}' .*A corpus is a preset \(routing-paper-tokens, .*hf:NAME"
    ):
        corpus_batches(mini, source, batch_size=2)


def test_a_directory_needs_its_prefix(mini: HookedMoE, sharded: Path) -> None:
    with pytest.raises(ValueError, match=r"is a directory; for a dataset write hf: in front"):
        corpus_batches(mini, sharded, batch_size=2)
    with pytest.raises(ValueError, match=r"names no split"):
        corpus_batches(mini, f"hf:{sharded}::", batch_size=2)


def test_a_model_without_a_tokenizer_is_told_first(mini: HookedMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini, "tokenizer", None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("a dataset was opened"))
    for name in HUB_PRESETS:
        with pytest.raises(ValueError, match="without a tokenizer"):
            preset_batches(mini, name)
    with pytest.raises(ValueError, match="without a tokenizer"):
        preset_batches(mini, "bundled", documents=[Document("a", "t", "x")])


# ---- lines, and a preset's recipe on other documents ----

WIKI_LINES = [" \n"] + [
    line
    for i in range(130)
    for line in (f" = Title {i} = \n", " \n", f" {i} " + "He gave a drink to John . " * (i % 14) + "\n")
]


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    """A file of lines like WikiText's."""
    path = tmp_path / "wiki.test.raw"
    path.write_text("".join(WIKI_LINES), encoding="utf-8")
    return path


def by_hand(longer_than: int) -> list[str]:
    """The lines that are long enough, as they are."""
    return [line for line in WIKI_LINES if len(line.strip()) > longer_than]


@pytest.mark.parametrize("name", IN_ORDER)
def test_the_published_recipes_on_a_file_of_lines(mini: HookedMoE, wiki: Path, name: str) -> None:
    preset = PRESETS[name]
    assert preset.longer_than is not None
    n = None if preset.n is None else 40
    got = corpus_batches(mini, f"{name}@lines:{wiki}", batch_size=16, n=n, prepend_bos=None)
    expected = []
    for line in by_hand(preset.longer_than):
        ids = mini.tokenize(line, prepend_bos=None)[0][0].tolist()
        if len(ids) >= (preset.min_length or 1):
            expected.append(ids[: preset.max_length])
    rows = [row[real].tolist() for tokens, mask, _ in got for row, real in zip(tokens, mask, strict=True)]
    assert rows == expected[:n]
    assert len(rows) > 20
    assert got.description.startswith(f"{name} (wiki.test.raw): ")
    same = preset_batches(mini, name, documents=read_lines(wiki), n=n, prepend_bos=None)
    assert same.fingerprint == got.fingerprint
    assert same.description.startswith(f"{name} (documents given): ")
    with pytest.raises(ValueError, match=rf"documents of more than {preset.longer_than} characters"):
        corpus_batches(mini, f"{name}@lines:{wiki}", batch_size=16, n=131)


def test_the_same_lines_are_the_same_corpus_wherever_they_are(
    mini: HookedMoE, wiki: Path, tmp_path: Path
) -> None:
    """A file of lines, JSON lines, and a dataset as the hub has it, with empty rows."""
    texts = ["" if line == " \n" else line for line in WIKI_LINES]
    directory = tmp_path / "dataset"
    directory.mkdir()
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    (directory / "test.jsonl").write_text(rows)
    (tmp_path / "rows.jsonl").write_text(rows.replace('"text"', '"body"'))
    of_lines = corpus_batches(mini, f"causal-audit@lines:{wiki}", batch_size=4, n=30, seed=5)
    of_rows = corpus_batches(
        mini, f"causal-audit@{tmp_path / 'rows.jsonl'}", batch_size=4, n=30, text_field="body"
    )
    of_dataset = corpus_batches(mini, f"causal-audit@hf:{directory}::test", batch_size=4, n=30)
    assert of_lines.fingerprint == of_rows.fingerprint == of_dataset.fingerprint
    assert (
        f"causal-audit ({directory}, config default, split test, field text): 30 of" in of_dataset.description
    )
    assert "causal-audit (rows.jsonl): 30 of" in of_rows.description
    # Another choice and another cut, on top of the preset's.
    fewer = corpus_batches(
        mini, f"causal-audit@lines:{wiki}", batch_size=4, n=7, max_length=20, min_length=20
    )
    assert fewer.n_tokens == 7 * 20
    assert fewer.documents == of_lines.documents[:7]


def test_a_random_preset_draws_from_another_source(mini: HookedMoE, wiki: Path, sharded: Path) -> None:
    drawn = corpus_batches(mini, f"bundled-32@lines:{wiki}", batch_size=4, n=5, seed=1)
    assert drawn.n_tokens == 5 * 32
    assert "bundled-32 (wiki.test.raw): 5 of" in drawn.description
    assert "drawn with seed 1" in drawn.description
    streamed = corpus_batches(mini, f"routing-paper-tokens@hf:{sharded}", batch_size=4, n=5, seed=1)
    assert (
        f"routing-paper-tokens ({sharded}, config default, split train, field text, shuffled with seed 1): 5 of"
        in (streamed.description)
    )


def test_a_corpus_is_a_file_of_lines(mini: HookedMoE, wiki: Path) -> None:
    got = corpus_batches(mini, f"lines:{wiki}", batch_size=64)
    assert [d.text for d in got.documents] == [line for line in WIKI_LINES if line.strip()]
    assert got.description.startswith("wiki.test.raw: 260 of 260 documents")
    assert len(corpus_batches(mini, wiki, batch_size=64).documents) < 260, "paragraphs"
    drawn = corpus_batches(mini, f"lines:{wiki}", batch_size=4, n=3, seed=1)
    assert "drawn with seed 1" in drawn.description
    with pytest.raises(ValueError, match=r"the text file wiki.test.raw takes none"):
        corpus_batches(mini, f"lines:{wiki}", batch_size=4, text_field="body")


def test_kinds_of_sources(wiki: Path, sharded: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    for source, kind in (
        (f"lines:{wiki}", "lines"),
        (str(wiki), "text"),
        (str(rows), "JSON lines"),
        (f"hf:{sharded}", "dataset"),
    ):
        assert corpus_kind(source) == corpus_kind(f"causal-audit@{source}") == kind
    assert corpus_kind("causal-audit") == "preset"
    for wrong, message in (
        ("lines:absent.txt", r"'lines:absent.txt' names no file of lines: there is no file 'absent.txt'"),
        ("lines:", "names no file of lines"),
        ("causal-audit@lines:absent.txt", "there is no file 'absent.txt'"),
        (
            "causal-audit@absent.txt",
            r"'absent.txt' is no corpus. A corpus is a preset .*lines:FILE.*PRESET@SOURCE",
        ),
        ("causal-audit@", "'causal-audit@' is no corpus"),
        ("causal-audit@bundled", "is a preset on a preset, and a preset runs on other documents"),
        ("causal-audits@lines:x", "'causal-audits@lines:x' is no corpus"),
    ):
        with pytest.raises(ValueError, match=message):
            corpus_kind(wrong)
    with pytest.raises(ValueError, match="takes none"):
        corpus_kind(f"causal-audit@{wiki}", text_field="body")
    at = tmp_path / "some@where.txt"
    at.write_text("x")
    assert corpus_kind(at) == "text"
