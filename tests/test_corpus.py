"""Documents and their batches: nothing cut, dropped or joined in silence."""

from __future__ import annotations

import json
from collections import Counter
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
    read_jsonl,
    read_lines,
    read_text,
    refuse_bare_pair,
    select_documents,
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


MANY = [Document(f"d{i}", "tests", "Mary " * (i % 7 + 1)) for i in range(200)]
ODD = [
    "\u2028 line \u0085 ends",
    "nul \x00 and tab\t",
    "emoji \U0001f600 and e\u0301",
    "right \u202eto left",
    "\ufeffmark",
]


def lengths(model: HookedMoE, documents: list[Document]) -> dict[str, int]:
    """How many tokens each document has, BOS included, one text at a time."""
    return {d.name: int(model.tokenize(d.text, prepend_bos=True)[1].sum()) for d in documents}


def names(batches) -> list[str]:
    return [document.name for document in batches.documents]


def test_shorter_documents_are_left_out_and_counted(model: HookedMoE) -> None:
    true = lengths(model, MANY)
    for shortest in (1, min(true.values()), max(true.values()) - 1, max(true.values())):
        got = token_batches(model, MANY, batch_size=7, min_length=shortest, prepend_bos=True)
        assert names(got) == [d.name for d in MANY if true[d.name] >= shortest]
        assert got.n_considered_documents == 200
        assert got.n_too_short_documents == 200 - len(got.documents)
        assert got.n_tokens == sum(true[name] for name in names(got))
    with pytest.raises(ValueError, match="there are 0 documents with at least 99 tokens, of 200"):
        token_batches(model, MANY, batch_size=7, min_length=99)


def test_blank_documents_are_too_short_and_raise_without_a_minimum(model: HookedMoE) -> None:
    documents = [Document("none", "t", ""), Document("blank", "t", " \n\t "), *DOCUMENTS]
    got = token_batches(model, documents, batch_size=2, min_length=1, prepend_bos=True)
    assert (names(got), got.n_too_short_documents) == (names_of(DOCUMENTS), 2)
    with pytest.raises(
        ValueError, match=r"'none' is empty; with a min_length, such are left out and counted"
    ):
        token_batches(model, documents, batch_size=2)
    blank = next(iter(token_batches(model, documents[1:], batch_size=1, prepend_bos=False)))
    assert blank.mask.all(), "without a minimum whitespace is text like any other"
    with pytest.raises(ValueError, match="there are 0 documents with at least 1 tokens, of 2"):
        token_batches(model, documents[:2], batch_size=2, min_length=1)


