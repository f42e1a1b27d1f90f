"""`moe-lens demo`: the main job on held-out text, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="explain a model's routing on held-out text and test every expert, as a page"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="a page (default: report.html); the audit's tables are put into a folder beside it",
    )
    parser.add_argument("--model", default="mini", help="default: mini, the bundled model")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from moe_lens.demo import run_demo
    from moe_lens.report import write_report

    if not options.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(options.output.parent)!r} to write the report into")
    result = run_demo(options.model)
    path = write_report(result, options.output)
    tables = path.with_name(f"{path.stem}-tables")
    tables.mkdir(exist_ok=True)
    result.tables.save(tables)
    print(result.summary())
    if not result.verification.passed:
        print(result.verification)
    print(f"report: {path}; the audit's tables: {tables}")
    return 0 if result.passed else 1
