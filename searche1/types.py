"""The values that flow between stages: questions, trajectories and groups.

Everything here is finished when it is made and never changes. Token ids are the truth, text is
what a person reads; ids are converted once, where they are sampled or observed. No torch here.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, Literal

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
Author = Literal["policy", "environment"]
# What a policy span asked for, or what the environment answered with.
SpanKind = Literal["search", "answer", "invalid", "final", "information", "error"]
Status = Literal["answered", "unanswered", "error"]


class UserError(ValueError):
    """A mistake or fault that a person can mend: the command line prints it without a stack trace.

    The message says what went wrong, what was given, what is needed, and the way out.
    """


class SharedError(UserError):
    """A UserError that every rank raises alike: one of them tells it."""


class Stopped(SharedError):
    """A run stopped because it was asked to, with everything on the disk that it needs to continue."""


def disk_fault(error: OSError) -> UserError | None:
    """What a person reads of a disk that is full or breaks; None for any other fault, which is a bug of ours."""
    if error.errno not in DISK_ERRORS:
        return None
    return UserError(
        f"{error.filename or 'a file'} could not be written: {error.strerror}; make room or mend the disk and run the "
        "same command again: it continues from what is whole"
    )


@dataclass(frozen=True)
class Question:
    """One question. `(source, id)` is unique: ids restart in every data set."""

    id: str
    text: str
    answers: tuple[str, ...]
    source: str

    @property
    def key(self) -> str:
        """Identity across data sets, e.g. "nq:17". Groups are formed by it, never by `id` alone."""
        return f"{self.source}:{self.id}"


@dataclass(frozen=True)
class Completion:
    """What an engine sampled in one turn."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # one per id, natural log, of the engine's sampling distribution at T=1
    text: str
    finish_reason: str  # "stop" (stop string or end of sequence), "length" or "abort"
    weight_version: str  # the policy weights that sampled it


@dataclass(frozen=True)
class Span:
    """Consecutive tokens by one author. A tag may straddle a token, so spans are typed by who wrote them."""

    author: Author
    kind: SpanKind
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # engine logprobs of policy tokens; empty for the environment
    text: str
    is_truncated: bool = False  # cut at a token cap (turn, observation or whole response)


@dataclass(frozen=True)
class Trajectory:
    """One rollout: a prompt, then policy and environment spans in turn.

    `status` is "error" when an engine or the retriever failed: such a trajectory is no behaviour of
    the policy, so it stays out of groups, pools and losses, and is counted.
    """

    prompt_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    status: Status
    error: str = ""
    weight_version: str = ""

    @property
    def response_ids(self) -> tuple[int, ...]:
        return tuple(i for span in self.spans for i in span.token_ids)

    @property
    def policy_mask(self) -> tuple[bool, ...]:
        """True on the response tokens that the policy sampled: the set R_tau of Eq. 7, A_tau of Eq. 2."""
        return tuple(span.author == "policy" for span in self.spans for _ in span.token_ids)

    @property
    def engine_logprobs(self) -> tuple[float, ...]:
        """The engine's logprobs of the policy tokens, in order."""
        return tuple(x for span in self.spans if span.author == "policy" for x in span.logprobs)

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    @property
    def policy_text(self) -> str:
        """Only what the policy wrote: answers are read from here, so the prompt's examples never count."""
        return "".join(span.text for span in self.spans if span.author == "policy")

    @property
    def num_searches(self) -> int:
        """Executed retrievals (n_srch). A search asked for in the final turn is not executed."""
        return sum(span.kind == "information" for span in self.spans)

    @property
    def num_policy_tokens(self) -> int:
        return sum(len(span.token_ids) for span in self.spans if span.author == "policy")


@dataclass(frozen=True)
class Group:
    """All trajectories of one question with their rewards: what is stored, trained on, mined and shown."""

    question: Question
    trajectories: tuple[Trajectory, ...]
    rewards: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.trajectories) == len(self.rewards)


def question_from_json(row: dict[str, Any]) -> Question:
    return Question(id=str(row["id"]), text=row["text"], answers=tuple(row["answers"]), source=row["source"])


def trajectory_from_json(row: dict[str, Any]) -> Trajectory:
    spans = tuple(
        Span(**{**span, "token_ids": tuple(span["token_ids"]), "logprobs": tuple(span["logprobs"])})
        for span in row["spans"]
    )
    return Trajectory(**{**row, "prompt_ids": tuple(row["prompt_ids"]), "spans": spans})


def group_from_json(row: dict[str, Any]) -> Group:
    """The inverse of `json.dumps(group, default=vars)`."""
    return Group(
        question=question_from_json(row["question"]),
        trajectories=tuple(trajectory_from_json(t) for t in row["trajectories"]),
        rewards=tuple(row["rewards"]),
    )
