"""The search engine as a rollout sees it: `await client.search(query)`, batched, cached and retried."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from searche1.retrieval.batching import Batcher, LRUCache
from searche1.types import UserError

RETRIED_STATUSES = (500, 502, 503, 504)
MAX_BATCH = 512  # queries in one request
MAX_REQUESTS = 8  # under way at once; more only wait in the server and run into the time-out there
MAX_BACKOFF_S = 8.0


@dataclass(frozen=True)
class Passage:
    """One retrieved passage; `contents` is a quoted title line, then the text."""

    id: str
    contents: str
    score: float


class RetrieverError(UserError):
    """The retriever gave no usable answer. Its trajectory is an error, never an empty observation."""


@dataclass(frozen=True)
class _Connection:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    session: aiohttp.ClientSession
    batcher: Batcher[str, tuple[Passage, ...]]


class RetrieverClient:
    """Searches a server that speaks Search-R1's POST /retrieve.

    Searches that come within milliseconds of each other share one request, and answers are remembered.
    `retries` is the number of tries, with growing pauses, on connection errors, time-outs and
    500/502/503/504. Connections belong to the running event loop: use `async with` inside each
    `asyncio.run`; what is remembered outlives them.
    """

    def __init__(
        self,
        *,
        url: str,
        topk: int,
        timeout_s: float,
        retries: int,
        cache_size: int = 10_000,
        backoff_s: float = 0.5,
    ) -> None:
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise UserError(f"retriever url is {url!r}; give an address such as http://127.0.0.1:8000/retrieve")
        if topk < 1 or retries < 1:
            raise UserError(f"retriever topk is {topk} and retries is {retries}; both must be at least 1")
        self._url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        self._topk = topk
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._cache: LRUCache[str, tuple[Passage, ...]] = LRUCache(size=cache_size)
        self._connection: _Connection | None = None
        self._jitter = random.Random()  # its own generator: pauses must not shift anyone's seeded numbers

    async def search(self, query: str) -> tuple[Passage, ...]:
        """At most `topk` passages, best first. Raises RetrieverError; () only if the server found nothing."""
        if self._connection is None or self._connection.loop is not asyncio.get_running_loop():
            self._connection = self._connect()
        return await self._connection.batcher.get(query)

    async def close(self) -> None:
        """Closes the connections of this event loop. A later search opens new ones."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.batcher.close()
            await connection.session.close()

    async def __aenter__(self) -> RetrieverClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _connect(self) -> _Connection:
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._timeout_s))

        async def retrieve(queries: list[str]) -> list[tuple[Passage, ...]]:
            return await self._retrieve(session, queries)

        batcher = Batcher(retrieve, cache=self._cache, max_batch=MAX_BATCH, max_running=MAX_REQUESTS)
        return _Connection(asyncio.get_running_loop(), session, batcher)

    async def _retrieve(self, session: aiohttp.ClientSession, queries: list[str]) -> list[tuple[Passage, ...]]:
        # return_scores is always true: Search-R1's own server fails, or answers nonsense, without it.
        request = {"queries": queries, "topk": self._topk, "return_scores": True}
        for attempt in range(self._retries):
            if attempt > 0:
                pause_s = min(MAX_BACKOFF_S, self._backoff_s * 2 ** (attempt - 1))
                await asyncio.sleep(pause_s * self._jitter.uniform(0.5, 1.0))
            try:
                async with session.post(self._url, json=request) as response:
                    status, body = response.status, await response.text(errors="replace")
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
                fault = str(error) or f"no answer within {self._timeout_s:g} s"
                continue
            if status == 200:
                return parse_answer(body, num_queries=len(queries), topk=self._topk)
            fault = f"HTTP status {status}: {body[:200]}"
            if status not in RETRIED_STATUSES:
                raise RetrieverError(f"the retriever at {self._url} refused a request: {fault}")
        raise RetrieverError(
            f"the retriever at {self._url} failed {self._retries} times, at last with: {fault}; "
            "look at its log, or ask its /health"
        )


def parse_answer(body: str, *, num_queries: int, topk: int) -> list[tuple[Passage, ...]]:
    """The passages of each query, in request order. Raises RetrieverError unless the answer is complete."""
    try:
        rows = json.loads(body)["result"]
        answers = [tuple(_parse_passage(hit) for hit in _as_list(row)) for row in _as_list(rows)]
    except (ValueError, KeyError, TypeError) as error:
        raise RetrieverError(
            f"the retriever's answer is malformed ({type(error).__name__}: {error}): {body[:200]!r}; needed "
            '{"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}'
        ) from error
    if len(answers) != num_queries:
        raise RetrieverError(f"the retriever answered {len(answers)} queries of {num_queries}")
    longest = max((len(answer) for answer in answers), default=0)
    if longest > topk:
        raise RetrieverError(f"the retriever gave {longest} passages for a query, asked for at most {topk}")
    return answers


def _as_list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return value


def _parse_passage(hit: Any) -> Passage:
    document = hit["document"]
    if not isinstance(document["contents"], str):
        raise TypeError(f"contents must be a string, got {type(document['contents']).__name__}")
    return Passage(id=str(document["id"]), contents=document["contents"], score=float(hit["score"]))
