"""Processes that end with the one that started them, also when that is killed."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_is_registered = False
_forker = 0


def die_with_parent() -> None:
    """In a child: SIGKILL when the thread that started it ends. Linux only."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits as a zombie for whoever started it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def forks_die_with_us() -> None:
    """Children that Python forks from this process end with it. May be called again."""
    global _is_registered
    if not _is_registered:
        _is_registered = True
        os.register_at_fork(before=_remember, after_in_child=_end_with_forker)


def _remember() -> None:
    global _forker
    _forker = os.getpid()


def _end_with_forker() -> None:
    die_with_parent()
    if os.getppid() != _forker:  # it died before we asked
        os._exit(1)
