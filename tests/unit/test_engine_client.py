"""How we speak HTTP with engines."""

import asyncio
import inspect
import json
import socket

import pytest
import uvicorn

from searche1.config import load_config
from searche1.rollout import engine as engine_module
from searche1.rollout.engine import KEEP_ALIVE_S, Engine, EngineError, EngineLost, http_session
from searche1.rollout.servers import engine_key
from searche1.types import UserError

META = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-0.5, 7, None]], "weight_version": "1"}
ANSWER = json.dumps({"text": "x", "meta_info": META}).encode()
SETTINGS = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "stop": (), "seed": 0}


@pytest.fixture
def connections() -> list[int]:
    """How many requests came on each connection."""
    return []


async def serve(connections: list[int]) -> tuple[asyncio.Server, str]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(connections)
        connections.append(0)
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:  # the client has closed it
                writer.close()
                return
            length = next(int(h.split(b":")[1]) for h in head.lower().splitlines() if h.startswith(b"content-length"))
            await reader.readexactly(length)
            connections[number] += 1
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER))
            await writer.drain()
            if b"connection: close" in head.lower():
                writer.close()
                return

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_a_connection_that_a_server_may_be_closing_is_not_used_again(connections, monkeypatch):
    monkeypatch.setattr(engine_module, "KEEP_ALIVE_S", 0.2)

    async def run() -> None:
        server, url = await serve(connections)
        async with server, http_session() as session:
            engine = Engine(url=url)
            for rest_s in (0.0, 0.0, 0.5, 0.0):  # turns of one trajectory, whose third waits for a search
                await asyncio.sleep(rest_s)
                completion = await engine.generate(session, [1, 2], **SETTINGS)
                assert completion.token_ids == (7,)

    asyncio.run(run())
    assert connections == [2, 2]


def test_we_let_connections_go_before_servers_do():
    default = inspect.signature(uvicorn.Config.__init__).parameters["timeout_keep_alive"].default  # SGLang's too
    assert default / 2 > KEEP_ALIVE_S


def test_what_is_no_completion_has_a_connection_of_its_own(connections):
    async def run() -> None:
        server, url = await serve(connections)
        async with server:
            engine = Engine(url=url)
            for _ in range(2):
                await asyncio.to_thread(engine._post, "/flush_cache", {})

    asyncio.run(run())
    assert connections == [1, 1]


def test_an_engine_computes_logprobs_while_we_do_something_else():
    """The answer waits for what the client does after it has asked."""
    has_gone_on = asyncio.Event()
    entries = [[None, 5, None], [-0.25, 6, None], [-0.5, 7, None]]
    body = json.dumps([{"meta_info": {"input_token_logprobs": entries}}]).encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /behind/a/gateway/generate HTTP/1.1\r\n") and b"Authorization: Bearer k" in head
        await has_gone_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    async def run() -> list[list[float]]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            engine = Engine(url=f"http://127.0.0.1:{port}/behind/a/gateway/", key="k", request_timeout_s=20.0)
            wait = await asyncio.to_thread(engine.begin_logprobs, [[5, 6, 7]])
            has_gone_on.set()
            return await asyncio.to_thread(wait)

    assert asyncio.run(run()) == [[-0.25, -0.5]]


def test_a_proxy_never_sees_what_an_engine_is_asked(connections, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens

    async def run() -> None:
        server, url = await serve(connections)
        async with server:
            await asyncio.to_thread(Engine(url=url)._post, "/flush_cache", {})

    asyncio.run(run())
    assert connections == [1]


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://[::1]", ("::1", 80)),
        ("http://[::1]:30000", ("::1", 30000)),
        ("https://[2001:db8::a]/engine", ("2001:db8::a", 443)),
        ("http://host.example", ("host.example", 80)),
    ],
)
def test_an_engine_is_looked_for_where_its_address_says(monkeypatch, url, place):
    looked = []

    def connect(address: tuple[str, int], *_: object, **__: object) -> None:
        looked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(EngineLost):
        Engine(url=url)._post("/flush_cache", {})
    assert looked == [place]


def test_paths_of_gateways_are_quoted_once():
    heads = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n")).split()[1])
        writer.write(b"HTTP/1.1 308 Moved\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mod\u00e8le%20a b"
            with pytest.raises(EngineError, match=r"not ready within 0.2 s \(/health answered HTTP status 308\)"):
                await asyncio.to_thread(Engine(url=url).wait_until_ready, timeout_s=0.2)

    asyncio.run(run())
    assert set(heads) == {b"/mod%C3%A8le%20a%20b/health"}


@pytest.mark.parametrize(
    "said", [b"", b"not HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\nhalf", None]
)
def test_an_engine_without_a_whole_answer_is_lost(said):
    """None: it says nothing in time, which is read only where the answer is wanted."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if said is None:
            await reader.read()  # until the client has had enough
        else:
            writer.write(said)
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            wait = await asyncio.to_thread(Engine(url=url, request_timeout_s=0.3).begin_logprobs, [[1, 2]])
            with pytest.raises(EngineLost, match=f"{url}/generate failed"):
                await asyncio.to_thread(wait)

    asyncio.run(run())


def test_an_engine_that_is_not_there_is_lost_when_it_is_asked():
    with socket.create_server(("127.0.0.1", 0)) as held:
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
    with pytest.raises(EngineLost, match=f"{url}/generate failed: ConnectionRefusedError"):
        Engine(url=url).begin_logprobs([[1, 2]])


@pytest.mark.parametrize(("status", "is_well"), [(200, True), (400, True), (500, False), (None, False)])
def test_an_engine_is_asked_how_it_is_without_a_forward_pass(monkeypatch, status, is_well):
    """While weights or cache sleep, one would be its end. None is a server that hangs."""
    monkeypatch.setattr(engine_module, "HEALTH_TIMEOUT_S", 0.3)
    asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split()[:2])
        if status is not None:
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
            await writer.drain()
        else:
            await reader.read()  # until the client has had enough
        writer.close()

    async def run() -> bool:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            engine = Engine(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            return await asyncio.to_thread(engine.answers)

    assert asyncio.run(run()) is is_well
    assert asked == [[b"POST", b"/flush_cache"]]


@pytest.mark.parametrize(("text", "key"), [("k\n", "k"), ("a\nb", None), ("schl\u00fcssel", None)])
def test_a_file_of_a_key_holds_one_line_that_a_header_can_carry(tmp_path, text, key):
    (tmp_path / "key").write_text(text, encoding="utf-8")
    config = load_config(overrides=[f"engine.token_file={tmp_path / 'key'}"])
    if key:
        assert engine_key(config) == key
    else:
        with pytest.raises(UserError, match=r"engine\.token_file=.* holds more than a key") as refused:
            engine_key(config)
        assert text not in str(refused.value)
