"""The HTTP interface over a backend that the test controls: batches, limits, faults, and the clients of others."""

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from searche1.ports import hold_port
from searche1.retrieval.app import Limits, create_app
from searche1.retrieval.backend import SearchFault
from searche1.retrieval.client import Passage, RetrieverClient
from searche1.retrieval.monitor import Monitor


@dataclass
class Shelf:
    """A backend that answers when it is allowed to, and remembers what it was asked."""

    description: str = "a shelf"
    batches: list[tuple[list[str], int]] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)
    first_is_running: threading.Event = field(default_factory=threading.Event)
    broken: str = ""

    async def search(self, queries, *, topk):
        self.batches.append((sorted(queries), topk))
        self.first_is_running.set()
        await asyncio.to_thread(self.go_on.wait, 30)
        if "bug" in queries:
            raise ZeroDivisionError
        return [self._answer(query, topk) for query in queries]

    def _answer(self, query: str, topk: int):
        if query in ("busy", "poison"):
            return SearchFault(f"{query}!", is_passing=query == "busy")
        if query == "nothing":
            return ()
        return tuple(Passage(f"{query}{rank}", f'"{query}"\ntext', 1.0 - rank / 8) for rank in range(topk))

    def fault(self) -> str:
        return self.broken

    async def close(self) -> None:
        pass


@contextmanager
def serving(shelf: Shelf, *, is_open: bool = True, **limits: Any) -> Iterator[str]:
    """The address of a server over the shelf, whose searches wait for `go_on` unless it `is_open`."""
    if is_open:
        shelf.go_on.set()
    bound = hold_port("127.0.0.1", 0, setting="port")
    bound.listen(100)
    app = create_app(shelf, Limits(**limits), monitor=Monitor(), pools=[], token="")
    http = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        shelf.go_on.set()
        http.should_exit = True
        thread.join()


def post(address: str, body: dict[str, Any] | bytes) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + "/retrieve", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.headers["Content-Type"] == "application/json"
        return json.load(response)


