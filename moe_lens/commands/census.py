"""`moe-lens census MODEL`: change every active expert at every token of a corpus, one at a time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_lens.commands.options import (
    add_corpus,
    add_memory_budget,
    add_model,
    add_precision,
    add_streams,
    check_corpus_and_output,
    check_streams,
    corpus_of,
    model_of,
)
from moe_lens.ranks import Ranks, became_visible, joined

_NEED_REFERENCE = ("mean", "resample")
_BATCH_SIZE = 8  # of the reference's documents; the census takes one at a time


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "census",
        help="what every active expert does to the loss at every token of a corpus; can be killed and resumed",
    )
    add_model(parser)
    add_corpus(
        parser,
        seed_help="of the choice of documents (default: the preset's, else 0), of --positions, and of resample's draws "
        "(default: 0)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="a folder for the census, its tables and its page"
    )
    parser.add_argument("--layers", nargs="+", type=int, metavar="LAYER", help="default: every MoE layer")
    parser.add_argument(
        "--how",
        choices=("zero", "renormalize", "reroute", *_NEED_REFERENCE),
        default="zero",
        help="what becomes of the expert (default: zero)",
    )
    parser.add_argument(
        "--scope",
        choices=("token", "sequence"),
        default="token",
        help="it is changed at one token, or wherever it is active in the document (default: token)",
    )
    parser.add_argument(
        "--positions",
        type=int,
        metavar="N",
        help="a uniform sample of so many positions of the documents (default: all)",
    )
    parser.add_argument(
        "--outcome",
        nargs="+",
        choices=("kl", "later_loss"),
        default=[],
        help="columns beside the change of the loss; later_loss takes a pass of its own for every position",
    )
    parser.add_argument(
        "--predictors", nargs="+", choices=("first_order", "direct"), default=[], help="columns, likewise"
    )
    parser.add_argument("--shared", action="store_true", help="also the shared experts, as expert -1, rank 0")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="for mean and resample: an expert reference that ExpertReference.save wrote",
    )
    parser.add_argument(
        "--reference-corpus",
        metavar="CORPUS",
        help="or what to make one of, as --corpus names it (default: the documents of the census)",
    )
    parser.add_argument(
        "--reference-documents",
        type=int,
        metavar="N",
        help="and how many of its documents (default: the preset's number, else all)",
    )
    parser.add_argument(
        "--noise-samples",
        type=int,
        default=32,
        help="in half precision: ablations that are also made in full forward passes and in float32 (default: 32; "
        "0: none)",
    )
    add_memory_budget(parser, 1.0)
    add_precision(parser)
    add_streams(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with joined() as ranks:
        return _run(options, ranks)


def _run(options: argparse.Namespace, ranks: Ranks) -> int:
    from moe_lens.audit.census import census
    from moe_lens.audit.noise import NoiseFloor
    from moe_lens.census_page import largest_changes, write_census_page
    from moe_lens.routing.folder_lock import FolderInUse
    from moe_lens.routing.storage import whole_or_not

    check_corpus_and_output(options)
    check_streams(options)
    _check_reference(options)
    model = model_of(options, ranks)
    corpus = corpus_of(model, options, _BATCH_SIZE)
    options.output.mkdir(parents=True, exist_ok=True)
    budget = options.streams_budget
    try:
        result = census(
            model,
            corpus,
            layers=options.layers,
            how=options.how,
            scope=options.scope,
            reference=_reference(model, corpus, options, ranks),
            seed=options.seed or 0,
            shared=options.shared,
            n=options.positions,
            outcome=options.outcome,
            predictors=options.predictors,
            output=options.output / "census",
            memory_budget=int(options.memory_budget * 2**30),
            noise_samples=options.noise_samples,
            ranks=ranks,
            streams_budget=None if budget is None else int(budget * 2**30),
            spill_directory=options.spill_directory,
            verbose=True,
        )
    except FolderInUse as error:
        raise OSError(str(error)) from error
    if not ranks.first:
        return 0  # rank 0 writes
    by_layer, by_rank = result.by_layer(), result.by_rank()
    for name, rows in (("by_layer", by_layer), ("by_rank", by_rank)):
        with whole_or_not(options.output / f"{name}.csv") as unfinished:
            rows.to_csv(unfinished, index=False)
    examples = largest_changes(model, corpus, result)
    page = write_census_page(result, options.output / "index.html", examples=examples)
    print(summary(result))
    print(f"census, tables and page: {page.parent}")
    noise = result.facts.get("noise_floor")
    if noise is None:
        return 0
    floor = NoiseFloor(**noise)
    print(
        f"noise floor: changes of {floor.median_effect:.2g} nats (median) are off by {floor.replay_error:.2g}, in full "
        f"forward passes by {floor.hooked_error:.2g}: {'ok' if floor.meets_criterion else 'FAIL'}"
    )
    return 0 if floor.meets_criterion else 1


def summary(result: Any) -> str:
    """A line or two for the terminal."""
    from moe_lens.census_page import mean_by_rank

    layers = result.by_layer()
    of_layers = ", ".join(f"M{m} {v:+.2g}" for m, v in zip(layers.layer, layers.delta_loss, strict=True))
    of_ranks = ", ".join(
        f"{f'rank {rank}' if rank else 'shared'} {change:+.2g}"
        for rank, change in mean_by_rank(result).items()
    )
    return (
        f"{result}\nmean change of the loss in nats, by layer: {of_layers}\n"
        f"mean change of the loss in nats, by rank: {of_ranks}"
    )


# ---- the reference of mean and resample ----


def _check_reference(options: argparse.Namespace) -> None:
    given = {
        "--reference": options.reference,
        "--reference-corpus": options.reference_corpus,
        "--reference-documents": options.reference_documents,
    }
    used = [name for name, value in given.items() if value is not None]
    if used and options.how not in _NEED_REFERENCE:
        raise ValueError(f"{used[0]} is for --how {' and '.join(_NEED_REFERENCE)}, not for {options.how}")
    if options.reference is not None and len(used) > 1:
        raise ValueError(f"--reference is a file that is made already, so {used[1]} says nothing")
    if options.reference is not None and not options.reference.is_file():
        raise FileNotFoundError(f"there is no file --reference {str(options.reference)!r}")
    if options.reference_corpus is not None:
        _text_field(options)


def _text_field(options: argparse.Namespace) -> str:
    """Of the reference's corpus: as given, where it has fields."""
    from moe_lens.corpus_presets import corpus_kind

    has_fields = corpus_kind(options.reference_corpus) in ("dataset", "JSON lines")
    return options.text_field if has_fields else "text"


