"""The retriever as a process, over real HTTP."""

import asyncio
import collections
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from searche1.retrieval.client import RetrieverClient
from searche1.retrieval.launch import RetrieverServer, launch_retriever
from searche1.retrieval.server import main
from searche1.types import UserError

PASSAGES = {
    "curie": '"Marie Curie"\nMarie Curie discovered polonium and radium.',
    "nile": '"Nile"\nThe Nile is a river in Africa.',
    "goethe": '"Goethe"\nGoethe was a German poet who wrote Faust.',
    "saturn": '"Saturn"\nSaturn is a planet with rings.',
}
QUESTIONS = {"Who discovered radium?": "curie", "Which planet has rings?": "saturn", "Who wrote Faust?": "goethe"}


def write_corpus(path: Path, passages: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "contents": text}) + "\n" for i, text in passages.items()))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A corpus and its index folder."""
    from searche1.retrieval.build import Encoding, build_index
    from searche1.retrieval.recipe import choose_recipe

    folder = tmp_path_factory.mktemp("retriever")
    corpus = write_corpus(folder / "corpus.jsonl", PASSAGES)
    build_index(corpus, folder / "index", Encoding(choose_recipe("minilm")))
    return corpus, folder / "index"


def launch(
    corpus: Path, index: Path, log_path: Path, *, port: int = 0, start_timeout_s: float = 120
) -> RetrieverServer:
    return launch_retriever(
        corpus=corpus,
        index=index,
        topk=3,
        port=port,
        log_path=log_path,
        device="cpu",
        threads=2,
        start_timeout_s=start_timeout_s,
    )


@pytest.fixture(scope="module")
def server(built, tmp_path_factory) -> Iterator[RetrieverServer]:
    with launch(*built, tmp_path_factory.mktemp("log") / "logs" / "retriever.log") as running:
        yield running
    assert running.process.poll() is not None


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["result"]


@pytest.mark.parametrize("num_queries", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("return_scores", [True, False])
def test_both_forms_of_the_answer_are_right_for_any_number_of_queries(server, num_queries, return_scores):
    queries = (list(QUESTIONS) * 3)[:num_queries]
    result = post(server.url, {"queries": queries, "topk": 2, "return_scores": return_scores})
    assert len(result) == num_queries
    for query, hits in zip(queries, result, strict=True):
        assert len(hits) == 2
        documents = [hit["document"] for hit in hits] if return_scores else hits
        assert documents[0] == {"id": QUESTIONS[query], "contents": PASSAGES[QUESTIONS[query]]}
        if return_scores:
            assert 1.0 >= hits[0]["score"] >= hits[1]["score"]


@pytest.mark.parametrize(("body", "expected"), [({}, 3), ({"topk": None}, 3), ({"topk": 0}, 3), ({"topk": 99}, 4)])
def test_topk_has_a_default_and_an_end(server, body, expected):
    assert len(post(server.url, {"queries": ["river"], **body})[0]) == expected


@pytest.mark.parametrize("body", [{}, {"queries": "river"}, {"queries": ["river"], "topk": -1}])
def test_a_request_that_breaks_the_schema_is_refused(server, body):
    with pytest.raises(urllib.error.HTTPError, match="422"):
        post(server.url, body)


def test_hostile_requests_are_refused_and_leave_the_server_as_it_was(server):
    """Mutated bodies, paths, methods and bytes that are not HTTP, on real connections."""
    draw = random.Random(0)
    address = urlsplit(server.url)
    good = json.dumps({"queries": ["who?", "Nile"], "topk": 2, "return_scores": True}).encode()
    pieces = [b'"', b"{", b"]", b"\xff", b"\x00", b"null", b"-1", b"1e999", b"\\ud800", b"[" * 2000, b"</answer>"]
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    seen = collections.Counter()
    for _ in range(1500):
        body = bytearray(good)
        for _ in range(draw.randrange(4)):
            at = draw.randrange(len(body))
            body[at : at + draw.randrange(5)] = draw.choice(pieces)
        path = draw.choice(["/retrieve"] * 8 + ["/", "/../../etc/passwd", "/health", "/retrieve/%00"])
        connection.request(draw.choice(["POST"] * 8 + ["GET", "PUT"]), path, bytes(body))
        response = connection.getresponse()
        response.read()
        seen[response.status] += 1
    assert set(seen) == {200, 404, 405, 422}, seen
    assert min(seen[200], seen[422]) > 100
    for _ in range(50):
        with socket.create_connection((address.hostname, address.port), timeout=30) as raw:
            raw.sendall(draw.randbytes(draw.randrange(1, 3000)) + b"\r\n\r\n")
    assert post(server.url, {"queries": ["Who wrote Faust?"], "topk": 1})[0][0]["id"] == "goethe"
    assert "Traceback" not in server.log_path.read_text()


def test_health_tells_what_is_served(server, built):
    with urllib.request.urlopen(server.url.replace("/retrieve", "/health"), timeout=30) as response:
        backend = f"Flat index of 4 passages from {built[0]}"
        assert json.load(response) == {"status": "ok", "backend": backend, "topk": 3}


def test_the_client_gets_aligned_passages_from_the_server(server):
    async def story():
        async with RetrieverClient(url=server.url, topk=3, timeout_s=30, retries=3) as client:
            return await asyncio.gather(*(client.search(query) for query in QUESTIONS))

    assert [answer[0].id for answer in asyncio.run(story())] == list(QUESTIONS.values())


def test_a_taken_port_is_told_before_anything_is_loaded(built, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}.*choose another port"):
            launch(*built, tmp_path / "log", port=port)


def test_a_missing_corpus_is_told_with_the_childs_own_words(built, tmp_path):
    with pytest.raises(UserError, match=r"exit code 2(.|\n)*corpus not found: .*nowhere\.jsonl"):
        launch(tmp_path / "nowhere.jsonl", built[1], tmp_path / "log")


def test_an_index_of_another_corpus_is_told_with_the_childs_own_words(built, tmp_path):
    other = write_corpus(tmp_path / "other.jsonl", {"x": "something else"})
    with pytest.raises(UserError, match=r"does not match the corpus .*other\.jsonl"):
        launch(other, built[1], tmp_path / "log")


def test_a_server_that_takes_too_long_is_ended(built, tmp_path):
    with pytest.raises(UserError, match=r"did not answer within 0\.2 s"):
        launch(*built, tmp_path / "log", start_timeout_s=0.2)


@pytest.mark.parametrize(("options", "expected"), [(["--threads=1"], "1"), ([], str(len(os.sched_getaffinity(0))))])
def test_its_processes_compute_with_their_own_threads_whatever_the_launcher_has(built, options, expected):
    with serving(built, *options, env={**os.environ, "OMP_NUM_THREADS": "7"}) as (process, _):
        for pid in children(process.pid):
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            assert f"OMP_NUM_THREADS={expected}" in environment and "OMP_WAIT_POLICY=passive" in environment


def test_a_launched_server_that_is_killed_is_there_again_at_the_same_address(built, tmp_path, capfd):
    with launch(*built, tmp_path / "log") as running:
        assert ask(running.url, "Who wrote Faust?") == "goethe"
        first = running.process
        first.kill()

        async def story():
            async with RetrieverClient(url=running.url, topk=1, timeout_s=30, retries=5) as client:
                return await client.search("Which planet has rings?")

        assert asyncio.run(story())[0].id == "saturn"
        assert running.process.pid != first.pid
    assert running.process.poll() is not None
    assert "exit code -9" in capfd.readouterr().err


def test_a_launched_server_is_given_its_threads(server):
    assert "--threads=2" in Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")


@contextmanager
def serving(
    built: tuple[Path, Path] | None, *options: str, **popen: Any
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`searche1 retriever` as a user starts it, and its address; killed at the end."""
    command = [sys.executable, "-m", "searche1", "retriever", "--port=0"]
    if built is not None:
        command += [f"--corpus={built[0]}", f"--index={built[1]}", "--device=cpu"]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **popen,
    )
    assert process.stdout is not None
    try:
        output = ""
        while "serving" not in output:
            line = process.stdout.readline()
            assert line, output
            output += line
        yield process, output.split("serving ")[1].strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def children(pid: int) -> list[int]:
    """The processes that compute for it (not the one that only watches over shared memory)."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def ask(url: str, query: str, *, topk: int = 1) -> str:
    return str(post(url, {"queries": [query], "topk": topk})[0][0]["id"])


@pytest.mark.parametrize("wanted", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_asked_to_stop_ends_its_processes_and_says_so(built, wanted):
    with serving(built) as (process, url):
        assert ask(url, "Who wrote Faust?") == "goethe"
        pids = children(process.pid)
        assert len(pids) == 2
        os.killpg(process.pid, wanted) if wanted == signal.SIGINT else process.send_signal(wanted)
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == "retriever: stopped\n"
    assert not any(map(is_running, pids))


def test_no_answer_is_lost_or_wrong_while_processes_are_killed_under_load(built):
    """What a client sees of a killed encoder or index process is time."""
    rounds = 40
    with serving(built, "--threads=1", "--cache-size=0") as (process, url):
        pids = children(process.pid)

        async def story() -> list[tuple[str, str]]:
            answers = []

            async def ask_all(client: RetrieverClient, number: int) -> None:
                for i in range(rounds):
                    query = list(QUESTIONS)[(number + i) % len(QUESTIONS)]
                    answers.append((query, (await client.search(f"{query}{' ' * number}"))[0].id))

            async def kill() -> None:
                for pid in pids:
                    await asyncio.sleep(0.3)
                    os.kill(pid, signal.SIGKILL)

            options = {"url": url, "topk": 1, "timeout_s": 60, "retries": 1, "cache_size": 0}
            async with RetrieverClient(**options) as client:
                await asyncio.gather(*(ask_all(client, number) for number in range(8)), kill())
            return answers

        answers = asyncio.run(story())
        restarted = metrics(url)
    assert len(answers) == 8 * rounds
    assert all(QUESTIONS[query] == found for query, found in answers)
    assert sum(value for name, value in restarted.items() if "worker_restarts" in name) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--index=i"], "--corpus is missing"),
        (["--corpus=c"], "--index is missing"),
        (["--searxng=http://127.0.0.1:9", "--shards=2"], "leave out --shards"),
        (["--searxng=127.0.0.1"], "the address of SearxNG"),
        (["--corpus=c", "--index=i", "--topk=0"], "between 1 and 1000"),
        (["--corpus=c", "--index=i", "--max-batch=0"], "--max-batch is 0"),
        (["--corpus=c", "--index=i", "--open", "--token-file=t"], "give one of them"),
        (["--corpus=c", "--index=nowhere"], "index not found: nowhere"),
        (
            ["--corpus=c", f"--index={__file__}", "--encoder=minilm", "--index-device=cuda", "--shards=2"],
            "one shard and",
        ),
    ],
)
def test_options_that_cannot_work_are_told_in_one_line(options, reason, capsys, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # which it sets, and other tests must not inherit
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    assert main([*options, "--port=0"]) == 2
    assert reason in capsys.readouterr().err


class SearxNG(BaseHTTPRequestHandler):
    """Finds one page for everything."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)["q"][0]
        page = {"url": "https://example.org", "title": query, "content": "a page", "score": 2.0}
        body = json.dumps({"results": [page], "unresponsive_engines": []}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_the_web_is_served_like_a_corpus():
    with ThreadingHTTPServer(("127.0.0.1", 0), SearxNG) as searxng:
        threading.Thread(target=searxng.serve_forever, daemon=True).start()
        with serving(None, f"--searxng=http://127.0.0.1:{searxng.server_port}") as (process, url):
            answer = post(url, {"queries": ["who?", "where?"], "topk": 3, "return_scores": True})
            assert children(process.pid) == []
        searxng.shutdown()
    contents = ['"who?"\na page', '"where?"\na page']
    assert answer == [[{"document": {"id": "https://example.org", "contents": c}, "score": 2.0}] for c in contents]


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url.replace("/retrieve", "/metrics"), timeout=30) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}