def refusal(address: str, body: dict[str, Any] | bytes) -> tuple[int, str, str | None]:
    """Status, words and Retry-After of a request that is refused."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(address, body)
    error = raised.value
    text = error.read().decode()
    detail = json.loads(text)["detail"] if text.startswith("{") else text
    return error.code, str(detail), error.headers["Retry-After"]


def document(query: str, rank: int = 0) -> dict[str, str]:
    return {"id": f"{query}{rank}", "contents": f'"{query}"\ntext'}


# What the clients of other trainers send, and what their code reads from the answer.
SEARCH_R1 = {"queries": ["a", "b"], "topk": 3, "return_scores": True}
VERL = {"queries": ["a"], "topk": 2, "return_scores": True}
SLIME = {"queries": ["a"], "topk": 1, "return_scores": False}


def test_search_r1_reads_contents_of_documents_in_rank_order():
    with serving(Shelf()) as address:
        answer = post(address, SEARCH_R1)
        assert list(answer) == ["result"]
        for query, hits in zip("ab", answer["result"], strict=True):
            assert hits == [{"document": document(query, i), "score": 1.0 - i / 8} for i in range(3)]
            assert all(list(hit) == ["document", "score"] for hit in hits)
            assert [hit["document"]["contents"].split("\n")[0] for hit in hits] == [f'"{query}"'] * 3
        assert post(address, {**SEARCH_R1, "queries": []}) == {"result": []}  # it asks so when no trajectory searches


def test_verl_and_slime_get_their_forms():
    with serving(Shelf()) as address:
        (hits,) = post(address, VERL)["result"]
        assert [(hit["document"]["id"], hit["score"]) for hit in hits] == [("a0", 1.0), ("a1", 0.875)]
        assert post(address, SLIME) == {"result": [[document("a")]]}


@pytest.mark.parametrize("num_queries", [1, 2, 3, 50])
@pytest.mark.parametrize("form", [{}, {"return_scores": False}, {"return_scores": True}])
def test_every_form_is_aligned_with_its_queries(num_queries, form):
    queries = [f"q{i % 7}" for i in range(num_queries)]
    with serving(Shelf()) as address:
        result = post(address, {"queries": queries, "topk": 1, **form})["result"]
    bare = [hit["document"] if form.get("return_scores") else hit for (hit,) in result]
    assert bare == [document(query) for query in queries]


def test_nothing_found_is_an_answer():
    with serving(Shelf()) as address:
        assert post(address, {"queries": ["nothing", "a"], "topk": 1}) == {"result": [[], [document("a")]]}


def test_health_answers_during_a_search_and_waiting_requests_share_the_next_batch():
    shelf = Shelf()
    with serving(shelf, is_open=False, max_running=1) as address:

        async def story():
            options = {"timeout_s": 30, "retries": 5}
            async with (
                RetrieverClient(url=address, topk=1, **options) as one,
                RetrieverClient(url=address, topk=2, **options) as two,
            ):
                first = asyncio.create_task(one.search("a"))
                await asyncio.to_thread(shelf.first_is_running.wait, 30)
                asked = ((one, "b"), (two, "b"), (two, "c"))
                rest = [asyncio.create_task(client.search(query)) for client, query in asked]
                await asyncio.sleep(0.2)
                await asyncio.to_thread(lambda: urllib.request.urlopen(address + "/health", timeout=5).close())
                shelf.go_on.set()
                return [[p.id for p in answer] for answer in [await first, *await asyncio.gather(*rest)]]

        assert asyncio.run(story()) == [["a0"], ["b0"], ["b0", "b1"], ["c0", "c1"]]
        # One batch, whose parts a backend sees as they were asked: a reranker's candidates are `topk` at least.
        assert shelf.batches == [(["a"], 1), (["b"], 1), (["b", "c"], 2)]
        post(address, {"queries": ["c"], "topk": 2})
        assert len(shelf.batches) == 3  # remembered


def test_a_full_queue_turns_away_and_says_when_to_come_again():
    shelf = Shelf()
    with serving(shelf, is_open=False, max_pending=10) as address:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(post(address, {"queries": ["a", "b"], "topk": 1})))
        thread.start()
        assert shelf.first_is_running.wait(30)
        status, detail, retry_after = refusal(address, {"queries": [f"q{i}" for i in range(9)]})
        assert (status, detail, retry_after) == (503, "the retriever is overloaded: 2 queries wait already", "1")
        shelf.go_on.set()
        thread.join()
        assert answers == [{"result": [[document("a")], [document("b")]]}]
        many = [f"q{i}" for i in range(50)]
        assert len(post(address, {"queries": many})["result"]) == 50  # a large request alone is no overload


def test_a_slow_search_is_told_in_time_and_its_answer_is_not_lost():
    shelf = Shelf()
    with serving(shelf, is_open=False, timeout_s=0.2) as address:
        status, detail, retry_after = refusal(address, {"queries": ["a"], "topk": 1})
        assert (status, retry_after) == (503, "1") and "no answer within 0.2 s" in detail
        shelf.go_on.set()
        while True:
            try:
                assert post(address, {"queries": ["a"], "topk": 1}) == {"result": [[document("a")]]}
                break
            except urllib.error.HTTPError:
                continue
        assert len(shelf.batches) == 1


@pytest.mark.parametrize(
    ("query", "status", "words", "retry_after"),
    [("busy", 503, "busy!", "1"), ("poison", 500, "poison!", None), ("bug", 500, "Internal Server Error", None)],
)
def test_a_fault_is_never_an_empty_answer_and_is_not_remembered(query, status, words, retry_after):
    shelf = Shelf()
    with serving(shelf) as address:
        for _ in range(2):
            assert refusal(address, {"queries": ["a", query]}) == (status, words, retry_after)
        assert sum(query in queries for queries, _ in shelf.batches) == 2
        assert post(address, {"queries": ["a"], "topk": 1}) == {"result": [[document("a")]]}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "queries"),
        ({"queries": "river"}, 422, "queries"),
        ({"queries": [1]}, 422, "queries"),
        ({"queries": ["river"], "topk": -1}, 422, "topk"),
        ({"queries": ["river"], "topk": 1001}, 422, "topk"),
        (b"not json", 422, "JSON"),
        (b'{"queries": ["\\ud800"]}', 422, "JSON"),
        (b"[" * 100_000, 422, "recursion"),
        ({"queries": ["x"] * 16_385}, 413, "16385 queries"),
        ({"queries": ["x" * 32_769]}, 413, "32769 characters"),
        (b" " * ((64 << 20) + 1), 413, "send fewer queries"),
    ],
)
def test_a_request_beyond_the_limits_is_refused_with_the_reason(body, status, words):
    shelf = Shelf()
    with serving(shelf) as address:
        got = refusal(address, body)
    assert got[0] == status and words in got[1]
    assert shelf.batches == []


def test_health_tells_a_fault_as_unavailable():
    shelf = Shelf()
    with serving(shelf) as address:
        shelf.broken = "no index"
        with pytest.raises(urllib.error.HTTPError, match="503") as raised:
            urllib.request.urlopen(address + "/health", timeout=30)
        assert json.load(raised.value)["status"] == "no index"


def test_metrics_count_requests_queries_and_batches():
    with serving(Shelf(), topk=2) as address:
        post(address, {"queries": ["a", "b"]})
        post(address, {"queries": ["a"]})
        refusal(address, {"queries": ["poison"]})
        with urllib.request.urlopen(address + "/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
    for line in (
        'searche1_retriever_requests_total{status="200"} 2.0',
        'searche1_retriever_requests_total{status="500"} 1.0',
        "searche1_retriever_queries_total 4.0",
        "searche1_retriever_remembered_queries_total 1.0",
        "searche1_retriever_failed_queries_total 1.0",
        "searche1_retriever_batch_size_sum 3.0",
        "searche1_retriever_pending_queries 0.0",
        "searche1_retriever_request_seconds_count 3.0",
    ):
        assert line in lines
