"""Tensors of all pipeline stages as a stream of flat buckets: what a weight sync and a saved folder are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.parallel import Layout, pipeline_group

ALIGNMENT = 256  # bytes; a tensor that starts in the middle of a word cannot be viewed as its type


@dataclass(frozen=True)
class Slot:
    """Where in a bucket a tensor lies."""

    name: str
    size: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes

    @property
    def end(self) -> int:
        return self.offset + prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Consecutive tensors in one buffer: one message between ranks, one handle between processes."""

    buffer: Tensor  # uint8 [n]
    slots: tuple[Slot, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the buffer."""
        for slot in self.slots:
            yield slot.name, self.buffer[slot.offset : slot.end].view(slot.dtype).view(slot.size)


Allocate = Callable[[int], Tensor]  # bytes -> uint8 [bytes]


class SharedDoubleBuffer:
    """Host memory for buckets that another process reads, two buffers in turn.

    Whoever takes the third bucket is done with the first. New shared memory takes far longer to write than old
    (`tools/bench/weight_sync.py` measures both).
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def __call__(self, num_bytes: int) -> Tensor:
        if len(self._buffers[0]) < num_bytes:
            storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
            self._buffers[0] = torch.empty(0, dtype=torch.uint8).set_(storage)
        self._buffers.reverse()
        return self._buffers[1][:num_bytes]


def fill_buckets(
    tensors: Iterable[tuple[str, Tensor]], *, bucket_bytes: int, allocate: Allocate | None = None
) -> Iterator[Bucket]:
    """Copies of the tensors, in order, in buckets of `bucket_bytes`, or of the one tensor that is larger.

    Every bucket has memory of its own, or what `allocate` gives.
    """
    buffer: Tensor | None = None
    slots: list[Slot] = []
    end = 0
    for name, tensor in tensors:
        if buffer is not None and end + tensor.nbytes > len(buffer):
            yield Bucket(buffer[:end] if allocate else _trimmed(buffer, end), tuple(slots))
            buffer = None
        if buffer is None:
            size = max(bucket_bytes, tensor.nbytes)
            buffer = allocate(size) if allocate else torch.empty(size, dtype=torch.uint8, device=tensor.device)
            slots, end = [], 0
        slot = Slot(name, tuple(tensor.shape), tensor.dtype, end)
        buffer[slot.offset : slot.end].view(tensor.dtype).copy_(tensor.reshape(-1))
        slots.append(slot)
        end = -(-slot.end // ALIGNMENT) * ALIGNMENT
    if buffer is not None:
        yield Bucket(buffer[:end] if allocate else _trimmed(buffer, end), tuple(slots))


def _trimmed(buffer: Tensor, end: int) -> Tensor:
    """The used part; readers get all memory behind a view, so a mostly empty buffer is copied."""
    return buffer[:end] if end > len(buffer) // 2 else buffer[:end].clone()


@torch.no_grad()
def stream_buckets(
    export: Callable[[], Iterable[tuple[str, Tensor]]],
    layout: Layout,
    *,
    bucket_bytes: int,
    everywhere: bool,
    allocate: Allocate | None = None,
) -> Iterator[Bucket]:
    """The tensors that `export` gives on each pipeline stage in turn. Collective: every rank must exhaust it.

    Args:
        export: this stage's tensors, the same on its tensor-parallel ranks; may be collective among them and those
            that hold the layer's experts.
        everywhere: every rank gets every bucket, from its own replica; else rank 0 does, and the others nothing.
        allocate: memory for buckets of so many bytes; by default each has its own.
    """
    if not everywhere and layout.replica >= layout.expert:  # the first replica, and those that hold its experts
        return
    receives = everywhere or layout.tensor_rank == layout.replica == 0
    group = pipeline_group()
    for stage in range(layout.pipeline):
        source = dist.get_global_rank(group, stage)
        if layout.pipeline_rank == stage:
            filled = fill_buckets(export(), bucket_bytes=bucket_bytes, allocate=allocate)
            for bucket in filled if receives else _exhausted(export()):
                if layout.pipeline > 1:
                    _announce((len(bucket.buffer), bucket.slots), source, group)
                    dist.broadcast(bucket.buffer, src=source, group=group)
                if everywhere or layout.is_writer:
                    yield bucket
            if layout.pipeline > 1 and receives:
                _announce(None, source, group)
        elif receives:
            while (header := _announce(None, source, group)) is not None:
                size, slots = header
                buffer = allocate(size) if allocate else torch.empty(size, dtype=torch.uint8, device=layout.device)
                dist.broadcast(buffer, src=source, group=group)
                if everywhere or layout.is_writer:
                    yield Bucket(buffer, slots)


def _announce(header: Any, source: int, group: dist.ProcessGroup) -> Any:
    """The header of the stage that sends, on all stages."""
    headers = [header]
    dist.broadcast_object_list(headers, src=source, group=group)
    return headers[0]


def _exhausted(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
    """No bucket: a rank that takes part in the gathering only."""
    for _ in tensors:
        pass
    yield from ()
