"""Reads and writes HuggingFace folders from and to a sharded Megatron model, a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.hf_mapping import EMBEDDING, HEAD, ModelShape, from_shards, local_rules, model_rules, to_shard
from megatron_ext.lora import Adapter
from megatron_ext.model import HiddenStateModel
from megatron_ext.parallel import Layout

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # config, tokenizer, chat template, generation config


class HFReader:
    """Random access to the tensors of a HuggingFace folder, without loading it whole."""

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX_NAME).is_file():
            self._files: dict[str, str] = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
        elif (folder / SINGLE_NAME).is_file():
            with safe_open(folder / SINGLE_NAME, "pt") as file:
                self._files = dict.fromkeys(file.keys(), SINGLE_NAME)
        else:
            raise ValueError(
                f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; give a folder with safetensors weights"
            )
        self._folder = folder

    def names(self) -> set[str]:
        return set(self._files)

    def in_file_order(self) -> list[str]:
        """All names, those of one file together."""
        return sorted(self._files, key=lambda name: (self._files[name], name))

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._folder / self._files[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._folder / self._files[name], "pt") as file:
            return file.get_tensor(name)


@torch.no_grad()
def load_hf_weights(model: HiddenStateModel, folder: Path, shape: ModelShape, layout: Layout) -> None:
    """Fill this rank's parameters from a HuggingFace folder.

    Raises ValueError if tensors are missing, unknown, or of the wrong shape.
    """
    reader = HFReader(folder)
    expected = {name for rule in model_rules(shape) for name in rule.hf}
    # A tied checkpoint may still carry a copy of its head.
    surplus = reader.names() - expected - (set(HEAD.hf) if shape.tied_embeddings else set())
    if missing := expected - reader.names():
        raise ValueError(f"{folder} lacks {len(missing)} tensors of its architecture, first: {sorted(missing)[0]}")
    if surplus:
        raise ValueError(f"{folder} holds {len(surplus)} tensors without a mapping rule, first: {sorted(surplus)[0]}")
    for rule, parameter in local_rules(model, shape):
        parts = [reader.tensor(name) for name in rule.hf]
        if rule.layout == "vocab" and len(parts[0]) != shape.vocab_size:  # padding would hide it
            raise ValueError(
                f"{rule.hf[0]} in {folder} has {len(parts[0])} rows where config.json says a vocabulary of "
                f"{shape.vocab_size}; the folder's weights and config.json do not belong together"
            )
        local = to_shard(rule, parts, shape, layout.tensor_rank, layout.tensor)
        if local.shape != parameter.shape:
            raise ValueError(
                f"{rule.hf[0]} in {folder} gives {tuple(local.shape)} where the model's config needs "
                f"{tuple(parameter.shape)}; the folder's weights and config.json do not belong together"
            )
        parameter.copy_(local)
    if shape.tied_embeddings and model.post_process and not model.pre_process:
        # The last stage holds its own copy of the embedding as its head.
        embedding = to_shard(EMBEDDING, [reader.tensor(EMBEDDING.hf[0])], shape, layout.tensor_rank, layout.tensor)
        model.output_layer.weight.copy_(embedding)


@torch.no_grad()
def hf_tensors(model: HiddenStateModel, shape: ModelShape, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Whole HuggingFace tensors, adapters merged in float32, one after another on rank 0.

    Collective over data-parallel replica 0: every rank of it must exhaust the iterator; all but rank 0 get nothing.
    Gathers over tensor-parallel ranks, walks over pipeline stages.
    """
    modules = dict(model.named_modules())

    def local_tensor(name: str, parameter: Tensor) -> Tensor:
        adapter = modules[name.rpartition(".")[0]]._modules.get("lora") if name.endswith(".weight") else None
        if not isinstance(adapter, Adapter):
            return parameter.detach()
        return (parameter.float() + adapter.weight_delta()).to(parameter.dtype)

    def export() -> Iterator[tuple[str, Tensor]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for rule, parameter in local_rules(model, shape):
            shards = gather_shards(local_tensor(names[id(parameter)], parameter), layout)
            yield from from_shards(rule, shards, shape).items()

    yield from walk_stages(export, layout)


def gather_shards(local: Tensor, layout: Layout) -> list[Tensor]:
    """The tensors of all tensor-parallel ranks, in rank order. Collective over the tensor-parallel group."""
    if layout.tensor == 1:
        return [local]
    local = local.contiguous()
    shards = [torch.empty_like(local) for _ in range(layout.tensor)]
    dist.all_gather(shards, local, group=parallel_state.get_tensor_model_parallel_group())
    return shards


def walk_stages(export: Callable[[], Iterable[tuple[str, Tensor]]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Run `export` on each pipeline stage in turn and hand its tensors to rank 0."""
    if layout.data_rank != 0:
        return
    group = parallel_state.get_pipeline_model_parallel_group()
    for stage in range(layout.pipeline):
        source = dist.get_global_rank(group, stage)
        if stage == 0:
            for item in export() if layout.pipeline_rank == 0 else ():
                if layout.is_writer:
                    yield item
            continue
        if layout.pipeline_rank == stage:
            for name, tensor in export():
                if layout.tensor_rank == 0:
                    header = [(name, tuple(tensor.shape), tensor.dtype)]
                    dist.send_object_list(header, dst=0)
                    dist.send(tensor.contiguous(), dst=0)
            if layout.tensor_rank == 0:
                dist.send_object_list([None], dst=0)
        elif layout.is_writer:
            while True:
                received: list[Any] = [None]
                dist.recv_object_list(received, src=source)
                if received[0] is None:
                    break
                name, size, dtype = received[0]
                tensor = torch.empty(size, dtype=dtype, device=layout.device)
                dist.recv(tensor, src=source)
                yield name, tensor


def save_hf(
    tensors: Iterable[tuple[str, Tensor]],
    *,
    out: Path,
    config_from: Path,
    shard_bytes: int = 4 << 30,
    finish: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write a HuggingFace folder: safetensors shards and index, and config and tokenizer files from another folder.

    Atomic: a killed write leaves no folder at `out`. `finish` may add files before the folder gets its name.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in COPIED:
        for source in config_from.glob(pattern):
            if source.name != INDEX_NAME:
                shutil.copy2(source, partial / source.name)
    shard: dict[str, Tensor] = {}
    num_shards, size, total = 1, 0, 0
    weight_map: dict[str, int] = {}
    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous().clone()
        if shard and size + tensor.nbytes > shard_bytes:
            save_file(shard, partial / f"shard-{num_shards}.safetensors", metadata={"format": "pt"})
            shard, size = {}, 0
            num_shards += 1
        shard[name] = tensor
        weight_map[name] = num_shards
        size += tensor.nbytes
        total += tensor.nbytes
    if num_shards == 1:
        save_file(shard, partial / SINGLE_NAME, metadata={"format": "pt"})
    else:
        save_file(shard, partial / f"shard-{num_shards}.safetensors", metadata={"format": "pt"})
        final = {k: f"model-{k:05d}-of-{num_shards:05d}.safetensors" for k in range(1, num_shards + 1)}
        for k, file in final.items():
            (partial / f"shard-{k}.safetensors").rename(partial / file)
        index = {"metadata": {"total_size": total}, "weight_map": {n: final[k] for n, k in weight_map.items()}}
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True))
    finish(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
