"""Documents for analyses, and their tokens in padded batches. Nothing is cut, dropped or joined in silence."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.corpus_files import (
    Document,
    bundled_documents,
    checked_documents,
    read_documents,
    read_jsonl,
    read_lines,
    read_text,
    text_of,
)
from moe_lens.model.hooked_moe import HookedMoE

__all__ = [
    "Choice",
    "Document",
    "TokenBatch",
    "TokenBatches",
    "bos_by_default",
    "bundled_documents",
    "read_documents",
    "read_jsonl",
    "read_lines",
    "read_text",
    "refuse_bare_pair",
    "select_documents",
    "text_of",
    "token_batches",
]

Choice = Literal["random", "first"]
"""Which of the suitable documents are taken: any, each as likely, or the first ones."""


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
        n_too_short_documents: how many of the considered were left out for having too few tokens or characters.
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
    longer_than: int | None = None,
    choice: Choice = "random",
    allow_fewer: bool = False,
    truncate: bool = True,
    description: str | None = None,
) -> TokenBatches:
    """Choose `n` documents of at least `min_length` tokens, each cut to its first `max_length`, as batches.

    Unless `choice` says otherwise, every choice of `n` suitable documents is equally likely, and `seed` with the
    documents decides it, whatever the batch size. The chosen stay in the order given. `documents` may be an iterator:
    it is read once, and no more than `n` documents are held.

    Args:
        n: how many; None is all that are suitable.
        min_length, max_length: in tokens as the tokenizer gives them, BOS included where it is added. With a
            `min_length`, a document of nothing but whitespace is too short; without, every one is suitable and an
            empty one raises. `max_length` None is the model's context.
        seed: of the draw.
        prepend_bos, batch_size, description: as in `token_batches`.
        longer_than: documents of so many characters or fewer are too short, white space at their ends not counted.
            None is no limit.
        choice: "random", or "first": the first `n` suitable ones are taken and the rest is not considered, for a
            recipe that says so, or for documents that come in random order (as `stream_dataset` gives them); `seed` is
            not used. Of an iterator, up to 63 documents more may be read than are considered.
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

    if longer_than is not None and longer_than < 0:
        raise ValueError(f"longer_than={longer_than} must be 0 or more characters")
    if choice not in get_args(Choice):
        raise ValueError(f"choice={choice!r} must be 'random' or 'first'")

    generator = random.Random(seed)
    chosen: list[_Measured] = []
    n_considered = n_too_few_characters = n_too_few_tokens = 0
    # With a minimum of tokens, nothing but white space has too few, whatever the tokenizer makes of it.
    characters = 0 if longer_than is None and min_length is not None else longer_than
    checked = checked_documents(documents, "the corpus", empty_ok=characters is not None)
    for row in _measured_rows(model, checked, prepend_bos, longest, characters):
        n_considered += 1
        if longer_than is not None and row.length is None:
            n_too_few_characters += 1
        elif row.length is None or (min_length is not None and row.length < min_length):
            n_too_few_tokens += 1
        elif n is None or len(chosen) < n:
            chosen.append(row)
            if choice == "first" and len(chosen) == n:
                break
        elif (place := generator.randrange(n_considered - n_too_few_characters - n_too_few_tokens)) < n:
            # Reservoir sampling: the k-th suitable document is drawn with probability n / k.
            chosen[place] = row
    chosen.sort(key=lambda row: row.position)
    if not chosen or (n is not None and len(chosen) < n and not allow_fewer):
        suitable = "" if longer_than is None else f" of more than {longer_than} characters"
        suitable += "" if min_length is None else f" with at least {min_length} tokens"
        raise ValueError(
            f"there are {len(chosen)} documents{suitable}, of {n_considered}"
            + (f", and {n} were asked for" if n is not None else "")
            + (
                f"; ask for n={len(chosen)}, or take what there is (allow_fewer=True, --allow-fewer)"
                if chosen
                else ""
            )
        )
    too_long = [(row.length, row) for row in chosen if row.length is not None and row.length > longest]
    if too_long and not truncate:
        length, worst = max(too_long, key=lambda pair: pair[0])
        raise ValueError(
            f"{len(too_long)} documents are longer than {longest} tokens, the longest {worst.document.name!r} with "
            f"{length}; raise max_length, or cut them with truncate=True"
        )

    n_tokens = sum(len(row.row) for row in chosen)
    n_truncated_tokens = sum(length - longest for length, _ in too_long)
    numbers = [f"{description or 'documents given'}: {len(chosen)} of {n_considered} documents"]
    if n is not None:
        drawn = f"the first {n} suitable ones" if choice == "first" else f"drawn with seed {seed}"
        numbers.append(drawn if len(chosen) == n else f"all the suitable ones, of {n} asked for")
    if longer_than is not None:
        numbers.append(f"of more than {longer_than} characters ({n_too_few_characters} were not)")
    if min_length is not None:
        numbers.append(f"of at least {min_length} tokens ({n_too_few_tokens} were shorter)")
    numbers.append(f"at most {longest} tokens of each ({len(too_long)} cut, by {n_truncated_tokens} in all)")
    numbers.append(f"{n_tokens} tokens with {_SPECIAL_TOKENS[prepend_bos]}")
    return TokenBatches(
        documents=tuple(row.document for row in chosen),
        n_tokens=n_tokens,
        n_truncated_documents=len(too_long),
        n_truncated_tokens=n_truncated_tokens,
        n_considered_documents=n_considered,
        n_too_short_documents=n_too_few_characters + n_too_few_tokens,
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
    """A document, its place among those considered, its first tokens, and how many it has in all; with too few
    characters it is not tokenised, and the number is None."""

    position: int
    document: Document
    row: Int[Tensor, " pos"]
    length: int | None


def _measured_rows(
    model: HookedMoE,
    documents: Iterator[Document],
    prepend_bos: bool | None,
    longest: int,
    characters: int | None,
) -> Iterator[_Measured]:
    model._require_tokenizer()
    position = 0
    # `tokenize` pads to its longest text: a few documents at a time keep that small.
    while chunk := list(islice(documents, 64)):
        tokenised = [d for d in chunk if characters is None or len(d.text.strip()) > characters]
        rows: dict[str, Tensor] = {}
        if tokenised:
            tokens, mask = model.tokenize([d.text for d in tokenised], prepend_bos=prepend_bos)
            for document, row, real in zip(tokenised, tokens.cpu(), mask.cpu(), strict=True):
                rows[document.name] = row[real]
        for document in chunk:
            row = rows.get(document.name)
            if row is None:
                yield _Measured(position, document, torch.empty(0, dtype=torch.long), None)
            else:
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
