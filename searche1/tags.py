"""The four tags of the trajectory format, and how an action is read from what the policy wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

STOP_STRINGS = ("</search>", "</answer>")

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Action:
    """What one policy turn asks for. `content` is the stripped query or answer, "" when invalid."""

    kind: Literal["search", "answer", "invalid"]
    content: str


def cut_at_tag(text: str) -> str:
    """The turn's text up to its closing tag; `</search>` wins over `</answer>`, as in Search-R1.

    With stop strings the last sampled token may carry characters behind the tag (">\\n"): they stay in
    the ids, which are on-policy, but are not parsed.
    """
    for tag in STOP_STRINGS:
        if tag in text:
            return text.split(tag, 1)[0] + tag
    return text


def parse_action(text: str) -> Action:
    """The first complete search or answer in a turn; anything else is an invalid action."""
    match = _ACTION.search(cut_at_tag(text))
    if match is None:
        return Action("invalid", "")
    return Action("search" if match[1] == "search" else "answer", match[2].strip())


def answers_in(text: str) -> list[str]:
    """Every complete answer in `text`, stripped, in order."""
    return [match.strip() for match in _ANSWER.findall(text)]


def last_answer(text: str) -> str | None:
    """The last complete answer in `text`, or None. Pass policy text: the prompt holds examples."""
    answers = answers_in(text)
    return answers[-1] if answers else None
