"""The retriever's client against a small HTTP server that does what each test says."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from searche1.retrieval.batching import Batcher, LRUCache
from searche1.retrieval.client import RetrieverClient, RetrieverError
from searche1.retrieval.token import make_token, read_token
from searche1.types import UserError


def hit(query: str, rank: int = 0) -> dict[str, Any]:
    return {"document": {"id": f"{query}-{rank}", "contents": f'"{query}"\ntext {rank}'}, "score": 1.0 - rank}


def echo(body: dict[str, Any]) -> web.Response:
    return web.json_response({"result": [[hit(q, rank) for rank in range(body["topk"])] for q in body["queries"]]})


@asynccontextmanager
async def serving(
    answer: Callable[[dict[str, Any]], web.Response], *, delay_s: float = 0.0
) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose requests are recorded; yields its address and the request bodies."""
    bodies: list[dict[str, Any]] = []

    async def retrieve(request: web.Request) -> web.Response:
        body = await request.json()
        bodies.append(body)
        await asyncio.sleep(delay_s)
        return answer(body)  # another request may have come meanwhile

    app = web.Application()
    app.router.add_post("/retrieve", retrieve)
    async with TestServer(app) as server:
        yield str(server.make_url("/retrieve")), bodies


def make_client(url: str, **changes: Any) -> RetrieverClient:
    return RetrieverClient(**{"url": url, "topk": 2, "timeout_s": 5.0, "retries": 3, "backoff_s": 0.01, **changes})


def test_concurrent_searches_share_one_request_and_each_gets_its_own_passages():
    async def story():
        async with serving(echo) as (url, bodies), make_client(url) as client:
            answers = await asyncio.gather(*(client.search(q) for q in ("b", "a", "b", "c", "")))
        assert bodies == [{"queries": ["b", "a", "c", ""], "topk": 2, "return_scores": True}]
        assert [[p.id for p in answer] for answer in answers] == [
            ["b-0", "b-1"], ["a-0", "a-1"], ["b-0", "b-1"], ["c-0", "c-1"], ["-0", "-1"],
        ]  # fmt: skip
        assert (answers[1][1].contents, answers[1][1].score) == ('"a"\ntext 1', 0.0)

    asyncio.run(story())


def test_an_answer_is_remembered_even_in_a_later_event_loop():
    client = make_client("http://127.0.0.1:1")

    async def first():
        async with serving(echo) as (url, bodies):
            client._url = url
            async with client:
                await client.search("a")
                await client.search("a")
            assert len(bodies) == 1

    async def second():
        async with client:  # the server is gone
            assert [p.id for p in await client.search("a")] == ["a-0", "a-1"]

    asyncio.run(first())
    asyncio.run(second())


def test_a_client_that_was_not_closed_works_in_the_next_event_loop():
    client = make_client("http://127.0.0.1:1")

    async def search(query):
        async with serving(echo) as (url, _):
            client._url = url
            answer = await client.search(query)
            if query == "b":
                await client.close()
            return answer

    assert asyncio.run(search("a"))[0].id == "a-0"
    assert asyncio.run(search("b"))[0].id == "b-0"


def test_a_full_cache_forgets_the_query_unused_for_longest():
    async def story():
        async with serving(echo) as (url, bodies), make_client(url, cache_size=2) as client:
            for query in ("a", "b", "a", "c", "a", "b"):
                await client.search(query)
        assert [body["queries"] for body in bodies] == [["a"], ["b"], ["c"], ["b"]]

    asyncio.run(story())


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_passing_server_error_is_retried(status):
    answers = iter([web.Response(status=status), web.Response(status=status)])

    async def story():
        async with serving(lambda body: next(answers, None) or echo(body)) as (url, bodies):
            async with make_client(url) as client:
                assert len(await client.search("a")) == 2
            assert len(bodies) == 3

    asyncio.run(story())


