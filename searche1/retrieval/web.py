"""Searching the web through a SearxNG of one's own, whose JSON API many metasearch servers speak."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from searche1.addresses import http_address
from searche1.retrieval.backend import Answer, SearchFault
from searche1.retrieval.client import Passage
from searche1.retrieval.retry import RETRIED_STATUSES, pause_s
from searche1.types import UserError

TEST_QUERY = "Wikipedia"
TAG = re.compile(r"<[^<>]*>")


@dataclass(frozen=True)
class WebSettings:
    """Where SearxNG is, and how hard it may be asked: the engines behind it ban whoever asks too much."""

    url: str
    language: str = ""  # as SearxNG names it, such as "en"; empty for its own default
    engines: str = ""  # comma-separated; empty for its own choice
    max_concurrent: int = 8
    tries: int = 4
    timeout_s: float = 20.0  # one request
    max_chars: int = 2000  # of a passage


async def open_web(settings: WebSettings) -> WebSearch:
    """A `Backend` over SearxNG, which has answered once. Raises UserError."""
    url = http_address(settings.url, setting="the address of SearxNG", example="http://127.0.0.1:8080")
    web = WebSearch(replace(settings, url=url))
    (answer,) = await web.search([TEST_QUERY], topk=1)
    if isinstance(answer, SearchFault):
        await web.close()
        raise UserError(str(answer)) from answer
    return web


class WebSearch:
    """A `Backend`: a result's address is its id, its title and snippet are its contents."""

    def __init__(self, settings: WebSettings) -> None:
        self.description = f"web search through {settings.url}"
        self._settings = settings
        self._url = settings.url.removesuffix("/search").rstrip("/") + "/search"
        self._slots = asyncio.Semaphore(settings.max_concurrent)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=settings.timeout_s))

    async def search(self, queries: Sequence[str], *, topk: int) -> list[Answer]:
        """See `Backend`."""
        return await asyncio.gather(*(self._answer(query, topk) for query in queries))

    def fault(self) -> str:
        """See `Backend`. Each query finds out for itself."""
        return ""

    async def close(self) -> None:
        """See `Backend`."""
        await self._session.close()

    async def _answer(self, query: str, topk: int) -> Answer:
        try:
            async with self._slots:
                return parse_results(await self._ask(query), topk=topk, max_chars=self._settings.max_chars)
        except SearchFault as fault:
            return fault

    async def _ask(self, query: str) -> str:
        """The body of an answer with status 200. Raises SearchFault."""
        asked = {"q": query, "format": "json", "language": self._settings.language, "engines": self._settings.engines}
        asked = {name: value for name, value in asked.items() if value}
        for attempt in range(1, self._settings.tries + 1):
            retry_after = None
            try:
                async with self._session.get(self._url, params=asked) as response:
                    body = await response.text(errors="replace")
                if response.status == 200:
                    return body
                if response.status not in RETRIED_STATUSES:
                    raise _refusal(self._url, response.status, body)
                fault = f"HTTP status {response.status}"
                retry_after = response.headers.get("Retry-After")
            except (aiohttp.ClientError, TimeoutError) as error:
                fault = str(error) or f"no answer within {self._settings.timeout_s:g} s"
            if attempt < self._settings.tries:
                await asyncio.sleep(pause_s(attempt, retry_after=retry_after))
        hint = "; its limiter must let this machine through" if fault.endswith("429") else ""
        raise SearchFault(
            f"SearxNG at {self._url} failed {self._settings.tries} times, at last with: {fault}{hint}", is_passing=True
        )


def parse_results(body: str, *, topk: int, max_chars: int) -> tuple[Passage, ...]:
    """The passages of SearxNG's JSON answer, in its order. Raises SearchFault."""
    try:
        answer = json.loads(body)
        results = answer["results"]
        with_text = (result for result in results if result.get("content"))
        passages = [_passage(result, rank, max_chars) for rank, result in enumerate(with_text, 1)]
        silent = answer.get("unresponsive_engines") or []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SearchFault(
            f"SearxNG's answer is malformed ({type(error).__name__}: {error}): {body[:200]!r}; needed "
            '{"results": [{"url", "title", "content"}, ...]}',
            is_passing=False,
        ) from error
    if not results and silent:  # an engine that is banned or down has found nothing, but that is no finding
        names = ", ".join(" ".join(map(str, one)) if isinstance(one, list) else str(one) for one in silent)
        raise SearchFault(f"SearxNG's engines did not answer: {names}", is_passing=True)
    return tuple(passages[:topk])


def _passage(result: dict[str, Any], rank: int, max_chars: int) -> Passage:
    title = _plain(result.get("title") or "").replace('"', '""')  # as the Wikipedia corpus writes quotes in titles
    contents = f'"{title}"\n{_plain(result["content"])}'
    score = result.get("score")
    return Passage(str(result["url"]), contents[:max_chars], float(score) if score is not None else 1.0 / rank)


def _plain(text: str) -> str:
    """One line without markup."""
    return " ".join(html.unescape(TAG.sub(" ", text)).split())


def _refusal(url: str, status: int, body: str) -> SearchFault:
    if status == 403:
        way_out = "let its settings.yml list json under search: formats:, then start it again"
    else:
        way_out = "check the address, and that it is a SearxNG"
    return SearchFault(
        f"SearxNG at {url} refused with HTTP status {status}: {body[:200]!r}; {way_out}", is_passing=False
    )
