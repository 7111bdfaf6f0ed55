"""Builds every rank's part of a model without memory or other processes, and checks that the parts make the whole.

Tensors are on torch's meta device and process groups are torch's fake ones, whose collectives do nothing; the code that
builds is the trainer's own: init_parallel, build_model, adapters, DDP and optimizer. This changes torch for the whole
process, so `dry_build` starts one of its own: `python -m megatron_ext.dry_build` reads a request and writes a result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.hf_mapping import ModelShape, Rule
from megatron_ext.memory import ParallelSizes


@dataclass(frozen=True)
class DryRank:
    """What the optimizer of a full training pass holds on one rank, counted in elements."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    expert_rank: int
    parameters: int
    gradients: int  # DDP's float32 buffers, padding included
    optimizer: int  # this rank's share of the main weights
    adapters: int  # parameters of the adapters, 0 without


@dataclass(frozen=True)
class DryBuild:
    ranks: tuple[DryRank, ...]  # one of each kind: ranks that differ in nothing but data or context rank are alike
    world: int
    num_tensors: int  # of the model's folder, each covered exactly once
    seconds: float  # building and checking, without the start of the process

    @property
    def heaviest(self) -> DryRank:
        return max(self.ranks, key=lambda rank: rank.parameters)

    @property
    def lightest(self) -> DryRank:
        return min(self.ranks, key=lambda rank: rank.parameters)


