"""Documents for analyses, and their tokens in padded batches. Nothing is cut, dropped or joined in silence."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE

_BUNDLED = "heldout.jsonl"


@dataclass(frozen=True)
class Document:
    """A piece of text: its name (unique in a corpus), what it is about, and whether it is one of the demo's."""

    name: str
    topic: str
    text: str
    demo: bool = False


def bundled_documents(*, demo_only: bool = False) -> list[Document]:
    """The package's held-out documents, which the bundled model was never trained on.

    Args:
        demo_only: the fixed subset that `moe-lens demo` runs.

    Raises:
        FileNotFoundError: the file is not in this installation.
    """
    documents = read_documents(Path(str(files("moe_lens.assets"))) / _BUNDLED)
    return [document for document in documents if document.demo] if demo_only else documents


def read_documents(path: str | Path) -> list[Document]:
    """Documents from JSON lines `{"document": name, "topic": ..., "text": ..., "demo": bool}`; the last is optional.

    This is the format of the bundled documents, every field of it required; `read_jsonl` takes any JSON lines
    with text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such document, a name that comes twice, or no document at all.
    """
    path = Path(path)
    documents = []
    for number, row in _json_rows(path):
        try:
            name, topic, text, demo = row["document"], row["topic"], row["text"], row.get("demo", False)
        except KeyError as error:
            raise ValueError(
                f"line {number} of {path.name} is no document (an object with document, topic and text): {error!r}"
            ) from error
        if not all(isinstance(value, str) for value in (name, topic, text)) or not isinstance(demo, bool):
            raise ValueError(
                f"line {number} of {path.name}: document, topic and text must be strings, demo a bool"
            )
        documents.append(Document(name, topic, text, demo))
    return list(_checked(documents, path.name))


def read_jsonl(path: str | Path, *, text_field: str = "text") -> list[Document]:
    """Documents from any JSON lines whose rows are objects with a text field, in their order.

    A row's `document` is the name where it is a string that no other row has, and `FILE#LINE` is otherwise. A string
    in `topic` is the topic (else the file's name), a bool in `demo` is kept, other fields are not read. A text of
    null is an empty one. Empty texts are kept: `token_batches` raises for them, or counts them with a `min_length`.

    Args:
        text_field: the field that holds the text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no object or has no text in `text_field`, or no line at all.
    """
    path = Path(path)
    rows = list(_json_rows(path))
    times = Counter(row["document"] for _, row in rows if isinstance(row.get("document"), str))
    documents = []
    for number, row in rows:
        name, topic = row.get("document"), row.get("topic")
        documents.append(
            Document(
                name=name if isinstance(name, str) and times[name] == 1 else f"{path.name}#{number}",
                topic=topic if isinstance(topic, str) else path.name,
                text=text_of(row, text_field, f"line {number} of {path.name}"),
                demo=row.get("demo") is True,
            )
        )
    return list(_checked(documents, path.name, empty_ok=True))


def read_text(path: str | Path) -> list[Document]:
    """A plain text file as documents: one for each paragraph, which empty lines divide, spaces in them or not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no text, or is not UTF-8.
    """
    path = Path(path)
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", _decoded(path, "text file"))]
    documents = [
        Document(f"{path.name}#{number}", path.name, paragraph)
        for number, paragraph in enumerate((p for p in paragraphs if p), start=1)
    ]
    return list(_checked(documents, path.name))


