"""Where a retriever's passages come from: the interface between its HTTP server and a local index or a web search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from searche1.retrieval.client import Passage


class SearchFault(Exception):
    """A query has no answer, and says why. `is_passing`: asking again later may help (HTTP 503), else not (500)."""

    def __init__(self, message: str, *, is_passing: bool) -> None:
        super().__init__(message)
        self.is_passing = is_passing


Answer = tuple[Passage, ...] | SearchFault  # () only if nothing was found


class Backend(Protocol):
    """Something that finds passages. One object, used from one event loop."""

    description: str  # for /health and the log: "Flat index of 1,000 passages"

    async def start(self) -> None:
        """Loads what it needs. Raises UserError."""

    async def search(self, queries: Sequence[str], *, topk: int) -> list[Answer]:
        """The passages of each query, in order, best first, at most `topk`. A fault of one query spoils no other."""

    def fault(self) -> str:
        """Why searches fail now, or ""."""

    async def close(self) -> None:
        """Ends its processes and connections."""
