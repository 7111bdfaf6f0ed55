"""Where the time of a whole command goes, process by process: py-spy's samples, counted.

    pip install --target py-spy py-spy
    PATH=py-spy/bin:$PATH python tools/bench/profile_run.py --out profile.txt searche1 quickstart --out runs/profiled

Samples every process of the command, 50 times a second, and counts the threads that py-spy takes for running, without
those in a call that waits (WAITS). Prints for the trainer, the engine and the retriever how much time that is, and in
which library and functions: their own time, with that of the C++ they call.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

RATE = 50  # samples a second
WAITS = ("Condition.wait", "_worker", "Selector.select", "_PollLikeSelector.select", "Popen._try_wait", "Runner.run",
         "_watchdog_once", "Socket.recv", "Connection._recv")  # fmt: skip
MOST_FUNCTIONS = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="searche1 and its arguments")
    parsed = parser.parse_args()
    if shutil.which("py-spy") is None:
        parser.error("py-spy is not on PATH; the first lines of --help say how to get it")
    if parsed.command[:1] != ["searche1"]:
        parser.error(f"got {' '.join(parsed.command) or 'no command'}; needed: searche1 and its arguments")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        spy = ["py-spy", "record", "--subprocesses", "--full-filenames", "--format", "raw"]
        spy += ["--rate", str(RATE), "--output", str(raw)]
        command = [sys.executable, "-m", *parsed.command]
        done = subprocess.run([*spy, "--", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not raw.exists():
            sys.exit(f"py-spy wrote no samples:\n{done.stdout[-3000:]}")
        table = count(raw.read_text().splitlines())
    print(table)
    if parsed.out:
        parsed.out.write_text(f"{' '.join(parsed.command)}\n\n{table}\n")
    return 0


def count(lines: list[str]) -> str:
    """A table of py-spy's raw lines: frames with semicolons between, and how often they were seen."""
    seen: dict[str, Counter[str]] = {}
    libraries: dict[str, Counter[str]] = {}
    for line in lines:
        stack, _, times = line.rpartition(" ")
        frames = stack.split(";")
        process = part_of(stack)
        function, _, place = frames[-1].partition(" (")
        file = place.rpartition(":")[0]
        if any(wait in function for wait in WAITS):
            continue
        seen.setdefault(process, Counter())[f"{function} ({'/'.join(file.split('/')[-2:])})"] += int(times)
        libraries.setdefault(process, Counter())[library_of(file)] += int(times)
    text = []
    for process, functions in sorted(seen.items(), key=lambda item: -item[1].total()):
        total = functions.total()
        shares = ", ".join(f"{n} {c / total:.0%}" for n, c in libraries[process].most_common(6))
        text += [f"{process}: {total / RATE:.0f} s; {shares}"]
        text += [f"  {c / total:6.1%}  {name}" for name, c in functions.most_common(MOST_FUNCTIONS)] + [""]
    return "\n".join(text).rstrip()


def part_of(stack: str) -> str:
    """Names of processes come and go while they start; what they run says more."""
    if "/engine_server.py" in stack or "/sglang/" in stack or "sglang::" in stack:
        return "engine"
    return "retriever" if re.search(r"process \d+:[^;]* retriever ", stack) else "trainer"


def library_of(file: str) -> str:
    """The package a file belongs to; Python's own library is one."""
    found = re.search(r"site-packages/(\w+)", file) or re.search(r"/(searche1|megatron_ext)/", file)
    return found[1] if found else "Python"


if __name__ == "__main__":
    sys.exit(main())
