#!/usr/bin/env python3
"""Kills parts of a tiny run at random moments until it is done, and compares what comes out with a run left alone.

    python tools/torture.py --kills 100

Each run is one cycle on the toy world. At random moments its driver, engine, retriever or (with --ranks 2) one rank
gets SIGKILL, the engine SIGSTOP, so that it hangs, the driver SIGTERM or Ctrl-C, or the wall clock of all processes
jumps by a day; the same command is called again until the run is finished. Final weights must then have the bits of
the undisturbed run, and summary.json the same numbers, seconds aside. No process may be left over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from searche1.config import load_config
from searche1.quickstart import make_world

ROOT = Path(__file__).resolve().parents[1]
# A checkpoint every other step, so that kills fall between two of them as well.
SETTINGS = (
    "grpo.steps=4",
    "grpo.prompts_per_step=8",
    "grpo.save_every=2",
    "pool.max_questions=24",
    "pool.chunk_questions=8",
    "opsd.pairs_per_step=4",
    "opsd.validate_every=2",
    "opsd.teacher_check_questions=4",
    "retriever.timeout_s=5",
    "engine.request_timeout_s=20",
    "engine.start_timeout_s=120",
)
SIGNALS = {"driver": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
# How a command may end that got this last. Signals do as they always do until it listens to them.
ENDS = {
    "driver": (-signal.SIGKILL,),
    "SIGTERM": (75, -signal.SIGTERM),
    "Ctrl-C": (130, -signal.SIGINT, 1),
    "engine": (),
    "hanging engine": (),
    "retriever": (),
    "rank": (),
    "clock": (),
}
MARK = "SEARCHE1_TORTURE"  # in the environment of every process of a run
DAY_S = 86400
MOST_CALLS = 40  # of one run: more means that it gets nowhere


@dataclass(frozen=True)
class Ended:
    """A finished run: how long its last call took, how often it was killed, and what it made."""

    seconds: float
    kills: list[str]
    result: dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many in all (default 20)")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2), help="processes of the trainer, by torchrun")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"), help="folder for the runs (runs/torture)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="such as driver, engine, SIGTERM (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    world = arguments.out / "world"
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already; give another --out, or remove it")
    make_world(world, seed=0)
    for name, most in (("train", 200), ("validation", 24), ("test", 40)):
        file = world / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:most]))
    clock = JumpingClock(arguments.out)
    if clock.why_absent:
        print(f"the clock does not jump: {clock.why_absent}", flush=True)
    start = Start(world, arguments.ranks, clock)
    reference = run_to_end(arguments.out / "undisturbed", start, victims=[], generator=generator)
    print(f"undisturbed run: {reference.seconds:.0f} s, EMs {ems(reference.result)}", flush=True)
    kinds = ["driver", "engine", "hanging engine", "retriever", "SIGTERM", "Ctrl-C", "clock"]
    if arguments.ranks > 1:  # torchrun answers signals with a status of its own, and starts ranks again
        kinds = ["engine", "retriever", "rank", "clock"]
    within = 0.6 * reference.seconds  # what is on the disk makes later calls shorter: a moment behind their end is none
    kills: list[str] = []
    runs = same = 0
    impossible = {"clock"} if clock.why_absent else set()
    kinds = [kind for kind in kinds if kind not in impossible and (not arguments.only or kind in arguments.only)]
    if not kinds:
        parser.error(f"none of --only {' '.join(arguments.only)} can be done; leave it out to see all")
    while len(kills) < arguments.kills:
        number = min(len(kinds), arguments.kills - len(kills))
        victims = generator.sample(kinds, number)  # each kind before any comes again
        runs += 1
        out = arguments.out / f"killed{runs}"
        ended = run_to_end(out, start, victims=victims, generator=generator, within=within)
        kills += ended.kills
        if left := left_over():
            sys.exit(f"{out}: processes are left over: {left}")
        is_same = ended.result == reference.result
        same += is_same
        counts = ", ".join(f"{kind} {ended.kills.count(kind)}" for kind in kinds)
        print(
            f"run {runs}: killed {len(ended.kills)} times ({counts}); "
            f"{'the same bits and numbers' if is_same else 'DIFFERS'}; {len(kills)} of {arguments.kills} kills",
            flush=True,
        )
        if not is_same:
            print(f"  undisturbed {reference.result}\n  killed      {ended.result}", flush=True)
        by_kind = {kind: kills.count(kind) for kind in kinds}
        if arguments.json:  # after every run: this takes long
            figures = {"kills": by_kind, "runs": runs, "same": same, "ranks": arguments.ranks, "seed": arguments.seed}
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    counts = ", ".join(f"{kind} {kills.count(kind)}" for kind in kinds)
    print(f"{len(kills)} kills ({counts}) in {runs} runs; {same} of {runs} ended as the undisturbed one")
    return 0 if same == runs else 1


@dataclass(frozen=True)
class Start:
    """What all runs have in common."""

    world: Path
    ranks: int
    clock: JumpingClock


def ems(result: dict[str, Any]) -> str:
    return " ".join(f"{stage['em']:.3f}" for stage in result["summary"]["stages"])


def command(out: Path, world: Path, ranks: int) -> list[str]:
    """One cycle on the toy world, small, with greedy and sampled rollouts, as one process or by torchrun."""
    module = ["-m", "searche1", "cycle", "--config", str(ROOT / "configs/quickstart-fast.yaml"), f"run.out={out}"]
    module += [f"model.path={ROOT / 'searche1/assets/toy_policy'}", *SETTINGS]
    module += [f"retriever.corpus={world / 'corpus.jsonl'}", f"retriever.index={world / 'index'}"]
    module += [f"data.{name}={world / name}.jsonl" for name in ("train", "validation", "test")]
    load_config(None, [word for word in module if "=" in word])
    if ranks == 1:
        return [sys.executable, *module]
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "100"]
    return [sys.executable, "-m", *start, *module]


def run_to_end(out: Path, start: Start, *, victims: list[str], generator: random.Random, within: float = 0.0) -> Ended:
    """Call the command until it is finished, killing one victim after another on the way."""
    left = list(victims)
    kills: list[str] = []
    for _ in range(MOST_CALLS):
        began = time.monotonic()
        with open(out.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(
                command(out, start.world, start.ranks),
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: str(os.getpid()), **start.clock.environment},
                start_new_session=True,
            )
        while process.poll() is None and left:
            moment = time.monotonic() + generator.uniform(0, within)
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.05)
            if process.poll() is None and disturb(left[0], process, start.clock):
                kills.append(left.pop(0))
        code = process.wait()
        if code == 0:
            return Ended(time.monotonic() - began, kills, result_of(out))
        if code == 2 and any(words in last_error(out) for words in ("while starting", "was not ready within")):
            continue  # killed twice while it started, or stopped: it says so, and the same command goes on
        if code not in ENDS[kills[-1] if kills else "driver"]:
            sys.exit(f"{out}: the command ended with {code}; its output is in {out.with_suffix('.log')}")
    sys.exit(f"{out}: not finished after {MOST_CALLS} calls; the output is in {out.with_suffix('.log')}")


def last_error(out: Path) -> str:
    """The last message of the run's command."""
    lines = out.with_suffix(".log").read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("searche1: error:")), "")


