"""Every string the policy reads that it did not write: prompts, observations and the privileged reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from searche1.config import PromptConfig


class Tokenizer(Protocol):
    """The part of a HuggingFace tokenizer that is used."""

    chat_template: Any
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str: ...


class Passage(Protocol):
    """One retrieved passage; `contents` is a quoted title line, then the text."""

    @property
    def contents(self) -> str: ...


def fill(template: str, **values: str) -> str:
    """The template with {name} replaced, once: braces inside a value, such as a passage's, are text."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def normalize_question(question: str) -> str:
    """Stripped, and ending in a question mark, as Search-R1 prepares its data."""
    question = question.strip()
    if not question:
        raise ValueError("a question is empty; give every question a text")
    return question if question.endswith("?") else question + "?"


def student_prompt(question: str, prompt: PromptConfig) -> str:
    """P_S(q) of Eq. 3: instruction and question, before the chat template."""
    return fill(prompt.user, question=normalize_question(question))


def teacher_prompt(question: str, reference: str, prompt: PromptConfig) -> str:
    """P_T(q, tau_ref) of Eq. 4: the same instruction and question, then the reference trajectory's text."""
    return fill(
        prompt.teacher,
        student_prompt=student_prompt(question, prompt),
        question=normalize_question(question),
        reference=reference.strip(),
    )


def encode_prompt(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of one user message: in the chat template if the tokenizer has one, else as it is."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def format_documents(passages: Sequence[Passage], prompt: PromptConfig) -> str:
    """Passages in rank order. The title keeps its quotes: the first line of `contents` is the title."""
    parts = []
    for rank, passage in enumerate(passages, start=1):
        title, _, text = passage.contents.partition("\n")
        parts.append(fill(prompt.document, rank=str(rank), title=title, text=text))
    return "".join(parts).strip()


def information(passages: Sequence[Passage], prompt: PromptConfig) -> str:
    """The observation that answers a search."""
    return fill(prompt.information, documents=format_documents(passages, prompt))
