"""Converts between HuggingFace folders and Megatron's checkpoints, in one process, a tensor at a time.

A Megatron checkpoint has no layout: Megatron cuts what each rank needs when it loads. What a tensor is called and how
it is put together is in hf_mapping.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.hf_io import (
    DTYPES,
    HFReader,
    TensorSpec,
    check_space,
    check_weights,
    copy_hf_settings,
    publish,
    save_hf,
)
from megatron_ext.hf_mapping import (
    ModelShape,
    Rule,
    from_shards,
    hf_size,
    hf_sizes,
    model_rules,
    padded_vocab_size,
    to_shard,
)
from megatron_ext.torch_dist import TRACKER_NAME, Chunk, TorchDistReader, write_torch_dist

RELEASE = "release"  # what Megatron-LM calls a checkpoint of no iteration
HF_FOLDER = "hf"  # beside it: config and tokenizer, so that a model leaves as it came
OF_TRAINING = ("optimizer.", "chained_", "rng_state", "rerun_state_machine")  # not of the model


# -- HuggingFace -> Megatron ------------------------------------------------------------------------


def hf_chunks(reader: HFReader, shape: ModelShape, *, dtype: torch.dtype | None, tensor: int) -> list[Chunk]:
    """What a Megatron checkpoint holds of a HuggingFace folder.

    Args:
        dtype: of all stored tensors; None keeps each one's own.
        tensor: blocks are cut for this tensor-parallel size, so that its ranks read no others'. All sizes can load it.
    """
    if dtype is None:
        kinds: dict[str, tuple[str, torch.dtype]] = {}  # of each stored tensor, with who it is from
        for rule in model_rules(shape):
            for name in rule.hf:
                found = reader.spec(name).dtype
                first, expected = kinds.setdefault(rule.key, (name, found))
                if found != expected:
                    raise ValueError(
                        f"{reader.folder} stores {first} as {expected} and {name} as {found}, which Megatron holds in "
                        "one tensor; choose one with --dtype"
                    )
    return [chunk for rule in model_rules(shape) for chunk in _rule_chunks(reader, rule, shape, dtype, tensor)]


def _rule_chunks(
    reader: HFReader, rule: Rule, shape: ModelShape, dtype: torch.dtype | None, tensor: int
) -> Iterator[Chunk]:
    kept = dtype or reader.spec(rule.hf[0]).dtype
    whole = stored_size(rule, shape, tensor=tensor)
    depth = len(rule.place)
    dim = depth + (rule.layout == "columns")
    halves = 2 if rule.layout == "gate_up" else 1  # all ranks' gates come before all ranks' ups
    blocks = 1 if rule.layout == "replicated" else tensor
    size = [1] * depth + list(whole[depth:])
    size[dim] //= blocks * halves
    for half in range(halves):
        for rank in range(blocks):
            offsets = [*rule.place, *[0] * (len(whole) - depth)]
            offsets[dim] += (half * blocks + rank) * size[dim]
            load = partial(_block, reader, rule, shape, half, rank, tensor, kept)
            yield Chunk(rule.key, tuple(offsets), tuple(size), whole, kept, load)


def _block(
    reader: HFReader, rule: Rule, shape: ModelShape, half: int, rank: int, tensor: int, dtype: torch.dtype
) -> Tensor:
    if rule.layout == "gate_up":
        return reader.tensor(rule.hf[half]).chunk(tensor)[rank].to(dtype)
    parts = [reader.tensor(name) for name in rule.hf]
    return to_shard(rule, parts, shape, rank, tensor).to(dtype)


def stored_size(rule: Rule, shape: ModelShape, *, tensor: int = 1) -> tuple[int, ...]:
    """The size of a rule's stacked tensor in a checkpoint; `tensor` pads the vocabulary."""
    stack = (shape.num_layers, shape.num_experts)[: len(rule.place)]
    sizes = [hf_size(name, shape) for name in rule.hf]
    rows = padded_vocab_size(shape.vocab_size, tensor) if rule.layout == "vocab" else sum(size[0] for size in sizes)
    return (*stack, rows, *sizes[0][1:])


def empty_states(shape: ModelShape) -> Iterator[str]:
    """Entries that Megatron's layers ask for and have nothing in: Transformer Engine keeps scales of fp8 there."""

    def entry(key: str, place: tuple[int, ...]) -> str:
        stack = (shape.num_layers, shape.num_experts)[: len(place)] or (1,)
        return f"{key}/shard_{'.'.join(map(str, place or (0,)))}_{'.'.join(map(str, stack))}"

    for rule in model_rules(shape):
        if rule.layout != "vocab" and rule.key.endswith("weight") and "router" not in rule.key:
            yield entry(rule.key.removesuffix("weight") + "_extra_state", rule.place)
    for layer in range(shape.num_layers):
        yield entry("decoder.layers.self_attention.core_attention._extra_state", (layer,))


