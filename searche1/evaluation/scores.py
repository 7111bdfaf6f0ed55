"""What one trajectory is worth: the small record that every table, interval and test is made from."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from searche1.data import read_groups
from searche1.rewards import contains_answer, exact_match, f1_score, policy_answer, search_r1_reward
from searche1.runs import atomic_path
from searche1.types import Group, Question, Trajectory, UserError

SCORES_FILE = "scores.jsonl.gz"
ANSWERS_FILE = "answers.jsonl.gz"  # every trajectory of an evaluation, as it finished
GROUPS_FILE = "eval_groups.jsonl.gz"  # of a stage of a run
GREEDY_GROUPS_FILE = "eval_greedy_groups.jsonl.gz"  # the same questions, decoded greedily


@dataclass(frozen=True)
class Score:
    """One trajectory, judged. `key` names the question; grades are in [0, 1]."""

    key: str
    source: str
    sample: int  # which of the question's trajectories
    status: str  # answered, unanswered or error
    em: float
    f1: float
    sub_em: float
    search_r1_em: float | None  # as Search-R1's code grades; None where the prompt is not at hand
    num_searches: int
    num_policy_tokens: int
    num_response_tokens: int
    prediction: str | None


def score(question: Question, trajectory: Trajectory, *, sample: int, prompt_text: str | None = None) -> Score:
    """Grades a trajectory. One of status "error" is no behaviour of the policy and gets no credit."""
    is_fault = trajectory.status == "error"
    answer = None if is_fault else policy_answer(trajectory)
    as_search_r1 = None
    if prompt_text is not None:
        as_search_r1 = 0.0 if is_fault else search_r1_reward(trajectory, question, prompt_text=prompt_text)
    return Score(
        key=question.key,
        source=question.source,
        sample=sample,
        status=trajectory.status,
        em=float(answer is not None and exact_match(answer, question.answers)),
        f1=f1_score(answer, question.answers) if answer is not None else 0.0,
        sub_em=float(answer is not None and contains_answer(answer, question.answers)),
        search_r1_em=as_search_r1,
        num_searches=trajectory.num_searches,
        num_policy_tokens=trajectory.num_policy_tokens,
        num_response_tokens=len(trajectory.response_ids),
        prediction=answer,
    )


def scores_of(groups: Iterable[Group]) -> list[Score]:
    """Scores of groups in order. Groups of one question hold further samples of it."""
    seen: Counter[str] = Counter()
    scores = []
    for group in groups:
        for trajectory in group.trajectories:
            scores.append(score(group.question, trajectory, sample=seen[group.question.key]))
            seen[group.question.key] += 1
    return scores


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """One JSON line a score, compressed. The file appears whole or not at all."""
    with atomic_path(path) as unfinished, gzip.open(unfinished, "wt", encoding="utf-8") as file:
        for one in scores:
            file.write(json.dumps(asdict(one)) + "\n")


def read_scores(folder: Path) -> list[Score]:
    """The scores of an evaluation's folder, or of a stage of a run that was judged. Raises UserError."""
    path = folder / SCORES_FILE
    if not path.is_file():
        if (folder / GROUPS_FILE).is_file():
            return scores_of(read_groups(folder / GROUPS_FILE))
        raise UserError(
            f"{folder} holds neither {SCORES_FILE} nor {GROUPS_FILE}; give the folder of a finished `searche1 eval`, "
            "or of a judged stage of a run, such as runs/NAME/cycle0/grpo"
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [Score(**json.loads(line)) for line in file]
    except (EOFError, gzip.BadGzipFile, zlib.error, json.JSONDecodeError, TypeError) as error:
        raise UserError(
            f"{path} is cut or damaged ({error}); delete it and run the same `searche1 eval` again: finished "
            "trajectories are kept"
        ) from error


def questions_of(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Scores by question, in the order in which questions first appear."""
    found: dict[str, list[Score]] = {}
    for one in scores:
        found.setdefault(one.key, []).append(one)
    return found
