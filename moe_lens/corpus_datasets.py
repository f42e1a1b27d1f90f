"""Documents of datasets on the Hugging Face hub or in a directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moe_lens.corpus_files import Document, text_of


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub or in a directory, and where its text is."""

    name: str
    config: str | None
    split: str
    text_field: str

    def __str__(self) -> str:
        return f"{self.name}, config {self.config or 'default'}, split {self.split}, field {self.text_field}"


def stream_dataset(
    name: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    revision: str | None = None,
    seed: int = 0,
    buffer_size: int = 10_000,
) -> Iterator[Document]:
    """A dataset's documents in a shuffled order, read as they are asked for; for `select_documents`.

    What the `datasets` library's streaming shuffle does: the order of the dataset's files and a buffer of
    `buffer_size` rows are shuffled. That is a uniform shuffle of a dataset no larger than the buffer; of a larger
    one, the first documents come from the few files that are read first.

    Args:
        name: a hub id, or the path of a directory with data files. No code of a dataset is ever run.
        config, split, revision: as in `datasets.load_dataset`.
        text_field: the field that holds the text; null counts as an empty text.
        seed, buffer_size: of the shuffle. The same ones give the same order, for the same files and release
            of `datasets`.

    Returns:
        Documents named `NAME[SPLIT]#INDEX`, counted from 0 in the shuffled order: a stream does not know its rows'
        numbers. The topic is the dataset's name.

    Raises:
        OSError: no such dataset, or it cannot be reached.
        ValueError: no such config, split or text field, or a row with something else than text there.
    """
    if buffer_size < 1:
        raise ValueError(
            f"buffer_size={buffer_size} must be positive: it is how many rows are shuffled at once"
        )
    dataset = _load(str(name), config, split, text_field, revision, streaming=True)
    return _documents(dataset.shuffle(seed=seed, buffer_size=buffer_size), str(name), split, text_field)


def read_dataset(
    name: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    revision: str | None = None,
    n_documents: int | None = None,
    seed: int = 0,
    buffer_size: int = 10_000,
) -> list[Document]:
    """Documents of a dataset on the Hugging Face hub or in a local directory. Empty ones are kept.

    Args:
        n_documents: the first so many of `stream_dataset`, without downloading the rest. None is all of them in the
            dataset's own order (named by their row numbers), which downloads it and keeps a copy in the cache of the
            `datasets` library; `seed` and `buffer_size` are not used then.

    The other arguments, the names and the errors are those of `stream_dataset`; fewer than `n_documents` rows raise
    a ValueError too.
    """
    if n_documents is None:
        dataset = _load(str(name), config, split, text_field, revision, streaming=False)
        return list(_documents(dataset, str(name), split, text_field))
    if n_documents < 1:
        raise ValueError(f"n_documents={n_documents} must be positive, or None for all")
    stream = stream_dataset(
        name,
        config=config,
        split=split,
        text_field=text_field,
        revision=revision,
        seed=seed,
        buffer_size=buffer_size,
    )
    documents = list(islice(stream, n_documents))
    if len(documents) < n_documents:
        raise ValueError(
            f"the dataset {str(name)!r} has {len(documents)} rows in its split {split!r}, and {n_documents} were "
            f"asked for"
        )
    return documents


def _load(
    name: str, config: str | None, split: str, text_field: str, revision: str | None, *, streaming: bool
) -> Any:
    import datasets  # takes a second, and most analyses need none
    from datasets.exceptions import DatasetsError

    what = f"the dataset {name!r} (config {config or 'default'!r}, split {split!r})"
    try:
        dataset: Any = datasets.load_dataset(
            name, config, split=split, revision=revision, streaming=streaming
        )
    except OSError as error:
        raise OSError(
            f"{what} cannot be read: it is no directory with data files here, and the Hugging Face hub did not give "
            f"it: {error}"
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    fields = dataset.column_names  # a stream may not know them before its first row
    if fields is None:
        return dataset
    if text_field not in fields:
        raise ValueError(f"{what} has no field {text_field!r} with its text; its fields are {sorted(fields)}")
    return dataset.select_columns([text_field])


def _documents(dataset: Any, name: str, split: str, text_field: str) -> Iterator[Document]:
    for index, row in enumerate(dataset):
        place = f"{name}[{split}]#{index}"
        yield Document(place, name, text_of(row, text_field, place))
