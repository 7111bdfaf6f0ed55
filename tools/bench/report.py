"""The report of 50,000 trajectories of real size: how large is the page, how soon does it paint and answer?

    python tools/bench/report.py [--trajectories 50000] [--out FILE]

Writes a run directory with evaluations of synthetic trajectories (words with the frequencies of a language, three
passages a search, a token and a logprob for every word), builds its report, and opens it in Chromium without a window.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from browser import open_browser

from searche1.data import write_groups
from searche1.report import page as pages
from searche1.report.gather import gather
from searche1.report.page import write_report
from searche1.runs import Run, StageRow, add_stage_row
from searche1.types import Group, Question, Span, Trajectory

STAGES = ("start", "cycle0/grpo", "cycle0/opsd", "cycle1/grpo", "cycle1/opsd")
NUM_PASSAGES = 100_000


class Writer:
    """Text of a made-up language: 20,000 words, the n-th as frequent as 1/n."""

    def __init__(self) -> None:
        self.dice = random.Random(0)
        letters = (
            "ba",
            "co",
            "din",
            "el",
            "fur",
            "gra",
            "hi",
            "jo",
            "kel",
            "lu",
            "mon",
            "ne",
            "or",
            "pis",
            "qua",
            "ran",
        )
        self.words = ["".join(self.dice.choices(letters, k=self.dice.randint(1, 4))) for _ in range(20_000)]
        self.weights = list(_cumulated(1 / n for n in range(1, 20_001)))
        self.passages = [f'(Title: "{self.text(3)}") {self.text(100)}' for _ in range(NUM_PASSAGES)]

    def text(self, count: int) -> str:
        return " ".join(self.dice.choices(self.words, cum_weights=self.weights, k=count))

    def policy(self, kind: Any, text: str) -> Span:
        ids = tuple(self.dice.choices(range(20_000), cum_weights=self.weights, k=len(text.split()) * 4 // 3))
        return Span("policy", kind, ids, tuple(-self.dice.expovariate(3.0) for _ in ids), text)

    def trajectory(self, is_right: bool) -> Trajectory:
        spans: list[Span] = []
        for _ in range(self.dice.choice((1, 2, 2, 3))):
            query = f"<think> {self.text(50)} </think>\n<search> {self.text(6)} </search>"
            documents = "".join(f"Doc {k}{self.dice.choice(self.passages)}\n" for k in (1, 2, 3))
            observation = f"\n\n<information>{documents}</information>\n\n"
            ids = tuple(self.dice.randrange(20_000) for _ in range(480))
            spans += [self.policy("search", query), Span("environment", "information", ids, (), observation)]
        answer = f"<think> {self.text(60)} </think>\n<answer> {'yes' if is_right else self.text(2)} </answer>"
        return Trajectory((1, 2, 3), (*spans, self.policy("answer", answer)), "answered")


def _cumulated(values: Iterator[float]) -> Iterator[float]:
    total = 0.0
    for value in values:
        total += value
        yield total


def write_run(folder: Path, count: int) -> None:
    writer = Writer()
    questions = [Question(str(i), f"{writer.text(9)}?", ("yes",), ("nq", "popqa")[i % 2]) for i in range(count // 5)]
    for number, stage in enumerate(STAGES):
        groups = []
        for question in questions:
            is_right = writer.dice.random() < 0.3 + 0.05 * number
            groups.append(Group(question, (writer.trajectory(is_right),), (float(is_right),)))
        write_groups(folder / stage / "eval_groups.jsonl.gz", groups)
        em = 0.3 + 0.05 * number
        row = StageRow(stage, em, (em - 0.01, em + 0.01), 1.0, None, None, {"nq": em}, 2.0, 1.0, len(questions), 1.0)
        add_stage_row(Run(folder), row)
        print(f"{stage}: {len(groups):,} trajectories written", flush=True)


def bench(folder: Path, count: int) -> dict[str, Any]:
    write_run(folder, count)
    began = time.monotonic()
    pages.token_texts = lambda _: lambda token: f"w{token} "  # no tokenizer made these ids
    page = write_report(folder)
    building = time.monotonic() - began
    with open_browser() as browser:
        began = time.monotonic()
        browser.open(page)
        browser.wait("document.documentElement.dataset.ready")
        ready = time.monotonic() - began
        paint = browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        clicked = browser.run(
            "(async () => { const t = performance.now(); await choose(state.found[state.found.length - 1]); "
            "return performance.now() - t; })()"
        )
        filtered = browser.run(
            "(() => { const t = performance.now(); $('outcome').value = 'right'; $('text').value = 'ba'; filter(); "
            "return performance.now() - t; })()"
        )
        assert browser.errors == []
    return {
        "trajectories": count,
        "shown": len(gather(folder).shown),
        "page_megabytes": round(page.stat().st_size / 1e6, 1),
        "build_seconds": round(building, 1),
        "first_paint_seconds": round(paint / 1000, 2),
        "ready_seconds": round(ready, 2),
        "open_a_trajectory_seconds": round(clicked / 1000, 3),
        "filter_and_find_seconds": round(filtered / 1000, 3),
        "notes": [line for line in page.read_text().split("<li>")[1:3] for line in [line.split("</li>")[0]]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=50_000, help="of five stages together (default 50000)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        figures = bench(folder, given.trajectories)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures, indent=2))
    if given.out:
        given.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
