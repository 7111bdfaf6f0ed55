"""Processes that compute: what they raise, what happens when they die, hang, or do not start again."""

import asyncio
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from searche1.retrieval.backend import SearchFault, in_halves
from searche1.retrieval.workers import Pool, Worker, WorkerDied, WorkerFailed
from searche1.types import UserError


class Service:
    """What a worker serves here; it refuses to be built while the file `closed` is there."""

    def __init__(self, closed: Path) -> None:
        if closed.exists():
            raise UserError("closed today")

    def double(self, number: int, *, plus: int = 0) -> int:
        return 2 * number + plus

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_once(self, marker: Path) -> str:
        if not marker.exists():
            marker.touch()
            self.die()
        return "survived"

    def sleep(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def fail(self) -> None:
        raise KeyError("no such thing")

    def refuse(self) -> None:
        raise UserError("not like this")


@pytest.fixture
def make(tmp_path):
    return partial(Service, tmp_path / "closed")


def run_in_pool(make, story, *, size: int = 1, timeout_s: float = 30.0):
    async def run():
        pool = Pool("test", lambda _: make, size=size, timeout_s=timeout_s)
        await pool.start()
        try:
            return await story(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def test_a_worker_computes_and_tells_what_it_raised(make):
    worker = Worker("test", make)
    worker.wait_ready()
    assert worker.call("double", (4,), {"plus": 1}, timeout_s=30) == 9
    with pytest.raises(WorkerFailed, match="KeyError: 'no such thing'"):
        worker.call("fail", (), {}, timeout_s=30)
    with pytest.raises(UserError, match="not like this"):
        worker.call("refuse", (), {}, timeout_s=30)
    with pytest.raises(WorkerDied, match="killed by signal 9"):
        worker.call("die", (), {}, timeout_s=30)
    with pytest.raises(WorkerDied):
        worker.call("double", (4,), {}, timeout_s=30)
    worker.stop()
    worker.stop()


def test_what_cannot_be_built_is_told(make, tmp_path):
    (tmp_path / "closed").touch()
    with pytest.raises(UserError, match="closed today"):
        run_in_pool(make, lambda pool: pool.call("double", 1))


def test_calls_go_to_whoever_is_free(make):
    async def story(pool):
        return set(await asyncio.gather(*(pool.call("sleep", 0.3) for _ in range(2)))) == set(pool.pids())

    assert run_in_pool(make, story, size=2)


def test_a_call_outlives_the_process_that_it_was_given_to(make, tmp_path):
    async def story(pool):
        answers = await asyncio.gather(pool.call("die_once", tmp_path / "marker"), pool.call("double", 3))
        return answers, pool.num_restarts

    assert run_in_pool(make, story) == (["survived", 6], 1)


def test_a_call_that_ends_every_process_is_given_up_and_others_are_answered(make):
    async def story(pool):
        with pytest.raises(SearchFault, match="signal 9") as raised:
            await pool.call("die")
        return raised.value.is_passing, await pool.call("double", 1)

    assert run_in_pool(make, story) == (False, 2)


def test_a_process_that_hangs_is_ended_and_replaced(make):
    async def story(pool):
        with pytest.raises(SearchFault, match=r"did not answer within 0\.5 s"):
            await pool.call("sleep", 60)
        return await pool.call("double", 1)

    assert run_in_pool(make, story, timeout_s=0.5) == 2


def test_while_no_process_can_be_started_calls_fail_at_once_and_later_work_again(make, tmp_path):
    closed = tmp_path / "closed"

    async def story(pool):
        closed.touch()
        os.kill(pool.pids()[0], signal.SIGKILL)
        with pytest.raises(SearchFault, match="closed today") as raised:
            await pool.call("double", 1)
        assert raised.value.is_passing and pool.fault() == "closed today"
        closed.unlink()
        while pool.fault():
            await asyncio.sleep(0.05)
        return await pool.call("double", 1)

    assert run_in_pool(make, story) == 2


def test_a_caller_that_gives_up_takes_no_answer_from_the_next_one(make):
    async def story(pool):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.call("sleep", 0.5), 0.1)
        return await pool.call("double", 21)

    assert run_in_pool(make, story) == 42


def test_the_processes_end_with_the_pool(make):
    async def story(pool):
        return pool.pids()

    for pid in run_in_pool(make, story, size=2):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_bad_query_of_a_batch_fails_alone():
    calls = []

    async def search(asked):
        calls.append(len(asked))
        if "bad" in asked:
            raise SearchFault("poison", is_passing=False)
        return [(query,) for query in asked]

    answers = asyncio.run(in_halves(search, ["a", "b", "bad", "c", "d"]))
    assert [answer for answer in answers if not isinstance(answer, SearchFault)] == [("a",), ("b",), ("c",), ("d",)]
    assert str(answers[2]) == "poison"
    assert len(calls) < 10


def test_a_fault_that_passes_is_not_searched_again_in_halves():
    async def search(asked):
        raise SearchFault("busy", is_passing=True)

    answers = asyncio.run(in_halves(search, ["a", "b"]))
    assert [str(answer) for answer in answers] == ["busy", "busy"]
