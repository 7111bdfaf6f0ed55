"""Reads and writes HuggingFace folders, a tensor at a time: alone, and from and to a sharded Megatron model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ext.buckets import Allocate, Bucket, stream_buckets
from megatron_ext.hf_mapping import (
    EMBEDDING,
    HEAD,
    ModelShape,
    Rule,
    expert_rule,
    from_shards,
    hf_sizes,
    local_rules,
    to_shard,
)
from megatron_ext.lora import Adapter
from megatron_ext.model import HiddenStateModel
from megatron_ext.parallel import Layout, expert_group

INDEX_NAME = "model.safetensors.index.json"
MERGED_NAME = "merged_lora.json"  # of peft_io.py: which adapters are in the weights
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # config, tokenizer, chat template, generation config
SHARD_BYTES = 4 << 30
BUCKET_BYTES = 256 << 20  # tensors on their way to a file
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize


class HFReader:
    """Random access to the tensors of a HuggingFace folder, without loading it whole.

    Raises ValueError if the folder has no safetensors weights, or lacks some that its index names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX_NAME).is_file():
            weight_map = json.loads((folder / INDEX_NAME).read_text()).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{folder / INDEX_NAME} has no weight_map; copy or download the folder again")
            files = sorted(set(weight_map.values()))
            if outside := [name for name in files if Path(name).name != name]:
                raise ValueError(f"{folder / INDEX_NAME} names {outside[0]}, which is no file of that folder; not read")
        elif (folder / SINGLE_NAME).is_file():
            weight_map, files = None, [SINGLE_NAME]
        else:
            raise ValueError(
                f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; give a folder with safetensors weights"
            )
        self._files: dict[str, str] = {}
        self._specs: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in files:
            for name, spec in _read_header(folder / file).items():
                self._files[name], self._specs[name] = file, spec
        if absent := sorted(name for name in weight_map or {} if self._files.get(name) != weight_map[name]):
            raise ValueError(
                f"{folder} is not whole: {weight_map[absent[0]]} lacks {absent[0]}, which {INDEX_NAME} says is in it "
                f"({len(absent)} such); copy or download the folder again"
            )

    def names(self) -> set[str]:
        return set(self._files)

    def in_file_order(self) -> list[str]:
        """All names, those of one file together."""
        return sorted(self._files, key=lambda name: (self._files[name], name))

    def spec(self, name: str) -> TensorSpec:
        """Raises ValueError for a type that is no plain float."""
        size, dtype = self._specs[name]
        if dtype not in DTYPES:
            raise ValueError(
                f"{name} in {self.folder} is stored as {dtype}; only {', '.join(DTYPES)} are read. "
                "Use the checkpoint's unquantized version"
            )
        return TensorSpec(size, DTYPES[dtype])

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.folder / self._files[name], "pt") as file:
            return file.get_tensor(name)


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Size and type of every tensor in a file, which must be as long as its header says."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or download the folder again") from error


def check_weights(reader: HFReader, shape: ModelShape) -> None:
    """Raises ValueError if tensors are missing, unknown, or of another size than the folder's config.json says."""
    folder, expected = reader.folder, hf_sizes(shape)
    # A tied checkpoint may still carry a copy of its head.
    surplus = reader.names() - set(expected) - (set(HEAD.hf) if shape.tied_embeddings else set())
    if missing := expected.keys() - reader.names():
        raise ValueError(f"{folder} lacks {len(missing)} tensors of its architecture, first: {sorted(missing)[0]}")
    if surplus:
        raise ValueError(f"{folder} holds {len(surplus)} tensors without a mapping rule, first: {sorted(surplus)[0]}")
    for name, size in expected.items():
        found = reader.spec(name).size
        if found != size:
            what = f"a vocabulary of {shape.vocab_size}" if name in (*EMBEDDING.hf, *HEAD.hf) else f"{size}"
            raise ValueError(
                f"{name} in {folder} is {found} where config.json says {what}; "
                "the folder's weights and config.json do not belong together"
            )