def test_a_lasting_failure_raises_for_every_waiter_and_is_not_remembered():
    broken = True

    def answer(body):
        return web.Response(status=503, text="warming up") if broken else echo(body)

    async def story():
        nonlocal broken
        async with serving(answer) as (url, bodies), make_client(url) as client:
            outcomes = await asyncio.gather(*(client.search(q) for q in ("a", "b", "a")), return_exceptions=True)
            assert len(bodies) == 3
            assert [type(outcome) for outcome in outcomes] == [RetrieverError] * 3
            assert "failed 3 times" in str(outcomes[0]) and "warming up" in str(outcomes[0])
            broken = False
            assert (await client.search("a"))[0].id == "a-0"

    asyncio.run(story())


def test_a_server_that_is_not_there_raises_after_its_tries():
    async def story():
        async with make_client("http://127.0.0.1:1/retrieve") as client:
            with pytest.raises(RetrieverError, match=r"127\.0\.0\.1:1/retrieve failed 3 times"):
                await client.search("a")

    asyncio.run(story())


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 2x0 OK\r\n\r\n", b""])
def test_what_does_not_speak_http_is_a_fault_that_may_pass(answer):
    async def speak(reader, writer):
        await reader.readline()
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def story():
        async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with make_client(f"http://127.0.0.1:{port}") as client:
                with pytest.raises(RetrieverError, match="failed 3 times, at last with"):
                    await client.search("a")

    asyncio.run(story())


def test_a_time_out_is_retried_and_then_raised():
    async def story():
        async with serving(echo, delay_s=0.5) as (url, bodies):
            async with make_client(url, timeout_s=0.05, retries=2) as client:
                with pytest.raises(RetrieverError, match=r"no answer within 0\.05 s|[Tt]ime"):
                    await client.search("a")
            assert len(bodies) == 2

    asyncio.run(story())


def test_a_refusal_is_not_retried():
    async def story():
        async with serving(lambda _: web.Response(status=422, text="bad topk")) as (url, bodies):
            async with make_client(url) as client:
                with pytest.raises(RetrieverError, match="422: bad topk"):
                    await client.search("a")
            assert len(bodies) == 1

    asyncio.run(story())


MALFORMED = {
    "not JSON": "<html>busy</html>",
    "no result": "{}",
    "a list": "[]",
    "too few answers": {"result": []},
    "too many answers": {"result": [[hit("a")], [hit("b")]]},
    "null for a query": {"result": [None]},
    "no document": {"result": [[{"score": 1.0}]]},
    "no contents": {"result": [[{"document": {"id": "1"}, "score": 1.0}]]},
    "contents is null": {"result": [[{"document": {"id": "1", "contents": None}, "score": 1.0}]]},
    "no score": {"result": [[{"document": {"id": "1", "contents": "x"}}]]},
    "bare documents": {"result": [[{"id": "1", "contents": "x"}]]},
    "more than topk": {"result": [[hit("a", rank) for rank in range(3)]]},
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_answer_is_an_error_and_never_an_empty_observation(body):
    def answer(_):
        return web.Response(text=body) if isinstance(body, str) else web.json_response(body)

    async def story():
        async with serving(answer) as (url, bodies):
            async with make_client(url) as client:
                with pytest.raises(RetrieverError):
                    await client.search("a")
            assert len(bodies) == 1

    asyncio.run(story())


def test_nothing_found_is_an_answer():
    async def story():
        async with serving(lambda _: web.json_response({"result": [[]]})) as (url, _), make_client(url) as client:
            assert await client.search("a") == ()

    asyncio.run(story())


def test_cancelling_one_waiter_leaves_the_others_their_answer():
    async def story():
        async with serving(echo, delay_s=0.1) as (url, bodies), make_client(url) as client:
            tasks = [asyncio.create_task(client.search("a")) for _ in range(2)]
            await asyncio.sleep(0.05)
            tasks[0].cancel()
            assert (await tasks[1])[0].id == "a-0"
            assert len(bodies) == 1

    asyncio.run(story())


def test_a_batch_is_never_larger_than_its_limit_and_loses_nobody():
    sizes = []

    async def double(keys):
        sizes.append(len(keys))
        await asyncio.sleep(0.01)
        return [2 * key for key in keys]

    async def story():
        cache = LRUCache(size=100)
        batcher = Batcher(double, cache=cache, max_batch=4, max_running=2)
        assert await asyncio.gather(*(batcher.get(i) for i in range(11))) == [2 * i for i in range(11)]
        assert len(cache) == 11

    asyncio.run(story())
    assert sizes == [4, 4, 3]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "", "http://:8000", "http://h:80a0", "http://h:99999", "http://[::1"]
)
def test_an_address_that_cannot_work_is_refused_with_one_that_can(url):
    with pytest.raises(UserError, match=r"retriever\.url is .*127\.0\.0\.1:8000/retrieve"):
        make_client(url)


