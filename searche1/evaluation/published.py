"""The paper's tables as data, with what is known to be wrong with some of the published numbers."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from searche1.benchmarks import BENCHMARKS

PAPER_RESULTS = Path(__file__).parents[1] / "assets" / "paper_results.csv"
HALF_A_DIGIT = 0.0005 + 1e-9  # published EMs have three decimals
DROP_LAST_BATCH = 512  # verl-agent's evaluation averages over batches of this size


@dataclass(frozen=True)
class PublishedRow:
    """A method's line in Table 1 (3B) or Table 2 (7B) of the paper."""

    table: int
    backbone: str
    group: str  # none, single, multi_prompt, outcome_rl, process_rl or ours
    method: str
    em: dict[str, float]  # by benchmark; those that are not reported are missing
    average: float | None


def published_rows() -> list[PublishedRow]:
    """Every row of both tables, in their order."""
    with open(PAPER_RESULTS, encoding="utf-8", newline="") as file:
        return [
            PublishedRow(
                table=int(row["table"]),
                backbone=row["backbone"],
                group=row["group"],
                method=row["method"],
                em={b.name: float(row[b.name]) for b in BENCHMARKS if row[b.name]},
                average=float(row["avg"]) if row["avg"] else None,
            )
            for row in csv.DictReader(file)
        ]


def doubt(em: float, num_questions: int) -> str | None:
    """Why a published EM cannot be a share of right answers among `num_questions`, or None if it can."""
    if _is_printed_as(em, round(em * num_questions) / num_questions):
        return None
    found = f"{em:.3f} is no multiple of 1/{num_questions}"
    others = num_questions - 1
    if abs(round(em * others) / others - em) <= HALF_A_DIGIT:
        return f"{found}; it is {round(em * others)}/{others}, as if the last question had been dropped"
    right = round((2 * em - 1) * others)
    if right >= 0 and _is_printed_as(em, (right / others + 1) / 2):
        return (
            f"{found}; it is ({right}/{others} + 1)/2, a mean over batches of {DROP_LAST_BATCH} whose last holds one "
            f"question, answered right; item by item it is {right + 1}/{num_questions}, "
            f"{(right + 1) / num_questions:.3f}"
        )
    return f"{found}; perhaps a mean over several runs"


def _is_printed_as(printed: float, value: float) -> bool:
    """Whether three decimals of `value`, rounded or cut, are `printed`."""
    return -HALF_A_DIGIT <= value - printed < 2 * HALF_A_DIGIT


def doubts(row: PublishedRow) -> dict[str, str]:
    """The EMs of a row that are impossible as they stand, and why, by benchmark."""
    sizes = {b.name: b.num_questions for b in BENCHMARKS}
    found = {source: doubt(em, sizes[source]) for source, em in row.em.items()}
    return {source: reason for source, reason in found.items() if reason is not None}
