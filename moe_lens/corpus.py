"""Documents for analyses, and their tokens in padded batches. Nothing is cut, dropped or joined in silence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

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

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such document, a name that comes twice, or no document at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of documents {path.name}")
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, topic, text, demo = row["document"], row["topic"], row["text"], row.get("demo", False)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"line {number} of {path.name} is no document (an object with document, topic and text): {error!r}"
            ) from error
        if not all(isinstance(value, str) for value in (name, topic, text)) or not isinstance(demo, bool):
            raise ValueError(
                f"line {number} of {path.name}: document, topic and text must be strings, demo a bool"
            )
        documents.append(Document(name, topic, text, demo))
    _check_documents(documents, path.name)
    return documents


def read_text(path: str | Path) -> list[Document]:
    """A plain text file as documents: one for each paragraph, which empty lines divide.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no text, or is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}")
    paragraphs = [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n")]
    documents = [
        Document(f"{path.name}#{number}", path.name, paragraph)
        for number, paragraph in enumerate((p for p in paragraphs if p), start=1)
    ]
    _check_documents(documents, path.name)
    return documents


def _check_documents(documents: Sequence[Document], source: str) -> None:
    if not documents:
        raise ValueError(f"{source} holds no documents")
    name, times = Counter(document.name for document in documents).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{source}: {times} documents are named {name!r}; every name must be unique")
    for document in documents:
        if not document.text:
            raise ValueError(f"{source}: document {document.name!r} is empty")


class TokenBatch(NamedTuple):
    """Documents as tokens, padded on the right; `mask` is true where tokens are real."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    documents: list[Document]


@dataclass(frozen=True)
class TokenBatches:
    """A tokenised corpus; iterating gives its `TokenBatch`es, as often as wanted.

    Attributes:
        documents: in the order given; a batch is a run of them.
        n_tokens: real ones, BOS included.
        n_truncated_documents, n_truncated_tokens: how many documents were cut, and what was cut off them.
    """

    documents: tuple[Document, ...]
    n_tokens: int
    n_truncated_documents: int
    n_truncated_tokens: int
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


def token_batches(
    model: HookedMoE,
    documents: Iterable[Document],
    *,
    batch_size: int,
    max_length: int | None = None,
    prepend_bos: bool | None = None,
    truncate: bool = False,
) -> TokenBatches:
    """Tokenise documents, one to a row, into right-padded batches in the order given.

    Args:
        batch_size: documents in a batch.
        max_length: the most tokens of a document, BOS included; None is the model's context.
        prepend_bos: as in `model.tokenize`: None leaves special tokens to the tokenizer, True puts exactly one BOS
            in front (the bundled model was trained so; `bos_by_default` tells), False adds none.
        truncate: cut longer documents, and count what was cut; otherwise one raises.

    Raises:
        ValueError: no documents, an empty one, a name that comes twice, one longer than `max_length` without
            `truncate`, a `max_length` beyond the model's context, no tokenizer.
    """
    documents = tuple(documents)
    _check_documents(documents, "the corpus")
    longest = model.cfg.n_ctx if max_length is None else max_length
    if batch_size < 1 or not 1 <= longest <= model.cfg.n_ctx:
        raise ValueError(
            f"batch_size={batch_size} must be positive, and max_length={longest} within the context of "
            f"{model.cfg.n_ctx} tokens"
        )
    whole = list(_token_rows(model, documents, prepend_bos))
    lengths = [len(row) for row in whole]
    too_long = [i for i, length in enumerate(lengths) if length > longest]
    if too_long and not truncate:
        worst = max(too_long, key=lambda i: lengths[i])
        raise ValueError(
            f"{len(too_long)} documents are longer than {longest} tokens, the longest {documents[worst].name!r} with "
            f"{lengths[worst]}; raise max_length, or cut them with truncate=True"
        )
    rows = tuple(row[:longest] for row in whole)
    return TokenBatches(
        documents=documents,
        n_tokens=sum(map(len, rows)),
        n_truncated_documents=len(too_long),
        n_truncated_tokens=sum(lengths[i] - longest for i in too_long),
        _rows=rows,
        _batch_size=batch_size,
        _device=model.cfg.device,
    )


def _token_rows(
    model: HookedMoE, documents: Sequence[Document], prepend_bos: bool | None
) -> Iterator[Int[Tensor, " pos"]]:
    # `tokenize` pads to its longest text: a few documents at a time keep that small.
    for start in range(0, len(documents), 64):
        texts = [document.text for document in documents[start : start + 64]]
        tokens, mask = model.tokenize(texts, prepend_bos=prepend_bos)
        for row, real in zip(tokens.cpu(), mask.cpu(), strict=True):
            yield row[real].clone()


def bos_by_default(model: HookedMoE) -> bool | None:
    """What `prepend_bos` should be for whole documents: True where the tokenizer has a BOS token, else None."""
    tokenizer = model.tokenizer
    return True if tokenizer is not None and tokenizer.bos_token_id is not None else None
