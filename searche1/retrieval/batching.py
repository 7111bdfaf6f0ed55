"""Batching and caching of single requests: what the retriever's client and its server have in common."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


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

    Keys that arrive within `window_s`, or while `max_running` batches are under way, share a call of at
    most `max_batch`; a key asked for twice is computed once. A failed call fails everyone who waits for
    one of its keys and leaves nothing in the cache, so asking again computes again.
    """

    def __init__(
        self,
        compute: Callable[[list[Key]], Awaitable[list[Value]]],
        *,
        cache: LRUCache[Key, Value],
        window_s: float,
        max_batch: int,
        max_running: int,
    ) -> None:
        self._compute = compute
        self._cache = cache
        self._window_s = window_s
        self._max_batch = max_batch
        self._slots = asyncio.Semaphore(max_running)
        self._waiting: list[Key] = []  # asked for, in no batch yet
        self._answers: dict[Key, asyncio.Future[Value]] = {}  # asked for, not answered yet
        self._tasks: set[asyncio.Task[None]] = set()

    async def get(self, key: Key) -> Value:
        """The value of one key; raises what its batch raised."""
        if key in self._cache:
            return self._cache[key]
        if key not in self._answers:
            self._answers[key] = asyncio.get_running_loop().create_future()
            if not self._waiting:
                self._start_batch()
            self._waiting.append(key)
        # Shielded, because a waiter that is cancelled must not cancel the answer of the others.
        return await asyncio.shield(self._answers[key])

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
        """Invariant: exactly one task is before the split below whenever `_waiting` is not empty."""
        await asyncio.sleep(self._window_s)
        async with self._slots:
            keys, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
            if self._waiting:
                self._start_batch()
            try:
                values = await self._compute(keys)
                assert len(values) == len(keys)
            except Exception as error:  # whatever it is, every waiter of this batch raises it
                for key in keys:
                    answer = self._answers.pop(key)
                    answer.set_exception(error)
                    answer.exception()  # marks it as seen: every waiter may have been cancelled meanwhile
                return
        for key, value in zip(keys, values, strict=True):
            self._cache[key] = value
            self._answers.pop(key).set_result(value)
