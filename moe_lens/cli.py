"""The command line: `moe-lens verify MODEL`, `moe-lens contributions MODEL` and `moe-lens demo`.

Exit status 0: everything passed. 1: it ran, and a check failed. 2: it could not run; one line says why. 130: stopped
from the keyboard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What `verify` reads of a text: enough for every check, little enough for a large vocabulary's logits.
_VERIFIED_DOCUMENTS = 8
_VERIFIED_LENGTH = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is returned."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("moe-lens: stopped; what keeps a state goes on from it with the same command", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, KeyError) as error:
        print(f"moe-lens: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-lens", description="A microscope for Mixture-of-Experts models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    verify = commands.add_parser(
        "verify", help="compare a checkpoint with transformers, and try interventions"
    )
    verify.add_argument("model", metavar="MODEL", help="a checkpoint directory, a hub id, or 'mini'")
    verify.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    verify.add_argument("--device", help="default: a CUDA device where there is one, else the CPU")
    verify.add_argument(
        "--text-file", type=Path, help="text to run, paragraphs as documents (default: bundled)"
    )
    verify.set_defaults(run=_verify)

    contributions = commands.add_parser(
        "contributions",
        help="measure over a corpus which senders move which routers; can be killed and resumed",
    )
    contributions.add_argument("model", metavar="MODEL", help="a checkpoint directory, a hub id, or 'mini'")
    contributions.add_argument(
        "--corpus",
        default="bundled-demo",
        help="a preset's name, a .jsonl or text file, or hf:NAME[:CONFIG[:SPLIT]] (default: bundled-demo)",
    )
    contributions.add_argument(
        "--by",
        nargs="+",
        choices=("layer", "head", "source", "expert", "neuron"),
        default=["layer"],
        help="one pass measures all that are named (default: layer)",
    )
    contributions.add_argument(
        "--output", type=Path, required=True, help="a folder for tables, state and page"
    )
    contributions.add_argument(
        "--receivers", nargs="+", type=int, metavar="LAYER", help="default: every MoE layer"
    )
    contributions.add_argument(
        "--experts",
        nargs="+",
        metavar="EXPERT",
        default=["all"],
        help="all, selected, or numbers (default: all)",
    )
    contributions.add_argument(
        "--rank-shift", action="store_true", help="also AARV, overlap, change in weights"
    )
    contributions.add_argument("--source-axis", choices=("position", "offset"), default="position")
    contributions.add_argument("--n", type=int, help="documents; default: the preset's number, else all")
    contributions.add_argument(
        "--allow-fewer", action="store_true", help="where there are fewer than --n, take those"
    )
    contributions.add_argument("--min-length", type=int, help="tokens that a document must have")
    contributions.add_argument(
        "--max-length", type=int, help="tokens after which it is cut (default: the context)"
    )
    contributions.add_argument(
        "--seed", type=int, help="of the choice of documents (default: the preset's, else 0)"
    )
    contributions.add_argument(
        "--text-field", default="text", help="of JSON lines and datasets (default: text)"
    )
    contributions.add_argument(
        "--text-leads", action="store_true", help="leave BOS out: the first token of text leads"
    )
    contributions.add_argument("--batch-size", type=int, default=8, help="documents (default: 8)")
    contributions.add_argument("--memory-budget", type=float, default=4.0, metavar="GIB", help="default: 4")
    contributions.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    contributions.add_argument("--device", help="default: a CUDA device where there is one, else the CPU")
    contributions.set_defaults(run=_contributions)

    demo = commands.add_parser("demo", help="explain a model's routing on held-out text, as a page")
    demo.add_argument("--output", type=Path, default=Path("report.html"), help="default: report.html")
    demo.add_argument("--model", default="mini", help="default: mini, the bundled model")
    demo.set_defaults(run=_demo)
    return parser


def _verify(options: argparse.Namespace) -> int:
    # Imported here, so that `--help` and a mistyped command answer at once.
    from moe_lens.audit.verification import verify
    from moe_lens.corpus import bos_by_default, bundled_documents, read_text, token_batches
    from moe_lens.model.hooked_moe import HookedMoE

    documents = (
        bundled_documents(demo_only=True) if options.text_file is None else read_text(options.text_file)
    )
    device = _device(options.device)
    model = HookedMoE.from_pretrained(options.model, dtype=DTYPES.get(options.dtype), device=device)
    corpus = token_batches(
        model,
        # The longest, so that a file of many short paragraphs still gives enough tokens.
        sorted(documents, key=lambda document: -len(document.text))[:_VERIFIED_DOCUMENTS],
        batch_size=_VERIFIED_DOCUMENTS,
        max_length=min(_VERIFIED_LENGTH, model.cfg.n_ctx),
        prepend_bos=bos_by_default(model),
        truncate=True,
    )
    tokens, mask, _ = next(iter(corpus))
    verification = verify(model, options.model, tokens, attention_mask=mask)
    print(
        f"text: the {len(corpus.documents)} longest of {len(documents)} documents, cut to {_VERIFIED_LENGTH} tokens "
        f"({corpus.n_truncated_tokens} tokens cut off {corpus.n_truncated_documents})"
    )
    print(verification)
    return 0 if verification.passed else 1


def _contributions(options: argparse.Namespace) -> int:
    from moe_lens.corpus_presets import corpus_batches, corpus_kind
    from moe_lens.model.hooked_moe import HookedMoE
    from moe_lens.routing.contributions import routing_contributions
    from moe_lens.routing_page import write_contributions_page
    from moe_lens.routing_page_data import routing_decisions

    # What can be known to be wrong is said before a model is read.
    experts = _experts(options.experts)
    corpus_kind(options.corpus, text_field=options.text_field)
    if options.output.exists() and not options.output.is_dir():
        raise NotADirectoryError(f"--output {str(options.output)!r} is a file, and a folder is wanted")
    if not 0 < options.memory_budget < float("inf"):
        raise ValueError(f"--memory-budget {options.memory_budget} must be a positive number of GiB")
    model = HookedMoE.from_pretrained(
        options.model, dtype=DTYPES.get(options.dtype), device=_device(options.device)
    )
    corpus = corpus_batches(
        model,
        options.corpus,
        batch_size=options.batch_size,
        max_length=options.max_length,
        min_length=options.min_length,
        n=options.n,
        seed=options.seed,
        text_field=options.text_field,
        allow_fewer=options.allow_fewer,
    )
    options.output.mkdir(parents=True, exist_ok=True)
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
        state=options.output / "state.safetensors",
        verbose=True,
    )
    for by, result in results.items():
        result.save(options.output / f"{by}.safetensors")
        result.write_table(options.output / f"{by}.parquet")
        print(f"by {by}: largest variance at {result.receivers[-1]}: {_largest(result)}; {_sums(result)}")
    decisions = routing_decisions(model, corpus, receivers=options.receivers)
    page = write_contributions_page(results, options.output / "index.html", routing=decisions)
    print(f"tables, results and page: {page.parent}")
    return 0 if all(result.closes for result in results.values()) else 1


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


def _demo(options: argparse.Namespace) -> int:
    from moe_lens.demo import run_demo
    from moe_lens.report import write_report

    if not options.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(options.output.parent)!r} to write the report into")
    result = run_demo(options.model)
    path = write_report(result, options.output)
    print(result.summary())
    if not result.verification.passed:
        print(result.verification)
    print(f"report: {path}")
    return 0 if result.passed else 1


def _device(name: str | None) -> torch.device | None:
    try:
        return None if name is None else torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device; give cpu, cuda or cuda:0") from error


def _one_line(error: BaseException) -> str:
    # A KeyError's text is its argument in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
