"""What it costs to be able to go on: checkpoints, health records and kept rollouts, as shares of a whole run.

    python tools/bench/overhead.py              the quickstart
    python tools/bench/overhead.py --fast       its short form

Runs the command in this process with a clock around every call that begins, publishes or thins out a
checkpoint, judges a step's health, or keeps a finished trajectory. The processes that write checkpoints run beside the
training; the CPU time of all of this process's children but the servers, which are still running, is given too. JSON as
the last line.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CLOCKED = {  # what: module, class, methods
    "checkpoints": (
        "searche1.checkpoints",
        "Checkpoints",
        ("save", "poll", "finish", "stop", "resume", "drop_after"),
    ),
    "health": ("searche1.health", "Watch", ("start", "step", "record")),
    "kept rollouts": ("searche1.rollout.journal", "Journal", ("add", "poll")),
}


def clock(kind: type, names: tuple[str, ...], seconds: list[float]) -> None:
    """Adds the outermost calls of these methods up in `seconds`."""
    depth = [0]

    def clocked(method: Any) -> Any:
        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            depth[0] += 1
            started = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                depth[0] -= 1
                if depth[0] == 0:
                    seconds.append(time.perf_counter() - started)

        return call

    for name in names:
        setattr(kind, name, clocked(getattr(kind, name)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    spent: dict[str, list[float]] = {name: [] for name in CLOCKED}
    # Not at the top: processes that the run spawns import this file, at no more cost than the command's own.
    for name, (module, kind, methods) in CLOCKED.items():
        clock(getattr(importlib.import_module(module), kind), methods, spent[name])
    searche1 = importlib.import_module("searche1.cli").main
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        code = searche1(["quickstart", "--out", str(Path(folder) / "run"), *(["--fast"] if parsed.fast else [])])
        total = time.perf_counter() - started
    if code:
        return code
    result: dict[str, Any] = {"seconds": round(total, 1)}
    for name, seconds in spent.items():
        result[name] = {"calls": len(seconds), "seconds": round(sum(seconds), 3), "share": sum(seconds) / total}
    result["share"] = sum(sum(seconds) for seconds in spent.values()) / total
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    result["CPU seconds of children that have ended"] = round(children.ru_utime + children.ru_stime, 2)
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
