"""`moe-lens verify MODEL`: compare a checkpoint with transformers, and try interventions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_lens.commands.options import add_model, add_precision, model_of

# Enough of a text for every check, little enough for a large vocabulary's logits.
_DOCUMENTS = 8
_LENGTH = 256


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "verify", help="compare a checkpoint with transformers, and try interventions"
    )
    add_model(parser)
    add_precision(parser, streams=False)  # transformers takes the whole checkpoint beside it
    parser.add_argument(
        "--text-file", type=Path, help="text to run, paragraphs as documents (default: bundled)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from moe_lens.audit.verification import verify
    from moe_lens.corpus import bos_by_default, bundled_documents, read_text, token_batches

    documents = (
        bundled_documents(demo_only=True) if options.text_file is None else read_text(options.text_file)
    )
    model = model_of(options)
    corpus = token_batches(
        model,
        # The longest, so that a file of many short paragraphs still gives enough tokens.
        sorted(documents, key=lambda document: -len(document.text))[:_DOCUMENTS],
        batch_size=_DOCUMENTS,
        max_length=min(_LENGTH, model.cfg.n_ctx),
        prepend_bos=bos_by_default(model),
        truncate=True,
    )
    tokens, mask, _ = next(iter(corpus))
    verification = verify(model, options.model, tokens, attention_mask=mask)
    print(
        f"text: the {len(corpus.documents)} longest of {len(documents)} documents, cut to {_LENGTH} tokens "
        f"({corpus.n_truncated_tokens} tokens cut off {corpus.n_truncated_documents})"
    )
    print(verification)
    return 0 if verification.passed else 1
