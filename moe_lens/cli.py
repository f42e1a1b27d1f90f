"""The command line: `moe-lens COMMAND ...`; the commands are in `moe_lens.commands`.

Exit status 0: everything passed. 1: it ran, and a check failed. 2: it could not run; one line says why. 130: stopped
from the keyboard, or asked to end (SIGTERM); what keeps a state has saved it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moe_lens.commands import audit, census, contributions, demo, verify
from moe_lens.interrupts import ended_like_an_interrupt
from moe_lens.ranks import require_alone, say

_ON_RANKS = (contributions.run, census.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is returned."""
    options = _parser().parse_args(arguments)
    try:
        with ended_like_an_interrupt():
            if options.run not in _ON_RANKS:
                require_alone()
            return options.run(options)
    except KeyboardInterrupt:
        say("stopped; what keeps a state goes on from it with the same command")
        return 130
    except (ValueError, OSError, MemoryError, KeyError, FloatingPointError) as error:
        say(f"error: {_one_line(error)}")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-lens", description="A microscope for Mixture-of-Experts models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (verify, contributions, census, audit, demo):
        command.add(commands)
    return parser


def _one_line(error: BaseException) -> str:
    # A KeyError's text is its argument in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
