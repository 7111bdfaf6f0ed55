"""Weights in memory that an engine on the same CPU computes with: a sync writes them, and nobody copies them again.

An engine that has taken the memory over (`rollout/weight_loaders.py`) reads its parameters there. So tensors lie as
engines hold them: query, key and value projections are one matrix, gate and up another, a vocabulary has rows to spare,
and float32 matrices are stored transposed, which products of few rows want (`rollout/cpu_kernels.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.buckets import ALIGNMENT, SharedDoubleBuffer
from megatron_ext.cpu_layers import copy_transposed
from megatron_ext.hf_mapping import ModelShape, hf_size, model_rules

SHARED_MEMORY = Path("/dev/shm")
KEPT_FREE = 16 << 20  # bytes of it: engines and writers of checkpoints use it too
VOCAB_MULTIPLE = 64  # SGLang's rows of an embedding or head; those behind the vocabulary are zero
TRANSPOSED = ("columns", "qkv", "gate_up")  # layouts of a layer's matrices


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def places(shape: ModelShape, dtype: torch.dtype) -> tuple[dict[str, Place], int]:
    """Of every HuggingFace tensor but experts, which engines rearrange, and how many elements all take together."""
    found = {}
    start = 0
    for rule in model_rules(shape):
        if rule.is_expert:
            continue
        sizes = [hf_size(name, shape) for name in rule.hf]
        rows, width = sum(size[0] for size in sizes), prod(sizes[0][1:])
        if rule.layout == "vocab":
            rows = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        is_transposed = dtype == torch.float32 and rule.layout in TRANSPOSED and len(sizes[0]) == 2
        stride = (1, rows) if is_transposed else (width, 1)
        row = 0
        for name, size in zip(rule.hf, sizes, strict=True):
            found[name] = Place(size, stride if len(size) == 2 else (1,), start + row * stride[0])
            row += size[0]
        start += -(-rows * width * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize
    return found, start


class SharedWeights:
    """One process writes the tensors of a model; engines to which `tensors` were handed compute with them.

    They must rest while it writes.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        """Takes `nbytes(shape, dtype)` of /dev/shm. Raises RuntimeError if it has no room."""
        found, count = places(shape, dtype)
        self.for_the_rest = SharedDoubleBuffer()  # buckets of what has no place here
        storage = torch.UntypedStorage._new_using_filename_cpu(count * dtype.itemsize)
        memory = torch.empty(0, dtype=dtype).set_(storage)
        self._views = {n: memory.as_strided(place.size, place.stride, place.offset) for n, place in found.items()}

    @staticmethod
    def nbytes(shape: ModelShape, dtype: torch.dtype) -> int:
        return places(shape, dtype)[1] * dtype.itemsize

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the one memory."""
        yield from self._views.items()

    @torch.no_grad()
    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Writes the tensors that have a place here, and passes the others on."""
        for name, tensor in tensors:
            view = self._views.get(name)
            if view is None:
                yield name, tensor
            elif view.ndim == 2 and view.stride(1) != 1:
                copy_transposed(tensor, view)
            else:
                view.copy_(tensor)


def shared_weights(shape: ModelShape, dtype: torch.dtype) -> SharedWeights | str:
    """Memory for a model's tensors, or why there is none."""
    needed = SharedWeights.nbytes(shape, dtype)
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        return f"{SHARED_MEMORY} cannot be used ({error.strerror}); mount a tmpfs there"
    if needed + KEPT_FREE > free:
        return (
            f"{needed / 2**30:.2f} GiB of {SHARED_MEMORY} are needed to share them, and {free / 2**30:.2f} are free; "
            "docker run --shm-size gives a container more"
        )
    try:
        return SharedWeights(shape, dtype)
    except RuntimeError as error:  # others may have taken the room meanwhile
        return f"{SHARED_MEMORY} gave no memory ({str(error).splitlines()[0]})"