@pytest.mark.parametrize("url", ["http://h:80", "http://h:80/", "http://h:80/retrieve", "http://h:80/retrieve/"])
def test_an_address_may_end_as_people_write_it(url):
    assert make_client(url)._url == "http://h:80/retrieve"


@pytest.mark.parametrize("changes", [{"topk": 0}, {"retries": 0}])
def test_settings_that_cannot_work_are_refused(changes):
    with pytest.raises(UserError, match="must be at least 1"):
        make_client(**{"url": "http://127.0.0.1:8000", **changes})


def test_the_client_imports_no_torch():
    code = "import sys, searche1.retrieval.client; sys.exit('torch' in sys.modules or 'faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_query_that_the_server_cannot_bear_fails_alone():
    def answer(body):
        return web.Response(status=500, text="crash") if "poison" in body["queries"] else echo(body)

    async def story():
        async with serving(answer) as (url, bodies), make_client(url, retries=2) as client:
            queries = ["a", "b", "poison", "c", "d"]
            outcomes = await asyncio.gather(*(client.search(q) for q in queries), return_exceptions=True)
            assert len(bodies) <= 2 + 6
        assert [outcome[0].id for i, outcome in enumerate(outcomes) if i != 2] == ["a-0", "b-0", "c-0", "d-0"]
        assert isinstance(outcomes[2], RetrieverError) and "crash" in str(outcomes[2])

    asyncio.run(story())


def test_the_pause_that_a_busy_server_asks_for_is_kept():
    answers = iter([web.Response(status=429, headers={"Retry-After": "0.3"})])

    async def story():
        loop = asyncio.get_running_loop()
        async with serving(lambda body: next(answers, None) or echo(body)) as (url, _), make_client(url) as client:
            started = loop.time()
            await client.search("a")
            assert loop.time() - started >= 0.3

    asyncio.run(story())


def test_a_server_that_comes_back_is_waited_for_by_one_request_at_a_time(capfd):
    """More faults than tries: a retriever that restarts for minutes must not turn a rollout batch into errors."""
    is_down = True

    def answer(body):
        return web.Response(status=503) if is_down else echo(body)

    async def story():
        nonlocal is_down
        async with serving(answer) as (url, bodies), make_client(url, retries=6, backoff_s=0.02) as client:
            tasks = []
            for i in range(40):  # one request each
                tasks.append(asyncio.create_task(client.search(str(i))))
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.8)
            num_while_down = len(bodies)
            is_down = False
            answers = await asyncio.gather(*tasks)
            assert [answer[0].id for answer in answers] == [f"{i}-0" for i in range(40)]
            assert num_while_down < 60  # 8 requests, unhindered, would be made over a hundred times

    asyncio.run(story())
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("does not answer (HTTP status 503: ); waiting for it") and "answers again" in lines[1]


