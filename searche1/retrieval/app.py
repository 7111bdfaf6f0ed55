"""The retriever's HTTP interface: Search-R1's POST /retrieve over any backend, GET /health and GET /metrics."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field, ValidationError

from searche1.retrieval.backend import Backend, SearchFault
from searche1.retrieval.batching import Batcher, LRUCache
from searche1.retrieval.client import Passage
from searche1.retrieval.monitor import Monitor
from searche1.retrieval.workers import Pool

MAX_TOPK = 1000
MAX_QUERIES = 16_384  # in one request: Search-R1 sends those of a whole rollout batch
MAX_QUERY_CHARS = 32_768
MAX_BODY_BYTES = 64 << 20
MAX_RETRY_AFTER_S = 60

Key = tuple[str, int]  # query and topk
Found = tuple[Passage, ...]


class QueryRequest(BaseModel):
    """Search-R1's request. A topk of None or 0 is the server's default."""

    queries: list[str]
    topk: int | None = Field(default=None, ge=0, le=MAX_TOPK)
    return_scores: bool = False


@dataclass(frozen=True)
class Limits:
    """How much is done at once, and how long it may take."""

    topk: int = 3
    max_batch: int = 512  # queries searched together (Search-R1)
    max_wait_s: float = 0.01  # a batch waits for others at most this long, and 5 % of what a search takes
    max_running: int = 2  # batches under way: one is encoded while another is searched
    max_pending: int = 20_000  # queries not answered yet; more are turned away
    cache_size: int = 100_000  # answers that are remembered
    timeout_s: float = 120.0  # one request


def create_app(backend: Backend, limits: Limits, *, monitor: Monitor, pools: Sequence[Pool], token: str) -> FastAPI:
    """The application over a backend that is ready; an empty `token` lets everybody in."""
    cache: LRUCache[Key, Found] = LRUCache(size=limits.cache_size)
    speed = _Speed()

    async def compute(keys: list[Key]) -> list[Found | Exception]:
        monitor.batch_size.observe(len(keys))
        started = time.perf_counter()
        found: dict[Key, Found | Exception] = {}
        for topk in sorted({k for _, k in keys}):  # how many are asked for may decide which, with a reranker
            queries = [query for query, k in keys if k == topk]
            answers = await backend.search(queries, topk=topk)
            found |= {(query, topk): answer for query, answer in zip(queries, answers, strict=True)}
        speed.add(len(keys), time.perf_counter() - started)
        return [found[key] for key in keys]

    batcher = Batcher(
        compute,
        cache=cache,
        max_wait_s=limits.max_wait_s,
        max_batch=limits.max_batch,
        max_running=limits.max_running,
    )
    monitor.watch(lambda: batcher.num_pending, pools)
    app = FastAPI(title="Search-E1 retriever", docs_url=None, redoc_url=None)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "needs the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    async def answer(request: Request) -> bytes:
        asked = _parse(await _read_body(request))
        keys = [(query, asked.topk or limits.topk) for query in asked.queries]
        monitor.queries.inc(len(keys))
        monitor.remembered.inc(sum(key in cache for key in keys))
        if batcher.num_pending and batcher.num_pending + len(keys) > limits.max_pending:
            raise _later(f"{batcher.num_pending} queries wait already", speed.seconds(batcher.num_pending))
        try:
            async with asyncio.timeout(limits.timeout_s):
                found = await asyncio.gather(*(batcher.get(key) for key in keys), return_exceptions=True)
        except TimeoutError as error:
            fault = f"no answer within {limits.timeout_s:g} s"
            raise _later(fault, speed.seconds(batcher.num_pending)) from error
        faults = [one for one in found if isinstance(one, BaseException)]
        if faults:
            monitor.faults.inc(len(faults))
            raise _http_error(faults)
        return _to_json(found, with_scores=asked.return_scores)  # type: ignore[arg-type]

    @app.post("/retrieve")
    async def retrieve(request: Request) -> Response:
        started = time.perf_counter()
        status = 500
        try:
            check_token(request)
            content = await answer(request)
            status = 200
            return Response(content, media_type="application/json")
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            monitor.requests.labels(str(status)).inc()
            monitor.request_seconds.observe(time.perf_counter() - started)

    @app.get("/health")
    async def health() -> Response:
        fault = backend.fault()
        state: dict[str, Any] = {"status": fault or "ok", "backend": backend.description, "topk": limits.topk}
        return Response(orjson.dumps(state), status_code=503 if fault else 200, media_type="application/json")

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_token(request)
        return Response(monitor.text(), media_type="text/plain; version=0.0.4")

    app.router.add_event_handler("shutdown", batcher.close)
    return app


class _Speed:
    """Queries a second, over the last batches: tells someone who is turned away when to come again."""

    def __init__(self) -> None:
        self._per_s = 0.0

    def add(self, queries: int, seconds: float) -> None:
        now = queries / max(seconds, 1e-6)
        self._per_s = 0.8 * self._per_s + 0.2 * now if self._per_s else now

    def seconds(self, queries: int) -> int:
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(queries / self._per_s))) if self._per_s else 1


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes; send fewer queries at once")
    return bytes(body)


def _parse(body: bytes) -> QueryRequest:
    try:
        asked = QueryRequest.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(422, error.errors(include_url=False, include_context=False, include_input=False)) from error
    if len(asked.queries) > MAX_QUERIES:
        raise HTTPException(413, f"{len(asked.queries)} queries in one request; send at most {MAX_QUERIES}")
    longest = max(map(len, asked.queries), default=0)
    if longest > MAX_QUERY_CHARS:
        raise HTTPException(413, f"a query has {longest} characters; send at most {MAX_QUERY_CHARS}")
    return asked


def _later(reason: str, seconds: int) -> HTTPException:
    return HTTPException(503, f"the retriever is overloaded: {reason}", {"Retry-After": str(seconds)})


def _http_error(faults: Sequence[BaseException]) -> HTTPException:
    """The worst of a request's faults. What is no SearchFault is a bug of ours and keeps its trace in the log."""
    for fault in faults:
        if not isinstance(fault, SearchFault):
            raise fault
    lasting = [fault for fault in faults if isinstance(fault, SearchFault) and not fault.is_passing]
    if lasting:
        return HTTPException(500, str(lasting[0]))
    return HTTPException(503, str(faults[0]), {"Retry-After": "1"})


def _to_json(found: Sequence[Found], *, with_scores: bool) -> bytes:
    to_json = _scored if with_scores else _bare
    return orjson.dumps({"result": [[to_json(passage) for passage in passages] for passages in found]})


def _bare(passage: Passage) -> dict[str, Any]:
    return {"id": passage.id, "contents": passage.contents}


def _scored(passage: Passage) -> dict[str, Any]:
    return {"document": _bare(passage), "score": passage.score}
