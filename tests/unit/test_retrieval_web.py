"""Web search against a local server that speaks SearxNG's JSON API, with its faults."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from searche1.retrieval.backend import SearchFault
from searche1.retrieval.retry import pause_s, retry_after_s
from searche1.retrieval.web import WebSettings, open_web, parse_results
from searche1.types import UserError

Handler = Callable[[web.Request], Awaitable[web.Response]]


def results(*rows: dict[str, Any], silent: tuple[Any, ...] = ()) -> web.Response:
    return web.json_response({"query": "q", "results": list(rows), "unresponsive_engines": list(silent)})


def row(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "url": f"https://example.org/{number}",
        "title": f"Title {number}",
        "content": f"text {number}",
        "engine": "wikipedia",
        "score": 4.0 / number,
        **fields,
    }


@asynccontextmanager
async def searxng(answer: Handler, **settings: Any):
    """A `WebSearch` over a server whose first request, the test on opening, succeeds."""
    seen: list[web.Request] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request)
        return results(row(1)) if len(seen) == 1 else await answer(request)

    app = web.Application()
    app.router.add_get("/search", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        search = await open_web(WebSettings(f"http://127.0.0.1:{port}", **settings))
        try:
            yield search, seen
        finally:
            await search.close()
    finally:
        await runner.cleanup()


def test_results_become_passages_in_order_with_plain_text():
    async def answer(request: web.Request) -> web.Response:
        assert request.query["q"] == "who wrote Faust?" and request.query["format"] == "json"
        assert request.query["language"] == "en" and "engines" not in request.query
        return results(
            row(1, title='Faust, "a tragedy"', content="by <b>Goethe</b> &amp;\n others"),
            row(2, content=""),
            row(3, content=None),
            row(4, score=None),
            row(5),
        )

    async def story():
        async with searxng(answer, language="en") as (search, _):
            return await search.search(["who wrote Faust?"], topk=2)

    ((first, second),) = asyncio.run(story())
    assert (first.id, first.score) == ("https://example.org/1", 4.0)
    assert first.contents == '"Faust, ""a tragedy"""\nby Goethe & others'
    assert (second.id, second.score) == ("https://example.org/4", 0.5)


def test_long_passages_are_cut_and_nothing_found_is_an_answer():
    assert parse_results('{"results": []}', topk=3, max_chars=10) == ()
    (passage,) = parse_results(json.dumps({"results": [row(1, content="x" * 99)]}), topk=3, max_chars=20)
    assert len(passage.contents) == 20


def test_one_query_fails_alone_and_no_more_run_than_allowed():
    running = most = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        if request.query["q"] == "bad":
            return web.Response(status=400, text="no such query")
        return results(row(1, title=request.query["q"]))

    async def story():
        async with searxng(answer, max_concurrent=3) as (search, _):
            return await search.search([*(f"q{i}" for i in range(9)), "bad"], topk=1)

    answers = asyncio.run(story())
    assert most == 3
    assert [answer[0].contents.split("\n")[0] for answer in answers[:9]] == [f'"q{i}"' for i in range(9)]
    assert isinstance(answers[9], SearchFault) and "HTTP status 400" in str(answers[9])
    assert not answers[9].is_passing


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_asked_again_after_the_time_it_names(status):
    async def answer(request: web.Request) -> web.Response:
        if len(seen) == 2:
            return web.Response(status=status, headers={"Retry-After": "0.1"})
        return results(row(1))

    seen: list[web.Request] = []

    async def story():
        nonlocal seen
        async with searxng(answer) as (search, seen):
            started = asyncio.get_running_loop().time()
            (found,) = await search.search(["q"], topk=1)
            return found, asyncio.get_running_loop().time() - started

    found, took_s = asyncio.run(story())
    assert found[0].id == "https://example.org/1" and took_s >= 0.1


@pytest.mark.parametrize(
    ("fault", "reason", "is_passing"),
    [
        (lambda: web.Response(status=429), "failed 1 times, at last with: HTTP status 429; its limiter", True),
        (lambda: web.Response(status=403, text="<h1>Forbidden</h1>"), "settings.yml list json", False),
        (lambda: web.Response(text="<html>"), "malformed", False),
        (lambda: web.json_response([1]), "malformed", False),
        (lambda: web.json_response({"results": [{"content": "x"}]}), "malformed .KeyError: 'url'", False),
        (lambda: web.json_response({"results": [1]}), "malformed .AttributeError", False),
        (lambda: results(silent=(["duckduckgo", "CAPTCHA"], "bing")), "duckduckgo CAPTCHA, bing", True),
    ],
)
def test_a_fault_is_told_with_its_way_out_and_is_never_an_empty_answer(fault, reason, is_passing):
    async def answer(_: web.Request) -> web.Response:
        return fault()

    async def story():
        async with searxng(answer, tries=1) as (search, _):
            return await search.search(["q"], topk=1)

    (found,) = asyncio.run(story())
    assert isinstance(found, SearchFault)
    assert re.search(reason, str(found))
    assert found.is_passing == is_passing


def test_a_slow_server_is_a_passing_fault():
    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(0.6)
        return results()

    async def story():
        async with searxng(answer, tries=1, timeout_s=0.2) as (search, _):
            return await search.search(["q"], topk=1)

    (found,) = asyncio.run(story())
    assert "no answer within 0.2 s" in str(found) and found.is_passing


def test_an_address_where_nobody_answers_is_told_at_once():
    for url, reason in (("127.0.0.1:9", "the address of SearxNG"), ("http://127.0.0.1:9", "failed 1 times")):
        with pytest.raises(UserError, match=reason):
            asyncio.run(open_web(WebSettings(url, tries=1)))


def test_pauses_grow_with_jitter_and_follow_the_server():
    assert 0.25 <= pause_s(1) <= 0.5 and 1.0 <= pause_s(3) <= 2.0 and pause_s(500) <= 8.0
    assert pause_s(1, retry_after="7") == 7.0
    assert retry_after_s(None) == retry_after_s("soon") == retry_after_s("-3") == retry_after_s("nan") == 0.0
    assert retry_after_s("1e9") == 60.0
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after_s("Wed, 21 Oct 2099 07:28:00 GMT") == 60.0
