"""Reads and writes Megatron's checkpoints a tensor at a time, in one process and without a model.

The format is the one of `megatron.core.dist_checkpointing` ("torch_dist"): torch's distributed checkpoint, in which
every tensor is whole (any layout cuts what it needs), with the layers, and in each the experts, stacked along leading
dimensions. Megatron itself holds all of a rank's tensors while it saves or loads; here one is in memory.
"""

from __future__ import annotations

import enum
import io
import json
import mmap
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

METADATA_NAME, CONFIG_NAME, COMMON_NAME = ".metadata", "metadata.json", "common.pt"
TRACKER_NAME = "latest_checkpointed_iteration.txt"  # Megatron-LM and Megatron-Bridge keep it beside the checkpoints
FILE_BYTES = 4 << 30
# What a checkpoint's metadata may be made of. It is a pickle, which could otherwise run anything.
PICKLED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},  # looks a name up
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta"),
    },
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "builtins": {"set"},
    "io": {"BytesIO"},
    "_io": {"BytesIO"},
    "pathlib": {"PosixPath"},
}
MOVED = {"pathlib._local": "pathlib"}  # as Python 3.13 names it


# -- reading --------------------------------------------------------------------------------------


class TorchDistReader:
    """Random access to the tensors of a checkpoint folder.

    Raises ValueError if it is no such checkpoint, or not a whole one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = find_checkpoint(folder)
        self._metadata = _read_metadata(self.folder / METADATA_NAME)
        _check_files(self.folder, self._metadata)
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def names(self) -> set[str]:
        return {name for name, stored in self._metadata.state_dict_metadata.items() if _is_tensor(stored)}

    def common(self) -> dict[str, Any]:
        """Plain values that were saved beside the tensors. Raises ValueError if there is more than plain values."""
        try:
            return torch.load(self.folder / COMMON_NAME, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{self.folder / COMMON_NAME} holds more than plain values: {error}") from error
        except (EOFError, RuntimeError) as error:
            raise ValueError(
                f"{self.folder / COMMON_NAME} is damaged ({error}); restore it, or take another checkpoint"
            ) from error

    def size(self, name: str) -> tuple[int, ...]:
        return tuple(self._stored(name).size)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name).properties.dtype

    def tensor(self, name: str, place: Sequence[int] = (), *, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor of a stack, at `place` in its leading dimensions; of it `rows`, from one to before another.

        Values that are stored in one piece are mapped from the file, not copied.
        """
        size = list(self.size(name)[len(place) :])
        offsets = [*place, *[0] * len(size)]
        if rows is not None:
            offsets[len(place)], size[0] = rows[0], rows[1] - rows[0]
        sizes = [*[1] * len(place), *size]
        wanted = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        stored = self._stored(name)
        chunks = TensorStorageMetadata(stored.properties, stored.size, self._chunks_at(name, tuple(place)))
        items = create_read_items_for_chunk_list(name, chunks, [wanted])
        if sum(prod(item.lengths) for item in items) != prod(sizes):
            raise ValueError(f"{self.folder} is not whole: parts of {name} at {tuple(place)} were never written")
        pieces = [_narrow(self._blob(item.storage_index), item.storage_offsets, item.lengths) for item in items]
        if len(pieces) == 1:
            return pieces[0].reshape(size)
        found = torch.empty(sizes, dtype=stored.properties.dtype)
        for item, piece in zip(items, pieces, strict=True):
            _narrow(found, item.dest_offsets, item.lengths).copy_(piece)
        return found.view(size)

    def _blob(self, index: MetadataIndex) -> Tensor:
        """A block as it was stored. Raises ValueError if it cannot be read."""
        stored = self._metadata.storage_data[index]
        path = self.folder / stored.relative_path
        try:
            return _read_blob(path, stored.offset, stored.length)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"a block of {index.fqn} in {path} cannot be read: {error}") from error

    def _stored(self, name: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    def _chunks_at(self, name: str, place: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """The chunks that hold a part of what is at `place`; without an index, stacks of experts take minutes."""
        depth = len(place)
        if (name, depth) not in self._chunks:
            index: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self._stored(name).chunks:
                ranges = [range(o, o + n) for o, n in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)]
                for at in product(*ranges):
                    index.setdefault(at, []).append(chunk)
            self._chunks[name, depth] = index
        return self._chunks[name, depth].get(place, [])


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint itself, where a folder of several is given as Megatron-LM and Megatron-Bridge write them."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; give a Megatron checkpoint folder")
    tracker = folder / TRACKER_NAME
    if tracker.is_file() and not (folder / METADATA_NAME).exists():
        latest = tracker.read_text().strip()
        name = latest if latest == "release" else f"iter_{int(latest):07d}" if latest.isdigit() else None
        if name is None:
            raise ValueError(f"{tracker} says {latest!r}, which is neither an iteration nor 'release'")
        if not (folder / name).is_dir():
            raise ValueError(f"{tracker} names {name}, which is not in {folder}; give one of the folders that are")
        folder = folder / name
    absent = [name for name in (METADATA_NAME, CONFIG_NAME, COMMON_NAME) if not (folder / name).is_file()]
    if len(absent) == 3:
        raise ValueError(
            f"{folder} is no Megatron checkpoint in torch_dist format: it has no {METADATA_NAME}, {CONFIG_NAME} or "
            f"{COMMON_NAME}. Checkpoints of another format (mp_rank_00/..., .pt): save them again with "
            "--ckpt-format torch_dist"
        )
    if absent:
        raise ValueError(f"{folder} is not whole: it has no {', '.join(absent)}; its saving was probably cut off")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME} is damaged ({error}); take another checkpoint") from error
    if config.get("sharded_backend") != "torch_dist":
        raise ValueError(
            f"{folder} is stored as {config.get('sharded_backend')!r}; only 'torch_dist' is read. "
            "Save it again with --ckpt-format torch_dist"
        )
    return folder


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        module = MOVED.get(module, module)
        if name in PICKLED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint's metadata does")


