"""`moe-lens audit MODEL_OR_CENSUS...`: does any metric say which expert matters? Tables, and a page."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.commands.options import (
    DEFAULT_CORPUS,
    DTYPES,
    add_corpus,
    add_memory_budget,
    add_precision,
    check_corpus_and_output,
    corpus_of,
    device_of,
)

if TYPE_CHECKING:
    from moe_lens.audit.audit_settings import AuditSettings
    from moe_lens.audit.census_table import Census
    from moe_lens.audit.model_audit import ModelAudit
    from moe_lens.config import MoEConfig
    from moe_lens.corpus import TokenBatches
    from moe_lens.model.hooked_moe import HookedMoE

_BATCH_SIZE = 8


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "audit",
        help="test whether metrics predict what ablating an expert does, with a census, controls and statistics",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL_OR_CENSUS",
        help="a checkpoint directory, a hub id, 'mini', or the folder of a finished census; several are compared",
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="MODEL",
        help="of each census that is given, in their order (default: the model that the census names)",
    )
    add_corpus(
        parser,
        seed_help="of the choice of documents (default: the preset's, else 0), and of samples, draws and resampling "
        "(default: 0)",
    )
    # None, so that it is known whether one was given: the published settings have corpora of their own.
    parser.set_defaults(corpus=None)
    parser.add_argument(
        "--metrics-corpus",
        metavar="CORPUS",
        help="what the metrics are of, as --corpus names it (default: --corpus)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="a folder for censuses, tables and the page"
    )
    _add_experiment(parser)
    add_memory_budget(parser, 1.0)
    add_precision(parser, streams=False)
    parser.set_defaults(run=run)


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", nargs="+", type=int, metavar="LAYER", help="default: all that there are")
    parser.add_argument(
        "--scope",
        nargs="+",
        choices=("token", "sequence"),
        help="an expert is changed at one token, or wherever it is active in the document, or one after the other "
        "(default: token)",
    )
    parser.add_argument(
        "--how",
        choices=("zero", "renormalize", "reroute"),
        help="what becomes of the expert (default: zero); a census of another kind can be given instead",
    )
    parser.add_argument(
        "--positions",
        type=int,
        metavar="N",
        help="of the census, and without --as-published of progressive removal: a uniform sample of so many "
        "(default: all)",
    )
    parser.add_argument(
        "--cell-positions",
        type=int,
        metavar="N",
        help="that are drawn of the census for each metric and layer, as published audits do (default: all)",
    )
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help="default: all that are registered")
    parser.add_argument(
        "--as-released",
        action="store_true",
        help="audit also the published audit's four metrics as its released code computes them for the model's family",
    )
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="the published audit's settings for the model's family: layers, metrics, positions, and the lines of "
        "WikiText-2's test split, or of --corpus",
    )
    parser.add_argument(
        "--compare",
        type=int,
        default=1,
        metavar="N",
        help="so many highest experts with so many lowest (default: 1)",
    )
    parser.add_argument(
        "--smallest-effect",
        type=float,
        metavar="D",
        help="Cohen's d; `equivalent` says that |d| is shown to be below it (default: 0.1)",
    )
    parser.add_argument(
        "--no-progressive", action="store_true", help="leave out the removal of several experts"
    )
    parser.add_argument("--no-redistribution", action="store_true", help="leave out that analysis")


def run(options: argparse.Namespace) -> int:
    from moe_lens.audit.audit_tables import AuditTables
    from moe_lens.audit_page import audit_text, write_audit_page
    from moe_lens.corpus_presets import corpus_kind
    from moe_lens.routing.folder_lock import FolderInUse

    options.corpus_given = options.corpus is not None
    options.corpus = options.corpus if options.corpus_given else DEFAULT_CORPUS
    check_corpus_and_output(options)
    if options.as_published and options.corpus_given:
        corpus_kind(f"causal-audit@{options.corpus}", text_field=options.text_field)
    if options.metrics_corpus is not None:
        corpus_kind(options.metrics_corpus)
    _check_numbers(options)
    subjects = _subjects(options)
    # The last model is found wrong before the first has run for hours.
    for subject in subjects:
        _check_model(subject, options)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        # A model at a time is in memory.
        audits = [_audit(subject, options) for subject in subjects]
    except FolderInUse as error:
        raise OSError(str(error)) from error
    tables = AuditTables.of(audits)
    tables.save(options.output)
    page = write_audit_page(tables, options.output / "index.html")
    print(audit_text(tables))
    print(f"tables and page: {page.parent}")
    return 0 if tables.passed and tables.noise_criterion_met else 1


# ---- what is audited ----


@dataclass(frozen=True)
class _Subject:
    """A model, and its census where that is given.

    Attributes:
        label: of its own among the subjects.
        checkpoint: where the model is.
        folder: what is kept of it, a name within `--output`; of its own as well.
        census: finished, or None.
    """

    label: str
    checkpoint: str
    folder: str
    census: Census | None


def _subjects(options: argparse.Namespace) -> list[_Subject]:
    """Those of the command line, each with its label.

    Raises:
        ValueError: checkpoints without a census each, one argument twice, an option for what is there already.
    """
    from moe_lens.audit.census_table import Census

    folders: dict[str, Path | None] = {given: _census_folder(given) for given in options.models}
    places = {str(folder or _place(given)) for given, folder in folders.items()}
    if len(places) < len(options.models):
        raise ValueError(f"each model or census is given once, not {' '.join(options.models)}")
    censuses = {given: Census.load(folder) for given, folder in folders.items() if folder is not None}
    checkpoints = options.checkpoint or [str(one.provenance.get("model")) for one in censuses.values()]
    if len(checkpoints) != len(censuses):
        raise ValueError(
            f"--checkpoint names {len(checkpoints)} models, and {len(censuses)} censuses are given; it is one for each"
        )
    if censuses and len(censuses) == len(folders):
        for name in ("scope", "how"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name} is for a census that is to be made, and cannot be given with one that is there already, "
                    f"as {next(iter(censuses))} is"
                )
    of_census: dict[str, str] = dict(zip(censuses, checkpoints, strict=True))
    wheres: dict[str, str] = {given: of_census.get(given, given) for given in folders}
    labels = _labels(wheres)
    names = _folder_names(list(labels.values()))
    return [
        _Subject(label=labels[given], checkpoint=where, folder=name, census=censuses.get(given))
        for (given, where), name in zip(wheres.items(), names, strict=True)
    ]


def _labels(wheres: Mapping[str, str]) -> dict[str, str]:
    """Short names; what was given, where two share one."""
    short = {given: _short(where) for given, where in wheres.items()}
    names = list(short.values())
    labels = {given: name if names.count(name) == 1 else given for given, name in short.items()}
    return labels if len(set(labels.values())) == len(labels) else {given: given for given in wheres}


def _folder_names(labels: Sequence[str]) -> list[str]:
    """One for each label, also where only characters that no folder should have tell two labels apart."""
    names: list[str] = []
    for label in labels:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "--", label.strip("/.")) or "model"
        taken = {name.lower() for name in names}
        candidates = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        names.append(next(name for name in candidates if name.lower() not in taken))
    return names


def _census_folder(given: str) -> Path | None:
    """The folder of a census, also where it is what `moe-lens census` wrote around it; None: it is a model's."""
    from moe_lens.audit.census_shards import HEADER

    for folder in (Path(given), Path(given) / "census"):
        if (folder / HEADER).is_file():
            return folder.resolve()
    return None


