"""Exact match on held-out questions: per source and averaged, with intervals, and the table of stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from searche1.runs import StageRow
from searche1.types import Group, Trajectory, UserError

Interval = tuple[float, float]

BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class SourceResult:
    """Means over questions, of means over a question's samples. Faulty trajectories count in num_errors only."""

    source: str
    em: float
    em_interval: Interval  # bootstrap 95 % over questions
    num_questions: int  # scored questions
    num_unscored: int  # questions whose every trajectory was faulty
    num_samples: int  # scored trajectories
    num_errors: int
    mean_searches: float
    answered_share: float
    mean_policy_tokens: float


@dataclass(frozen=True)
class EvalResult:
    sources: tuple[SourceResult, ...]  # sorted by name
    overall: SourceResult  # every question with equal weight
    macro_em: float  # every source with equal weight: the "Avg." of the paper's tables
    macro_interval: Interval

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Item:
    """One scored question."""

    source: str
    em: float
    num_samples: int
    mean_searches: float
    answered_share: float
    mean_policy_tokens: float


def summarize(groups: Sequence[Group], *, seed: int = 0) -> EvalResult:
    """Judges the trajectories of held-out questions, item by item: no batch size can change the result.

    Groups of the same question are samples of one item. Raises UserError if a source has no
    question left to score.
    """
    trials = _trials(groups)
    items = {key: _item(source, scored) for key, (source, scored, _) in trials.items() if scored}
    by_source: dict[str, list[str]] = {}
    for key, (source, _, _) in trials.items():
        by_source.setdefault(source, []).append(key)
    if not by_source:
        raise UserError("there is nothing to evaluate: no groups were given; check data.test")

    results, resampled = [], []
    for position, source in enumerate(sorted(by_source)):
        keys = by_source[source]
        num_errors = sum(trials[key][2] for key in keys)
        scored = [items[key] for key in keys if key in items]
        if not scored:
            raise UserError(
                f"all {num_errors} trajectories of {source!r} failed for engine or retriever faults, so it has no EM; "
                f"see the engine and retriever logs, then evaluate again"
            )
        means = bootstrap_means([item.em for item in scored], seed=seed + position)
        resampled.append(means)
        results.append(_result(source, scored, means, num_unscored=len(keys) - len(scored), num_errors=num_errors))

    everything = [items[key] for key in trials if key in items]
    return EvalResult(
        sources=tuple(results),
        overall=_result(
            "all",
            everything,
            bootstrap_means([item.em for item in everything], seed=seed),
            num_unscored=len(trials) - len(everything),
            num_errors=sum(result.num_errors for result in results),
        ),
        macro_em=fmean(result.em for result in results),
        macro_interval=_interval(np.mean(resampled, axis=0)),
    )


def _trials(groups: Sequence[Group]) -> dict[str, tuple[str, list[tuple[Trajectory, float]], int]]:
    """Question key -> (source, scored trajectories with rewards, number of faulty ones)."""
    trials: dict[str, tuple[str, list[tuple[Trajectory, float]], int]] = {}
    for group in groups:
        source, scored, num_errors = trials.get(group.question.key, (group.question.source, [], 0))
        pairs = list(zip(group.trajectories, group.rewards, strict=True))
        valid = [pair for pair in pairs if pair[0].status != "error"]
        trials[group.question.key] = (source, scored + valid, num_errors + len(pairs) - len(valid))
    return trials


def _item(source: str, scored: Sequence[tuple[Trajectory, float]]) -> _Item:
    trajectories = [trajectory for trajectory, _ in scored]
    return _Item(
        source=source,
        em=fmean(reward for _, reward in scored),
        num_samples=len(scored),
        mean_searches=fmean(t.num_searches for t in trajectories),
        answered_share=fmean(t.status == "answered" for t in trajectories),
        mean_policy_tokens=fmean(t.num_policy_tokens for t in trajectories),
    )


def _result(
    source: str, items: Sequence[_Item], resampled: np.ndarray, *, num_unscored: int, num_errors: int
) -> SourceResult:
    return SourceResult(
        source=source,
        em=fmean(item.em for item in items),
        em_interval=_interval(resampled),
        num_questions=len(items),
        num_unscored=num_unscored,
        num_samples=sum(item.num_samples for item in items),
        num_errors=num_errors,
        mean_searches=fmean(item.mean_searches for item in items),
        answered_share=fmean(item.answered_share for item in items),
        mean_policy_tokens=fmean(item.mean_policy_tokens for item in items),
    )


def bootstrap_means(values: Sequence[float], *, seed: int) -> np.ndarray:
    """[BOOTSTRAP_RESAMPLES] means of `values` resampled with replacement.

    Exact-match values repeat, so how often each distinct one is drawn is a multinomial: 50,000
    questions cost no more than 50. The interval of all-equal values has no width.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=BOOTSTRAP_RESAMPLES)
    return draws @ distinct / total


def _interval(resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def stage_row(
    name: str, result: EvalResult, *, temperature: float, greedy: EvalResult | None, seconds: float
) -> StageRow:
    """The line of a stage in summary.json. At temperature 0, `result` is the greedy one itself."""
    if temperature == 0.0:
        greedy = result
    return StageRow(
        name=name,
        em=result.macro_em,
        em_interval=result.macro_interval,
        temperature=temperature,
        em_greedy=greedy.macro_em if greedy else None,
        em_greedy_interval=greedy.macro_interval if greedy else None,
        em_by_source={source.source: source.em for source in result.sources},
        mean_searches=result.overall.mean_searches,
        answered_share=result.overall.answered_share,
        num_questions=result.overall.num_questions,
        seconds=seconds,
    )


def format_table(rows: Sequence[StageRow]) -> Table:
    """The stages of a run, one line each; "+/-" is half the width of the bootstrap 95 % interval."""
    header, *lines = table_cells(rows)
    title = f"Held-out exact match by stage, {rows[-1].num_questions} questions" if rows else "No stage is finished"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def table_cells(rows: Sequence[StageRow]) -> list[list[str]]:
    """Header and lines of the stage table as text. A way of decoding that no stage used has no column."""
    sampled_at = sorted({row.temperature for row in rows if row.temperature > 0})
    has_greedy = any(row.em_greedy is not None for row in rows)
    header = ["stage", *[f"EM at T={t:g}" for t in sampled_at], *(["EM greedy"] if has_greedy else [])]
    lines = [[*header, "searches", "answered", "seconds"]]
    for row in rows:
        cells = [row.name]
        cells += [_with_interval(row.em, row.em_interval) if row.temperature == t else "-" for t in sampled_at]
        cells += [_with_interval(row.em_greedy, row.em_greedy_interval)] if has_greedy else []
        cells += [f"{row.mean_searches:.2f}", f"{row.answered_share:.0%}", f"{row.seconds:.0f}"]
        lines.append(cells)
    return lines


def _with_interval(em: float | None, interval: Interval | None) -> str:
    if em is None or interval is None:
        return "-"
    return f"{em:.3f} +/- {(interval[1] - interval[0]) / 2:.3f}"
