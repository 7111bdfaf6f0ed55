"""Grading an answer: exact match, the only supervision (protocol of Search-R1, paper 4.1), and two that only judge."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

from searche1.tags import answers_in, last_answer
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


def f1_score(prediction: str, answers: Iterable[str]) -> float:
    """Token F1 after normalization, the best over the aliases: SQuAD's, with HotpotQA's rule that a "yes", "no" or
    "noanswer" shares no token with another answer. In [0, 1].
    """
    return max((_token_f1(normalize_answer(prediction), normalize_answer(answer)) for answer in answers), default=0.0)


def _token_f1(prediction: str, answer: str) -> float:
    closed = ("yes", "no", "noanswer")
    if prediction != answer and (prediction in closed or answer in closed):
        return 0.0
    predicted, expected = prediction.split(), answer.split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def contains_answer(prediction: str, answers: Iterable[str]) -> bool:
    """Sub-EM: True if any alias, normalized, is a substring of the normalized prediction."""
    normalized = normalize_answer(prediction)
    return any(normalize_answer(answer) in normalized for answer in answers)


def policy_answer(trajectory: Trajectory) -> str | None:
    """The last complete answer that the policy wrote in one turn, or None.

    Only policy text is read: the prompt and the error message contain example answers, which Search-R1's code grades
    when there is no other.
    """
    # Turn by turn: a tag left open in one must not swallow, or lend its opening to, the answer of another.
    turns = (span.text for span in reversed(trajectory.spans) if span.author == "policy")
    return next((answer for answer in map(last_answer, turns) if answer is not None), None)


def em_reward(trajectory: Trajectory, question: Question) -> float:
    """1.0 if the policy's answer matches, else 0.0.

    A trajectory of status "error" gets 0.0 whatever it holds, and the caller leaves it out by its status: it is no
    behaviour of the policy.
    """
    if trajectory.status == "error":
        return 0.0
    answer = policy_answer(trajectory)
    return float(answer is not None and exact_match(answer, question.answers))


def search_r1_reward(trajectory: Trajectory, question: Question, *, prompt_text: str) -> float:
    """What Search-R1's code gives: the last answer of prompt, observations and policy text together, if there are two.

    Its prompt holds two ("and" and "Beijing"), so a trajectory without an answer is graded as answering "Beijing".
    """
    found = answers_in(prompt_text + trajectory.text)
    return float(len(found) > 1 and exact_match(found[-1], question.answers))
