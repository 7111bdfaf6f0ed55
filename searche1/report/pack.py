"""Trajectories as compressed pieces inside the page, each unpacked by the browser when somebody looks at it.

A piece is gzip of JSON, in base64. `index` has what filters need, in columns; `text-N` the spans of [CHUNK]
trajectories, where an observation is a list of line numbers; `lines-N` those lines, which repeat from trajectory to
trajectory; `tokens-N` ids and logprobs; `vocabulary` the text of every id in use; `kl` the pairs' KLs.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from searche1.report.gather import Gathered, Shown

CHUNK = 200  # trajectories in a piece
LINES = 1000
BUDGET_BYTES = 55_000_000  # of all pieces; the page may have 60 MB
TEXT_SHARE = 0.8  # of the budget, for what the policy wrote
LINE_LIMITS = (100_000, 500, 200, 80)  # characters kept of an observation's line: the first that fits the budget
KINDS = ("search", "answer", "invalid", "final", "information", "error")


@dataclass(frozen=True)
class Packed:
    pieces: dict[str, str]  # base64 text by name
    notes: list[str]  # what had to be left out, for the reader

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.pieces.values()))


class Lines:
    """Numbers for the lines of observations, which passages that are found again share."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def numbers(self, text: str) -> list[int]:
        return [self.texts.setdefault(line, len(self.texts)) for line in text.split("\n")]


def pack(found: Gathered, token_text: Callable[[int], str] | None, *, budget: int = BUDGET_BYTES) -> Packed:
    """Everything within `budget` bytes; what does not fit goes in the order tokens, ends of passages, trajectories.

    `token_text` gives an id's text; without it, tokens are left out.
    """
    lines, chunks, pieces = _texts(found)
    used = sum(map(len, pieces.values()))
    if used > TEXT_SHARE * budget:
        return pack(_part(found, TEXT_SHARE * budget / used), token_text, budget=budget)
    notes = []
    if found.total > len(found.shown):
        notes.append(
            f"{len(found.shown):,} of the run's {found.total:,} trajectories: those of a part of the questions, the "
            "same in every stage."
        )
    for limit in LINE_LIMITS:
        packed_lines = _line_pieces(lines, limit)
        num_bytes = sum(map(len, packed_lines.values()))
        if used + num_bytes <= budget:
            break
    else:
        return pack(_part(found, (budget - used) / num_bytes), token_text, budget=budget)
    if limit < LINE_LIMITS[0] and any(len(line) > limit for line in lines.texts):
        notes.append(f"Of every line of an observation, the first {limit} characters.")
    pieces |= packed_lines
    used += num_bytes
    if token_text is None:
        notes.append("No tokens and logprobs: the run's tokenizer could not be loaded.")
    else:
        tokens = _token_pieces(found, chunks, token_text, room=budget - used)
        num_with = sum(len(chunks[int(name.removeprefix("tokens-"))]) for name in tokens if name != "vocabulary")
        if num_with < len(found.shown):
            notes.append(f"Tokens and logprobs of {num_with:,} trajectories, pairs first.")
        pieces |= tokens
    return Packed(pieces, notes)


def _part(found: Gathered, share: float) -> Gathered:
    """Somewhat fewer than that share of the questions, as a part compresses worse than the whole."""
    part = found.part(0.85 * share)
    assert len(part.shown) < len(found.shown), "each try is smaller than the one before"
    return part


def _texts(found: Gathered) -> tuple[Lines, list[list[Shown]], dict[str, str]]:
    """Lines of observations, chunks of trajectories, and the pieces of everything but lines and tokens."""
    lines = Lines()
    pieces = {"index": _piece(_index(found))}
    chunks = [found.shown[start : start + CHUNK] for start in range(0, len(found.shown), CHUNK)]
    for number, chunk in enumerate(chunks):
        pieces[f"text-{number}"] = _piece([_spans(shown, lines) for shown in chunk])
    if any(pair.before for pair in found.pairs):
        pieces["kl"] = _piece([[_milli(pair.before), _milli(pair.after)] for pair in found.pairs])
    return lines, chunks, pieces


def _piece(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def _index(found: Gathered) -> dict[str, Any]:
    number = {key: i for i, key in enumerate(found.questions)}
    return {
        "chunk": CHUNK,
        "lines": LINES,
        "kinds": KINDS,
        "wheres": [{"title": where.title, "stage": where.stage, "what": where.what} for where in found.wheres],
        "questions": [[q.key, q.source, q.text, list(q.answers)] for q in found.questions.values()],
        "where": [shown.where for shown in found.shown],
        "question": [number[shown.question] for shown in found.shown],
        "sample": [shown.sample for shown in found.shown],
        "reward": [shown.reward for shown in found.shown],
        "status": [shown.status[0] for shown in found.shown],  # a, u or e
        "searches": [shown.num_searches for shown in found.shown],
        "tokens": [shown.num_tokens for shown in found.shown],
        "pairs": [
            [
                pair.stage,
                number[pair.question],
                pair.reference,
                pair.student,
                round(pair.distance, 4),
                bool(pair.before),
            ]
            for pair in found.pairs
        ],
    }


def _spans(shown: Shown, lines: Lines) -> list[Any]:
    spans: list[Any] = [
        [KINDS.index(kind), lines.numbers(text) if kind == "information" else text, int(is_cut)]
        for kind, text, is_cut in shown.spans
    ]
    return [spans, shown.error] if shown.error else [spans]


def _line_pieces(lines: Lines, limit: int) -> dict[str, str]:
    texts = [line if len(line) <= limit else line[:limit] + "\u2026" for line in lines.texts]
    return {f"lines-{i}": _piece(texts[i * LINES : (i + 1) * LINES]) for i in range(-(-len(texts) // LINES))}


def _token_pieces(
    found: Gathered, chunks: Sequence[Sequence[Shown]], token_text: Callable[[int], str], *, room: int
) -> dict[str, str]:
    """As many whole chunks as fit; first those that pairs are in, then evenly over the run."""
    in_pairs = {place // CHUNK for pair in found.pairs if pair.before for place in (pair.reference, pair.student)}
    spread = sorted(range(len(chunks)), key=lambda number: (number not in in_pairs, number * 0.6180339887 % 1))
    used_ids = {token for shown in found.shown for ids in shown.token_ids for token in ids}
    pieces = {"vocabulary": _piece({token: token_text(token) for token in sorted(used_ids)})}
    room -= len(pieces["vocabulary"])
    for number in spread:
        piece = _piece(
            [
                [[ids.tolist(), list(surprise)] for ids, surprise in zip(s.token_ids, s.surprise, strict=True)]
                for s in chunks[number]
            ]
        )
        if len(piece) > room:
            break
        room -= len(piece)
        pieces[f"tokens-{number}"] = piece
    return pieces if len(pieces) > 1 else {}


def _milli(values: Sequence[float]) -> list[int]:
    return [round(1000 * value) for value in values]
