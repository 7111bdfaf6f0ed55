"""A second look at what was found: a cross-encoder reads query and passage together. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from searche1.retrieval.backend import Answer, Backend, SearchFault, in_halves
from searche1.retrieval.local import Observe
from searche1.retrieval.ranking import rerank
from searche1.retrieval.workers import Pool

Found = tuple[str, Answer]  # a query and its candidates


@dataclass(frozen=True)
class RerankSettings:
    """Which cross-encoder judges how many candidates; `model` is a HuggingFace folder or hub id."""

    model: str
    candidates: int = 10  # passages of each query that it judges (Search-R1)
    device: str = "auto"
    dtype: str = "auto"
    timeout_s: float = 300.0  # a process that computes longer is ended and started again


async def open_reranked(backend: Backend, settings: RerankSettings, *, observe: Observe) -> Reranked:
    """`backend` behind a cross-encoder, in a process of its own. Raises UserError."""
    make = partial(load_reranker, settings.model, settings.device, settings.dtype)
    pool = Pool("reranker", lambda _: make, size=1, timeout_s=settings.timeout_s)
    try:
        await pool.start()
    except BaseException:
        await pool.close()
        raise
    return Reranked(backend, pool, candidates=settings.candidates, model=settings.model, observe=observe)


class Reranked:
    """A `Backend` that asks another for candidates and gives the best of them, with the cross-encoder's scores."""

    def __init__(self, backend: Backend, pool: Pool, *, candidates: int, model: str, observe: Observe) -> None:
        self.description = f"{backend.description}, {candidates} candidates reranked by {model}"
        self.pool = pool
        self._backend = backend
        self._candidates = candidates
        self._observe = observe

    async def search(self, queries: Sequence[str], *, topk: int) -> list[Answer]:
        """See `Backend`."""
        answers = await self._backend.search(queries, topk=max(topk, self._candidates))

        async def judge(found: Sequence[Found]) -> list[Answer]:
            return await self._judge(found, topk)

        return await in_halves(judge, list(zip(queries, answers, strict=True)))

    def fault(self) -> str:
        """See `Backend`."""
        return self._backend.fault() or self.pool.fault()

    async def close(self) -> None:
        """See `Backend`."""
        await self._backend.close()
        await self.pool.close()

    async def _judge(self, found: Sequence[Found], topk: int) -> list[Answer]:
        pairs = [
            (query, passage.contents)
            for query, answer in found
            if not isinstance(answer, SearchFault)
            for passage in answer
        ]
        started = time.perf_counter()
        scores = iter((await self.pool.call("score", pairs)).tolist() if pairs else ())
        self._observe("rerank", time.perf_counter() - started)
        return [
            answer if isinstance(answer, SearchFault) else rerank(answer, [next(scores) for _ in answer], topk=topk)
            for _, answer in found
        ]


def load_reranker(model: str, device: str, dtype: str) -> Any:
    """What the reranker's process serves."""
    from searche1.retrieval.reranker import Reranker

    return Reranker(model, device, dtype)