def text_of(row: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a row of a file or dataset; null is an empty text.

    Raises:
        ValueError: the row lacks the field, or holds something else than text there. It names the row's fields.
    """
    if text_field not in row:
        raise ValueError(f"{where} has no field {text_field!r} with its text; its fields are {sorted(row)}")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        fields = sorted(field for field, value in row.items() if isinstance(value, str))
        raise ValueError(
            f"{where}: the field {text_field!r} must be text, and is {type(text).__name__}; fields with text: {fields}"
        )
    return text or ""


def _decoded(path: Path, what: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not text in UTF-8 (a compressed file must be unpacked): {error}"
        ) from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: it would divide at U+2028 and U+0085, which may stand in JSON strings.
    for number, line in enumerate(_decoded(path, "file of documents").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} of {path.name} is no document, not even JSON: {error}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"line {number} of {path.name} is no document: {type(row).__name__}, not an object"
            )
        yield number, row


def _checked(documents: Iterable[Document], source: str, *, empty_ok: bool = False) -> Iterator[Document]:
    names = set()
    for document in documents:
        if not isinstance(document, Document):
            raise TypeError(f"{source} must hold Documents, not {type(document).__name__}")
        if document.name in names:
            raise ValueError(
                f"{source}: at least 2 documents are named {document.name!r}; every name must be unique"
            )
        names.add(document.name)
        if not document.text and not empty_ok:
            raise ValueError(
                f"{source}: document {document.name!r} is empty; with a min_length, such are left out and counted"
            )
        try:
            document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{source}: document {document.name!r} is no valid Unicode text: {error}"
            ) from error
        yield document
    if not names:
        raise ValueError(f"{source} holds no documents")


class TokenBatch(NamedTuple):
    """Documents as tokens, padded on the right; `mask` is true where tokens are real."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    documents: list[Document]


@dataclass(frozen=True)
class TokenBatches:
    """A tokenised corpus; iterating gives its `TokenBatch`es, as often as wanted.

    Attributes:
        documents: those chosen, in the order given; a batch is a run of them.
        n_tokens: real ones, BOS included.
        n_truncated_documents, n_truncated_tokens: how many of them were cut, and what was cut off them.
        n_considered_documents: how many there were to choose from. Those neither chosen nor too short were suitable
            and not drawn.
        n_too_short_documents: how many of the considered were left out for having too few tokens.
        description: what this is, for people: source, selection and numbers.
    """

    documents: tuple[Document, ...]
    n_tokens: int
    n_truncated_documents: int
    n_truncated_tokens: int
    n_considered_documents: int
    n_too_short_documents: int
    description: str
    _rows: tuple[Int[Tensor, " pos"], ...]
    _batch_size: int
    _device: torch.device

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[TokenBatch]:
        for start in range(0, len(self._rows), self._batch_size):
            rows = self._rows[start : start + self._batch_size]
            # A padded position reaches no real one, so any valid token will do there.
            tokens = rows[0].new_zeros(len(rows), max(map(len, rows)))
            mask = torch.zeros_like(tokens, dtype=torch.bool)
            for i, row in enumerate(rows):
                tokens[i, : len(row)], mask[i, : len(row)] = row, True
            documents = list(self.documents[start : start + self._batch_size])
            yield TokenBatch(tokens.to(self._device), mask.to(self._device), documents)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of every row's length and token ids in order: which tokens results are of.

        It depends on neither batch size, device nor document names. Other tokenizers give other ids.
        """
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(struct.pack(f"<{1 + len(row)}q", len(row), *row.tolist()))
        return digest.hexdigest()


def token_batches(
    model: HookedMoE,
    documents: Iterable[Document],
    *,
    batch_size: int,
    max_length: int | None = None,
    min_length: int | None = None,
    prepend_bos: bool | None = None,
    truncate: bool = False,
    description: str | None = None,
) -> TokenBatches:
    """Tokenise documents, one to a row, into right-padded batches in the order given.

    Args:
        batch_size: documents in a batch.
        max_length: the most tokens of a document, BOS included; None is the model's context.
        min_length: leave out documents of fewer tokens, BOS included, and count them; a document of nothing but
            whitespace is always too short then. None takes all, and an empty one raises.
        prepend_bos: as in `model.tokenize`: None leaves special tokens to the tokenizer, True puts exactly one BOS
            in front (the bundled model was trained so; `bos_by_default` tells), False adds none.
        truncate: cut longer documents, and count what was cut; otherwise one raises.
        description: what the documents are; `description` of the result begins so and adds selection and numbers.

    Raises:
        ValueError: no documents, an empty one, a name that comes twice, one longer than `max_length` without
            `truncate`, none of at least `min_length`, lengths that are no range within the model's context, no
            tokenizer.
    """
    return select_documents(
        model,
        documents,
        n=None,
        min_length=min_length,
        max_length=max_length,
        seed=0,
        prepend_bos=prepend_bos,
        batch_size=batch_size,
        truncate=truncate,
        description=description,
    )


def select_documents(
    model: HookedMoE,
    documents: Iterable[Document],
    *,
    n: int | None,
    min_length: int | None,
    max_length: int | None,
    seed: int,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    in_random_order: bool = False,
    allow_fewer: bool = False,
    truncate: bool = True,
    description: str | None = None,
) -> TokenBatches:
    """Choose `n` documents of at least `min_length` tokens, each cut to its first `max_length`, as batches.

    Every choice of `n` suitable documents is equally likely, and `seed` with the documents decides it, whatever the
    batch size. The chosen stay in the order given. `documents` may be an iterator: it is read once, and no more than
    `n` documents are held.

    Args:
        n: how many; None is all that are suitable.
        min_length, max_length: in tokens as the tokenizer gives them, BOS included where it is added. With a
            `min_length`, a document of nothing but whitespace is too short; without, every one is suitable and an
            empty one raises. `max_length` None is the model's context.
        seed: of the draw.
        prepend_bos, batch_size, description: as in `token_batches`.
        in_random_order: the documents come in random order (as `stream_dataset` gives them), so the first `n`
            suitable ones are taken and the rest is not considered; `seed` is not used. Of an iterator, up to 63
            documents more may be read than are considered.
        allow_fewer: take all suitable documents where there are fewer than `n`; otherwise that raises.
        truncate: False raises where a chosen document is longer than `max_length`.

    Raises:
        ValueError: fewer than `n` suitable documents without `allow_fewer`, or none; and as `token_batches`.
    """
    longest = model.cfg.n_ctx if max_length is None else max_length
    if batch_size < 1 or not 1 <= longest <= model.cfg.n_ctx:
        raise ValueError(
            f"batch_size={batch_size} must be positive, and max_length={longest} within the context of "
            f"{model.cfg.n_ctx} tokens"
        )
    if min_length is not None and not 1 <= min_length <= longest:
        raise ValueError(f"min_length={min_length} must be from 1 to max_length={longest}")
    if n is not None and n < 1:
        raise ValueError(f"n={n} must be positive: it is how many documents to choose")

    generator = random.Random(seed)
    chosen: list[_Measured] = []
    n_considered = n_too_short = 0
    blank_ok = min_length is not None
    checked = _checked(documents, "the corpus", empty_ok=blank_ok)
    for row in _measured_rows(model, checked, prepend_bos, longest, blank_ok=blank_ok):
        n_considered += 1
        if min_length is not None and row.length < min_length:
            n_too_short += 1
        elif n is None or len(chosen) < n:
            chosen.append(row)
            if in_random_order and len(chosen) == n:
                break
        elif (place := generator.randrange(n_considered - n_too_short)) < n:
            # Reservoir sampling: the k-th suitable document is drawn with probability n / k.
            chosen[place] = row
    chosen.sort(key=lambda row: row.position)
    if not chosen or (n is not None and len(chosen) < n and not allow_fewer):
        suitable = "" if min_length is None else f" with at least {min_length} tokens"
        raise ValueError(
            f"there are {len(chosen)} documents{suitable}, of {n_considered}"
            + (f", and {n} were asked for" if n is not None else "")
            + (f"; ask for n={len(chosen)}, or take what there is with allow_fewer=True" if chosen else "")
        )
    too_long = [row for row in chosen if row.length > longest]
    if too_long and not truncate:
        worst = max(too_long, key=lambda row: row.length)
        raise ValueError(
            f"{len(too_long)} documents are longer than {longest} tokens, the longest {worst.document.name!r} with "
            f"{worst.length}; raise max_length, or cut them with truncate=True"
        )

    n_tokens = sum(len(row.row) for row in chosen)
    n_truncated_tokens = sum(row.length - longest for row in too_long)
    numbers = [f"{description or 'documents given'}: {len(chosen)} of {n_considered} documents"]
    if n is not None:
        drawn = f"the first {n} suitable ones" if in_random_order else f"drawn with seed {seed}"
        numbers.append(drawn if len(chosen) == n else f"all the suitable ones, of {n} asked for")
    if min_length is not None:
        numbers.append(f"of at least {min_length} tokens ({n_too_short} were shorter)")
    numbers.append(f"at most {longest} tokens of each ({len(too_long)} cut, by {n_truncated_tokens} in all)")
    numbers.append(f"{n_tokens} tokens with {_SPECIAL_TOKENS[prepend_bos]}")
    return TokenBatches(
        documents=tuple(row.document for row in chosen),
        n_tokens=n_tokens,
        n_truncated_documents=len(too_long),
        n_truncated_tokens=n_truncated_tokens,
        n_considered_documents=n_considered,
        n_too_short_documents=n_too_short,
        description=", ".join(numbers),
        _rows=tuple(row.row for row in chosen),
        _batch_size=batch_size,
        _device=model.cfg.device,
    )


_SPECIAL_TOKENS = {
    True: "one BOS in front of each document",
    False: "no special tokens",
    None: "the tokenizer's own special tokens",
}


class _Measured(NamedTuple):
    """A document, its place among those considered, its first tokens, and how many it has in all."""

    position: int
    document: Document
    row: Int[Tensor, " pos"]
    length: int


def _measured_rows(
    model: HookedMoE,
    documents: Iterator[Document],
    prepend_bos: bool | None,
    longest: int,
    *,
    blank_ok: bool,
) -> Iterator[_Measured]:
    model._require_tokenizer()
    position = 0
    # `tokenize` pads to its longest text: a few documents at a time keep that small.
    while chunk := list(islice(documents, 64)):
        worded = [document for document in chunk if not blank_ok or document.text.strip()]
        rows: dict[str, Tensor] = {}
        if worded:
            tokens, mask = model.tokenize([document.text for document in worded], prepend_bos=prepend_bos)
            for document, row, real in zip(worded, tokens.cpu(), mask.cpu(), strict=True):
                rows[document.name] = row[real]
        for document in chunk:
            row = rows.get(document.name, torch.empty(0, dtype=torch.long))
            yield _Measured(position, document, row[:longest].clone(), len(row))
            position += 1


def refuse_bare_pair(batches: Any, batch: str = "(tokens, mask)") -> None:
    """Refuse one batch `(tokens, mask, ...)` where an iterable of batches is wanted, which would take the mask for
    documents. Anything else passes.

    Args:
        batches: as given by the caller; nothing is taken from an iterator.
        batch: what a batch is, for the error.

    Raises:
        ValueError: a tuple that begins with tokens and their mask: None, booleans, or nothing but 0 and 1 in the
            tokens' shape. Of a list, only booleans are known not to be tokens.
    """
    if not isinstance(batches, (tuple, list)) or len(batches) < 2 or not isinstance(batches[0], Tensor):
        return
    tokens, second = batches[:2]
    bare = isinstance(batches, tuple)
    if isinstance(second, Tensor):
        is_mask = second.dtype == torch.bool or (bare and bool(((second == 0) | (second == 1)).all()))
        bare = second.shape == tokens.shape and is_mask
    else:
        bare = bare and second is None
    if bare:
        raise ValueError(
            f"tokens and their mask are one batch, and batches are wanted, of which the mask would be the second: give "
            f"[{batch}]"
        )


def bos_by_default(model: HookedMoE) -> bool | None:
    """What `prepend_bos` should be for whole documents: True where the tokenizer has a BOS token, else None."""
    tokenizer = model.tokenizer
    return True if tokenizer is not None and tokenizer.bos_token_id is not None else None