def dry_build(
    shape: ModelShape,
    sizes: ParallelSizes,
    *,
    recompute: str,
    distributed_optimizer: bool,
    lora_rank: int,
    timeout_s: float = 600.0,
) -> DryBuild:
    """Build what each rank of `sizes.world` would hold, in a process of its own that sees no GPU.

    Raises ValueError if the layout cannot hold the model, a part has not the size that the rules say, or the parts of
    all ranks do not make up the model.
    """
    request = {
        "shape": asdict(shape),
        "sizes": asdict(sizes),
        "recompute": recompute,
        "distributed_optimizer": distributed_optimizer,
        "lora_rank": lora_rank,
    }
    environment = {"CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(sizes.world), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_ext.dry_build"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired as error:
        kinds = sizes.tensor * sizes.pipeline * sizes.expert
        raise ValueError(f"building {kinds} kinds of rank took longer than {timeout_s:.0f} s") from error
    if done.returncode:
        raise ValueError(f"the model cannot be built in this layout: {done.stderr.strip().splitlines()[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return DryBuild(**{**answer, "ranks": tuple(DryRank(**rank) for rank in answer["ranks"])})


def main() -> None:
    request = json.load(sys.stdin)
    try:
        found = asdict(
            _build_all(
                ModelShape(**request["shape"]),
                ParallelSizes(**request["sizes"]),
                recompute=request["recompute"],
                distributed_optimizer=request["distributed_optimizer"],
                lora_rank=request["lora_rank"],
            )
        )
    except ValueError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


def _build_all(
    shape: ModelShape, sizes: ParallelSizes, *, recompute: str, distributed_optimizer: bool, lora_rank: int
) -> DryBuild:
    import torch

    warnings.simplefilter("ignore")
    _nothing_is_allocated()
    started = time.monotonic()
    parts, ranks = _Parts(shape, sizes), []
    for rank in _one_of_each_kind(sizes):
        layout = _join(rank, sizes)
        with torch.device("meta"):
            ranks.append(
                _build(
                    shape, layout, parts, recompute, distributed_optimizer=distributed_optimizer, lora_rank=lora_rank
                )
            )
        _leave()
    return DryBuild(tuple(ranks), sizes.world, parts.check_whole(), time.monotonic() - started)


def _one_of_each_kind(sizes: ParallelSizes) -> Iterator[int]:
    """Ranks that differ in tensor, expert or pipeline rank. Nothing that is built asks for data or context rank."""
    per_stage = sizes.world // sizes.pipeline
    for stage in range(sizes.pipeline):
        yield from range(stage * per_stage, stage * per_stage + sizes.tensor * sizes.expert)


def _nothing_is_allocated() -> None:
    """What says "cuda" to Megatron, or "cpu" in its CPU mode, says "meta"; groups of any backend are fake ones."""
    import torch
    import torch.distributed as dist
    from torch.overrides import TorchFunctionMode
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend

    from megatron_ext.cpu import enable_cpu_mode

    class CudaMeansMeta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
                kwargs["device"] = "meta"
            result = func(*args, **kwargs)
            if func is torch.Tensor.type and isinstance(result, str):
                return result.replace("torch.cuda.meta.", "torch.cuda.")  # optimizers sort parameters by this name
            return result

    enable_cpu_mode()
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    distributed: Any = dist
    new_group = distributed.new_group
    distributed.new_group = lambda *args, backend=None, **options: new_group(*args, backend="fake", **options)
    CudaMeansMeta().__enter__()


def _join(rank: int, sizes: ParallelSizes) -> Any:
    """The layout of a rank."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ext.parallel import init_parallel

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.world)
    layout = init_parallel(
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        sequence=sizes.sequence,
        expert=sizes.expert,
        context=sizes.context,
        device="cpu",
    )
    return dataclasses.replace(layout, device=torch.device("meta"))


def _leave() -> None:
    from megatron_ext.parallel import close_parallel

    close_parallel()


def _build(
    shape: ModelShape, layout: Any, parts: _Parts, recompute: str, *, distributed_optimizer: bool, lora_rank: int
) -> DryRank:
    import torch
    from megatron.core import parallel_state

    from megatron_ext.lora import LoraSettings, adapters, attach_adapters
    from megatron_ext.model import ModelSettings, build_model
    from megatron_ext.optimizer import OptimizerSettings, build_optimizer
    from megatron_ext.training import wrap_data_parallel

    settings = ModelSettings(torch.bfloat16, recompute)
    adam = OptimizerSettings(1e-6, (0.9, 0.999), 0.0, 1.0, distributed_optimizer)
    model = build_model(shape, settings, layout)
    num_parameters = sum(p.numel() for p in model.parameters())
    parts.add(model, layout)
    ddp = wrap_data_parallel(model, distributed_optimizer=distributed_optimizer)
    optimizer = build_optimizer(ddp, adam, torch.bfloat16)
    num_adapters = 0
    if lora_rank:
        frozen = build_model(shape, settings, layout)
        attach_adapters(frozen, shape, LoraSettings(lora_rank, 2 * lora_rank, 0), layout)
        wrapped = wrap_data_parallel(frozen, distributed_optimizer=distributed_optimizer)
        build_optimizer(wrapped, adam, torch.bfloat16)
        num_adapters = sum(p.numel() for adapter in adapters(frozen) for p in adapter.parameters())
    return DryRank(
        rank=layout.rank,
        tensor_rank=layout.tensor_rank,
        pipeline_rank=layout.pipeline_rank,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        parameters=num_parameters,
        gradients=sum(buffer.grad_data.numel() for buffer in ddp.buffers + ddp.expert_parallel_buffers),
        optimizer=sum(_main_elements(part) for part in getattr(optimizer, "chained_optimizers", [optimizer])),
        adapters=num_adapters,
    )


def _main_elements(optimizer: Any) -> int:
    if optimizer.optimizer is None:  # a rank may have no share of the experts
        return 0
    return sum(p.numel() for group in optimizer.optimizer.param_groups for p in group["params"])


class _Parts:
    """Collects the shards of all ranks under the names of the model's folder."""

    def __init__(self, shape: ModelShape, sizes: ParallelSizes) -> None:
        self.shape, self.sizes = shape, sizes
        self.seen: Counter[tuple[str, int]] = Counter()  # (Megatron's name, tensor rank)
        self.shards: dict[str, list[tuple[int, ...]]] = {}  # Megatron's name: size on each tensor rank

    def add(self, model: Any, layout: Any) -> None:
        """Raises ValueError if a shard has another size than its rule says, or a parameter has no rule."""
        import torch

        from megatron_ext.hf_mapping import hf_size, local_rules, to_shard

        covered = set()
        for rule, parameter in local_rules(model, self.shape):
            whole = [torch.empty(hf_size(name, self.shape)) for name in rule.hf]
            expected = to_shard(rule, whole, self.shape, layout.tensor_rank, layout.tensor).shape
            if parameter.shape != expected:
                raise ValueError(
                    f"rank {layout.rank} holds {tuple(parameter.shape)} of {rule.megatron}, "
                    f"where its share is {tuple(expected)}"
                )
            self.seen[rule.megatron, layout.tensor_rank] += 1
            sizes = self.shards.setdefault(rule.megatron, [()] * layout.tensor)
            sizes[layout.tensor_rank] = tuple(parameter.shape)
            covered.add(id(parameter))
        is_copy = self.shape.tied_embeddings and model.post_process and not model.pre_process
        copies = {id(model.output_layer.weight)} if is_copy else set()
        for name, parameter in model.named_parameters():
            if id(parameter) not in covered | copies:
                raise ValueError(f"rank {layout.rank} holds {name}, which no rule of hf_mapping.py names")

    def _put_together(self, rule: Rule) -> dict[str, tuple[int, ...]]:
        """Sizes of the whole tensors that the rule's shards make up."""
        import torch

        from megatron_ext.hf_mapping import from_shards

        shards = [torch.empty(size, device="meta") for size in self.shards[rule.megatron]]
        return {name: tuple(whole.shape) for name, whole in from_shards(rule, shards, self.shape).items()}

    def check_whole(self) -> int:
        """The number of tensors that all shards make up. Raises ValueError unless each is there exactly once."""
        from megatron_ext.hf_mapping import hf_sizes, model_rules

        sizes, names = self.sizes, list[str]()
        expected = hf_sizes(self.shape)
        for rule in model_rules(self.shape):
            # Every expert rank holds what is no expert's; an expert is on one.
            copies = 1 if rule.is_expert else sizes.expert
            for rank in range(sizes.tensor):
                if self.seen[rule.megatron, rank] != copies:
                    raise ValueError(
                        f"{rule.megatron} is on {self.seen[rule.megatron, rank]} ranks of tensor rank {rank}, "
                        f"it should be on {copies}"
                    )
            for name, size in self._put_together(rule).items():
                if size != expected[name]:
                    raise ValueError(f"the shards of {name} make up {size}, the model has {expected[name]}")
            names += rule.hf
        if sorted(names) != sorted(expected):
            raise ValueError("the rules do not name every tensor of the model exactly once")
        return len(names)


if __name__ == "__main__":
    main()
