"""Exact match on held-out questions: per source and averaged, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from searche1.evaluation.intervals import Interval, bootstrap_means, percentile_interval
from searche1.evaluation.scores import Score, questions_of
from searche1.types import UserError


@dataclass(frozen=True)
class SourceResult:
    """Means over questions, of means over a question's samples. Faulty trajectories count in num_errors only."""

    source: str
    em: float
    em_interval: Interval  # bootstrap 95 % over questions
    f1: float
    sub_em: float
    search_r1_em: float | None  # as Search-R1's code grades
    num_questions: int  # scored questions
    num_unscored: int  # questions whose every trajectory was faulty
    num_samples: int  # scored trajectories
    num_errors: int
    mean_searches: float
    answered_share: float
    mean_policy_tokens: float
    mean_response_tokens: float  # observations included


@dataclass(frozen=True)
class EvalResult:
    sources: tuple[SourceResult, ...]  # sorted by name
    overall: SourceResult  # every question with equal weight
    macro_em: float  # every source with equal weight: the "Avg." of the paper's tables
    macro_interval: Interval
    macro_f1: float
    macro_sub_em: float
    macro_em_by_sample: tuple[float, ...]  # of each question's first trajectory, of its second, ...

    @property
    def macro_em_std(self) -> float | None:
        """Standard deviation over the samples, as over runs with other seeds; None of a single one."""
        return stdev(self.macro_em_by_sample) if len(self.macro_em_by_sample) > 1 else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"macro_em_std": self.macro_em_std}


@dataclass(frozen=True)
class _Question:
    """One question's trajectories."""

    source: str
    valid: tuple[Score, ...]
    num_errors: int

    def mean(self, value: Callable[[Score], float]) -> float:
        return fmean(value(score) for score in self.valid)


def summarize(scores: Sequence[Score], *, seed: int = 0) -> EvalResult:
    """Judges the trajectories of held-out questions, item by item: no batch size can change the result.

    Raises UserError if a source has no question left to score.
    """
    by_source: dict[str, list[_Question]] = {}
    for found in questions_of(scores).values():
        valid = tuple(score for score in found if score.status != "error")
        question = _Question(found[0].source, valid, num_errors=len(found) - len(valid))
        by_source.setdefault(question.source, []).append(question)
    if not by_source:
        raise UserError("there is nothing to evaluate: no question was given; check data.test")

    results, resampled = [], []
    for position, source in enumerate(sorted(by_source)):
        questions = by_source[source]
        if not any(question.valid for question in questions):
            raise UserError(
                f"all {sum(q.num_errors for q in questions)} trajectories of {source!r} failed for engine or "
                "retriever faults, so it has no EM; see the engine and retriever logs, then evaluate again"
            )
        means = _resampled_em(questions, seed=seed + position)
        resampled.append(means)
        results.append(_result(source, questions, means))

    everything = [question for questions in by_source.values() for question in questions]
    return EvalResult(
        sources=tuple(results),
        overall=_result("all", everything, _resampled_em(everything, seed=seed)),
        macro_em=fmean(result.em for result in results),
        macro_interval=percentile_interval(np.mean(resampled, axis=0)),
        macro_f1=fmean(result.f1 for result in results),
        macro_sub_em=fmean(result.sub_em for result in results),
        macro_em_by_sample=_macro_em_by_sample(scores),
    )


def _resampled_em(questions: Sequence[_Question], *, seed: int) -> np.ndarray:
    return bootstrap_means([question.mean(lambda s: s.em) for question in questions if question.valid], seed=seed)


def _result(source: str, questions: Sequence[_Question], resampled: np.ndarray) -> SourceResult:
    scored = [question for question in questions if question.valid]

    def mean(value: Callable[[Score], float]) -> float:
        return fmean(question.mean(value) for question in scored)

    is_graded_twice = all(score.search_r1_em is not None for question in scored for score in question.valid)
    return SourceResult(
        source=source,
        em=mean(lambda s: s.em),
        em_interval=percentile_interval(resampled),
        f1=mean(lambda s: s.f1),
        sub_em=mean(lambda s: s.sub_em),
        search_r1_em=mean(lambda s: s.search_r1_em or 0.0) if is_graded_twice else None,
        num_questions=len(scored),
        num_unscored=len(questions) - len(scored),
        num_samples=sum(len(question.valid) for question in scored),
        num_errors=sum(question.num_errors for question in questions),
        mean_searches=mean(lambda s: s.num_searches),
        answered_share=mean(lambda s: s.status == "answered"),
        mean_policy_tokens=mean(lambda s: s.num_policy_tokens),
        mean_response_tokens=mean(lambda s: s.num_response_tokens),
    )


def _macro_em_by_sample(scores: Sequence[Score]) -> tuple[float, ...]:
    """[samples] The macro average of each sample alone, of those with a valid trajectory in every source."""
    ems: dict[int, dict[str, list[float]]] = {}
    for score in scores:
        if score.status != "error":
            ems.setdefault(score.sample, {}).setdefault(score.source, []).append(score.em)
    num_sources = len({score.source for score in scores})
    whole = [sources for _, sources in sorted(ems.items()) if len(sources) == num_sources]
    return tuple(fmean(fmean(values) for values in sources.values()) for sources in whole)