def test_a_server_that_stays_down_costs_one_deadline_and_later_searches_one_try():
    async def story():
        loop = asyncio.get_running_loop()
        url = "http://127.0.0.1:1/retrieve"
        async with make_client(url, retries=10, deadline_s=0.5, backoff_s=0.01) as client:
            started = loop.time()
            with pytest.raises(RetrieverError, match=r"within 0\.5 s \(retriever\.deadline_s\), at last: .*127"):
                await client.search("a")
            assert 0.4 < loop.time() - started < 2
            await asyncio.sleep(1.0)
            started = loop.time()
            with pytest.raises(RetrieverError):
                await client.search("b")
            assert loop.time() - started < 0.3

    asyncio.run(story())


def test_no_search_takes_longer_than_its_deadline():
    async def story():
        async with serving(echo, delay_s=0.5) as (url, _), make_client(url, deadline_s=0.1) as client:
            with pytest.raises(RetrieverError, match=r"no answer within 0\.1 s"):
                await client.search("a")

    asyncio.run(story())


def test_a_token_is_sent_and_its_absence_explained():
    async def retrieve(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer secret":
            return web.Response(status=401)
        return echo(await request.json())

    async def story():
        app = web.Application()
        app.router.add_post("/retrieve", retrieve)
        async with TestServer(app) as server:
            url = str(server.make_url("/retrieve"))
            async with make_client(url, token="secret") as client:
                assert len(await client.search("a")) == 2
            async with make_client(url) as client:
                with pytest.raises(RetrieverError, match=r"401.*retriever\.token_file"):
                    await client.search("a")

    asyncio.run(story())


def test_a_token_file_is_made_once_and_read_by_both_sides(tmp_path):
    path = tmp_path / "deep" / "token"
    assert make_token(path) and not make_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(read_token(path)) > 30
    for text in ("", "\n", "a\nb"):
        path.write_text(text)
        with pytest.raises(UserError, match="holds no token"):
            read_token(path)
    with pytest.raises(UserError, match="cannot read the retriever's token file"):
        read_token(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the token file"):
        make_token(tmp_path / "file" / "token")


def test_a_key_that_nobody_waits_for_is_not_computed_and_a_failed_one_not_remembered():
    calls = []

    async def compute(keys):
        calls.append(keys)
        await asyncio.sleep(0.02)
        return [ValueError(key) if key == "bad" else key.upper() for key in keys]

    async def story():
        batcher = Batcher(compute, cache=LRUCache(size=10), max_batch=4, max_running=1)
        first = asyncio.create_task(batcher.get("a"))
        await asyncio.sleep(0.01)
        rest = [asyncio.create_task(batcher.get(key)) for key in ("b", "bad", "c", "c")]
        await asyncio.sleep(0)
        assert batcher.num_pending == 4
        rest[0].cancel()
        rest[2].cancel()
        outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
        assert batcher.num_pending == 0
        with pytest.raises(ValueError):
            await batcher.get("bad")
        return outcomes

    outcomes = asyncio.run(story())
    assert outcomes[0] == "A" and outcomes[4] == "C" and isinstance(outcomes[2], ValueError)
    assert calls == [["a"], ["bad", "c"], ["bad"]]


def test_a_batch_waits_for_more_only_a_small_share_of_what_the_last_one_took():
    sizes = []

    async def compute(keys):
        sizes.append(len(keys))
        await asyncio.sleep(0.2)
        return keys

    async def story():
        batcher = Batcher(compute, cache=LRUCache(size=0), max_batch=3, max_running=1, max_wait_s=5.0)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await batcher.get(0)
        assert loop.time() - started < 0.4  # nothing is known yet: no wait

        async def late(key):
            await asyncio.sleep(0.003 * key)
            return await batcher.get(key)

        started = loop.time()
        assert await asyncio.gather(*(late(key) for key in (1, 2))) == [1, 2]
        assert loop.time() - started < 0.4
        await asyncio.gather(*(batcher.get(key) for key in (3, 4, 5)))  # full: no wait

    asyncio.run(story())
    assert sizes == [1, 2, 3]
