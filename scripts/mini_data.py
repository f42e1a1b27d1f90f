"""Tokens for the bundled model: its tokenizer, and a training stream that depends on nothing but the seed."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from mini_corpus import Document, gather_documents
from mini_sentences import indirect_object_sentences, name_sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_lens.indirect_object import HELD_OUT_NAMES, TRAIN_NAMES

VOCABULARY_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
INDIRECT_OBJECT_SHARE = 0.10
NAME_SHARE = 0.05


def _write_lines(path: Path, documents: Iterable[Document]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps([document.name, document.topic, document.text]) + "\n")
    temporary.replace(path)


def read_documents(path: Path) -> list[Document]:
    """Read what `load_or_gather` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Document(*json.loads(line)) for line in file]


def load_or_gather(out: Path) -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents, gathered once and then kept in `out`."""
    train_path, held_out_path = out / "train.jsonl", out / "heldout.jsonl"
    if not (train_path.exists() and held_out_path.exists()):
        training, held_out = gather_documents()
        _write_lines(train_path, training)
        _write_lines(held_out_path, held_out)
    return read_documents(train_path), read_documents(held_out_path)


def load_or_train_tokenizer(out: Path, training: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every name, with its leading space, is one token.

    Names come often in its training sample, so that byte pairs build them up like any frequent word.

    Raises:
        RuntimeError: A name came out as more than one token.
    """
    folder = out / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        sample = [document.text for document in training[::4]]
        sample += indirect_object_sentences(5000, seed=0) + name_sentences(5000, seed=0)
        sample += [f" {name}" for name in TRAIN_NAMES + HELD_OUT_NAMES] * 4000
        tokenizer.train_from_iterator(sample, trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=512,
            clean_up_tokenization_spaces=False,
        )
        fast.save_pretrained(folder)
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    divided = [name for name in TRAIN_NAMES + HELD_OUT_NAMES if len(fast.encode(f" {name}")) != 1]
    if divided:
        raise RuntimeError(f"not one token: {', '.join(divided)}")
    return fast


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Tokens of each text, `<|endoftext|>` before each."""
    first = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return [np.array([first, *encoding.ids], dtype=np.int16) for encoding in encoded]


def _write_epoch(
    path: Path, documents: list[np.ndarray], tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    """Every training document once, in a shuffled order, with freshly generated sentences between them."""
    total = sum(map(len, documents)) / (1 - INDIRECT_OBJECT_SHARE - NAME_SHARE)
    texts: list[str] = []
    for generate, share in ((indirect_object_sentences, INDIRECT_OBJECT_SHARE), (name_sentences, NAME_SHARE)):
        length = np.mean([len(tokens) for tokens in encode_all(tokenizer, generate(1000, seed=0))])
        texts += generate(round(total * share / length), seed=seed)
    everything = documents + encode_all(tokenizer, texts)
    order = np.random.default_rng(seed).permutation(len(everything))
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, np.concatenate([everything[index] for index in order]))
    temporary.replace(path)


class TrainingStream:
    """Training tokens one epoch after the other, the same for the same seed wherever reading begins.

    Epochs lie in files, so that several processes can read the same stream.

    Args:
        folder: Where the epochs' files are.
        tokens: How many tokens must be readable; missing epochs are written.
        training: Training documents, for the epochs that have no file yet.
        tokenizer: Likewise.
        seed: What orders the documents and draws the generated sentences.
    """

    def __init__(
        self,
        folder: Path,
        tokens: int,
        training: list[Document],
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
    ) -> None:
        documents: list[np.ndarray] = []
        self.paths: list[Path] = []
        self._epochs: list[np.ndarray] = []
        while sum(map(len, self._epochs)) < tokens:
            path = folder / f"epoch-{len(self.paths)}.npy"
            if not path.exists():
                documents = documents or encode_all(tokenizer, [document.text for document in training])
                _write_epoch(path, documents, tokenizer, seed * 1000 + len(self.paths))
            self.paths.append(path)
            self._epochs.append(np.load(path, mmap_mode="r"))

    def __getstate__(self) -> list[Path]:
        return self.paths

    def __setstate__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._epochs = [np.load(path, mmap_mode="r") for path in paths]

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from place `start` of the stream, as int64."""
        pieces = []
        for epoch in self._epochs:
            if count and start < len(epoch):
                piece = epoch[start : start + count]
                pieces.append(piece)
                count -= len(piece)
            start = max(0, start - len(epoch))
        return np.concatenate(pieces).astype(np.int64)