def _place(given: str) -> str:
    """The same for all ways to write one directory."""
    path = Path(given)
    return str(path.resolve()) if path.is_dir() else given


def _short(checkpoint: str) -> str:
    """A hub id whole; of a folder, its last part."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else checkpoint


# ---- what can be known to be wrong before a weight is read ----


def _check_numbers(options: argparse.Namespace) -> None:
    from moe_lens.audit.metric_registry import find_metrics
    from moe_lens.audit.paired_tests import check_levels
    from moe_lens.routing.arguments import natural_number, positive_integer

    find_metrics(options.metrics)
    if options.smallest_effect is not None:
        check_levels(options.smallest_effect, 0.05)
    for name in ("positions", "cell_positions", "compare"):
        if getattr(options, name) is not None:
            positive_integer(getattr(options, name), f"--{name.replace('_', '-')}")
    natural_number(options.seed or 0, "--seed")
    if options.scope is not None and len(set(options.scope)) < len(options.scope):
        raise ValueError(f"--scope names each scope once, not {' '.join(options.scope)}")
    if options.positions is not None and (options.cell_positions or 0) > options.positions:
        raise ValueError(
            f"--cell-positions {options.cell_positions} are drawn of a census, and --positions {options.positions} "
            f"makes one of fewer"
        )
    device_of(options.device)


def _check_model(subject: _Subject, options: argparse.Namespace) -> None:
    """What its config says.

    Raises:
        ValueError: the settings do not fit it; FileNotFoundError: there is no such checkpoint.
    """
    from moe_lens.audit.released_metrics import RELEASED
    from moe_lens.converters.loading import convert_config, find_checkpoint, read_hf_config
    from moe_lens.interventions.spec_base import moe_layers_of
    from moe_lens.routing.arguments import few

    where = subject.checkpoint
    cfg = convert_config(read_hf_config(find_checkpoint(where), where), name=where, device="cpu")
    if options.as_released and cfg.model_type not in RELEASED:
        raise ValueError(
            f"--as-released: the released code has definitions for {', '.join(RELEASED)}, and {where} is of "
            f"{cfg.model_type!r}"
        )
    settings, _ = _settings(cfg, options)
    layers = moe_layers_of(cfg, settings.layers)
    if subject.census is not None and settings.layers is not None:
        missing = [layer for layer in layers if layer not in subject.census.layers]
        if missing:
            raise ValueError(
                f"the census of {subject.label} has no layer {few(missing)}; it is of layers "
                f"{few(subject.census.layers)}"
            )
    if 2 * options.compare > cfg.top_k:
        raise ValueError(
            f"--compare {options.compare} needs {2 * options.compare} active routed experts, and {where} has "
            f"{cfg.top_k}"
        )


# ---- what is done ----


def _audit(subject: _Subject, options: argparse.Namespace) -> ModelAudit:
    from moe_lens.audit.model_audit import audit_model
    from moe_lens.model.hooked_moe import HookedMoE

    dtype = DTYPES.get(options.dtype)
    if dtype is None and subject.census is not None:
        dtype = DTYPES.get(str(subject.census.provenance.get("dtype")))
    model = HookedMoE.from_pretrained(subject.checkpoint, dtype=dtype, device=device_of(options.device))
    settings, corpora = _experiment(model, options)
    if subject.census is not None:
        settings = _settings_beside(subject.census, settings, subject.label)
    print(f"{subject.label}: {_what_is_run(subject, corpora['census'])}")
    return audit_model(
        model,
        subject.checkpoint,
        corpora["census"],
        settings=settings,
        metrics_corpus=corpora.get("metrics"),
        progressive_corpus=corpora.get("progressive"),
        redistribution_corpus=corpora.get("redistribution"),
        censuses=() if subject.census is None else (subject.census,),
        label=subject.label,
        output=options.output / subject.folder,
        verbose=True,
    )


def _settings_beside(census: Census, settings: AuditSettings, label: str) -> AuditSettings:
    """The settings for a census that is there: progressive removal does what it did, where it can."""
    how = census.provenance.get("how")
    if how in ("zero", "renormalize", "reroute"):
        return replace(settings, how=how)
    if settings.progressive:
        print(
            f"{label}: its census is of {how!r}, which progressive removal is not made of here; it is left out"
        )
    return replace(settings, progressive=False)


def _what_is_run(subject: _Subject, corpus: TokenBatches) -> str:
    if subject.census is None:
        return corpus.description
    of = subject.census.provenance
    same = of.get("tokens") == corpus.fingerprint
    beside = "the same documents" if same else f"OTHER documents, {corpus.description}"
    return (
        f"a census of {of.get('corpus')}; verification, metrics, progressive removal and redistribution are of "
        f"{beside}"
    )


def _settings(cfg: MoEConfig, options: argparse.Namespace) -> tuple[AuditSettings, dict[str, str]]:
    """What is asked for; and names of corpus presets, where the published audit's are."""
    from moe_lens.audit.as_published import as_published
    from moe_lens.audit.audit_settings import AuditSettings
    from moe_lens.audit.paired_tests import SMALLEST_EFFECT

    settings = AuditSettings(
        layers=options.layers,
        scopes=tuple(options.scope or ("token",)),
        how=options.how or "zero",
        positions=options.positions,
        metrics=options.metrics,
        as_released=options.as_released,
        n=options.cell_positions,
        compare=options.compare,
        smallest_effect=SMALLEST_EFFECT if options.smallest_effect is None else options.smallest_effect,
        progressive=not options.no_progressive,
        redistribution=not options.no_redistribution,
        seed=options.seed or 0,
        memory_budget=int(options.memory_budget * 2**30),
    )
    return as_published(cfg, settings) if options.as_published else (settings, {})


def _experiment(model: HookedMoE, options: argparse.Namespace) -> tuple[AuditSettings, dict[str, Any]]:
    """The settings, and the documents of each part that has its own."""
    settings, presets = _settings(model.cfg, options)
    corpora: dict[str, Any] = {}
    for part, preset in presets.items():
        lines = f"{preset}@{options.corpus}" if options.corpus_given else preset
        # The published runs leave special tokens to the tokenizer.
        corpora[part] = corpus_of(model, options, _BATCH_SIZE, source=lines, prepend_bos=None)
    if not presets:
        corpora["census"] = corpus_of(model, options, _BATCH_SIZE)
    if options.metrics_corpus is not None:
        corpora["metrics"] = corpus_of(
            model, options, _BATCH_SIZE, source=options.metrics_corpus, n=None, text_field="text"
        )
    return settings, corpora
