"""Where corpora come from: named recipes of published analyses, and what a command line may name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moe_lens.corpus import (
    Choice,
    Document,
    TokenBatches,
    bos_by_default,
    bundled_documents,
    read_jsonl,
    read_lines,
    read_text,
    select_documents,
)
from moe_lens.corpus_datasets import HubDataset, read_dataset, stream_dataset
from moe_lens.indirect_object import indirect_object_prompts
from moe_lens.model.hooked_moe import HookedMoE

__all__ = [
    "PRESETS",
    "WIKITEXT_2",
    "Bos",
    "CorpusPreset",
    "HubDataset",
    "corpus_batches",
    "corpus_kind",
    "preset_batches",
    "read_dataset",
    "stream_dataset",
]

Bos = bool | Literal["default"] | None
"""`prepend_bos` of whole documents: "default" is `bos_by_default` of the model, the rest as in `token_batches`."""

_JSON_LINES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson", ".json")
_LINES = "lines:"


@dataclass(frozen=True)
class CorpusPreset:
    """A named recipe for a corpus; `preset_batches` runs it.

    Attributes:
        name: under which it stands in `PRESETS`.
        description: what it is, and what its source left open.
        dataset: where its documents come from.
        n: how many are chosen, as `choice` says; None is all that are long enough.
        min_length, max_length: in tokens, BOS included; None is no limit, and the model's context.
        seed: of the choice, or of the generated prompts.
        source: where the recipe stands.
        longer_than: characters; a document of so many or fewer is left out, white space at its ends not counted. None
            is no limit.
        choice: "random", or "first": the first `n` that are long enough, in their order, and `seed` is not used.
    """

    name: str
    description: str
    dataset: HubDataset | Literal["bundled", "bundled-demo", "indirect-object"]
    n: int | None
    min_length: int | None
    max_length: int | None
    seed: int
    source: str
    longer_than: int | None = None
    choice: Choice = "random"


WIKITEXT_2 = HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text")
"""The test split of raw WikiText-2: a document is a line, its spaces and line feed included."""

_C4 = HubDataset("allenai/c4", "en", "validation", "text")
_MATH = HubDataset("open-r1/OpenR1-Math-220k", "default", "train", "problem")
_SPLIT = "The paper does not name the split: here it is validation, which C4 holds out of training."
_PAPER = '"Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs"'
_AUDIT = (
    '"From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models" '
    "(arXiv:2606.10703)"
)
_AUDIT_CODE = (
    "which lines, and where they are cut, is in its code: https://github.com/callmeloui/observational_metrics"
)
_TOKENIZERS_OWN = "Its code leaves special tokens to the tokenizer: that is prepend_bos=None."
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
            "causal-audit",
            f"Lines of WikiText-2's raw test split of more than 50 characters, the first 100 of them, cut to 512 "
            f"tokens. {_TOKENIZERS_OWN}",
            WIKITEXT_2, 100, None, 512, 0,
            f"{_AUDIT}, section 2: \"The evaluation corpus is the WikiText-2 test split\"; {_AUDIT_CODE}",
            longer_than=50, choice="first",
        ),
        CorpusPreset(
            "causal-audit-progressive",
            f"Lines of WikiText-2's raw test split of more than 100 characters and at least 33 tokens, so that one can "
            f"be predicted from 32; cut to 256 tokens. {_TOKENIZERS_OWN}",
            WIKITEXT_2, None, 33, 256, 0,
            f"{_AUDIT}, section 3 and appendix C; {_AUDIT_CODE}",
            longer_than=100,
        ),
        CorpusPreset(
            "causal-audit-redistribution",
            f"Lines of WikiText-2's raw test split of more than 100 characters, the first 200 of them, cut to 256 "
            f"tokens. {_TOKENIZERS_OWN}",
            WIKITEXT_2, 200, None, 256, 0,
            f"{_AUDIT}, section 3 and appendix A.3: \"over the WikiText-2 test corpus\"; {_AUDIT_CODE}",
            longer_than=100, choice="first",
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
    origin: str = "documents given",
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
            random choice is then drawn from all of them; from a dataset it is the first suitable ones of a shuffled
            stream.
        origin: what `documents` are, for the description.
        n, seed: instead of the preset's. Where the preset takes the first documents, `n` is how many, and `seed` is
            not used.
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
    choice = preset.choice
    if documents is not None:
        pass
    elif isinstance(preset.dataset, HubDataset):
        in_its_order = preset.n is None or choice == "first"
        documents, origin = _hub_documents(preset.dataset, None if in_its_order else preset.seed)
        choice = "first"
    elif preset.dataset == "indirect-object":
        if preset.n is None:
            raise ValueError(f"the preset {preset.name!r} generates its prompts, so it needs an n")
        choice = "first"
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
        longer_than=preset.longer_than,
        choice=choice,
        truncate=truncate,
        allow_fewer=allow_fewer,
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
            `lines:FILE`, a file of plain text: every line is a document, as in `read_lines`;
            a file of JSON lines (by its suffix, such as .jsonl);
            any other file, as plain text: every paragraph is a document;
            `PRESET@SOURCE`, a preset's recipe on the documents of one of these others, such as
            `causal-audit@lines:wiki.test.raw` for the recipe on WikiText without the hub.
        batch_size: documents in a batch.
        max_length, min_length: in tokens, BOS included; None is the preset's, else the context and no limit.
        n: how many documents to choose, at random unless the preset takes the first ones; None is the preset's, else
            all.
        seed: of a random choice; None is the preset's, else 0.
        text_field: of JSON lines and datasets.
        prepend_bos: as in `token_batches`; "default" is `bos_by_default(model)`.
        truncate: cut longer documents, and count what was cut; otherwise one raises.
        allow_fewer: take what there is where there are fewer than `n`; otherwise that raises.

    Raises:
        OSError: a dataset that cannot be reached.
        ValueError: a source that is none of these, a `text_field` for one without fields; and as
            `select_documents`.
    """
    preset, name = _divided(source)
    kind = corpus_kind(source, text_field=text_field)
    seed_or_0 = 0 if seed is None else seed
    documents: Iterable[Document] | None = None
    origin: str = Path(name.removeprefix(_LINES)).name
    choice: Choice = "random"
    if kind == "dataset":
        dataset = _named_dataset(name, text_field)
        if preset is None:
            documents, origin = _hub_documents(dataset, None if n is None else seed_or_0)
            choice = "first"
        else:
            preset = replace(preset, dataset=dataset)
    elif kind == "JSON lines":
        documents = read_jsonl(name, text_field=text_field)
    elif kind == "lines":
        documents = read_lines(name.removeprefix(_LINES))
    elif kind == "text":
        documents = read_text(name)
    if preset is not None:
        changes = {"max_length": max_length, "min_length": min_length, "n": n, "seed": seed}
        return preset_batches(
            model,
            replace(preset, **{key: value for key, value in changes.items() if value is not None}),
            documents=documents,
            origin=origin,
            batch_size=batch_size,
            prepend_bos=prepend_bos,
            truncate=truncate,
            allow_fewer=allow_fewer,
        )
    assert documents is not None
    return select_documents(
        model,
        documents,
        batch_size=batch_size,
        max_length=max_length,
        min_length=min_length,
        n=n,
        seed=seed_or_0,
        prepend_bos=bos_by_default(model) if prepend_bos == "default" else prepend_bos,
        choice=choice,
        truncate=truncate,
        allow_fewer=allow_fewer,
        description=origin,
    )