class JumpingClock:
    """The time of day as the processes of the runs see it: jumping_clock.c, preloaded into them."""

    def __init__(self, folder: Path) -> None:
        library, self._offset = folder / "jumping_clock.so", folder / "clock_offset"
        self.environment: dict[str, str] = {}
        self.why_absent = ""
        compiler, source = os.environ.get("CC", "cc"), Path(__file__).with_name("jumping_clock.c")
        if shutil.which(compiler) is None:
            self.why_absent = f"there is no C compiler {compiler!r}; install one, or set CC"
            return
        options = ["-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        compiled = subprocess.run([compiler, *options], capture_output=True, text=True)
        if compiled.returncode:
            self.why_absent = f"{source.name} was not compiled: {compiled.stderr}"
            return
        self._offset.write_bytes(struct.pack("=q", 0))
        self.environment = {"LD_PRELOAD": str(library.resolve()), "SEARCHE1_CLOCK": str(self._offset.resolve())}

    def jump(self) -> None:
        """A day ahead, or back to where it was."""
        (offset,) = struct.unpack("=q", self._offset.read_bytes())
        with open(self._offset, "r+b") as file:  # in place: the processes have it mapped
            file.write(struct.pack("=q", 0 if offset else DAY_S))


def disturb(kind: str, process: subprocess.Popen[bytes], clock: JumpingClock) -> bool:
    """A signal to a process of the run, or a jump of its clock; whether there was such a process."""
    if kind == "clock":
        clock.jump()
        return True
    if kind in SIGNALS:
        process.send_signal(SIGNALS[kind])
        process.wait()
        return True
    kind, number = ("engine", signal.SIGSTOP) if kind == "hanging engine" else (kind, signal.SIGKILL)
    mark = {"engine": b"searche1.rollout.engine_server", "retriever": b"retriever", "rank": b"-msearche1cycle"}[kind]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b"")
            parents = ancestors(int(folder.name))
        except OSError:  # processes come and go
            continue
        if mark in line and process.pid in parents and int(folder.name) != process.pid:
            os.kill(int(folder.name), number)
            return True
    return False


def left_over() -> list[str]:
    """Processes of runs that have ended, some seconds later."""
    deadline = time.monotonic() + 15
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={os.getpid()}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(f"{folder.name} {(folder / 'comm').read_text().strip()}")
            except OSError:  # processes come and go
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def ancestors(pid: int) -> list[int]:
    """Parents up to init."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def result_of(out: Path) -> dict[str, Any]:
    """What must not depend on kills: every byte of the weights, every number of the summary but seconds."""
    summary = json.loads((out / "summary.json").read_text())
    for stage in summary["stages"]:
        del stage["seconds"]
    weights = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in sorted((out / "final").glob("*.safe*"))}
    return {"weights": weights, "summary": summary}


if __name__ == "__main__":
    sys.exit(main())
