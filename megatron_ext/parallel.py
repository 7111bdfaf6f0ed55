"""Process groups for tensor x context x data x pipeline and expert parallelism, over NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ext.blas import multiply_by_openblas
from megatron_ext.cpu import enable_cpu_mode
from megatron_ext.host import keep_freed_memory


@dataclass(frozen=True)
class Layout:
    """This process's place. tensor x context x data x pipeline is the world size, in this order of neighbours.

    `data_rank` says which samples a process trains on, `context_rank` which tokens of each, `sequence` shards
    activations over tensor. `expert` neighbouring replicas hold the experts of every layer between them, cut over
    tensor ranks as all is.
    """

    tensor: int
    pipeline: int
    data: int
    sequence: bool
    device: torch.device
    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    expert: int = 1
    context: int = 1
    context_rank: int = 0

    @property
    def replica(self) -> int:
        """This process's number among the data x context ranks, which hold the same shard of all but experts."""
        return self.data_rank * self.context + self.context_rank

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @property
    def is_writer(self) -> bool:
        """True on the one rank that talks to people, engines and files."""
        return self.rank == 0


def init_parallel(
    *,
    tensor: int,
    pipeline: int,
    sequence: bool,
    device: str,
    expert: int = 1,
    context: int = 1,
    timeout_s: float = 7200.0,
) -> Layout:
    """Join the process groups. Collective: call once on every rank; under torchrun or as a single process.

    Args:
        device: "cpu" or "cuda".
        timeout_s: how long a collective may wait for its last rank.
    Raises:
        ValueError: the world size is no multiple of tensor x pipeline x context, expert does not divide the number of
            replicas (data x context), or sequence is asked without tensor.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % (tensor * pipeline * context):
        raise ValueError(
            f"{world_size} processes cannot hold tensor-parallel {tensor} x pipeline-parallel {pipeline} "
            f"x context-parallel {context}; start a multiple of {tensor * pipeline * context} processes "
            "(torchrun --nproc-per-node) or lower the sizes"
        )
    replicas = world_size // (tensor * pipeline)
    if replicas % expert:
        raise ValueError(
            f"{world_size} processes hold {replicas} replicas of tensor-parallel {tensor} x pipeline-parallel "
            f"{pipeline}, over which experts cannot be spread {expert}-fold; set parallel.expert to a divisor of "
            f"{replicas}"
        )
    if sequence and tensor == 1:
        raise ValueError("sequence parallelism needs tensor parallelism of at least 2; set parallel.sequence=false")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        keep_freed_memory()
        multiply_by_openblas()
        enable_cpu_mode()
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        if "RANK" in os.environ:
            # After a restart torchrun's store still holds the addresses of ranks that are gone.
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        else:  # a single process needs no address
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        create_gloo_process_groups=True,  # the sharded optimizer gathers its state on the host
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    if device == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=replicas // context,
        sequence=sequence,
        device=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu"),
        rank=dist.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        expert=expert,
        context=context,
        context_rank=parallel_state.get_context_parallel_rank(),
    )


def close_parallel() -> None:
    """Leave the process groups, so that a finished rank does not hold up the others."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def replica_group() -> dist.ProcessGroup:
    """Ranks that hold the same shard of the model, data x context: losses and gradients are summed over them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def context_group() -> dist.ProcessGroup:
    """Ranks that share every packed sequence, in the order of `attention.context_positions`."""
    return parallel_state.get_context_parallel_group()


def expert_group() -> dist.ProcessGroup:
    """Ranks that hold the experts of one layer between them, in the order of the experts."""
    return parallel_state.get_expert_model_parallel_group()


def pipeline_group() -> dist.ProcessGroup:
    """Ranks that hold the stages of one replica, in stage order."""
    return parallel_state.get_pipeline_model_parallel_group()


def pipeline_last_rank() -> int:
    """Global rank of this replica's last stage."""
    return parallel_state.get_pipeline_model_parallel_last_rank()
