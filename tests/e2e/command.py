"""The command line as a user runs it, in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from searche1.rollout.engine import Engine, start_engine

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
POLICY = ROOT / "searche1" / "assets" / "toy_policy"


def searche1(*arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run `searche1 ...` and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "searche1", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def torchrun(
    num_processes: int,
    *arguments: str,
    on_line: Callable[[subprocess.Popen[str], str], None] = lambda process, line: None,
) -> subprocess.CompletedProcess[str]:
    """A rank that dies has all ranks started again, once; `on_line` sees torchrun's process and what ranks print."""
    options = [*TORCHRUN, "--nproc-per-node", str(num_processes), "--max-restarts", "1"]
    command = [*options, "-m", "searche1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            print(line, end="")  # a test that runs out of time shows what it has come to
            on_line(process, line)
        code = process.wait(timeout=500)
    return subprocess.CompletedProcess(command, code, stdout="".join(printed), stderr="")


def settings(world: Path, out: Path) -> list[str]:
    """The settings of a run on the toy world, without the quickstart's own command."""
    return [
        f"run.out={out}",
        f"model.path={POLICY}",
        f"retriever.corpus={world / 'corpus.jsonl'}",
        f"retriever.index={world / 'index'}",
        *(f"data.{name}={world / name}.jsonl" for name in ("train", "validation", "test")),
    ]


def toy_engine(model: Path, log_path: Path) -> Engine:
    """An engine of its own on the CPU, large enough for the toy world; ready later."""
    return start_engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        tensor=1,
        port=0,
        seed=0,
        mem_fraction=0.2,
        max_total_tokens=60000,
        max_running=128,
        context_length=1000,
        attention_backend="",
        log_path=log_path,
    )


def elsewhere(engine: Engine, folder: Path) -> list[str]:
    """The settings of a command that uses this engine instead of one of its own."""
    token_file = folder / "engine.token"
    token_file.write_text(engine.key + "\n")
    return [f"engine.urls=[{engine.url}]", f"engine.token_file={token_file}"]


def kill_rank(torchrun: subprocess.Popen[str], rank: int) -> None:
    """SIGKILL to the process that this torchrun made this rank: not to one of its children, which look like it."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    ranks = [pid for pid in children if f"\0RANK={rank}\0".encode() in _read(Path("/proc", pid, "environ"))]
    assert len(ranks) == 1, ranks
    os.kill(int(ranks[0]), signal.SIGKILL)


def kill_engine(log: Path) -> None:
    """SIGKILL to the server that writes this log."""
    servers = [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if b"engine_server" in _read(folder / "cmdline") and _target(folder / "fd/1") == str(log.resolve())
    ]
    assert servers
    os.kill(min(servers), signal.SIGKILL)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # processes come and go
        return b""


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
