"""The search engine as a rollout sees it: `await client.search(query)`, batched, cached and retried."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from searche1.addresses import http_address
from searche1.retrieval.batching import Batcher, LRUCache
from searche1.retrieval.breaker import Breaker
from searche1.retrieval.retry import FIRST_PAUSE_S, RETRIED_STATUSES, pause_s
from searche1.types import UserError

MAX_BATCH = 512  # queries in one request
MAX_REQUESTS = 8  # under way at once; more only wait in the server and run into the time-out there
BLAMED_STATUSES = (400, 413, 422, 500)  # one of the queries may be what the server cannot bear


@dataclass(frozen=True)
class Passage:
    """One retrieved passage; `contents` is a quoted title line, then the text."""

    id: str
    contents: str
    score: float


Found = tuple[Passage, ...]


class RetrieverError(UserError):
    """The retriever gave no usable answer. Its trajectory is an error, never an empty observation."""


class _Refused(RetrieverError):
    """The server answered that it will not, or not even when it is asked again."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Fault(Exception):
    """A request that may be made again. `is_down`: the server has said nothing, or that it cannot."""

    def __init__(self, message: str, *, status: int = 0, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.is_down = status != 500  # with which a server that works tells of a query that it cannot bear


@dataclass(frozen=True)
class _Connection:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    session: aiohttp.ClientSession
    batcher: Batcher[str, Found]
    breaker: Breaker


class RetrieverClient:
    """Searches a server that speaks Search-R1's POST /retrieve.

    Searches that come in the same turn of the event loop, or while others are under way, share a request; answers are
    remembered. A request that meets a passing fault (no connection, no answer in `timeout_s`, 429, 500, 502, 503, 504)
    is made `retries` times, with growing pauses or those that the server asks for. When faults follow each other the
    server counts as down: then one request at a time tries it, which no longer counts, until it answers or `deadline_s`
    have passed. No search takes longer than that, and while the server stays down later ones get one try. If a request
    of several queries fails for good, its parts are asked once more, so that a query the server cannot bear fails
    alone.

    Connections belong to the running event loop: use `async with` inside each `asyncio.run`; what is remembered
    outlives them.
    """

    def __init__(
        self,
        *,
        url: str,
        topk: int,
        timeout_s: float,
        retries: int,
        deadline_s: float = 600.0,
        token: str = "",
        cache_size: int = 10_000,
        backoff_s: float = FIRST_PAUSE_S,
    ) -> None:
        """`backoff_s` is the first pause. Raises UserError for an address or numbers that cannot work."""
        url = http_address(url, setting="retriever.url", example="http://127.0.0.1:8000/retrieve")
        if topk < 1 or retries < 1 or timeout_s <= 0 or deadline_s <= 0:
            raise UserError(
                f"retriever topk is {topk}, retries {retries}, timeout_s {timeout_s:g} and deadline_s {deadline_s:g}; "
                "the first two must be at least 1, the others more than 0"
            )
        self._url = url.removesuffix("/retrieve").rstrip("/") + "/retrieve"
        self._topk = topk
        self._timeout_s = timeout_s
        self._retries = retries
        self._deadline_s = deadline_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._backoff_s = backoff_s
        self._cache: LRUCache[str, Found] = LRUCache(size=cache_size)
        self._connection: _Connection | None = None

    async def search(self, query: str) -> Found:
        """At most `topk` passages, best first. Raises RetrieverError; () only if the server found nothing."""
        if self._connection is None or self._connection.loop is not asyncio.get_running_loop():
            self._connection = self._connect()
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._connection.batcher.get(query)
        except TimeoutError as error:
            last_fault = self._connection.breaker.last_fault
            raise RetrieverError(
                f"the retriever at {self._url} gave no answer within {self._deadline_s:g} s (retriever.deadline_s)"
                f"{', at last: ' + last_fault if last_fault else ''}; look at its log, or ask its /health"
            ) from error

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
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        breaker = Breaker(f"the retriever at {self._url}")

        async def retrieve(queries: list[str]) -> Sequence[Found | Exception]:
            return await self._retrieve(session, breaker, queries, retries=self._retries)

        batcher = Batcher(retrieve, cache=self._cache, max_batch=MAX_BATCH, max_running=MAX_REQUESTS)
        return _Connection(asyncio.get_running_loop(), session, batcher, breaker)

    async def _retrieve(
        self, session: aiohttp.ClientSession, breaker: Breaker, queries: list[str], *, retries: int
    ) -> Sequence[Found | Exception]:
        """The answer of each query, or the RetrieverError that is its own. Raises one that concerns them all."""
        try:
            return await self._ask(session, breaker, queries, retries=retries)
        except _Refused as error:
            if error.status not in BLAMED_STATUSES:
                raise
            if len(queries) == 1:
                return [error]
        middle = len(queries) // 2
        halves = (queries[:middle], queries[middle:])
        parts = [await self._retrieve(session, breaker, half, retries=1) for half in halves]
        return [*parts[0], *parts[1]]

    async def _ask(
        self, session: aiohttp.ClientSession, breaker: Breaker, queries: list[str], *, retries: int
    ) -> list[Found]:
        """Asks until there is an answer. Raises RetrieverError."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._deadline_s
        num_tries = 0
        while True:
            async with breaker.turn():
                try:
                    found = await self._post(session, queries)
                    breaker.answered()
                    return found
                except _Refused:
                    breaker.answered()
                    raise
                except _Fault as fault:
                    last = fault
                num_tries += 1
                if last.is_down:
                    breaker.failed(str(last))
                else:
                    breaker.answered()
                is_too_late = loop.time() > give_up_at or breaker.down_s > self._deadline_s
                if is_too_late or (num_tries >= retries and not breaker.is_open):
                    raise self._failure(last, num_tries)
                # Within our turn: whoever comes next must not ask a server that is down without a pause either.
                await asyncio.sleep(pause_s(num_tries, first_s=self._backoff_s, retry_after=last.retry_after))

    async def _post(self, session: aiohttp.ClientSession, queries: list[str]) -> list[Found]:
        """One request. Raises _Fault or RetrieverError."""
        # return_scores is always true: Search-R1's own server fails, or answers nonsense, without it.
        request = {"queries": queries, "topk": self._topk, "return_scores": True}
        try:
            async with session.post(self._url, json=request) as response:
                status, body = response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _Fault(str(error) or f"no answer within {self._timeout_s:g} s") from error
        if status == 200:
            return parse_answer(body, num_queries=len(queries), topk=self._topk)
        said = f"HTTP status {status}: {body[:200]}"
        if status in RETRIED_STATUSES:
            raise _Fault(said, status=status, retry_after=response.headers.get("Retry-After"))
        hint = "; give the server's token file as retriever.token_file" if status == 401 else ""
        raise _Refused(f"the retriever at {self._url} refused a request: {said}{hint}", status=status)

    def _failure(self, fault: _Fault, num_tries: int) -> RetrieverError:
        message = (
            f"the retriever at {self._url} failed {num_tries} times, at last with: {fault}; "
            "look at its log, or ask its /health"
        )
        return _Refused(message, status=500) if fault.status == 500 else RetrieverError(message)


def parse_answer(body: str, *, num_queries: int, topk: int) -> list[Found]:
    """The passages of each query, in request order. Raises RetrieverError unless the answer is complete."""
    try:
        rows = json.loads(body)["result"]
        answers = [tuple(_parse_passage(hit) for hit in _as_list(row)) for row in _as_list(rows)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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
    contents = document["contents"].encode(errors="replace").decode()  # half a surrogate pair is no text
    return Passage(id=str(document["id"]), contents=contents, score=float(hit["score"]))
