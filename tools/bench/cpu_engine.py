"""The engine that the benches on a CPU share, and how it stands still while another contestant runs."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from searche1.rollout.engine import Engine, start_engine


def cpu_engine(model: Path, log: Path, *, max_running: int = 128) -> Engine:
    """Ready later."""
    return start_engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        tensor=1,
        port=0,
        seed=0,
        mem_fraction=0.2,
        max_total_tokens=60_000,
        max_running=max_running,
        context_length=1000,
        attention_backend="",
        log_path=log,
    )


def stop(engine: Engine) -> None:
    """Its processes stand still (SIGSTOP) until `go_on`."""
    _signal(engine, signal.SIGSTOP)


def go_on(engine: Engine) -> None:
    _signal(engine, signal.SIGCONT)


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[None]:
    """Lets a stopped server run meanwhile."""
    go_on(engine)
    try:
        yield
    finally:
        stop(engine)


@contextlib.contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """Stops a running server meanwhile."""
    stop(engine)
    try:
        yield
    finally:
        go_on(engine)


def _signal(engine: Engine, number: signal.Signals) -> None:
    assert engine._process is not None
    os.killpg(engine._process.pid, number)
