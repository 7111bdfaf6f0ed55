"""Ranks forked from a server that has imported Megatron: each rank would spend seconds on that import again."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["searche1.grpo", "searche1.opsd", "megatron_ext.verify", "transformers.models.qwen3_moe", "pytest"]
)


def run_ranks(function: Callable[..., None], count: int, *arguments: Any, timeout_s: float = 300.0) -> None:
    """Call function(*arguments) in `count` processes with the variables that torchrun sets, and wait for them.

    Raises the first failure of a rank, with its traceback, and TimeoutError. No rank is left behind.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = torch.multiprocessing.start_processes(
        _rank, (count, port, function, arguments), nprocs=count, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + timeout_s
    while not ranks.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} on {count} ranks was not done within {timeout_s:.0f} s")


def _rank(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as a run does
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in torchrun.items()} | {"MASTER_ADDR": "127.0.0.1"}
    function(*arguments)