def test_a_corpus_that_changes_under_the_server_gives_errors_and_no_other_passages(built, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(built[0].read_bytes())
    with serving((corpus, built[1])) as (_, url):
        assert ask(url, "Who wrote Faust?") == "goethe"
        os.truncate(corpus, 100)
        with pytest.raises(urllib.error.HTTPError, match="500") as raised:
            ask(url, "Which planet has rings?")
        assert "was changed while it is in use" in json.load(raised.value)["detail"]


def test_other_machines_need_a_token_or_an_explicit_word(built, tmp_path):
    refused = subprocess.run(
        [sys.executable, "-m", "searche1", "retriever", "--corpus=c", "--index=i", "--host=0.0.0.0"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "--token-file" in refused.stderr
    token_file = tmp_path / "token"
    with serving(built, "--host=0.0.0.0", f"--token-file={token_file}") as (_, url):
        assert token_file.stat().st_mode & 0o777 == 0o600
        token = token_file.read_text().strip()
        assert len(token) > 30
        body = json.dumps({"queries": ["Who wrote Faust?"], "topk": 1}).encode()
        for header, status in ((None, 401), ("Bearer x", 401), (f"Bearer {token}", 200)):
            headers = {"Authorization": header} if header else {}
            request = urllib.request.Request(url, body, headers)
            if status == 401:
                with pytest.raises(urllib.error.HTTPError, match="401"):
                    urllib.request.urlopen(request, timeout=30)
            else:
                with urllib.request.urlopen(request, timeout=30) as response:
                    assert json.load(response)["result"][0][0]["id"] == "goethe"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            metrics(url)
        with urllib.request.urlopen(url.replace("/retrieve", "/health"), timeout=30) as response:
            assert json.load(response)["status"] == "ok"


PARENT = """
import sys, time
from searche1.retrieval.launch import launch_retriever
corpus, index, log, how = sys.argv[1:]
server = launch_retriever(
    corpus=corpus, index=index, topk=3, port=0, log_path=log, device="cpu", start_timeout_s=120
)
print(server.process.pid, flush=True)
if how == "exit":
    sys.exit(0)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # a zombie waits only to be collected


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_the_server_ends_with_its_parent(built, tmp_path, how):
    arguments = [*map(str, built), str(tmp_path / "log"), how]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if how == "kill":
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=30)
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
    parent.stdout.close()
