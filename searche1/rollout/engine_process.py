"""The process of an engine: its environment, and a start ahead of the trainer's imports.

Importing SGLang takes a CPU as many seconds as importing Megatron does. `importing_sglang` has a process do the first
while ours does the second; `start_process` gives it the arguments of the first engine that is started.
Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.lifetime import die_with_parent
from searche1.config import Config
from searche1.rollout.engine_server import KEY_VARIABLE, WAIT

_SERVER = (sys.executable, "-m", "searche1.rollout.engine_server")
_TORCHRUN_PREFIXES = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
_early: tuple[subprocess.Popen[bytes], dict[str, str]] | None = None  # a process and its environment


@contextlib.contextmanager
def importing_sglang(config: Config) -> Iterator[None]:
    """Has a process ready for the engine of a command in one process on a CPU; ends it if it was not needed.

    Open it in the main thread, before anything heavy is imported. Elsewhere it does nothing: a start on a GPU takes
    much longer than imports, and of several ranks one will start the engine.
    """
    global _early
    device, has_gpu = config.run.device, any(Path("/dev").glob("nvidia[0-9]*"))
    is_on_gpu = device == "cuda" or (device == "auto" and has_gpu)
    if config.engine.urls or is_on_gpu or os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    environment = engine_environment("cpu", host="127.0.0.1", tensor=1)
    process = subprocess.Popen(
        [*_SERVER, WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    _early = process, environment
    try:
        yield
    finally:
        if _early is not None and _early[0] is process:
            _early = None
            process.kill()
            process.wait()


def start_process(
    arguments: Sequence[str], *, environment: dict[str, str], key: str, log_path: Path
) -> subprocess.Popen[bytes]:
    """An engine's process with SGLang's `arguments`: the early one if it fits, else a new one.

    Its output goes to the end of `log_path`. Call it from the main thread, with which the process ends.
    """
    global _early
    early, _early = _early, None
    if early is not None:
        process, its_environment = early
        is_as_before = its_environment.items() <= environment.items()  # libraries add variables when they are imported
        added = {name: value for name, value in environment.items() if name not in its_environment}
        if is_as_before and _tell(process, arguments, environment={**added, KEY_VARIABLE: key}, log_path=log_path):
            return process
        process.kill()
        process.wait()
        reason = "it had ended" if is_as_before else "the environment has changed"
        with log_path.open("a") as log:
            log.write(f"searche1: a process that imported SGLang early is replaced by a new one: {reason}\n")
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [*_SERVER, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, KEY_VARIABLE: key},
            start_new_session=True,  # Ctrl-C reaches us first, and one signal reaches all of its processes
            preexec_fn=die_with_parent,
        )


def _tell(
    process: subprocess.Popen[bytes], arguments: Sequence[str], *, environment: dict[str, str], log_path: Path
) -> bool:
    """Whether the process is still there to be told; if it has ended, one that is started anew says why."""
    order = {"arguments": list(arguments), "environment": environment, "log": str(log_path.resolve())}
    assert process.stdin is not None
    try:
        with process.stdin as pipe:
            pipe.write(json.dumps(order).encode() + b"\n")
    except BrokenPipeError:
        return False
    return process.poll() is None


def engine_environment(kind: str, *, host: str, tensor: int) -> dict[str, str]:
    """Environment of an engine of `tensor` ranks that listens at `host`; kind is "cpu" or "cuda"."""
    # An engine makes process groups of its own: in torchrun's it would wait for the trainer's ranks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_TORCHRUN_PREFIXES)}
    if kind == "cpu":
        environment.setdefault("OMP_NUM_THREADS", "1")  # spinning threads on shared cores cost ten times
        environment.setdefault("SGLANG_SCHEDULER_MAX_RECV_PER_POLL", "16")  # of a burst the first start meanwhile
        if tensor > 1:
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", cores_of_ranks(tensor))
    # Logprobs of the distribution at temperature 1 whatever the sampling temperature, as Completion promises.
    environment["SGLANG_RETURN_ORIGINAL_LOGPROB"] = "1"
    # Longer than any client keeps an idle connection: one that closes under a request looks like a dead engine.
    environment["SGLANG_TIMEOUT_KEEP_ALIVE"] = "3600"
    # /health says whether the warm-up is over, and /health_generate asks for a token, which takes a second or more.
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "false"
    # SGLang's warm-up calls itself and would ask a proxy.
    environment["no_proxy"] = ",".join(filter(None, [environment.get("no_proxy"), host]))
    return environment


def cores_of_ranks(num_ranks: int) -> str:
    """SGLang's notation for which cores each rank of an engine uses: a share each, or all where there are fewer."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // num_ranks)
    parts = [cores[rank * share % len(cores) :][:share] for rank in range(num_ranks)]
    return "|".join(f"{part[0]}-{part[-1]}" for part in parts)
