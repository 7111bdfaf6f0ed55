"""Lay finished runs side by side as Markdown: EM, searches and teacher gap of every stage.

    python tools/compare_runs.py runs/quickstart-seed0 runs/quickstart-seed1 ...

It reads summary.json and teacher_check.json of each run directory and prints what is in them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from searche1.runs import StageRow, read_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with a summary.json")
    for directory in parser.parse_args().runs:
        print(f"\n### {directory.name}\n\n{table(directory)}")


def table(directory: Path) -> str:
    """One row a stage; changes are against the row before."""
    header = "| stage | EM, T=1 | change | EM, greedy | searches | answered | teacher gap | seconds |"
    lines = [header, "|" + "---|" * header.count(" | ") + "---|"]
    before: StageRow | None = None
    for row in read_summary(directory).stages:
        change = f"{row.em - before.em:+.3f}" if before else ""
        greedy = f"{row.em_greedy:.3f}" if row.em_greedy is not None else ""
        half_width = (row.em_interval[1] - row.em_interval[0]) / 2
        lines.append(
            f"| {row.name} | {row.em:.3f} +/- {half_width:.3f} | {change} | {greedy} | {row.mean_searches:.2f} | "
            f"{row.answered_share:.1%} | {teacher_gap(directory / row.name)} | {row.seconds:.0f} |"
        )
        before = row
    return "\n".join(lines)


def teacher_gap(stage: Path) -> str:
    """EM of wrong trajectories continued with and without the reference, where the stage measured it."""
    file = stage / "teacher_check.json"
    if not file.is_file():
        return ""
    check = json.loads(file.read_text())
    return f"{check['gap']:+.2f} ({check['teacher_em']:.2f} vs {check['student_em']:.2f})"


if __name__ == "__main__":
    main()
