"""SIGTERM asks a run to stop at the next good place; a second Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether this process has got SIGTERM, as Slurm sends it before it takes a machine away."""

    def __init__(self) -> None:
        self.is_made = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM for a request while the block runs."""
        before = signal.signal(signal.SIGTERM, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.is_made = True


def end_on_interrupt() -> None:
    """From now on, while servers are stopped, Ctrl-C ends this process at once; the kernel ends its servers with it."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    print("\nsearche1: stopped at once; the same command continues", file=sys.stderr, flush=True)
    os._exit(130)
