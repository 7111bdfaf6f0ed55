"""Lines that say how far long work is and how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

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


@contextmanager
def progress_line(
    console: Console,
    title: str,
    beat: Callable[[], None] = lambda: None,
    *,
    show: Callable[[str], None] | None = None,
) -> Iterator[Callable[[int, int, float], None]]:
    """A line that says how far a long rollout is; rewritten in place on a terminal, every 10 s elsewhere.

    What it yields takes trajectories done, in all, and their mean reward; `beat` is called each time. `show` takes the
    line instead of the terminal.
    """
    started = last = time.monotonic()
    is_terminal = console.is_terminal
    done_before = -1  # in an earlier session: says nothing about our rate

    def progress(done: int, total: int, mean_reward: float) -> None:
        nonlocal last, done_before
        beat()
        if done_before < 0:
            done_before = done - 1
        now = time.monotonic()
        if now - last < (0.5 if is_terminal else 10.0):
            return
        last = now
        rate = (done - done_before) / (now - started)
        left = f", {duration((total - done) / rate)} left" if done < total else ""
        spent = duration(now - started)
        line = f"  {title}: {done:,}/{total:,} trajectories  EM {mean_reward:.3f}  {rate:,.0f}/s  {spent}{left}"
        if show is not None:
            show(line.strip())
        elif is_terminal:
            sys.stdout.write(f"\r{line}\033[K")
            sys.stdout.flush()
        else:
            console.print(line, markup=False, soft_wrap=True)

    try:
        yield progress
    finally:
        if show is not None:
            show("")
        elif is_terminal:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()
