"""Lines that say how far long work is and how long it still takes."""

from __future__ import annotations

import time

EVERY_S = 5.0


class Report:
    """Prints what is done, of how much, the rate and the time left: every few seconds, and at the end of long work."""

    def __init__(self, what: str, *, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._start = self._last = time.monotonic()
        self._begun_at = -1  # what was done already when we began: it says nothing about our rate

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._begun_at < 0:
            self._begun_at = 0 if done == total else done
        is_long = now - self._start > EVERY_S
        if now - self._last < EVERY_S and not (done == total and is_long):
            return
        self._last = now
        rate = (done - self._begun_at) / max(now - self._start, 1e-6)
        left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
        share = f"{100 * done / total:.1f} %"
        print(f"{self._what}: {share}, {done:,} of {total:,} {self._unit}, {rate:,.0f}/s{left}", flush=True)


def duration(seconds: float) -> str:
    """ "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
