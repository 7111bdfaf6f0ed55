"""Which of a run's trajectories its page shows, each made small as it is read: a run may hold more than memory does."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from searche1.evaluation.scores import ANSWERS_FILE, GROUPS_FILE
from searche1.rewards import em_reward
from searche1.rollout.journal import read_journal
from searche1.runs import PAIR_KL_FILE
from searche1.types import Question, Trajectory, UserError, question_from_json, trajectory_from_json

MAX_TRAJECTORIES = 50_000
QUESTION_KEY = '{"question": '  # how a line of a groups file begins


@dataclass(frozen=True)
class Where:
    """A file of groups: at which stage, and what the policy was doing there."""

    stage: str  # "cycle0/opsd"; "" for an evaluation
    what: str  # "held-out", "pool" or "rollouts"
    path: Path

    @property
    def title(self) -> str:
        step = re.search(r"step_0*(\d+)", self.path.name)
        return " ".join(filter(None, (self.stage, self.what, step and f"step {step[1]}")))


@dataclass(frozen=True)
class Shown:
    """A trajectory as the page needs it."""

    where: int
    question: str  # key
    sample: int
    reward: float
    status: str
    error: str
    num_searches: int
    num_tokens: int  # of the response
    spans: tuple[tuple[str, str, bool], ...]  # kind, text, whether it was cut
    token_ids: tuple[array[int], ...]  # of each policy span
    surprise: tuple[bytes, ...]  # of each policy span: `quantized` logprobs


@dataclass(frozen=True)
class ShownPair:
    """Reference and student as places in `Gathered.shown`; the KLs are of the student's policy tokens, or empty."""

    stage: str
    question: str
    reference: int
    student: int
    distance: float
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass
class Gathered:
    wheres: list[Where]
    questions: dict[str, Question] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)
    pairs: list[ShownPair] = field(default_factory=list)
    total: int = 0  # trajectories in the files
    bar: int = 1 << 32  # above the hash of every question that is shown

    def part(self, share: float) -> Gathered:
        """The trajectories of about that share of the questions shown, with their pairs."""
        bar = int(share * self.bar)
        kept = [i for i, shown in enumerate(self.shown) if zlib.crc32(shown.question.encode()) < bar]
        place = {i: new for new, i in enumerate(kept)}
        present = {self.shown[i].question for i in kept}
        return Gathered(
            wheres=self.wheres,
            questions={key: question for key, question in self.questions.items() if key in present},
            shown=[self.shown[i] for i in kept],
            pairs=[
                replace(pair, reference=place[pair.reference], student=place[pair.student])
                for pair in self.pairs
                if pair.question in present
            ],
            total=self.total,
            bar=bar,
        )


def quantized(logprobs: tuple[float, ...]) -> bytes:
    """-ln p in steps of 1/32, up to 7.97: finer than a colour shows, and one byte."""
    return bytes(min(255, max(0, round(-32 * value))) for value in logprobs)


def gather(directory: Path) -> Gathered:
    """All trajectories of a run or evaluation; of more than [MAX_TRAJECTORIES] those of fewer questions, the same ones
    everywhere, so that what a question became in every stage stays together. Raises UserError on a damaged file.
    """
    if (directory / ANSWERS_FILE).is_file():
        wheres = [Where("", "held-out", directory / ANSWERS_FILE)]
    else:
        wheres = [*_named(directory, GROUPS_FILE, "held-out"), *_named(directory, "pool/*.jsonl.gz", "pool")]
        wheres += _named(directory, "rollouts/*.jsonl.gz", "rollouts")
        wheres.sort(key=lambda where: _natural(where))
    found = Gathered(wheres)
    kept = _Kept()
    for number, where in enumerate(wheres):
        for question, trajectories in _groups(where, kept):
            found.questions[question.key] = question
            for sample, trajectory, reward in trajectories:
                kept.add(_small(number, question, sample, trajectory, reward))
    found.total = kept.total
    found.shown, found.bar = kept.shown, kept.bar
    present = {shown.question for shown in found.shown}
    found.questions = {key: question for key, question in found.questions.items() if key in present}
    _add_pairs(directory, found)
    return found


