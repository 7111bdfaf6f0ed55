"""Runs packed micro-batches through Megatron's own forward-backward schedules, pipeline stages included.

Shapes: T packed tokens, n sequences, R rows (positions that predict a policy token), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ext.model import HiddenStateModel, packed_params
from megatron_ext.parallel import Layout
from megatron_ext.prefixes import Prefix

# (rows' hidden states [R, H], micro-batch number) -> (scalar loss, anything to keep). Runs on the last stage only.
RowsFunction = Callable[[Tensor, int], tuple[Tensor, Any]]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed end to end. Padding has no rows: it ends a sequence, or is a last sequence of its own.

    A prompt that several responses share is a sequence, and they are the sequences after it.

    Of C context-parallel ranks each holds T/C of the tokens, in the order of `attention.context_positions`.
    """

    token_ids: Tensor  # [T/C] int64
    position_ids: Tensor  # [T/C] int64, from 0 in each sequence; from the end of its prompt in a response
    cu_seqlens: Tensor  # [n + 1] int32, of the whole pack
    max_seqlen: int  # a response's is that with its prompt
    rows: Tensor  # [R] int64, places among this rank's tokens whose next token is a policy token
    prefixes: tuple[Prefix, ...] = ()  # prompts that are shared

    def to(self, device: torch.device) -> MicroBatch:
        """Lengths stay on the host, where packs are described."""
        return MicroBatch(
            self.token_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens,
            self.max_seqlen,
            self.rows.to(device, non_blocking=True),
            self.prefixes,
        )


def wrap_data_parallel(model: HiddenStateModel, *, distributed_optimizer: bool) -> DistributedDataParallel:
    """Megatron's DDP: gradients in contiguous float32 buffers, reduced once per update."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    return DistributedDataParallel(model.config, config, model)


def gradients(model: DistributedDataParallel) -> list[Tensor]:
    """The buffers that hold all gradients of this rank."""
    return [buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers)]


def run_schedule(
    model: torch.nn.Module, batches: Sequence[MicroBatch], on_rows: RowsFunction, layout: Layout, *, forward_only: bool
) -> list[Any]:
    """Forward (and backward) of all micro-batches; what `on_rows` kept, in order, on the last stage, else [].

    Losses add up over micro-batches and data-parallel ranks as they are. Collective over the model-parallel ranks
    of one replica, which must pass the same batches.
    """
    assert batches, "a rank without micro-batches would leave its pipeline waiting; pack an empty one"
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    source = iter(enumerate(batches))

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        index, batch = next(iterator)
        batch = batch.to(layout.device)
        hidden = model(
            batch.token_ids[None],
            batch.position_ids[None],
            None,
            packed_seq_params=packed_params(batch.cu_seqlens, batch.max_seqlen, layout=layout, prefixes=batch.prefixes),
        )

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            value, kept = on_rows(inner.gather_rows(hidden, batch.rows), index)
            return value, torch.zeros([], dtype=torch.int, device=layout.device), kept

        return hidden, loss

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=source,
        model=[model],
        num_microbatches=len(batches),
        seq_length=max(len(batch.token_ids) for batch in batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )
