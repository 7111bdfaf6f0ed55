"""What a CPU run takes of its machine: memory that it keeps, and cores."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ext import blas

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed, instead of giving it back to the system; whether it will.

    Tensors of 32 MB and more get pages of their own, freed with them and cleared by the system one by one when they
    are written: at 2 to 4 GB/s, a quarter of a training step on a CPU. The process stays as large as it ever was.
    Only glibc knows how.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Gives the system what malloc keeps, this once. Where malloc is not glibc's it keeps what it likes."""
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    """A function of its malloc, or None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def use_threads(count: int) -> None:
    """Has PyTorch compute with so many OpenMP threads in this process, and with one in its forks.

    OpenMP's threads do not come along in a fork, where it waits for them forever: a writer of checkpoints would hang at
    the first tensor it copies.
    """
    _compute_with(count)
    if count > 1:
        os.register_at_fork(after_in_child=_one_thread)


@contextlib.contextmanager
def half_the_threads() -> Iterator[None]:
    """Inside, PyTorch and OpenBLAS compute with half of what this process has, at least one: another has the rest."""
    count = torch.get_num_threads()
    _compute_with(max(1, count // 2))
    try:
        yield
    finally:
        _compute_with(count)


def _compute_with(count: int) -> None:
    torch.set_num_threads(count)
    blas.use_threads(count)


def _one_thread() -> None:
    _compute_with(1)
