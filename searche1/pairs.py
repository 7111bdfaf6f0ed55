"""Pair mining (paper 3.2): from the K trajectories of a question, the reference and the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import Levenshtein

from searche1.config import PairsConfig
from searche1.types import Group, Question, Trajectory, UserError


@dataclass(frozen=True)
class Pair:
    """One question's reference (cheapest correct) and student (most different sibling)."""

    question: Question
    reference: Trajectory
    student: Trajectory
    student_reward: float
    distance: float  # normalised Levenshtein distance of the two texts


@dataclass(frozen=True)
class PairRecord:
    """Why a question gave its pair or none: the audit line in pairs.jsonl. Indices are within the group."""

    question: str
    outcome: str  # "pair", or why there is none
    rewards: tuple[float, ...]
    num_searches: tuple[int, ...]
    reference: int | None = None
    student: int | None = None
    distance: float | None = None


def mine_pair(group: Group, settings: PairsConfig) -> tuple[Pair | None, PairRecord]:
    """The reference is the correct trajectory with the fewest searches, then the shortest, then the first.

    The student is the wrong trajectory most different from it, or, if none is wrong, the most different correct one.
    Trajectories with an engine or retriever fault are no behaviour of the policy and are not considered.
    """
    valid = [k for k, trajectory in enumerate(group.trajectories) if trajectory.status != "error"]

    def record(outcome: str, **found: Any) -> PairRecord:
        return PairRecord(
            question=group.question.key,
            outcome=outcome,
            rewards=group.rewards,
            num_searches=tuple(t.num_searches for t in group.trajectories),
            **found,
        )

    correct = [
        k for k in valid if group.rewards[k] == 1.0 and group.trajectories[k].num_searches >= settings.min_ref_searches
    ]
    if not correct:
        return None, record("no correct trajectory")
    reference = min(
        correct, key=lambda k: (group.trajectories[k].num_searches, len(group.trajectories[k].response_ids), k)
    )
    siblings = [k for k in valid if k != reference and group.trajectories[k].num_policy_tokens]
    wrong = [k for k in siblings if group.rewards[k] == 0.0]
    candidates = wrong or [k for k in siblings if group.rewards[k] == 1.0]
    if not candidates:
        return None, record("no sibling", reference=reference)
    text = [compared_text(trajectory, settings.text) for trajectory in group.trajectories]
    distances = {k: Levenshtein.normalized_distance(text[reference], text[k]) for k in candidates}
    student = min(candidates, key=lambda k: (-distances[k], k))
    found = {"reference": reference, "student": student, "distance": distances[student]}
    if distances[student] == 0.0:
        return None, record("student equals reference", **found)
    pair = Pair(
        question=group.question,
        reference=group.trajectories[reference],
        student=group.trajectories[student],
        student_reward=group.rewards[student],
        distance=distances[student],
    )
    return pair, record("pair", **found)


def compared_text(trajectory: Trajectory, which: str) -> str:
    """The text whose characters are compared: the "full" response or what the "policy" wrote."""
    if which not in ("full", "policy"):
        raise UserError(f"pairs.text must be full or policy, got {which!r}")
    return trajectory.text if which == "full" else trajectory.policy_text