def _named(directory: Path, pattern: str, what: str) -> list[Where]:
    wheres = []
    for path in directory.rglob(pattern):
        stage = path.parent if what == "held-out" else path.parent.parent
        wheres.append(Where(stage.relative_to(directory).as_posix(), what, path))
    return wheres


def _natural(where: Where) -> tuple[Any, ...]:
    """start, cycle0/grpo, cycle0/opsd, ..., cycle10/opsd; in a stage the order in which it made them."""
    words = re.split(r"(\d+)", where.stage)
    order = ("rollouts", "pool", "held-out").index(where.what)
    return (where.stage != "start", [int(w) if w.isdigit() else w for w in words], order, where.path.name)


class _Kept:
    """Shown trajectories of the questions whose hash is below a bar, which sinks when there are too many."""

    def __init__(self) -> None:
        self.total = 0
        self.bar = 1 << 32
        self.shown: list[Shown] = []

    def wants(self, key: str) -> bool:
        return zlib.crc32(key.encode()) < self.bar

    def add(self, shown: Shown) -> None:
        self.shown.append(shown)
        if len(self.shown) > MAX_TRAJECTORIES:
            hashes = sorted(zlib.crc32(one.question.encode()) for one in self.shown)
            self.bar = hashes[int(0.9 * MAX_TRAJECTORIES)]
            self.shown = [one for one in self.shown if self.wants(one.question)]


def _groups(where: Where, kept: _Kept) -> Iterator[tuple[Question, list[tuple[int, Trajectory, float]]]]:
    if where.path.name == ANSWERS_FILE:
        for answer in read_journal(where.path):
            kept.total += 1
            if kept.wants(answer.question.key):
                trajectory = answer.trajectory
                yield answer.question, [(answer.sample, trajectory, em_reward(trajectory, answer.question))]
        return
    decoder = json.JSONDecoder()
    number = 0
    try:
        with gzip.open(where.path, "rt", encoding="utf-8") as file:
            for line in file:
                number += 1
                # Of a question that is not shown, only the question is parsed.
                question = question_from_json(decoder.raw_decode(line, len(QUESTION_KEY))[0])
                if not kept.wants(question.key):
                    kept.total += line.count('"prompt_ids": ')
                    continue
                group = json.loads(line)
                trajectories = map(trajectory_from_json, group["trajectories"])
                made = [(k, t, r) for k, (t, r) in enumerate(zip(trajectories, group["rewards"], strict=True))]
                kept.total += len(made)
                yield question, made
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where.path} is cut or damaged near line {number} ({error}); copy it once more, or delete it for a "
            "page without it"
        ) from error


def _small(where: int, question: Question, sample: int, trajectory: Trajectory, reward: float) -> Shown:
    policy = [span for span in trajectory.spans if span.author == "policy"]
    return Shown(
        where=where,
        question=question.key,
        sample=sample,
        reward=reward,
        status=trajectory.status,
        error=trajectory.error,
        num_searches=trajectory.num_searches,
        num_tokens=len(trajectory.response_ids),
        spans=tuple((span.kind, span.text, span.is_truncated) for span in trajectory.spans),
        token_ids=tuple(array("I", span.token_ids) for span in policy),
        surprise=tuple(quantized(span.logprobs) for span in policy),
    )


def _add_pairs(directory: Path, found: Gathered) -> None:
    """The pairs of every OPSD round whose trajectories are shown."""
    places = {
        (found.wheres[shown.where].stage, shown.question, shown.sample): place
        for place, shown in enumerate(found.shown)
        if found.wheres[shown.where].what == "pool"
    }
    for path in sorted(directory.rglob("pairs.jsonl")):
        stage = path.parent.relative_to(directory).as_posix()
        kls = {}
        if (path.parent / PAIR_KL_FILE).is_file():
            rows = map(json.loads, (path.parent / PAIR_KL_FILE).read_text(encoding="utf-8").splitlines())
            kls = {row["question"]: (tuple(row["before"]), tuple(row["after"])) for row in rows}
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            reference, student = (places.get((stage, row["question"], row[name])) for name in ("reference", "student"))
            if row["outcome"] == "pair" and reference is not None and student is not None:
                before, after = kls.get(row["question"], ((), ()))
                found.pairs.append(
                    ShownPair(stage, row["question"], reference, student, row["distance"], before, after)
                )
