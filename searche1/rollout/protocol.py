"""The turns of one trajectory, as pure functions: policy text in, what to do next out.

Search-R1's rules (Search-E1, 4.1). A turn is one generation. The first `max_searches` turns may search; a turn without
a complete tag is told so and counts as well. One final generation follows in which a search is not executed. Token
ids are only ever appended: what was sampled or observed is never tokenized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from searche1.config import PromptConfig, RolloutConfig
from searche1.prompts import Passage, Tokenizer, information
from searche1.tags import parse_action
from searche1.types import Completion, Span, SpanKind, Trajectory


@dataclass(frozen=True)
class State:
    """A trajectory under way. Its spans say all: turns used are policy spans, a search asked for is the last one."""

    prompt_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    weight_version: str = ""

    @property
    def num_turns(self) -> int:
        return sum(span.author == "policy" for span in self.spans)

    @property
    def num_response_tokens(self) -> int:
        return sum(len(span.token_ids) for span in self.spans)


@dataclass(frozen=True)
class Generate:
    """Sample a completion of `context_ids`."""

    context_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Search:
    """Look up `query`; an empty query is a query."""

    query: str


def start(prompt_ids: Sequence[int], spans: Sequence[Span] = (), *, rollout: RolloutConfig) -> State:
    """A fresh trajectory, or one that goes on after `spans`, whose turns count as used.

    A longer prompt loses its left end. `spans` must end at a turn boundary, with an observation.
    """
    assert not spans or spans[-1].author == "environment", "a trajectory goes on after an observation"
    return State(prompt_ids=tuple(prompt_ids)[-rollout.max_start_tokens :], spans=tuple(spans))


def next_step(state: State, *, rollout: RolloutConfig, tokenizer: Tokenizer) -> Generate | Search | Trajectory:
    """What comes next, or the finished trajectory."""
    last = state.spans[-1] if state.spans else None
    # What comes after a full response would be cut off anyway.
    is_full = state.num_response_tokens >= rollout.max_context_tokens
    if is_full or (last is not None and last.kind in ("answer", "final")):
        return _finish(state, max_tokens=rollout.max_context_tokens, tokenizer=tokenizer)
    if last is not None and last.kind == "search":
        return Search(parse_action(last.text).content)
    context_ids = (*state.prompt_ids, *(i for span in state.spans for i in span.token_ids))
    return Generate(context_ids[-rollout.max_context_tokens :], rollout.max_response_tokens)


def add_completion(
    state: State, completion: Completion, *, rollout: RolloutConfig, prompt: PromptConfig, tokenizer: Tokenizer
) -> State:
    """Adds a policy turn, and the error message if the turn is invalid and not the last one."""
    token_ids = completion.token_ids
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    kind: SpanKind = parse_action(text).kind
    if kind == "invalid":  # a turn that stopped at a tag has no end of sequence
        token_ids = _without_end_of_sequence(token_ids, tokenizer)
        text = tokenizer.decode(token_ids, skip_special_tokens=False)
    if kind != "answer" and state.num_turns == rollout.max_searches:
        kind = "final"
    turn = Span(
        author="policy",
        kind=kind,
        token_ids=token_ids,
        logprobs=completion.logprobs[: len(token_ids)],
        text=text,
        is_truncated=completion.finish_reason == "length",
    )
    state = replace(state, spans=(*state.spans, turn), weight_version=completion.weight_version)
    if kind == "invalid":
        return _observe(state, "error", prompt.invalid_action, rollout=rollout, tokenizer=tokenizer)
    return state


def add_passages(
    state: State, passages: Sequence[Passage], *, rollout: RolloutConfig, prompt: PromptConfig, tokenizer: Tokenizer
) -> State:
    """Adds the observation that answers the search asked for."""
    assert state.spans[-1].kind == "search"
    return _observe(state, "information", information(passages, prompt), rollout=rollout, tokenizer=tokenizer)


def fail(state: State, error: str) -> Trajectory:
    """The trajectory so far, marked as an error of the engine or the retriever."""
    return Trajectory(state.prompt_ids, state.spans, status="error", error=error, weight_version=state.weight_version)


def _observe(state: State, kind: SpanKind, text: str, *, rollout: RolloutConfig, tokenizer: Tokenizer) -> State:
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    span = Span(author="environment", kind=kind, token_ids=token_ids, logprobs=(), text=text)
    return replace(state, spans=(*state.spans, _cut(span, rollout.max_observation_tokens, tokenizer)))


def _finish(state: State, *, max_tokens: int, tokenizer: Tokenizer) -> Trajectory:
    """Keeps the first `max_tokens` of the response. An answer that loses its end is none."""
    kept: list[Span] = []
    room = max_tokens
    for span in state.spans:
        if room == 0 and span.token_ids:
            break
        kept.append(_cut(span, room, tokenizer))
        room -= len(kept[-1].token_ids)
    is_answered = kept[-1].kind == "answer"
    return Trajectory(
        state.prompt_ids,
        tuple(kept),
        status="answered" if is_answered else "unanswered",
        weight_version=state.weight_version,
    )


def _cut(span: Span, max_tokens: int, tokenizer: Tokenizer) -> Span:
    """The first `max_tokens` of a span. A policy turn that loses its closing tag becomes "final"."""
    if len(span.token_ids) <= max_tokens:
        return span
    token_ids = span.token_ids[:max_tokens]
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    kind = span.kind
    if span.author == "policy" and parse_action(text).kind != kind:
        kind = "final"
    return replace(
        span, kind=kind, token_ids=token_ids, logprobs=span.logprobs[:max_tokens], text=text, is_truncated=True
    )


def _without_end_of_sequence(token_ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Drops trailing special tokens: several may end a sequence, and all of them are invisible text."""
    end = len(token_ids)
    while end and _is_special(token_ids[end - 1], tokenizer):
        end -= 1
    return token_ids[:end]


def _is_special(token_id: int, tokenizer: Tokenizer) -> bool:
    visible = tokenizer.decode([token_id], skip_special_tokens=True)
    return not visible and tokenizer.decode([token_id], skip_special_tokens=False) != ""
