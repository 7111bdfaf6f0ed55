"""Makes the paper's training, validation and evaluation files: python tools/prepare_data.py --source DIR --out data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from searche1.benchmarks import in_table_order
from searche1.console import open_console, plain_table
from searche1.prepare import REPORT_FILE, Report, prepare
from searche1.types import UserError


def main(argv: list[str] | None = None) -> int:
    """Parses the options and prepares. Returns the exit code."""
    given = _parser().parse_args(argv)
    try:
        if given.hold_out < 1:
            raise UserError(f"--hold-out is {given.hold_out}; OPSD rounds need validation questions, such as 500")
        report = prepare(
            given.source,
            given.out,
            hold_out=given.hold_out,
            seed=given.seed,
            any_size=given.any_size,
            drop_leaks=given.drop_leaks,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or given.out
        print(f"error: {where}: {error.strerror or error}; see that it is there for you and has room", file=sys.stderr)
        return 2
    show(report, given.out)
    return 0


def show(report: Report, out: Path) -> None:
    """Sizes, and what to know about the data."""
    console = open_console()
    counts = (report.train, report.validation, report.test)
    lines = [["source", "train", "validation", "test"]]
    for source in in_table_order({name for count in counts for name in count}):
        lines.append([source, *(f"{count[source]:,}" if source in count else "-" for count in counts)])
    lines.append(["all", *(f"{sum(count.values()):,}" for count in counts)])
    console.print(plain_table(lines))
    for warning in report.warnings:
        console.print(f"not the paper's size: {warning}", markup=False)
    console.print(f"{report.repeated_in_train:,} training questions repeat another; they are kept")
    if report.dropped_from_train:
        console.print(f"{report.dropped_from_train:,} were dropped from training because validation asks the same")
    leaks = ", ".join(f"{source} {count:,}" for source, count in report.train_also_in_test.items())
    console.print(f"training questions that a test set asks too: {leaks or 'none'}")
    console.print(f"wrote {out}/train.parquet, validation.parquet, test.parquet, {REPORT_FILE}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Training, validation and evaluation files of the paper, in Search-R1's parquet schema.",
        epilog="docs/data.md tells where the data are and what the report means.",
    )
    parser.add_argument(
        "--source",
        required=True,
        help="FlashRAG's folder or hub id, or a folder of Search-R1's train and test.parquet",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--hold-out", type=int, default=500, help="validation questions out of training (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the hold-out (default 0)")
    parser.add_argument("--any-size", action="store_true", help="take data of other sizes than the paper's")
    parser.add_argument("--drop-leaks", action="store_true", help="drop training questions that a test set asks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
