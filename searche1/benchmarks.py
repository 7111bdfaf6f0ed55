"""The seven question-answering benchmarks of the paper, in the order of its tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    name: str  # data_source in the question files
    title: str
    split: str  # the evaluation split: test where there is one, else dev
    num_questions: int


BENCHMARKS = (
    Benchmark("nq", "NQ", "test", 3_610),
    Benchmark("triviaqa", "TriviaQA", "test", 11_313),
    Benchmark("popqa", "PopQA", "test", 14_267),
    Benchmark("hotpotqa", "HotpotQA", "dev", 7_405),
    Benchmark("2wikimultihopqa", "2Wiki", "dev", 12_576),
    Benchmark("musique", "MuSiQue", "dev", 2_417),
    Benchmark("bamboogle", "Bamboogle", "test", 125),
)
TITLES = {benchmark.name: benchmark.title for benchmark in BENCHMARKS}


def in_table_order(sources: Iterable[str]) -> list[str]:
    """Benchmarks as the paper orders them, then other sources by name."""
    order = list(TITLES)
    return sorted(sources, key=lambda source: (order.index(source) if source in TITLES else len(order), source))
