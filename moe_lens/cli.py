"""The command line: `moe-lens verify MODEL` and `moe-lens demo`.

Exit status 0: everything passed. 1: it ran, and a check failed. 2: it could not run; one line says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

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
