"""Two evaluations of the same questions: is one better, and could chance have made the difference?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console

from searche1.benchmarks import TITLES, in_table_order
from searche1.console import plain_table
from searche1.evaluation.intervals import Interval, bootstrap_means, percentile_interval, sign_flip_p_value
from searche1.evaluation.scores import Score, questions_of, read_scores
from searche1.types import UserError


@dataclass(frozen=True)
class Difference:
    """EM of b minus EM of a over the questions that both answered. `won`: b has the higher EM there, `lost`: a."""

    source: str  # "average of sources" for the macro average
    num_questions: int
    em_a: float
    em_b: float
    interval: Interval  # bootstrap 95 % of the difference
    p_value: float  # sign-flip test; McNemar's exact test for one trajectory a question
    won: int
    lost: int


AVERAGE = "average of sources"


def compare(a: Sequence[Score], b: Sequence[Score]) -> list[Difference]:
    """By source, then their average where there are several. Raises UserError if no question is in both."""
    em_a, em_b = question_ems(a), question_ems(b)
    by_source: dict[str, list[tuple[float, float]]] = {}
    for key, (source, em) in em_a.items():
        if key in em_b:
            by_source.setdefault(source, []).append((em, em_b[key][1]))
    if not by_source:
        raise UserError("the two evaluations have no scored question in common; compare runs over the same data file")
    names = in_table_order(by_source)
    differences = {name: [y - x for x, y in by_source[name]] for name in names}
    resampled = {name: bootstrap_means(differences[name], seed=i) for i, name in enumerate(names)}
    found = [
        _difference(name, by_source[name], resampled[name], p_value=sign_flip_p_value({name: differences[name]}))
        for name in names
    ]
    if len(names) > 1:
        found.append(
            Difference(
                source=AVERAGE,
                num_questions=sum(one.num_questions for one in found),
                em_a=fmean(one.em_a for one in found),
                em_b=fmean(one.em_b for one in found),
                interval=percentile_interval(np.mean(list(resampled.values()), axis=0)),
                p_value=sign_flip_p_value(differences),
                won=sum(one.won for one in found),
                lost=sum(one.lost for one in found),
            )
        )
    return found


def question_ems(scores: Sequence[Score]) -> Mapping[str, tuple[str, float]]:
    """{question key: (source, mean EM of its trajectories)}, faulty trajectories left out."""
    ems = {}
    for key, found in questions_of(scores).items():
        if valid := [score.em for score in found if score.status != "error"]:
            ems[key] = (found[0].source, fmean(valid))
    return ems


def _difference(
    source: str, pairs: Sequence[tuple[float, float]], resampled: np.ndarray, *, p_value: float
) -> Difference:
    return Difference(
        source=source,
        num_questions=len(pairs),
        em_a=fmean(x for x, _ in pairs),
        em_b=fmean(y for _, y in pairs),
        interval=percentile_interval(resampled),
        p_value=p_value,
        won=sum(y > x for x, y in pairs),
        lost=sum(y < x for x, y in pairs),
    )


def print_comparison(a: Path, b: Path, console: Console) -> None:
    """The table for two folders of evaluations or judged stages. Raises UserError."""
    scores_a, scores_b = read_scores(a), read_scores(b)
    differences = compare(scores_a, scores_b)
    lines = [["source", "questions", "EM a", "EM b", "b - a", "95 %", "p", "b better", "a better"]]
    for one in differences:
        line = [TITLES.get(one.source, one.source), f"{one.num_questions:,}", f"{one.em_a:.3f}", f"{one.em_b:.3f}"]
        line += [f"{one.em_b - one.em_a:+.3f}", f"{one.interval[0]:+.3f} to {one.interval[1]:+.3f}"]
        line += ["<0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}", f"{one.won:,}", f"{one.lost:,}"]
        lines.append(line)
    console.print(plain_table(lines, title=f"a: {a}\nb: {b}"))
    only_a, only_b = len(question_ems(scores_a)), len(question_ems(scores_b))
    common = differences[-1].num_questions
    if only_a != common or only_b != common:
        console.print(f"Compared on the {common:,} questions in both (a has {only_a:,} scored, b {only_b:,}).")
    verdict = differences[-1]
    low, high = verdict.interval
    if low <= 0 <= high:
        console.print("The interval of the difference holds zero: these runs do not tell which is better.")
    else:
        better = "b" if low > 0 else "a"
        console.print(f"{better} is better on these questions by {abs(verdict.em_b - verdict.em_a):.3f} EM.")
