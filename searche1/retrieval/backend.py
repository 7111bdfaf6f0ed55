"""Where a retriever's passages come from: the interface between its HTTP server and a local index or a web search."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from searche1.retrieval.client import Passage


class SearchFault(Exception):
    """A query has no answer, and says why. `is_passing`: asking again later may help (HTTP 503), else not (500)."""

    def __init__(self, message: str, *, is_passing: bool) -> None:
        super().__init__(message)
        self.is_passing = is_passing


Asked = TypeVar("Asked")
Answer = tuple[Passage, ...] | SearchFault  # () only if nothing was found


class Backend(Protocol):
    """Something that finds passages. One object, used from one event loop."""

    description: str  # for /health and the log: "Flat index of 1,000 passages"

    async def search(self, queries: Sequence[str], *, topk: int) -> list[Answer]:
        """The passages of each query, in order, best first, at most `topk`. A fault of one query spoils no other."""

    def fault(self) -> str:
        """Why searches fail now, or ""."""

    async def close(self) -> None:
        """Ends its processes and connections."""


async def in_halves(
    search: Callable[[Sequence[Asked]], Awaitable[Sequence[Answer]]], asked: Sequence[Asked]
) -> list[Answer]:
    """The answers of `search`; what it fails on is asked again in halves, so that one bad query fails alone."""
    try:
        return list(await search(asked))
    except SearchFault as fault:
        if fault.is_passing or len(asked) == 1:
            return [fault] * len(asked)
    middle = len(asked) // 2
    return [*await in_halves(search, asked[:middle]), *await in_halves(search, asked[middle:])]