@torch.no_grad()
def load_hf_weights(model: HiddenStateModel, folder: Path, shape: ModelShape, layout: Layout) -> None:
    """Fill this rank's parameters from a HuggingFace folder. Raises ValueError if it does not fit (`check_weights`)."""
    reader = HFReader(folder)
    check_weights(reader, shape)
    for rule, parameter in local_rules(model, shape):
        parts = [reader.tensor(name) for name in rule.hf]
        parameter.copy_(to_shard(rule, parts, shape, layout.tensor_rank, layout.tensor))
    if shape.tied_embeddings and model.post_process and not model.pre_process:
        # The last stage holds its own copy of the embedding as its head.
        embedding = to_shard(EMBEDDING, [reader.tensor(EMBEDDING.hf[0])], shape, layout.tensor_rank, layout.tensor)
        model.output_layer.weight.copy_(embedding)


def hf_tensors(model: HiddenStateModel, shape: ModelShape, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Whole HuggingFace tensors, adapters merged in float32, one after another on rank 0.

    Collective: every rank must exhaust the iterator; all but rank 0 get nothing.
    """
    for bucket in hf_buckets(model, shape, layout, bucket_bytes=BUCKET_BYTES, everywhere=False):
        yield from bucket.tensors()


def hf_buckets(
    model: HiddenStateModel,
    shape: ModelShape,
    layout: Layout,
    *,
    bucket_bytes: int,
    everywhere: bool,
    only_adapted: bool = False,
    allocate: Allocate | None = None,
) -> Iterator[Bucket]:
    """Whole HuggingFace tensors, adapters merged in float32, in buckets. Collective, see `stream_buckets`.

    Gathers over tensor- and expert-parallel ranks, walks over pipeline stages. `only_adapted` leaves out what no
    adapter changes.
    """
    export = _exporter(model, shape, layout, only_adapted=only_adapted)
    return stream_buckets(export, layout, bucket_bytes=bucket_bytes, everywhere=everywhere, allocate=allocate)


@torch.no_grad()
def hf_tensors_everywhere(
    model: HiddenStateModel, shape: ModelShape, layout: Layout, *, bucket_bytes: int, only_adapted: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """What `hf_buckets` gives everywhere, tensor by tensor: views of parameters where those are whole. Collective."""
    export = _exporter(model, shape, layout, only_adapted=only_adapted)
    if layout.pipeline == 1:
        yield from export()
        return
    for bucket in stream_buckets(export, layout, bucket_bytes=bucket_bytes, everywhere=True):
        yield from bucket.tensors()


def _exporter(
    model: HiddenStateModel, shape: ModelShape, layout: Layout, *, only_adapted: bool
) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """Gives this stage's tensors at every call, for `stream_buckets`."""
    modules = dict(model.named_modules())

    def adapter_of(name: str) -> Adapter | None:
        found = modules[name.rpartition(".")[0]]._modules.get("lora") if name.endswith(".weight") else None
        return found if isinstance(found, Adapter) else None

    def merged(parameter: Tensor, adapter: Adapter | None) -> Tensor:
        if adapter is None:
            return parameter.detach()
        return (parameter.float() + adapter.weight_delta()).to(parameter.dtype)

    def export() -> Iterator[tuple[str, Tensor]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for rule, parameter in local_rules(model, shape):
            adapter = adapter_of(names[id(parameter)])
            if only_adapted and adapter is None:
                continue
            shards = gather_shards(merged(parameter, adapter), layout)
            for owner, whole in gather_experts(rule, from_shards(rule, shards, shape), shape, layout):
                yield from zip(owner.hf, whole, strict=True)

    return export


def gather_experts(
    rule: Rule, whole: dict[str, Tensor], shape: ModelShape, layout: Layout
) -> Iterator[tuple[Rule, list[Tensor]]]:
    """The same parameter of every expert-parallel rank's expert, each with its rule. Collective over their group."""
    tensors = list(whole.values())
    if not rule.is_expert or layout.expert == 1:
        yield rule, tensors
        return
    group, local = expert_group(), shape.num_experts // layout.expert
    gathered = []
    for tensor in tensors:
        gathered.append([torch.empty_like(tensor) for _ in range(layout.expert)])
        dist.all_gather(gathered[-1], tensor.contiguous(), group=group)
    for rank in range(layout.expert):
        yield expert_rule(rule, rank * local + rule.place[1] % local), [parts[rank] for parts in gathered]


def gather_shards(local: Tensor, layout: Layout) -> list[Tensor]:
    """The tensors of all tensor-parallel ranks, in rank order. Collective over the tensor-parallel group."""
    if layout.tensor == 1:
        return [local]
    local = local.contiguous()
    shards = [torch.empty_like(local) for _ in range(layout.tensor)]
    dist.all_gather(shards, local, group=parallel_state.get_tensor_model_parallel_group())
    return shards


def save_hf(
    tensors: Iterable[tuple[str, Tensor]],
    *,
    specs: Mapping[str, TensorSpec],
    out: Path,
    config_from: Path,
    shard_bytes: int = SHARD_BYTES,
    finish: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write a HuggingFace folder: safetensors shards and index, and config and tokenizer files from another folder.

    One tensor at a time is in memory. Atomic: a killed write leaves no folder at `out`.

    Args:
        tensors: exactly those of `specs`, in any order; rounded to the type named there.
        shard_bytes: how large a file may be, unless one tensor is larger.
        finish: may add files before the folder gets its name.
    """

    def write(partial: Path) -> None:
        _write_hf(partial, tensors, specs, config_from, shard_bytes)
        finish(partial)

    publish(write, out)


def _write_hf(
    partial: Path,
    tensors: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, TensorSpec],
    config_from: Path,
    shard_bytes: int,
) -> None:
    copy_hf_settings(config_from, partial, dtype=next(iter(specs.values())).dtype)
    shards = _plan_shards(specs, shard_bytes)
    names = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE_NAME]
    place: dict[str, tuple[Path, int]] = {}  # tensor -> its file and byte in it
    for name, shard in zip(names, shards, strict=True):
        offsets = _start_safetensors(partial / name, shard)
        place.update({tensor: (partial / name, offset) for tensor, offset in offsets.items()})
    if len(shards) > 1:
        weight_map = {tensor: path.name for tensor, (path, _) in place.items()}
        index = {"metadata": {"total_size": sum(s.nbytes for s in specs.values())}, "weight_map": weight_map}
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True))
    for tensor_name, tensor in tensors:
        path, offset = place.pop(tensor_name)
        assert tuple(tensor.shape) == specs[tensor_name].size, tensor_name
        tensor = tensor.detach().to("cpu", specs[tensor_name].dtype).contiguous()
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    assert not place, f"{len(place)} tensors were never given, first: {next(iter(place))}"


def copy_hf_settings(source: Path, out: Path, *, dtype: torch.dtype) -> None:
    """Config, with the type of the weights beside it, generation config, tokenizer and chat template."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name not in (INDEX_NAME, MERGED_NAME):  # which are of the weights that lie there
                shutil.copy2(file, out / file.name)
    config = json.loads((out / CONFIG_NAME).read_text())
    name = str(dtype).removeprefix("torch.")
    stale = [key for key in ("dtype", "torch_dtype") if config.get(key, name) != name]
    if stale:
        config.update(dict.fromkeys(stale, name))
        (out / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def check_space(out: Path, needed: int) -> None:
    """Raises ValueError if the disk of a folder that is to be made has fewer bytes free than it needs."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise ValueError(
            f"{existing} has {free / 1e9:.1f} GB free, {out.name} needs {needed / 1e9:.1f} GB; make room, or give "
            "a folder on another disk"
        )


def refuse_to_overwrite(source: Path, out: Path) -> None:
    """Raises ValueError if reading `source` would meet the folder that `publish` clears and writes."""
    partial = _partial(out).resolve()
    if partial in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{source} is what a cut-off run left for {out}, and would be cleared; rename it first")


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def publish(write: Callable[[Path], None], out: Path) -> None:
    """Have a folder written under another name, and give it its own once its bytes are on the disk."""
    partial = _partial(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _plan_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _start_safetensors(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Write a file's header and reserve its data; returns at which byte each tensor belongs.

    The safetensors library writes a file only from tensors that are all in memory.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        offsets = [end, end + spec.nbytes]
        header[name] = {"dtype": names[spec.dtype], "shape": list(spec.size), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in specs}
