"""Keeping many requests from a server that has stopped answering."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

OPENS_AFTER = 5  # faults in a row


class Breaker:
    """Closed, it lets everybody through. Open, it lets one request at a time find out whether the server is back.

    Belongs to one event loop. Each request reports its outcome with `answered` or `failed`.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._num_faults = 0  # since the last answer
        self._down_since = 0.0
        self.last_fault = ""
        self._one_at_a_time = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the server counts as down."""
        return self._num_faults >= OPENS_AFTER

    @property
    def down_s(self) -> float:
        """Seconds since the first of the faults in a row; 0 while it is closed."""
        return asyncio.get_running_loop().time() - self._down_since if self.is_open else 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until a request may be made."""
        if self.is_open:
            async with self._one_at_a_time:
                if self.is_open:
                    yield
                    return
        yield

    def answered(self) -> None:
        """The server has answered."""
        if self.is_open:
            print(f"{self._server} answers again, after {self.down_s:.0f} s", file=sys.stderr, flush=True)
        self._num_faults = 0
        self.last_fault = ""

    def failed(self, fault: str) -> None:
        """The server has not answered, and why."""
        self._num_faults += 1
        self.last_fault = fault
        if self._num_faults == 1:
            self._down_since = asyncio.get_running_loop().time()
        if self._num_faults == OPENS_AFTER:
            print(f"{self._server} does not answer ({fault}); waiting for it", file=sys.stderr, flush=True)
