"""Options that commands have in common, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from moe_lens.ranks import ALONE, Ranks

DEFAULT_CORPUS = "bundled-demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model(parser: argparse.ArgumentParser) -> None:
    """`MODEL`."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a hub id, or 'mini'")


def add_precision(parser: argparse.ArgumentParser, *, streams: bool = True) -> None:
    """`--dtype` and `--device`; and `--stream`, for a command that can do without all layers in memory."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    parser.add_argument("--device", help="default: a CUDA device where there is one, else the CPU")
    parser.set_defaults(stream=False)
    if streams:
        parser.add_argument(
            "--stream",
            action="store_true",
            help="leave the layers on disk and read each when it runs, for a checkpoint larger than memory",
        )


def add_corpus(parser: argparse.ArgumentParser, seed_help: str) -> None:
    """`--corpus`, and which of its documents are taken and how much of them."""
    parser.add_argument(
        "--corpus",
        default=DEFAULT_CORPUS,
        help="a preset's name, a .jsonl or text file, lines:FILE for a text file whose lines are documents, "
        "hf:NAME[:CONFIG[:SPLIT]], or PRESET@SOURCE for a preset's recipe on one of these (default: bundled-demo)",
    )
    # torchrun takes --n for the beginning of an option of its own.
    parser.add_argument(
        "--n",
        "--documents",
        type=int,
        metavar="N",
        help="how many documents (default: the preset's number, else all); under torchrun write --documents",
    )
    parser.add_argument(
        "--allow-fewer", action="store_true", help="where there are fewer than --n, take those"
    )
    parser.add_argument("--min-length", type=int, help="tokens that a document must have")
    parser.add_argument("--max-length", type=int, help="tokens after which it is cut (default: the context)")
    parser.add_argument("--seed", type=int, help=seed_help)
    parser.add_argument("--text-field", default="text", help="of JSON lines and datasets (default: text)")


def add_memory_budget(parser: argparse.ArgumentParser, default: float) -> None:
    """`--memory-budget`."""
    parser.add_argument(
        "--memory-budget", type=float, default=default, metavar="GIB", help=f"default: {default:g}"
    )


def add_streams(parser: argparse.ArgumentParser) -> None:
    """`--streams-budget` and `--spill-directory`, beside `--stream`."""
    parser.add_argument(
        "--streams-budget",
        type=float,
        metavar="GIB",
        help="with --stream: of what lies between two layers, so much is held in memory (default: 2)",
    )
    parser.add_argument(
        "--spill-directory",
        type=Path,
        metavar="DIR",
        help="with --stream: where the rest is meanwhile (default: the system's temporary directory)",
    )


def check_streams(options: argparse.Namespace) -> None:
    """Raises:
    ValueError, NotADirectoryError: they are given without `--stream`, or make no sense.
    """
    budget, folder = options.streams_budget, options.spill_directory
    for name, value in (("--streams-budget", budget), ("--spill-directory", folder)):
        if value is not None and not options.stream:
            raise ValueError(
                f"{name} is for --stream; with all layers in memory there is nothing that it says"
            )
    # Not less than a byte.
    if budget is not None and not 2**-30 <= budget < float("inf"):
        raise ValueError(f"--streams-budget {budget} must be a positive number of GiB")
    if folder is not None and not folder.is_dir():
        raise NotADirectoryError(f"there is no folder --spill-directory {str(folder)!r}")


def check_corpus_and_output(options: argparse.Namespace) -> None:
    """What can be known to be wrong before a model is read.

    Raises:
        ValueError, NotADirectoryError: it is.
    """
    from moe_lens.corpus_presets import corpus_kind

    corpus_kind(options.corpus, text_field=options.text_field)
    if options.output.exists() and not options.output.is_dir():
        raise NotADirectoryError(f"--output {str(options.output)!r} is a file, and a folder is wanted")
    if not 0 < options.memory_budget < float("inf"):
        raise ValueError(f"--memory-budget {options.memory_budget} must be a positive number of GiB")


def model_of(options: argparse.Namespace, ranks: Ranks = ALONE) -> Any:
    """The model that is asked for, on this process's device."""
    from moe_lens.model.hooked_moe import HookedMoE

    return HookedMoE.from_pretrained(
        options.model,
        dtype=DTYPES.get(options.dtype),
        device=ranks.device(device_of(options.device)),
        stream=options.stream,
        verbose=ranks.first,
    )


def corpus_of(model: Any, options: argparse.Namespace, batch_size: int, **changes: Any) -> Any:
    """The documents that are asked for, as batches of tokens.

    Args:
        changes: instead of the options of these names.
    """
    from moe_lens.corpus_presets import corpus_batches

    names = ("max_length", "min_length", "n", "seed", "text_field", "allow_fewer")
    given = {"source": options.corpus, **{name: getattr(options, name) for name in names}, **changes}
    return corpus_batches(model, batch_size=batch_size, **given)


def device_of(name: str | None) -> torch.device | None:
    """Raises:
    ValueError: there is no such device.
    """
    try:
        device = None if name is None else torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device; give cpu, cuda or cuda:0") from error
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name!r}: this installation of torch sees no CUDA device; give cpu")
    return device
