"""What it costs to be able to go on: checkpoints, health records and kept rollouts, as shares of a whole run.

    python tools/bench/overhead.py              the quickstart
    python tools/bench/overhead.py --fast       its short form

Runs the command in this process with a clock around every call that begins, publishes, thins out or removes a
checkpoint, judges a step's health, or keeps a finished trajectory. The processes that write checkpoints run beside the
training; the CPU time of all of this process's children but the servers, which are still running, is given too. JSON as
the last line.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from searche1.checkpoints import Checkpoints
from searche1.cli import main as searche1
from searche1.health import Watch
from searche1.rollout.journal import Journal

CLOCKED: dict[str, tuple[type, tuple[str, ...]]] = {
    "checkpoints": (Checkpoints, ("save", "poll", "finish", "stop", "resume", "drop_after", "remove")),
    "health": (Watch, ("start", "step", "record")),
    "kept rollouts": (Journal, ("add",)),
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
    for name, (kind, methods) in CLOCKED.items():
        clock(kind, methods, spent[name])
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
