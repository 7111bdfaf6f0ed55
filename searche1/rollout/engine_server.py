"""`python -m searche1.rollout.engine_server ARGS` is `python -m sglang.launch_server ARGS` with five differences.

The API key comes in the environment: a command line is there for everybody on the machine to read. And where
torchvision is absent, as on CPUs, a stub stands in: SGLang 0.5.17 imports it before it looks for platform plugins. Its
scheduler and detokenizer are spawned, and a spawned process imports the main module first: this one, which puts the
stub in place there too; and has them end with their parent from their first moment. Stop strings are tokenized once.
With WAIT as its only argument it imports SGLang, and goes on when a line on standard input says with which arguments
(engine_process.py).
"""

import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
from typing import Any

from megatron_ext.host import keep_freed_memory
from megatron_ext.lifetime import die_with_parent, forks_die_with_us, has_ended
from searche1.rollout.torchvision_stub import stub_torchvision

WAIT = "--wait"
KEY_VARIABLE = "SEARCHE1_ENGINE_KEY"
PID_VARIABLE = "SEARCHE1_ENGINE_PID"  # of the process that all others of an engine belong to


def fork_workers() -> None:
    """SGLang spawns its workers, each of which imports everything again. Without CUDA a fork does as well."""
    keep_freed_memory()
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose("fork", force=force)  # type: ignore[assignment]
    forks_die_with_us()


def remember_stop_strings() -> None:
    """Every request's stop strings are tokenized, which was 40 % of the server's work. Ours are always the same."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    normalize = SamplingParams.normalize

    class Remembering:
        def __init__(self, tokenizer: Any) -> None:
            self.encode = functools.lru_cache(maxsize=100)(tokenizer.encode)

    remembering = functools.lru_cache(maxsize=1)(Remembering)
    SamplingParams.normalize = lambda params, tokenizer: normalize(params, tokenizer and remembering(tokenizer))


def wait_for_arguments() -> None:
    """Continues with the line {"arguments", "environment", "log"}. Ends if none comes."""
    with tempfile.TemporaryFile("w+b") as so_far:
        for descriptor in (1, 2):
            os.dup2(so_far.fileno(), descriptor)
        importlib.import_module("sglang.srt.entrypoints.http_server")
        line = sys.stdin.readline()
        if not line:
            sys.exit()  # the command ended before it needed an engine
        order = json.loads(line)
        with open(order["log"], "ab") as log:
            so_far.seek(0)
            shutil.copyfileobj(so_far, log)
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
    sys.argv[1:] = order["arguments"]
    os.environ |= order["environment"]


if __name__ in ("__main__", "__mp_main__") and importlib.util.find_spec("torchvision") is None:
    stub_torchvision()

if __name__ == "__mp_main__":  # before SGLang does the same, seconds of imports later: its starter may die meanwhile
    die_with_parent()
    if has_ended(int(os.environ[PID_VARIABLE])):  # before we asked
        os._exit(1)

if __name__ == "__main__":
    os.environ[PID_VARIABLE] = str(os.getpid())
    if sys.argv[1:] == [WAIT]:
        wait_for_arguments()
    if "cpu" in sys.argv[1:]:
        fork_workers()
    if key := os.environ.pop(KEY_VARIABLE, ""):
        sys.argv += ["--api-key", key]
    remember_stop_strings()
    runpy.run_module("sglang.launch_server", run_name="__main__")
