"""Where corpora come from: datasets, named recipes of published analyses, and what a command line may name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from moe_lens.corpus import (
    Document,
    TokenBatches,
    bos_by_default,
    bundled_documents,
    read_jsonl,
    read_text,
    select_documents,
    text_of,
)
from moe_lens.indirect_object import indirect_object_prompts
from moe_lens.model.hooked_moe import HookedMoE

Bos = bool | Literal["default"] | None
"""`prepend_bos` of whole documents: "default" is `bos_by_default` of the model, the rest as in `token_batches`."""

_JSON_LINES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson", ".json")


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


@dataclass(frozen=True)
class HubDataset:
    """Where on the Hugging Face hub a preset's text is."""

    name: str
    config: str | None
    split: str
    text_field: str

    def __str__(self) -> str:
        return f"{self.name}, config {self.config or 'default'}, split {self.split}, field {self.text_field}"


@dataclass(frozen=True)
class CorpusPreset:
    """A named recipe for a corpus; `preset_batches` runs it.

    Attributes:
        name: under which it stands in `PRESETS`.
        description: what it is, and what its source left open.
        dataset: where its documents come from.
        n: how many are chosen; None is all that are long enough.
        min_length, max_length: in tokens, BOS included; None is no limit, and the model's context.
        seed: of the choice, or of the generated prompts.
        source: where the recipe stands.
    """

    name: str
    description: str
    dataset: HubDataset | Literal["bundled", "bundled-demo", "indirect-object"]
    n: int | None
    min_length: int | None
    max_length: int | None
    seed: int
    source: str


_C4 = HubDataset("allenai/c4", "en", "validation", "text")
_MATH = HubDataset("open-r1/OpenR1-Math-220k", "default", "train", "problem")
_SPLIT = "The paper does not name the split: here it is validation, which C4 holds out of training."
_PAPER = '"Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs"'
_HELD_OUT = "moe_lens: the held-out documents in the package"

PRESETS: dict[str, CorpusPreset] = {
    preset.name: preset
    for preset in (
        CorpusPreset(
            "routing-paper-tokens",
            f"1,000 random samples of C4 with at least 32 tokens, the first 32 of each, for scores of tokens. The "
            f"paper says 1,000 for its 5.1, which is the setup; taken to be 5.2. {_SPLIT}",
            _C4, 1000, 32, 32, 0,
            f"{_PAPER}, section 5.1: \"We randomly select samples with at least 32 tokens from C4 dataset and "
            f"truncate each to the first 32 tokens\"; \"We use 1000 and 5000 samples for the experiments in Section "
            f"5.1 and 5.3\"",
        ),
        CorpusPreset(
            "routing-paper-layers",
            f"5,000 random samples of C4 with at least 32 tokens, the first 32 of each, for scores of layers and "
            f"heads. {_SPLIT}",
            _C4, 5000, 32, 32, 0,
            f"{_PAPER}, sections 5.1 and 6.1: \"We follow the setting in Section 5.1 and use 5000 samples\"",
        ),
        CorpusPreset(
            "routing-paper-indirect-object",
            "5,000 indirect-object prompts, whole, half ABBA and half BABA. The paper adapts the generator of Wang et "
            "al. 2023; these are `indirect_object_prompts` with held-out names and templates, which are others.",
            "indirect-object", 5000, None, None, 0,
            f"{_PAPER}, appendix C: \"We adapt the code provided in the original paper to generate 5000 samples for "
            f"the IOI task experiments\"",
        ),
        CorpusPreset(
            "routing-paper-math",
            "1,000 random problems (the field `problem`, without solutions) of OpenR1-Math-220k with at least 32 "
            "tokens, the first 32 of each. The paper says \"a subset\": number, lengths and field are chosen here, "
            "the first two as in its section 5.1.",
            _MATH, 1000, 32, 32, 0,
            f"{_PAPER}, appendix J: \"experimental results on a subset of OpenR1-Math-220k\"",
        ),
        CorpusPreset(
            "bundled",
            "All bundled held-out documents, cut to 512 tokens.",
            "bundled", None, None, 512, 0, _HELD_OUT,
        ),
        CorpusPreset(
            "bundled-demo",
            "The bundled documents that `moe-lens demo` runs, cut to 512 tokens.",
            "bundled-demo", None, None, 512, 0, _HELD_OUT,
        ),
        CorpusPreset(
            "bundled-32",
            "All bundled held-out documents with at least 32 tokens, the first 32 of each: the routing paper's recipe "
            "on text that needs no download.",
            "bundled", None, 32, 32, 0, _HELD_OUT,
        ),
    )
}  # fmt: skip
"""Recipes by name."""


