"""Batching and caching of single requests: what the retriever's client and its server have in common."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

MAX_WAIT_SHARE = 0.05  # of what the last batch took


class LRUCache(Generic[Key, Value]):
    """The `size` most recently used values. A size of 0 keeps nothing."""

    def __init__(self, *, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: Key) -> Value:
        self._values.move_to_end(key)
        return self._values[key]

    def __setitem__(self, key: Key, value: Value) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)


class Batcher(Generic[Key, Value]):
    """Answers single keys from batched calls of `compute`, inside one event loop.

    What is asked for in one turn of the event loop, or while `max_running` batches are under way, shares a call of at
    most `max_batch` keys; a key asked for twice is computed once. A batch that is not full waits for more, at most
    `max_wait_s` and never longer than a small share of what the last batch took, so that waiting costs next to nothing.
    An exception among the values fails those who wait for that key, one that `compute` raises fails everyone of the
    batch; neither is remembered, so asking again computes again.
    """

    def __init__(
        self,
        compute: Callable[[list[Key]], Awaitable[Sequence[Value | Exception]]],
        *,
        cache: LRUCache[Key, Value],
        max_batch: int,
        max_running: int,
        max_wait_s: float = 0.0,
    ) -> None:
        self._compute = compute
        self._cache = cache
        self._max_wait_s = max_wait_s
        self._max_batch = max_batch
        self._slots = asyncio.Semaphore(max_running)
        self._waiting: dict[Key, None] = {}  # asked for, in no batch yet; in order
        self._answers: dict[Key, asyncio.Future[Value]] = {}  # asked for, not answered yet
        self._waiters: Counter[Key] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_took_s = 0.0
        self._is_full = asyncio.Event()

    @property
    def num_pending(self) -> int:
        """Keys asked for and not answered yet."""
        return len(self._answers)

    async def get(self, key: Key) -> Value:
        """The value of one key; raises what its batch raised."""
        if key in self._cache:
            return self._cache[key]
        if key not in self._answers:
            self._answers[key] = asyncio.get_running_loop().create_future()
            if not self._waiting:
                self._start_batch()
            self._waiting[key] = None
            if len(self._waiting) >= self._max_batch:
                self._is_full.set()
        self._waiters[key] += 1
        try:
            # Shielded, because a waiter that is cancelled must not cancel the answer of the others.
            return await asyncio.shield(self._answers[key])
        finally:
            self._waiters[key] -= 1
            if not self._waiters[key]:
                del self._waiters[key]
                if key in self._waiting:  # nobody wants it any more, and it is in no batch yet
                    del self._waiting[key]
                    self._answers.pop(key).cancel()

    async def close(self) -> None:
        """Stops every batch; whoever still waits is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for answer in self._answers.values():
            answer.cancel()
        self._answers.clear()
        self._waiting.clear()

    def _start_batch(self) -> None:
        task = asyncio.create_task(self._run_batch())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_batch(self) -> None:
        """Invariant: a task is before the split below whenever `_waiting` is not empty."""
        await self._wait_for_more()
        async with self._slots:
            keys = list(itertools.islice(self._waiting, self._max_batch))
            for key in keys:
                del self._waiting[key]
            if len(self._waiting) < self._max_batch:
                self._is_full.clear()
            if self._waiting:
                self._start_batch()
            if keys:  # else all who waited went away
                await self._answer(keys)

    async def _wait_for_more(self) -> None:
        await asyncio.sleep(0)  # the others of this turn of the event loop
        wait_s = min(self._max_wait_s, MAX_WAIT_SHARE * self._last_took_s)
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_full.wait(), wait_s)

    async def _answer(self, keys: list[Key]) -> None:
        started = time.perf_counter()
        values: Sequence[Value | Exception]
        try:
            values = await self._compute(keys)
            assert len(values) == len(keys)
        except Exception as error:  # whatever it is, every waiter of this batch raises it
            values = [error] * len(keys)
        self._last_took_s = time.perf_counter() - started
        for key, value in zip(keys, values, strict=True):
            answer = self._answers.pop(key)
            if isinstance(value, Exception):
                answer.set_exception(value)
                answer.exception()  # marks it as seen: every waiter may have been cancelled meanwhile
            else:
                self._cache[key] = value
                answer.set_result(value)