def _reference(model: Any, corpus: Any, options: argparse.Namespace, ranks: Ranks) -> Any:
    """The file's; or one made of a corpus, which is kept in the output's folder for when the run goes on. Rank 0 makes
    it, and the others read it.

    Raises:
        ValueError: the folder keeps one of something else.
    """
    from moe_lens.interventions.expert_reference import ExpertReference
    from moe_lens.routing.provenance import weights_fingerprint

    if options.how not in _NEED_REFERENCE:
        return None
    if options.reference is not None:
        return ExpertReference.load(options.reference)
    if options.reference_corpus is not None:
        corpus = corpus_of(
            model,
            options,
            _BATCH_SIZE,
            source=options.reference_corpus,
            n=options.reference_documents,
            text_field=_text_field(options),
        )
    elif options.reference_documents is not None:
        corpus = corpus_of(model, options, _BATCH_SIZE, n=options.reference_documents)
    wanted = {
        "weights": weights_fingerprint(model),
        "fingerprint": corpus.fingerprint,
        "seed": options.seed or 0,
        "layers": list(model.cfg.moe_layers if options.layers is None else sorted(set(options.layers))),
    }
    kept = options.output / "reference.safetensors"
    if ranks.first:
        reference = _kept_or_made(model, corpus, options, kept, wanted)
        ranks.wait()
        return reference
    ranks.wait()
    if not became_visible(kept):
        raise OSError(
            f"{str(kept)!r}, which rank 0 wrote, is not seen here: all ranks need one --output, on a file system that "
            f"their machines share"
        )
    return ExpertReference.load(kept)


def _kept_or_made(
    model: Any, corpus: Any, options: argparse.Namespace, kept: Path, wanted: dict[str, Any]
) -> Any:
    from moe_lens.interventions.expert_reference import ExpertReference, expert_reference

    if kept.exists():
        reference = ExpertReference.load(kept)
        there = {**reference.provenance, "layers": list(reference.layers)}
        other = [name for name, value in wanted.items() if there.get(name) != value]
        if other:
            raise ValueError(
                f"{str(kept)!r} is of another run, by its {' and '.join(other)}; name another --output, or delete "
                f"that file"
            )
        return reference
    print(f"reference: {corpus.description}")
    reference = expert_reference(model, corpus, layers=options.layers, seed=options.seed or 0, verbose=True)
    reference.save(kept)
    return reference
