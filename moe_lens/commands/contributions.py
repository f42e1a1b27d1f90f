"""`moe-lens contributions MODEL`: measure over a corpus which senders move which routers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lens.commands.options import (
    add_corpus,
    add_memory_budget,
    add_model,
    add_precision,
    check_corpus_and_output,
    corpus_of,
    model_of,
)
from moe_lens.ranks import Ranks, joined, say


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "contributions",
        help="measure over a corpus which senders move which routers; can be killed and resumed",
    )
    add_model(parser)
    add_corpus(parser, seed_help="of the choice of documents (default: the preset's, else 0)")
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("layer", "head", "source", "expert", "neuron"),
        default=["layer"],
        help="one pass measures all that are named (default: layer)",
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder for tables, state and page")
    parser.add_argument("--receivers", nargs="+", type=int, metavar="LAYER", help="default: every MoE layer")
    parser.add_argument(
        "--experts",
        nargs="+",
        metavar="EXPERT",
        default=["all"],
        help="all, selected, or numbers (default: all)",
    )
    parser.add_argument("--rank-shift", action="store_true", help="also AARV, overlap, change in weights")
    parser.add_argument("--source-axis", choices=("position", "offset"), default="position")
    parser.add_argument(
        "--text-leads", action="store_true", help="leave BOS out: the first token of text leads"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="documents (default: 8)")
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="measure the corpus in so many parts, as torchrun's processes do (there the default is at most 64): no "
        "more processes have something to do",
    )
    add_memory_budget(parser, 4.0)
    add_precision(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with joined() as ranks:
        return _run(options, ranks)


def _run(options: argparse.Namespace, ranks: Ranks) -> int:
    from moe_lens.routing.contributions import routing_contributions
    from moe_lens.routing.folder_lock import FolderInUse
    from moe_lens.routing_page import write_contributions_page
    from moe_lens.routing_page_data import routing_decisions

    experts = _experts(options.experts)
    check_corpus_and_output(options)
    if options.shards is not None and options.shards < 1:
        raise ValueError(f"--shards {options.shards} must be positive")
    model = model_of(options, ranks)
    corpus = corpus_of(model, options, options.batch_size)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        results = routing_contributions(
            model,
            corpus,
            by=options.by,
            receivers=options.receivers,
            experts=experts,
            rank_shift=options.rank_shift,
            source_axis=options.source_axis,
            bos_is_lead=not options.text_leads,
            memory_budget=int(options.memory_budget * 2**30),
            verbose=True,
            **_kept(options, ranks),
        )
    except FolderInUse as error:
        raise OSError(str(error)) from error
    if results is None:
        return 0  # rank 0 writes
    for by, result in results.items():
        result.save(options.output / f"{by}.safetensors")
        result.write_table(options.output / f"{by}.parquet")
        print(f"by {by}: largest variance at {result.receivers[-1]}: {_largest(result)}; {_sums(result)}")
    decisions = routing_decisions(model, corpus, receivers=options.receivers)
    page = write_contributions_page(results, options.output / "index.html", routing=decisions)
    print(f"tables, results and page: {page.parent}")
    return 0 if all(result.closes for result in results.values()) else 1


def _kept(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """How the run is kept: in one state, or in shards."""
    from moe_lens.routing.shards import Shards

    folder = options.output / "shards"
    if ranks.launched or options.shards is not None or folder.is_dir():
        states = sorted(options.output.glob("state.safetensors*"))
        if states and ranks.first and not folder.is_dir():
            say(f"{str(states[0])!r} is of a run in one piece: a run in shards does not go on from it")
        return {"shards": Shards(folder, ranks, options.shards)}
    return {"state": options.output / "state.safetensors"}


def _largest(result: Any) -> str:
    """The senders of the largest variance at the last router; whole components only where nothing is divided."""
    top = result.top(result.receivers[-1], n=len(result.senders))
    divided = [result.senders.group_of(result.senders.index(s)).kind != "whole" for s in top.sender[:200]]
    top = top.head(200)[divided] if any(divided) else top
    return ", ".join(f"{s} {v:.3g}" for s, v in zip(top.sender[:5], top.variance[:5], strict=True))


def _sums(result: Any) -> str:
    closed = f"sums close to {result.completeness_error:.1e} of the largest logit"
    if result.rounding_ratio is None:
        return closed
    return (
        f"{closed}, with rounding as a sender of at most {result.rounding_ratio:.2f} of what rounding can be"
    )


def _experts(given: Sequence[str]) -> Any:
    if given in (["all"], ["selected"]):
        return given[0]
    if not all(number.isdecimal() for number in given):
        raise ValueError(f"--experts {' '.join(given)}: give all, selected, or the numbers of experts")
    return [int(number) for number in given]