def hf_to_megatron(
    source: Path,
    out: Path,
    shape: ModelShape,
    *,
    dtype: torch.dtype | None = None,
    tensor: int = 1,
    moved: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write `out`/release, a tracker file as Megatron-LM reads it, and `out`/hf with config and tokenizer. Atomic.

    Raises ValueError if the folder's weights are not what its config says.
    """
    reader = HFReader(source)
    check_weights(reader, shape)
    chunks = [_counted(chunk, moved) for chunk in hf_chunks(reader, shape, dtype=dtype, tensor=tensor)]
    check_space(out, sum(chunk.nbytes for chunk in chunks))

    def write(partial: Path) -> None:
        (partial / RELEASE).mkdir()
        write_torch_dist(
            partial / RELEASE, chunks, objects=empty_states(shape), common={"checkpoint_version": 3.0, "iteration": 0}
        )
        (partial / HF_FOLDER).mkdir()
        copy_hf_settings(source, partial / HF_FOLDER, dtype=chunks[0].dtype)
        (partial / TRACKER_NAME).write_text(RELEASE + "\n")

    publish(write, out)


def _counted(chunk: Chunk, moved: Callable[[int], None]) -> Chunk:
    def load() -> Tensor:
        tensor = chunk.load()
        moved(tensor.nbytes)
        return tensor

    return Chunk(chunk.name, chunk.offsets, chunk.size, chunk.whole, chunk.dtype, load)


# -- Megatron -> HuggingFace ------------------------------------------------------------------------


def check_checkpoint(reader: TorchDistReader, shape: ModelShape) -> None:
    """Raises ValueError if a checkpoint lacks tensors of the model, has others, or their sizes are not the model's."""
    folder, names = reader.folder, reader.names()
    expected: dict[str, Rule] = {}
    for rule in model_rules(shape):
        expected.setdefault(_locate(rule, names)[0], rule)
    model = {name for name in names if not name.startswith(OF_TRAINING)}
    if adapters := sorted(name for name in model if ".lora." in name):
        raise ValueError(
            f"{folder} holds an adapter that is not merged ({len(adapters)} tensors, first: {adapters[0]}); "
            "merge it with tools/merge_lora.py"
        )
    if missing := sorted(set(expected) - names):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of the architecture, first: {missing[0]}")
    if surplus := sorted(model - set(expected)):
        raise ValueError(f"{folder} holds {len(surplus)} tensors without a mapping rule, first: {surplus[0]}")
    for name, rule in expected.items():
        depth = len(rule.place) - len(_locate(rule, names)[1])
        size, found = stored_size(rule, shape)[depth:], reader.size(name)
        if reader.dtype(name) not in DTYPES.values():
            raise ValueError(f"{name} in {folder} is stored as {reader.dtype(name)}; only plain floats are converted")
        fits = found[0] >= shape.vocab_size and found[1:] == size[1:] if rule.layout == "vocab" else found == size
        if not fits:
            needed = f"at least {shape.vocab_size} rows of {size[1:]}" if rule.layout == "vocab" else f"{size}"
            raise ValueError(
                f"{name} in {folder} is {found} where config.json says {needed}; they do not belong together"
            )


def checkpoint_tensors(reader: TorchDistReader, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Every HuggingFace tensor of a checkpoint, in the order of `hf_sizes`."""
    names = reader.names()
    for rule in model_rules(shape):
        name, place = _locate(rule, names)
        if rule.layout == "gate_up":  # stored one after the other: they need not be put together to be taken apart
            middle = hf_size(rule.hf[0], shape)[0]
            yield rule.hf[0], reader.tensor(name, place, rows=(0, middle))
            yield rule.hf[1], reader.tensor(name, place, rows=(middle, 2 * middle))
        else:
            yield from from_shards(rule, [reader.tensor(name, place)], shape).items()


def _locate(rule: Rule, names: set[str]) -> tuple[str, tuple[int, ...]]:
    """Where a rule's tensor is stored: in a stack of layers, or under its layer's own number."""
    if rule.key in names or not rule.place:
        return rule.key, rule.place
    numbered = rule.key.replace("decoder.layers.", f"decoder.layers.{rule.place[0]}.")
    return (numbered, rule.place[1:]) if numbered in names else (rule.key, rule.place)


def hf_specs(reader: TorchDistReader, shape: ModelShape, *, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """What a HuggingFace folder made of a checkpoint holds."""
    names = reader.names()
    kept = {hf: dtype or reader.dtype(_locate(rule, names)[0]) for rule in model_rules(shape) for hf in rule.hf}
    return {name: TensorSpec(size, kept[name]) for name, size in hf_sizes(shape).items()}


def megatron_to_hf(
    reader: TorchDistReader,
    out: Path,
    shape: ModelShape,
    *,
    config_from: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int,
    moved: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write a HuggingFace folder. Atomic. Raises ValueError if the checkpoint is not of this model."""
    check_checkpoint(reader, shape)

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint_tensors(reader, shape):
            yield name, tensor
            moved(specs[name].nbytes)

    specs = hf_specs(reader, shape, dtype=dtype)
    check_space(out, sum(spec.nbytes for spec in specs.values()))
    save_hf(counted(), specs=specs, out=out, config_from=config_from, shard_bytes=shard_bytes)
