"""The retriever as a process, over real HTTP."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from searche1.retrieval.client import Passage, RetrieverClient
from searche1.retrieval.server import RetrieverServer, bind, create_app, launch_retriever
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
    from searche1.retrieval.encoder import load_encoder
    from searche1.retrieval.index import build_index

    folder = tmp_path_factory.mktemp("retriever")
    corpus = write_corpus(folder / "corpus.jsonl", PASSAGES)
    build_index(corpus=corpus, out=folder / "index", encoder=load_encoder("minilm", "cpu"))
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


def test_health_tells_the_size_of_the_corpus(server):
    with urllib.request.urlopen(server.url.replace("/retrieve", "/health"), timeout=30) as response:
        assert json.load(response) == {"status": "ok", "num_passages": 4, "topk": 3}


def test_the_client_gets_aligned_passages_from_the_server(server):
    async def story():
        async with RetrieverClient(url=server.url, topk=3, timeout_s=30, retries=3) as client:
            return await asyncio.gather(*(client.search(query) for query in QUESTIONS))

    assert [answer[0].id for answer in asyncio.run(story())] == list(QUESTIONS.values())


def test_health_answers_during_a_search_and_waiting_requests_share_the_next_batch():
    batches, first_is_running, go_on = [], threading.Event(), threading.Event()

    def search(queries, topk):
        batches.append((sorted(queries), topk))
        first_is_running.set()
        assert go_on.wait(30)
        return [tuple(Passage(f"{query}{rank}", "text", 0.0) for rank in range(topk)) for query in queries]

    bound = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    http = uvicorn.Server(uvicorn.Config(create_app(search, topk=3, num_passages=1), log_level="warning"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [bound]})
    thread.start()

    async def story():
        options = {"timeout_s": 30, "retries": 5}
        async with (
            RetrieverClient(url=address, topk=1, **options) as one,
            RetrieverClient(url=address, topk=2, **options) as two,
        ):
            first = asyncio.create_task(one.search("a"))
            await asyncio.to_thread(first_is_running.wait, 30)
            rest = [asyncio.create_task(client.search(query)) for client, query in ((one, "b"), (two, "b"), (two, "c"))]
            await asyncio.sleep(0.2)
            await asyncio.to_thread(lambda: urllib.request.urlopen(address + "/health", timeout=5).close())
            go_on.set()
            return [[p.id for p in answer] for answer in [await first, *await asyncio.gather(*rest)]]

    try:
        assert asyncio.run(story()) == [["a0"], ["b0"], ["b0", "b1"], ["c0", "c1"]]
        assert batches == [(["a"], 1), (["b", "b", "c"], 2)]
        post(address + "/retrieve", {"queries": ["c"], "topk": 2})
        assert len(batches) == 2  # remembered
    finally:
        go_on.set()
        http.should_exit = True
        thread.join()


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


ALL_CORES = len(os.sched_getaffinity(0))
THREADS = """
import sys
from searche1.retrieval.server import main
main(["--corpus=nowhere.jsonl", "--index=nowhere", *sys.argv[1:]])  # which it says, once its threads are set
import faiss
print(faiss.omp_get_max_threads())
"""


@pytest.mark.parametrize(("options", "launcher_has", "expected"), [(["--threads=1"], 2, 1), ([], 1, ALL_CORES)])
def test_the_server_searches_with_its_own_threads_whatever_its_launcher_has(options, launcher_has, expected):
    command = [sys.executable, "-c", THREADS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(launcher_has)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout == f"{expected}\n", result.stderr


def test_a_launched_server_is_given_its_threads(server):
    assert "--threads=2" in Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")


PARENT = """
import sys, time
from searche1.retrieval.server import launch_retriever
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