def preset_batches(
    model: HookedMoE,
    preset: str | CorpusPreset,
    *,
    documents: Iterable[Document] | None = None,
    n: int | None = None,
    batch_size: int = 8,
    seed: int | None = None,
    prepend_bos: Bos = "default",
    truncate: bool = True,
    allow_fewer: bool = False,
) -> TokenBatches:
    """Run a recipe: get its documents, choose among them, and tokenise them.

    Args:
        preset: a name in `PRESETS`, or a preset of your own (`dataclasses.replace` changes one).
        documents: take these instead of the preset's own, and do the same with them: the recipe without the hub. A
            choice is then drawn from all of them; from a dataset it is the first suitable ones of a shuffled stream.
        n, seed: instead of the preset's.
        batch_size: documents in a batch.
        prepend_bos: as in `token_batches`; "default" is `bos_by_default(model)`. A BOS is one of the tokens that
            the recipe counts.
        truncate: cut longer documents, and count what was cut; otherwise one raises.
        allow_fewer: take what there is where fewer documents are long enough; otherwise that raises.

    Raises:
        OSError: the preset's dataset cannot be reached.
        ValueError: no such preset; and as `select_documents`.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    preset = replace(preset, n=preset.n if n is None else n, seed=preset.seed if seed is None else seed)
    in_random_order = False
    if documents is not None:
        origin = "documents given"
    elif isinstance(preset.dataset, HubDataset):
        in_random_order = preset.n is not None
        documents, origin = _hub_documents(preset.dataset, preset.n, preset.seed), str(preset.dataset)
        if in_random_order:
            origin += f", shuffled with seed {preset.seed}"
    elif preset.dataset == "indirect-object":
        if preset.n is None:
            raise ValueError(f"the preset {preset.name!r} generates its prompts, so it needs an n")
        in_random_order = True
        documents = _indirect_object_documents(preset.n, preset.seed)
        origin = f"prompts generated with seed {preset.seed}"
    else:
        documents = bundled_documents(demo_only=preset.dataset == "bundled-demo")
        origin = "held-out documents of the package"
    return select_documents(
        model,
        documents,
        batch_size=batch_size,
        max_length=preset.max_length,
        min_length=preset.min_length,
        n=preset.n,
        seed=preset.seed,
        prepend_bos=bos_by_default(model) if prepend_bos == "default" else prepend_bos,
        truncate=truncate,
        allow_fewer=allow_fewer,
        in_random_order=in_random_order,
        description=f"{preset.name} ({origin})",
    )


def corpus_batches(
    model: HookedMoE,
    source: str | Path,
    *,
    batch_size: int,
    max_length: int | None = None,
    min_length: int | None = None,
    n: int | None = None,
    seed: int | None = None,
    text_field: str = "text",
    prepend_bos: Bos = "default",
    truncate: bool = True,
    allow_fewer: bool = False,
) -> TokenBatches:
    """What `--corpus SOURCE` means.

    Args:
        source: one of these, looked up in this order:
            a preset's name;
            `hf:NAME` or `hf:NAME:CONFIG:SPLIT`, a dataset on the Hugging Face hub or in a directory. An empty CONFIG
            is the default one, and without SPLIT it is `train`. With `n` it is streamed, and without it all of it is
            downloaded;
            a file of JSON lines (by its suffix, such as .jsonl);
            any other file, as plain text: every paragraph is a document.
        batch_size: documents in a batch.
        max_length, min_length: in tokens, BOS included; None is the preset's, else the context and no limit.
        n: how many documents to choose at random; None is the preset's, else all.
        seed: of the choice; None is the preset's, else 0.
        text_field: of JSON lines and datasets.
        prepend_bos: as in `token_batches`; "default" is `bos_by_default(model)`.
        truncate: cut longer documents, and count what was cut; otherwise one raises.
        allow_fewer: take what there is where there are fewer than `n`; otherwise that raises.

    Raises:
        OSError: a dataset that cannot be reached.
        ValueError: a source that is none of these, a `text_field` for one without fields; and as
            `select_documents`.
    """
    name, kind = str(source), corpus_kind(source, text_field=text_field)
    if kind == "preset":
        changes = {"max_length": max_length, "min_length": min_length, "n": n, "seed": seed}
        preset = replace(PRESETS[name], **{key: value for key, value in changes.items() if value is not None})
        return preset_batches(
            model,
            preset,
            batch_size=batch_size,
            prepend_bos=prepend_bos,
            truncate=truncate,
            allow_fewer=allow_fewer,
        )
    seed = 0 if seed is None else seed
    in_random_order = kind == "dataset" and n is not None
    documents: Iterable[Document]
    if kind == "dataset":
        dataset = _named_dataset(name, text_field)
        documents, origin = _hub_documents(dataset, n, seed), str(dataset)
        if in_random_order:
            origin += f", shuffled with seed {seed}"
    elif kind == "JSON lines":
        documents, origin = read_jsonl(name, text_field=text_field), Path(name).name
    else:
        documents, origin = read_text(name), Path(name).name
    return select_documents(
        model,
        documents,
        batch_size=batch_size,
        max_length=max_length,
        min_length=min_length,
        n=n,
        seed=seed,
        prepend_bos=bos_by_default(model) if prepend_bos == "default" else prepend_bos,
        truncate=truncate,
        allow_fewer=allow_fewer,
        in_random_order=in_random_order,
        description=origin,
    )


def corpus_kind(
    source: str | Path, *, text_field: str = "text"
) -> Literal["preset", "dataset", "JSON lines", "text"]:
    """Which kind of corpus a source names, as `corpus_batches` would take it; nothing is read.

    Raises:
        ValueError: see `corpus_batches`.
    """
    name, path = str(source), Path(source)
    if name in PRESETS:
        _refuse_text_field(text_field, f"the preset {name}")
        return "preset"
    if name.startswith("hf:"):
        _named_dataset(name, text_field)
        return "dataset"
    if path.is_file() and path.suffix.lower() in _JSON_LINES:
        return "JSON lines"
    if path.is_file():
        _refuse_text_field(text_field, f"the text file {path.name}")
        return "text"
    what = "is a directory; for a dataset write hf: in front" if path.is_dir() else "is no corpus"
    raise ValueError(f"{name!r} {what}. A corpus is {_ACCEPTED}")


_ACCEPTED = (
    f"a preset ({', '.join(PRESETS)}), a file of JSON lines ({', '.join(_JSON_LINES)}), another file of plain text, "
    f"or a dataset on the Hugging Face hub or in a directory, hf:NAME or hf:NAME:CONFIG:SPLIT"
)


def _refuse_text_field(text_field: str, what: str) -> None:
    if text_field != "text":
        raise ValueError(f"text_field={text_field!r} is for JSON lines and datasets, and {what} takes none")


def _named_dataset(source: str, text_field: str) -> HubDataset:
    name = source.removeprefix("hf:")
    parts = [name] if Path(name).is_dir() else name.split(":")
    if len(parts) not in (1, 3) or not parts[0]:
        raise ValueError(f"{source!r} names no dataset. A corpus is {_ACCEPTED}")
    config, split = parts[1:] or ("", "train")
    if not split:
        raise ValueError(
            f"{source!r} names no split: write hf:NAME:CONFIG:SPLIT, such as hf:allenai/c4:en:train"
        )
    return HubDataset(parts[0], config or None, split, text_field)


def _hub_documents(dataset: HubDataset, n: int | None, seed: int) -> Iterator[Document]:
    """All documents where `n` is None, else a shuffled stream; opened when the first one is asked for."""
    where = {"config": dataset.config, "split": dataset.split, "text_field": dataset.text_field}
    if n is None:
        yield from read_dataset(dataset.name, **where)
    else:
        yield from stream_dataset(dataset.name, **where, seed=seed)


def _indirect_object_documents(n: int, seed: int) -> list[Document]:
    return [
        Document(f"indirect-object#{index}", prompt.order, prompt.text)
        for index, prompt in enumerate(indirect_object_prompts(n, seed=seed))
    ]