def names_of(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def test_a_choice_is_of_long_enough_documents_cut_and_counted(model: HookedMoE) -> None:
    true = lengths(model, MANY)
    shortest, longest = 4, 6
    got = select_documents(
        model, MANY, n=50, min_length=shortest, max_length=longest, seed=3, prepend_bos=True
    )
    suitable = [d.name for d in MANY if true[d.name] >= shortest]
    assert len(got.documents) == 50
    assert set(names(got)) < set(suitable)
    assert names(got) == [name for name in suitable if name in names(got)], "the order given is kept"
    assert (got.n_considered_documents, got.n_too_short_documents) == (200, 200 - len(suitable))
    assert got.n_truncated_documents == sum(true[name] > longest for name in names(got))
    assert got.n_truncated_tokens == sum(max(true[name] - longest, 0) for name in names(got))
    assert got.n_tokens == sum(min(true[name], longest) for name in names(got))
    whole = dict(
        zip(names_of(MANY), (model.tokenize(d.text, prepend_bos=True)[0][0] for d in MANY), strict=True)
    )
    for tokens, mask, documents in got:
        for row, real, document in zip(tokens, mask, documents, strict=True):
            assert row[real].tolist() == whole[document.name][:longest].tolist()


def test_the_seed_alone_decides_the_choice(model: HookedMoE) -> None:
    def choice(seed: int, batch_size: int, documents=MANY):
        return select_documents(
            model, documents, n=20, min_length=3, max_length=5, seed=seed, batch_size=batch_size
        )

    first = choice(0, 1)
    for batch_size in (2, 7, 64):
        again = choice(0, batch_size, iter(MANY))
        assert names(again) == names(first)
        assert again.fingerprint == first.fingerprint
        assert again.description == first.description
    assert names(choice(1, 1)) != names(first)


def test_every_suitable_document_is_drawn_equally_often(model: HookedMoE) -> None:
    documents = [Document("short", "t", "M"), *(Document(f"d{i}", "t", "Mary and John") for i in range(6))]
    drawn = Counter(
        name
        for seed in range(600)
        for name in names(
            select_documents(
                model, documents, n=2, min_length=3, max_length=None, seed=seed, prepend_bos=True
            )
        )
    )
    assert set(drawn) == set(names_of(documents[1:]))
    assert all(150 < times < 250 for times in drawn.values()), drawn  # 200 expected, 11.5 the deviation


def test_the_first_documents_are_read_until_there_are_enough(model: HookedMoE) -> None:
    read = []

    def stream():
        for document in MANY:
            read.append(document.name)
            yield document

    true = lengths(model, MANY)
    got = select_documents(
        model, stream(), n=10, min_length=5, max_length=8, seed=0, prepend_bos=True, choice="first"
    )
    assert names(got) == [d.name for d in MANY if true[d.name] >= 5][:10]
    last = names_of(MANY).index(names(got)[-1])
    assert (got.n_considered_documents, got.n_too_short_documents) == (last + 1, last + 1 - 10)
    assert len(read) <= got.n_considered_documents + 63
    other = select_documents(
        model, MANY, n=10, min_length=5, max_length=8, seed=9, prepend_bos=True, choice="first"
    )
    assert other.fingerprint == got.fingerprint


def test_too_few_documents_raise_unless_allowed(model: HookedMoE) -> None:
    arguments = {"min_length": 3, "max_length": 5, "seed": 0, "prepend_bos": True}
    for choice in ("random", "first"):
        arguments["choice"] = choice
        with pytest.raises(
            ValueError, match=r"there are 2 documents with at least 3 tokens, of 3, and 4 were asked"
        ):
            select_documents(model, [*DOCUMENTS[::2], Document("m", "t", "M")], n=4, **arguments)
        got = select_documents(model, DOCUMENTS, n=4, allow_fewer=True, **arguments)
        assert "all the suitable ones, of 4 asked for" in got.description
        assert len(got.documents) == 3 - got.n_too_short_documents
        with pytest.raises(ValueError, match="there are 0 documents"):
            select_documents(model, [Document("m", "t", "M")], n=1, allow_fewer=True, **arguments)


def test_arguments_are_checked_before_anything_is_read(model: HookedMoE) -> None:
    def unread():
        pytest.fail("a document was read")
        yield

    right = {"n": 1, "min_length": 1, "max_length": 5, "seed": 0}
    for wrong, message in (
        ({"n": 0}, "n=0 must be positive"),
        ({"min_length": 0}, "min_length=0 must be from 1 to max_length=5"),
        ({"min_length": 6}, "min_length=6 must be from 1 to max_length=5"),
        ({"max_length": 257}, "within the context of 256"),
        ({"batch_size": 0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            select_documents(model, unread(), **{**right, **wrong})
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        with pytest.raises(ValueError, match="without a tokenizer"):
            select_documents(model, unread(), **right)
    finally:
        model.tokenizer = tokenizer


def test_what_is_no_document_is_named(model: HookedMoE) -> None:
    right = {"n": 1, "min_length": 1, "max_length": 5, "seed": 0}
    with pytest.raises(TypeError, match="must hold Documents, not str"):
        select_documents(model, ["Mary"], **right)
    with pytest.raises(ValueError, match="'half' is no valid Unicode text"):
        select_documents(model, [Document("half", "t", "\ud83d")], **right)
    with pytest.raises(ValueError, match="at least 2 documents are named 'a'"):
        select_documents(model, [Document("a", "t", "x"), Document("a", "t", "y")], **right)
    with pytest.raises(ValueError, match="holds no documents"):
        select_documents(model, [], **right)


def test_iterating_again_gives_the_same(model: HookedMoE) -> None:
    batches = select_documents(model, iter(MANY), n=9, min_length=2, max_length=4, seed=0, batch_size=4)
    first, second = list(batches), list(batches)
    assert len(first) == len(second) == 3
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.mask, two.mask)
        assert one.documents == two.documents


def test_the_fingerprint_changes_when_and_only_when_tokens_do(model: HookedMoE) -> None:
    def fingerprint(documents=DOCUMENTS, **arguments) -> str:
        return token_batches(
            model, documents, **{"batch_size": 2, "prepend_bos": True, **arguments}
        ).fingerprint

    base = fingerprint()
    assert len(base) == 64
    renamed = [Document(f"other {i}", "else", d.text) for i, d in enumerate(DOCUMENTS)]
    for same in (
        fingerprint(batch_size=3),
        fingerprint(renamed),
        fingerprint(max_length=200),
        fingerprint(min_length=1),
        fingerprint(description="x"),
    ):
        assert same == base
    changed = [
        fingerprint(prepend_bos=False),
        fingerprint(max_length=5, truncate=True),
        fingerprint(DOCUMENTS[:2]),
        fingerprint(DOCUMENTS[::-1]),
        fingerprint([*DOCUMENTS[:2], Document("x", "t", DOCUMENTS[2].text + ".")]),
    ]
    assert len({base, *changed}) == 1 + len(changed)
    # The same ids in one row and in two.
    parts = [Document("1", "t", "Mary"), Document("2", "t", " and")]
    joined = [Document("1", "t", "Mary and")]
    together = token_batches(model, joined, batch_size=2, prepend_bos=False)
    apart = token_batches(model, parts, batch_size=2, prepend_bos=False)
    assert apart.n_tokens == together.n_tokens
    assert apart.fingerprint != together.fingerprint


def test_the_description_says_source_selection_and_numbers(model: HookedMoE) -> None:
    plain = token_batches(model, DOCUMENTS, batch_size=2, prepend_bos=True)
    assert plain.description.startswith(
        "documents given: 3 of 3 documents, at most 256 tokens of each (0 cut, by 0"
    )
    assert f"{plain.n_tokens} tokens with one BOS in front" in plain.description
    drawn = select_documents(
        model, MANY, n=5, min_length=3, max_length=4, seed=8, prepend_bos=False, description="Marys"
    )
    assert drawn.description == (
        f"Marys: 5 of 200 documents, drawn with seed 8, of at least 3 tokens ({drawn.n_too_short_documents} were "
        f"shorter), at most 4 tokens of each ({drawn.n_truncated_documents} cut, by {drawn.n_truncated_tokens} in "
        f"all), {drawn.n_tokens} tokens with no special tokens"
    )


def test_odd_characters_are_kept(model: HookedMoE, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    for ascii_only in (True, False):
        rows = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in ODD]
        path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
        documents = read_jsonl(path)
        assert [d.text for d in documents] == ODD
        assert names_of(documents) == [f"odd.jsonl#{line}" for line in range(1, 6)]
    assert sum(map(len, (batch.documents for batch in token_batches(model, documents, batch_size=2)))) == 5
    rows = [json.dumps({"document": t, "topic": t, "text": t}, ensure_ascii=False) for t in ODD]
    path.write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    assert [d.text for d in read_documents(path)] == ODD


def test_reading_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"document": "a", "topic": "t", "text": "1", "demo": True},
        {"document": "twice", "text": "2", "url": "x"},
        {"document": "twice", "text": "3", "topic": 4, "demo": "yes"},
        {"document": 7, "text": None},
        {"text": ""},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_jsonl(path) == [
        Document("a", "t", "1", True),
        Document("rows.jsonl#2", "rows.jsonl", "2"),
        Document("rows.jsonl#3", "rows.jsonl", "3"),
        Document("rows.jsonl#4", "rows.jsonl", ""),
        Document("rows.jsonl#5", "rows.jsonl", ""),
    ]
    path.write_text(json.dumps({"content": "x", "text": 3}))
    assert [d.text for d in read_jsonl(path, text_field="content")] == ["x"]
    with pytest.raises(
        ValueError, match=r"line 1 of rows.jsonl has no field 'body'.* are \['content', 'text'\]"
    ):
        read_jsonl(path, text_field="body")
    with pytest.raises(ValueError, match=r"'text' must be text, and is int; fields with text: \['content'\]"):
        read_jsonl(path)
    for bad, message in (
        (b"{", "line 1 of rows.jsonl is no document, not even JSON"),
        (b'{"text": "x"}\n["x"]', "line 2 of rows.jsonl is no document: list, not an object"),
        (b"\n", "holds no documents"),
        (b'{"text": "\xff"}', "is not text in UTF-8"),
        (b'{"text": "\\ud83d"}', "'rows.jsonl#1' is no valid Unicode text"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            read_jsonl(path)
    with pytest.raises(FileNotFoundError, match=r"absent.jsonl"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_reading_lines(tmp_path: Path) -> None:
    path = tmp_path / "some.raw"
    path.write_bytes(" = Title = \n \n\r\n one \u2028 line \u0085 still \r\n\n\ttwo \x0c\nlast".encode())
    documents = read_lines(path)
    assert [(d.name, d.text) for d in documents] == [
        ("some.raw#1", " = Title = \n"),
        ("some.raw#4", " one \u2028 line \u0085 still \n"),
        ("some.raw#6", "\ttwo \x0c\n"),
        ("some.raw#7", "last"),
    ]
    assert {d.topic for d in documents} == {"some.raw"}
    for nothing in ("", "\n \n\t\n"):
        path.write_text(nothing)
        with pytest.raises(ValueError, match=r"some.raw holds no documents"):
            read_lines(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_lines(path)
    with pytest.raises(FileNotFoundError, match=r"there is no text file .*absent.raw"):
        read_lines(tmp_path / "absent.raw")


def test_documents_of_few_characters_are_left_out_and_counted(model: HookedMoE) -> None:
    texts = ["", " \n\t" + "a" * 50 + "  ", "b" * 51, "Mary", "c " * 40, "d" * 60]
    documents = [Document(f"d{i}", "t", text) for i, text in enumerate(texts)]

    def choose(**how):
        arguments = {"n": None, "min_length": None, "max_length": None, "seed": 0, "prepend_bos": True}
        return select_documents(model, documents, **{**arguments, **how})

    got = choose(longer_than=50)
    assert names(got) == ["d2", "d4", "d5"]
    assert (got.n_considered_documents, got.n_too_short_documents) == (6, 3)
    assert "6 documents, of more than 50 characters (3 were not), at most" in got.description
    of_tokens = lengths(model, documents[2:3])["d2"] + 1
    assert names(choose(longer_than=0)) == ["d1", "d2", "d3", "d4", "d5"]
    both = choose(longer_than=50, min_length=of_tokens)
    long = [d.name for d in documents[2:] if d.name != "d3" and lengths(model, [d])[d.name] >= of_tokens]
    assert names(both) == long
    assert both.n_too_short_documents == 6 - len(long)
    assert f"(3 were not), of at least {of_tokens} tokens ({3 - len(long)} were shorter)" in both.description
    first = choose(longer_than=50, n=2, choice="first")
    assert names(first) == ["d2", "d4"]
    assert first.n_considered_documents == 5
    assert {name for seed in range(20) for name in names(choose(longer_than=50, n=1, seed=seed))} == {
        "d2",
        "d4",
        "d5",
    }
    for choice in ("first", "random"):
        with pytest.raises(
            ValueError, match="there are 3 documents of more than 50 characters, of 6, and 4 were asked for"
        ):
            choose(longer_than=50, n=4, choice=choice)
    with pytest.raises(ValueError, match="longer_than=-1 must be 0 or more"):
        choose(longer_than=-1)
    with pytest.raises(ValueError, match="choice='last' must be 'random' or 'first'"):
        choose(choice="last")


def test_a_bare_pair_of_tokens_and_mask_is_no_list_of_batches() -> None:
    tokens = torch.tensor([[5, 9, 1], [7, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    for bare in (
        (tokens, mask),
        (tokens, mask.bool()),
        (tokens, mask, "documents"),
        (tokens, None),
        [tokens, mask.bool()],
    ):
        with pytest.raises(ValueError, match=r"give \[\(tokens, mask\)\]"):
            refuse_bare_pair(bare)
    batches = iter([(tokens, mask)])
    for fine in (
        [(tokens, mask)],
        ((tokens, mask),),
        (tokens, tokens),
        (tokens, mask[:1]),
        [tokens, mask],  # two batches of tokens, as far as can be told
        tokens,
        batches,
        ["a text"],
        [],
    ):
        refuse_bare_pair(fine)
    assert list(batches) == [(tokens, mask)]


def test_lines_of_spaces_divide_paragraphs_too(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("one\nline more\n \t \ntwo\n\n   \n\n  three  \n")
    assert [document.text for document in read_text(path)] == ["one\nline more", "two", "three"]
