"""What one rank finds out, all ranks know: results, mistakes, and that somebody is still at work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from megatron_ext.heartbeat import BEAT_EVERY_S, Heartbeat
from megatron_ext.parallel import Layout
from searche1.types import SharedError, Stopped, UserError, disk_fault

T = TypeVar("T")


def _told(function: Callable[[], T]) -> T:
    """Its result; a fault of the disk becomes a UserError, so that no rank waits for one that has met it."""
    try:
        return function()
    except OSError as error:
        if (told := disk_fault(error)) is None:
            raise
        raise told from error


class Ranks:
    """All ranks of the job. Make it on every rank, after the process groups."""

    def __init__(self, layout: Layout, *, timeout_s: float) -> None:
        self.is_writer = layout.is_writer
        self.rank = layout.rank
        self.world_size = dist.get_world_size()
        self._heartbeat = Heartbeat(timeout_s=timeout_s)

    def beat(self) -> None:
        """Called by whoever works while others wait, whenever something has got done."""
        if self.is_writer:
            self._heartbeat.beat()

    def from_writer(self, function: Callable[[], T], *, beats: bool = False) -> T:
        """The result of `function` on rank 0, on every rank. Collective.

        Its UserError is raised on every rank, as a SharedError. The others wait as long as rank 0 beats; `beats` has a
        thread do so, for work with files and other programs that may take as long as it takes.
        """
        outcome: list[tuple[T | None, UserError | None]] = [(None, None)]
        if self.is_writer:
            try:
                with self._beating() if beats else contextlib.nullcontext():
                    outcome = [(_told(function), None)]
            except UserError as error:
                outcome = [(None, error)]
        if self.world_size > 1:
            if self.is_writer:
                self._heartbeat.finish()
            else:
                self._wait()
            dist.broadcast_object_list(outcome, src=0)
        value, problem = outcome[0]
        if problem is not None:
            raise (Stopped if isinstance(problem, Stopped) else SharedError)(str(problem)) from problem
        return value  # type: ignore[return-value]

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT_EVERY_S):
                self.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _wait(self) -> None:
        try:
            self._heartbeat.wait()
        except ValueError as error:
            raise UserError(str(error)) from error

    def everywhere(self, function: Callable[[], T]) -> list[T]:
        """The results of `function` on all ranks, in rank order, on every rank. Collective.

        The first UserError of any rank is raised on every rank, as a SharedError.
        """
        own: tuple[T | None, str] = (None, "")
        try:
            own = (_told(function), "")
        except UserError as error:
            own = (None, str(error))
        outcomes = [own]
        if self.world_size > 1:
            outcomes = [own] * self.world_size
            dist.all_gather_object(outcomes, own)
        for _, problem in outcomes:
            if problem:
                raise SharedError(problem)
        return [value for value, _ in outcomes]  # type: ignore[misc]
