"""The only supervision: exact match of the answer (protocol of Search-R1, paper 4.1)."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from searche1.tags import last_answer
from searche1.types import Question, Trajectory

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, then without articles, single spaces: SQuAD's rule, in this order."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """True if the prediction equals any of the reference aliases after normalization."""
    normalized = normalize_answer(prediction)
    return any(normalized == normalize_answer(answer) for answer in answers)


def em_reward(trajectory: Trajectory, question: Question) -> float:
    """1.0 if the last complete answer that the policy wrote in one turn matches, else 0.0.

    Only policy text is read: the prompt and the error message contain example answers, which Search-R1's code grades
    when there is no other. A trajectory of status "error" gets 0.0 whatever it holds, and the caller leaves it out by
    its status: it is no behaviour of the policy.
    """
    if trajectory.status == "error":
        return 0.0
    # Turn by turn: a tag left open in one must not swallow, or lend its opening to, the answer of another.
    turns = (span.text for span in reversed(trajectory.spans) if span.author == "policy")
    answer = next((answer for answer in map(last_answer, turns) if answer is not None), None)
    return float(answer is not None and exact_match(answer, question.answers))
