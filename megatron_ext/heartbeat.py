"""Waiting for one rank's long work without a collective's time-out, and without waiting for a dead one for ever."""

from __future__ import annotations

import time

import torch.distributed as dist

BEAT_EVERY_S = 1.0
LONGEST_POLL_S = 0.5


class Heartbeat:
    """Rank 0 works and says so; the others wait as long as it does. Make it on every rank after the process groups."""

    def __init__(self, *, timeout_s: float) -> None:
        """`timeout_s` is how long rank 0 may be silent."""
        self._store: dist.Store = dist.distributed_c10d._get_default_store()
        self._timeout_s = timeout_s
        self._num_waits = 0
        self._last_beat = 0.0

    def beat(self) -> None:
        """On the rank that works, whenever something has got done; cheap enough for every trajectory."""
        now = time.monotonic()
        if now - self._last_beat >= BEAT_EVERY_S:
            self._last_beat = now
            self._store.add("searche1/beats", 1)

    def finish(self) -> None:
        """On the rank that worked: lets the others go."""
        self._num_waits += 1
        self._store.set(f"searche1/finished/{self._num_waits}", "1")

    def wait(self) -> None:
        """On the others, until `finish`. Raises ValueError when nothing has been heard for too long."""
        self._num_waits += 1
        key = f"searche1/finished/{self._num_waits}"
        beats, heard, pause = -1, time.monotonic(), 0.001
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_S)
            if pause == LONGEST_POLL_S and (now := self._store.add("searche1/beats", 0)) != beats:
                beats, heard = now, time.monotonic()
            if time.monotonic() - heard > self._timeout_s:
                raise ValueError(
                    f"rank 0 has made no progress for {self._timeout_s:.0f} s; it hangs, or train.timeout_s is shorter "
                    "than its longest step: look at its last line and at the logs of engines and retriever"
                )