def _enum_member(of: Any, name: str) -> Any:
    """How Python 3.11 pickles a member of an enumeration."""
    if not isinstance(of, enum.EnumMeta):
        raise pickle.UnpicklingError(f"it asks for {name} of {of}, which is no enumeration")
    return of[name]


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise ValueError(f"{path} is no metadata of a distributed checkpoint")
    return metadata


def _check_files(folder: Path, metadata: Metadata) -> None:
    """Every file that the metadata points into must reach as far as it points."""
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        name = stored.relative_path
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder}/{METADATA_NAME} points to {name}, outside its folder")
        ends[name] = max(ends.get(name, 0), stored.offset + stored.length)
    for name, end in sorted(ends.items()):
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None or size < end:
            what = "is missing" if size is None else f"has {size} bytes of at least {end}"
            raise ValueError(f"{folder} is not whole: {name} {what}; its saving or copying was probably cut off")


def _read_blob(path: Path, offset: int, length: int) -> Tensor:
    """What torch.save wrote at a place in a file; its values are mapped from there where they lie in order."""
    with path.open("rb") as file:
        view: Any = _create_file_view(file, offset, length)
        described = torch.load(view, map_location="meta", weights_only=True)  # reads no values
        view.seek(0)
        is_plain = described.is_contiguous() and described.untyped_storage().nbytes() == described.nbytes
        if not is_plain or not described.numel():
            return torch.load(view, map_location="cpu", weights_only=True)
        archive: Any = torch._C.PyTorchFileReader(view)
        start = offset + archive.get_record_offset("data/0")
        first = start - start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(file.fileno(), start - first + described.nbytes, offset=first, access=mmap.ACCESS_COPY)
    flat = torch.frombuffer(mapped, dtype=described.dtype, count=described.numel(), offset=start - first)
    return flat.view(described.shape)


def _narrow(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def _is_tensor(stored: Any) -> bool:
    return isinstance(stored, TensorStorageMetadata)


# -- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A block of a stored tensor."""

    name: str
    offsets: tuple[int, ...]
    size: tuple[int, ...]
    whole: tuple[int, ...]  # the size of the stored tensor
    dtype: torch.dtype
    load: Callable[[], Tensor]  # its values, when they are written

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize


def write_torch_dist(
    folder: Path,
    chunks: Sequence[Chunk],
    *,
    objects: Iterable[str] = (),
    common: dict[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a checkpoint into an empty folder. A chunk's values are asked for once, in order, and not kept.

    Args:
        objects: names of entries that are stored as None, such as the states of layers that have none.
        common: plain values that Megatron's `load_common_state_dict` returns.
        file_bytes: how large a file may be, unless one chunk is larger.
    """
    plans = [SavePlan([_write_item(chunk) for chunk in file]) for file in _files(chunks, file_bytes)]
    nothing = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    plans[0].items.extend(nothing)
    # Nothing is copied ahead on another thread: one tensor is in memory.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0, sync_files=True)
    writer.set_up_storage_writer(is_coordinator=True)
    planner = _FromChunks(chunks)
    results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
    stored: dict[str, Any] = {item.index.fqn: BytesStorageMetadata() for item in nothing}
    for chunk in chunks:
        if chunk.name not in stored:
            stored[chunk.name] = TensorStorageMetadata(TensorProperties(chunk.dtype), torch.Size(chunk.whole), [])
        block = ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.size))
        stored[chunk.name].chunks.append(block)
    writer.finish(Metadata(stored), results)
    torch.save(common or {}, folder / COMMON_NAME)
    save_config(CheckpointingConfig("torch_dist"), os.fspath(folder))


def _files(chunks: Sequence[Chunk], file_bytes: int) -> Iterator[list[Chunk]]:
    file: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if file and size + chunk.nbytes > file_bytes:
            yield file
            file, size = [], 0
        file.append(chunk)
        size += chunk.nbytes
    yield file


def _write_item(chunk: Chunk) -> WriteItem:
    block = ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.size))
    data = TensorWriteData(block, TensorProperties(chunk.dtype), torch.Size(chunk.whole))
    return WriteItem(MetadataIndex(chunk.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _FromChunks(DefaultSavePlanner):
    """Loads a chunk's values when they are written."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__()
        self._loaded = ((chunk, chunk.load()) for chunk in chunks)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([None], data)
            return data
        chunk, tensor = next(self._loaded)  # a plan's items are written in its order
        assert (chunk.name, torch.Size(chunk.offsets)) == (write_item.index.fqn, write_item.index.offset)
        assert tensor.dtype == chunk.dtype
        return tensor.reshape(chunk.size)
