"""Trainer memory that goes to the host and comes back, while the GPU serves somebody else.

What moves are storages, not tensors: parameters, their views in Megatron's buffers and the optimizer's slices of them
stay the same objects with the same addresses inside a storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

SLAB = 1 << 28  # bytes of host memory in one piece: torch rounds what it page-locks up to a power of two


class HostOffload:
    """Some tensors' storages, which are either where they were made or on the host."""

    def __init__(self, tensors: Iterable[Tensor], *, keep_contents: bool = True) -> None:
        """`keep_contents=False` is for scratch memory, such as gradients between two updates: it comes back undefined.

        Tensors that share memory are taken together: name all of them, or none outside may be used meanwhile.
        """
        storages = {s.data_ptr(): s for t in tensors if (s := t.untyped_storage()).nbytes()}
        self._storages = list(storages.values())
        self.sizes = [storage.nbytes() for storage in self._storages]
        self._keep_contents = keep_contents
        self._slabs: list[Tensor] = []  # uint8, page-locked where there is a GPU; allocated once
        self.is_offloaded = False

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    def to_host(self) -> int:
        """Frees the memory; returns how many bytes. Does nothing when it is free already."""
        if self.is_offloaded:
            return 0
        if self._keep_contents:
            if not self._slabs:
                pin = any(storage.device.type == "cuda" for storage in self._storages)
                sizes = (min(SLAB, self.num_bytes - start) for start in range(0, self.num_bytes, SLAB))
                self._slabs = [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for size in sizes]
            for here, copy in self._pieces():
                copy.copy_(here, non_blocking=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # copies under way still read what is freed next
        for storage in self._storages:
            storage.resize_(0)
        self.is_offloaded = True
        return self.num_bytes

    def back(self) -> None:
        """Allocates the memory again, with its contents if they were kept. Does nothing when it is there."""
        if not self.is_offloaded:
            return
        for storage, size in zip(self._storages, self.sizes, strict=True):
            storage.resize_(size)
        if self._keep_contents:
            for here, copy in self._pieces():
                here.copy_(copy, non_blocking=True)
        self.is_offloaded = False

    def is_same_memory(self, other: HostOffload) -> bool:
        """Whether both are of the same storages, which are where they were made."""
        return [s.data_ptr() for s in self._storages] == [s.data_ptr() for s in other._storages]

    def take_host_memory(self, other: HostOffload) -> None:
        """Goes on with the host memory of one that is not needed any more, if that is as large."""
        if self.num_bytes == other.num_bytes:
            self._slabs, other._slabs = other._slabs, []

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes where they were made, and their place on the host."""
        place = 0
        for storage, size in zip(self._storages, self.sizes, strict=True):
            here, done = _bytes_of(storage), 0
            while done < size:
                slab, start = divmod(place, SLAB)
                count = min(size - done, SLAB - start)
                yield here[done : done + count], self._slabs[slab][start : start + count]
                done, place = done + count, place + count


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