Kind = Literal["preset", "dataset", "lines", "JSON lines", "text"]


def corpus_kind(source: str | Path, *, text_field: str = "text") -> Kind:
    """Which kind of corpus a source names, as `corpus_batches` would take it, and of PRESET@SOURCE which kind that
    source is; nothing is read.

    Raises:
        ValueError: see `corpus_batches`.
    """
    preset, name = _divided(source)
    path = Path(name)
    if preset is not None and not name:
        _refuse_text_field(text_field, f"the preset {preset.name}")
        return "preset"
    if name.startswith("hf:"):
        _named_dataset(name, text_field)
        return "dataset"
    if name.startswith(_LINES):
        path = Path(name.removeprefix(_LINES))
        if not path.is_file():
            raise ValueError(f"{str(source)!r} names no file of lines: there is no file {str(path)!r}")
        _refuse_text_field(text_field, f"the text file {path.name}")
        return "lines"
    if path.is_file() and path.suffix.lower() in _JSON_LINES:
        return "JSON lines"
    if path.is_file():
        _refuse_text_field(text_field, f"the text file {path.name}")
        return "text"
    if preset is not None and name in PRESETS:
        raise ValueError(f"{str(source)!r} is a preset on a preset, and a preset runs on other documents")
    what = "is a directory; for a dataset write hf: in front" if path.is_dir() else "is no corpus"
    raise ValueError(f"{name!r} {what}. A corpus is {_ACCEPTED}")


_ACCEPTED = (
    f"a preset ({', '.join(PRESETS)}), a file of JSON lines ({', '.join(_JSON_LINES)}), another file of plain text, "
    f"of which every paragraph is a document, or of which every line is one, {_LINES}FILE, a dataset on the Hugging "
    f"Face hub or in a directory, hf:NAME or hf:NAME:CONFIG:SPLIT, or a preset on other documents, PRESET@SOURCE"
)


def _divided(source: str | Path) -> tuple[CorpusPreset | None, str]:
    """The preset that a source names, and the rest of it: "" of a preset alone."""
    name = str(source)
    before, at, after = name.partition("@")
    if before in PRESETS and (after or not at):
        return PRESETS[before], after
    return None, name


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


def _hub_documents(dataset: HubDataset, seed: int | None) -> tuple[Iterator[Document], str]:
    """All documents of a dataset, and what they are: shuffled, or with `seed` None in its own order.

    The dataset is opened when the first document is asked for."""

    def documents() -> Iterator[Document]:
        where = {"config": dataset.config, "split": dataset.split, "text_field": dataset.text_field}
        if seed is None:
            yield from read_dataset(dataset.name, **where)
        else:
            yield from stream_dataset(dataset.name, **where, seed=seed)

    return documents(), str(dataset) if seed is None else f"{dataset}, shuffled with seed {seed}"


def _indirect_object_documents(n: int, seed: int) -> list[Document]:
    return [
        Document(f"indirect-object#{index}", prompt.order, prompt.text)
        for index, prompt in enumerate(indirect_object_prompts(n, seed=seed))
    ]
