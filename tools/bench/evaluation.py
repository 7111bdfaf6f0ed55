"""An evaluation of the seven benchmarks' 51,713 questions, killed again and again: nothing lost, nothing twice.

    python tools/bench/evaluation.py [--kills 3] [--per-source N] [--out FILE]

The questions are the toy world's, repeated until every source has the size of its benchmark; model, engine and
retriever are the quickstart's. Reports the wall time, start-ups included, and how often every question was answered.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from searche1.benchmarks import BENCHMARKS
from searche1.quickstart import ASSETS, CONFIGS, make_world
from searche1.rollout.journal import read_journal


def write_questions(world: Path, path: Path, *, per_source: int) -> int:
    """A file with every benchmark's number of questions (or `per_source`), from the world's; returns how many."""
    given = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    rows = []
    for benchmark in BENCHMARKS:
        for number, row in enumerate(itertools.islice(itertools.cycle(given), per_source or benchmark.num_questions)):
            rows.append({**row, "id": number, "data_source": benchmark.name})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def evaluate(command: list[str], *, kill_after: float | None) -> float:
    """Wall seconds of one call, which is killed after `kill_after` seconds if it lasts so long."""
    began = time.monotonic()
    process = subprocess.Popen(command)
    try:
        if process.wait(timeout=kill_after):
            raise SystemExit(f"the evaluation ended with {process.returncode}")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.monotonic() - began


def bench(folder: Path, *, kills: int, per_source: int) -> dict[str, Any]:
    world, out, data = folder / "world", folder / "eval", folder / "questions.jsonl"
    make_world(world, seed=0)
    total = write_questions(world, data, per_source=per_source)
    command = [sys.executable, "-m", "searche1", "eval", f"--config={CONFIGS / 'quickstart.yaml'}", f"--out={out}"]
    command += [f"--model={ASSETS / 'toy_policy'}", f"--data={data}", "--temperature=0"]
    command += [f"retriever.corpus={world / 'corpus.jsonl'}", f"retriever.index={world / 'index'}"]
    dice = random.Random(0)
    walls = [evaluate(command, kill_after=dice.uniform(35.0, 60.0)) for _ in range(kills)]
    walls.append(evaluate(command, kill_after=None))

    times = Counter((answer.question.key, answer.sample) for answer in read_journal(out / "answers.jsonl.gz"))
    results = json.loads((out / "results.json").read_text())
    return {
        "questions": total,
        "answered_once": sum(count == 1 for count in times.values()),
        "answered_more_often": sum(count > 1 for count in times.values()),
        "counted_in_results": results["overall"]["num_questions"],
        "faults": results["overall"]["num_errors"],
        "kills": kills,
        "wall_seconds": round(sum(walls), 1),
        "last_call_trajectories_per_second": round(results["last_call_trajectories"] / results["last_call_seconds"], 1),
        "last_call_trajectories": results["last_call_trajectories"],
        "mean_searches": results["overall"]["mean_searches"],
        "answers_megabytes": round((out / "answers.jsonl.gz").stat().st_size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="SIGKILLs to the whole evaluation (default 3)")
    parser.add_argument("--per-source", type=int, default=0, help="questions of each source (default: the real sizes)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--keep", type=Path, help="folder to work in and keep (default: a temporary one)")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp())
    try:
        figures = bench(folder, kills=given.kills, per_source=given.per_source)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures, indent=2))
    if given.out:
        given.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
