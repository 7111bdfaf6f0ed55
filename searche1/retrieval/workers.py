"""Processes that do the retriever's heavy work, one call at a time each, and are started again when they die."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from searche1.retrieval.backend import SearchFault
from searche1.types import UserError

PR_SET_PDEATHSIG = 1  # prctl(2)
MAX_DEATHS = 2  # processes that may die of one call
FIRST_PAUSE_S = 0.2  # before a process is started again; grows
MAX_PAUSE_S = 30.0


class WorkerDied(Exception):
    """The process is gone, or was ended because it did not answer in time."""


class WorkerFailed(Exception):
    """The call raised; the process lives on."""


class Worker:
    """A child process around the object that `make` builds there. Used from one thread at a time.

    `make` must be picklable. The child ends when this process ends in any way.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process with threads may hang
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, os.getpid()), name=f"searche1-{name}", daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    def wait_ready(self) -> None:
        """Returns when the object is built. Raises the UserError that building it raised, or WorkerDied."""
        self._receive(timeout_s=None)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, timeout_s: float | None) -> Any:
        """`object.method(*args, **kwargs)`, computed in the child. Raises UserError, WorkerFailed or WorkerDied."""
        try:
            self._pipe.send((method, args, kwargs))
        except OSError as error:
            raise self._died() from error
        return self._receive(timeout_s)

    def stop(self) -> None:
        """Ends the child at once; may be called again."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, timeout_s: float | None) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                self._process.kill()
                raise WorkerDied(f"the {self.name} process did not answer within {timeout_s:g} s and was ended")
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if kind == "user_error":
            raise UserError(value)
        if kind == "failed":
            raise WorkerFailed(value)
        return value

    def _died(self) -> WorkerDied:
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        hint = " (9 is often the kernel, out of memory)" if code == -signal.SIGKILL else ""
        return WorkerDied(f"the {self.name} process {how}{hint}")


def _serve(pipe: Connection, make: Callable[[], Any], parent: int) -> None:
    """The child: builds the object, then answers calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who may still need us to finish
    end_with_parent(parent)
    try:
        served = make()
        pipe.send(("ready", None))
    except UserError as error:
        pipe.send(("user_error", str(error)))
        return
    while True:
        try:
            method, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("value", getattr(served, method)(*args, **kwargs))
        except UserError as error:
            answer = ("user_error", str(error))
        except Exception as error:  # told to the caller; the object is still good
            traceback.print_exc()
            answer = ("failed", f"{type(error).__name__}: {error}")
        pipe.send(answer)


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, also of a crash or SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)


class Pool:
    """Workers that do the same; a call goes to one that is free.

    A worker that dies is started again and its call goes to another, so callers wait but see nothing. Use it from
    one event loop, whose thread must last: Linux ends a child with the thread that started it.
    """

    def __init__(self, name: str, make: Callable[[int], Callable[[], Any]], *, size: int, timeout_s: float) -> None:
        """`make(i)` is what worker i builds; a call that takes longer than `timeout_s` ends its worker."""
        self.name = name
        self.num_restarts = 0
        self._make = make
        self._size = size
        self._timeout_s = timeout_s
        self._free: list[tuple[int, Worker]] = []
        self._alive: dict[int, Worker] = {}
        self._fault = ""
        self._is_closed = False
        self._changed = asyncio.Condition()
        self._threads = ThreadPoolExecutor(max_workers=size, thread_name_prefix=name)
        self._revivals: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Starts all workers side by side. Raises UserError if one cannot start."""
        results = await asyncio.gather(*(self._start(number) for number in range(self._size)), return_exceptions=True)
        for result in results:
            if isinstance(result, WorkerDied):
                raise UserError(f"{result} while it started; see the messages above")
            if isinstance(result, BaseException):
                raise result

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """`object.method(*args, **kwargs)` of a worker's object.

        Raises SearchFault: a passing one if no worker can be had, one that does not pass if the call itself fails.
        """
        # Shielded: a worker that was asked must be heard, or the next caller would get this answer.
        return await asyncio.shield(asyncio.create_task(self._call(method, args, kwargs)))

    def fault(self) -> str:
        """Why no call can be answered now, or ""."""
        return "" if self._alive else self._fault

    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [worker.pid for worker in self._alive.values()]

    async def close(self) -> None:
        """Ends all workers; calls that still wait for one fail."""
        self._is_closed = True
        for task in self._revivals:
            task.cancel()
        await asyncio.gather(*self._revivals, return_exceptions=True)
        for worker in self._alive.values():
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
        self._fault = "it was stopped"
        self._alive.clear()
        self._free.clear()
        async with self._changed:
            self._changed.notify_all()

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, worker = await self._take()
        deaths = 0
        while True:
            try:
                value = await self._in_thread(partial(worker.call, method, args, kwargs, timeout_s=self._timeout_s))
                break
            except WorkerDied as error:
                self._revive(number, worker, error)
                deaths += 1
                if deaths == MAX_DEATHS:
                    raise SearchFault(f"{error}; so did another of the same request", is_passing=False) from error
                number, worker = await self._take()
            except (WorkerFailed, UserError) as error:
                await self._put(number, worker)
                raise SearchFault(f"the {self.name} process failed: {error}", is_passing=False) from error
        await self._put(number, worker)
        return value

    async def _start(self, number: int) -> None:
        worker = Worker(self.name, self._make(number))  # from this thread, see above
        try:
            await self._in_thread(worker.wait_ready)
        except BaseException:
            worker.stop()
            raise
        self._alive[number] = worker
        await self._put(number, worker)

    async def _take(self) -> tuple[int, Worker]:
        async with self._changed:
            while not self._free:
                if self.fault():
                    raise SearchFault(f"the retriever cannot search now: {self.fault()}", is_passing=True)
                await self._changed.wait()
            return self._free.pop()

    async def _put(self, number: int, worker: Worker) -> None:
        async with self._changed:
            self._free.append((number, worker))
            self._changed.notify()

    def _revive(self, number: int, worker: Worker, reason: WorkerDied) -> None:
        if self._is_closed:
            return
        _tell(f"{reason}; starting it again")
        del self._alive[number]
        worker.stop()
        task = asyncio.create_task(self._start_again(number))
        self._revivals.add(task)
        task.add_done_callback(self._revivals.discard)

    async def _start_again(self, number: int) -> None:
        """Tries until it works: what ended the process may be mended meanwhile. `fault` says why it does not."""
        pause_s = FIRST_PAUSE_S
        started = time.monotonic()
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._start(number)
            except (UserError, WorkerDied) as error:
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                self._fault = str(error)
                _tell(f"the {self.name} process does not start: {error}; trying again in {pause_s:.0f} s")
                async with self._changed:
                    self._changed.notify_all()
                continue
            self._fault = ""
            self.num_restarts += 1
            took_s = time.monotonic() - started
            _tell(f"the {self.name} process is back after {took_s:.1f} s")
            return

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)


def _tell(line: str) -> None:
    print(f"retriever: {line}", file=sys.stderr, flush=True)
