"""When each rank did what: a Chrome trace a rank, for https://ui.perfetto.dev or chrome://tracing.

The trace event format lets a file of events end without its closing bracket, so events are appended as they end and a
killed run leaves a readable trace.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searche1.runs import atomic_write_text

TRACE_FOLDER = "trace"


class Timeline:
    """One rank's events; ranks are processes of the trace. Time is the wall clock's, so ranks of all nodes line up."""

    def __init__(self, directory: Path, *, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._rank = rank
        self._path = directory / TRACE_FOLDER / f"rank{rank}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            name = {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
            self._path.write_text(f"[\n{json.dumps(name)}", encoding="utf-8")

    @contextmanager
    def __call__(self, name: str, **details: Any) -> Iterator[None]:
        """An event around a block; blocks may nest. `details` are shown when somebody clicks on it."""
        began = self._clock()
        try:
            yield
        finally:
            self.add(name, began, self._clock(), **details)

    def add(self, name: str, began: float, ended: float, **details: Any) -> None:
        """An event from `began` to `ended`, seconds of the wall clock."""
        event = {"name": name, "ph": "X", "pid": self._rank, "tid": 0, "args": details}
        event |= {"ts": round(1e6 * began), "dur": round(1e6 * (ended - began))}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(",\n" + json.dumps(event))


def merge_traces(directory: Path) -> Path | None:
    """trace.json of all ranks whose traces are here, for one look at the whole job; None if there are none."""
    events = []
    for path in sorted((directory / TRACE_FOLDER).glob("rank*.json")):
        events += read_trace(path)
    if not events:
        return None
    merged = directory / "trace.json"
    atomic_write_text(merged, json.dumps({"traceEvents": events}))
    return merged


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a rank's file; one that a kill cut is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        try:
            events.append(json.loads(line.removesuffix(",")))
        except json.JSONDecodeError:  # cut by a kill; the next start's events stand behind it
            continue
    return events
