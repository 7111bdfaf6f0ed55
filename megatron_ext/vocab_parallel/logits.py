"""Token log-probabilities, entropy and clipped forward KL of logits that lie in memory, differentiable (M0).

Shapes: R rows, v local columns of a vocabulary of V that is split over the ranks of `VocabShard.group`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.vocab_parallel.backends import kernels_for
from megatron_ext.vocab_parallel.protocol import KLBlock, KLRows, RowKernels, TokenBlock
from megatron_ext.vocab_parallel.shard import VocabShard
from megatron_ext.vocab_parallel.values import ClippedKL, TokenLogprobs


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    *,
    temperature: float = 1.0,
    live: Tensor | None = None,
    consume: bool = False,
    kernels: RowKernels | None = None,
) -> TokenLogprobs:
    """log p(target) and the entropy of each row, float32, differentiable in `logits`. One collective.

    Args:
        logits: [R, v], this rank's columns, padding included; float32, bfloat16 or float16.
        targets: [R] int64 ids in [0, V).
        temperature: logits are divided by it.
        live: [R] bool; a row that is not live is never read and has value 0 and gradient 0. None: all are.
        consume: the gradient overwrites `logits`, which nobody else may need; backward runs once.
        kernels: row kernels to use instead of the fastest for this device.
    Raises:
        ValueError: shapes or types do not fit, or a target is no column of the vocabulary.
    """
    check_logits(shard, logits, is_written=consume)
    check_targets(targets, len(logits), shard)
    live = check_live(live, len(logits))
    kernels = kernels or kernels_for(logits)
    return TokenLogprobs(
        *_TokenLogprobs.apply(logits, targets, live, shard, 1 / check_temperature(temperature), consume, kernels)
    )


def clipped_kl(
    student: Tensor,
    teacher: Tensor,
    shard: VocabShard,
    *,
    kl_clip: float,
    temperature: float = 1.0,
    live: Tensor | None = None,
    consume: bool = False,
    kernels: RowKernels | None = None,
) -> ClippedKL:
    """Forward KL(teacher || student) with every vocabulary entry clipped from above: Eq. 7's inner sum.

    Differentiable in `student` only. A clipped entry has no gradient, so a row whose teacher mass sits on clipped
    entries learns nothing: watch `clipped_mass`. The clipped sum can be negative (>= -1/e). One collective, and a
    second one if some row may be clipped.

    Args:
        student, teacher: [R, v] logits of one dtype, this rank's columns, padding included.
        kl_clip: tau_clip, 0 or more; infinity gives the plain forward KL.
        temperature: both logits are divided by it.
        live: [R] bool; a row that is not live is never read and has value 0 and gradient 0. None: all are.
        consume: the gradient overwrites `teacher`, which nobody else may need; backward runs once.
        kernels: row kernels to use instead of the fastest for this device.
    Raises:
        ValueError: shapes, types or settings do not fit.
    """
    check_logits(shard, student, teacher, is_written=consume)
    check_clip(kl_clip)
    live = check_live(live, len(student))
    kernels = kernels or kernels_for(student)
    scale = 1 / check_temperature(temperature)
    return ClippedKL(*_ClippedKL.apply(student, teacher.detach(), live, shard, scale, kl_clip, consume, kernels))


def check_logits(shard: VocabShard, *logits: Tensor, is_written: bool) -> None:
    first = logits[0]
    for each in logits:
        if each.ndim != 2 or each.shape[1] != shard.size or each.shape != first.shape or each.dtype != first.dtype:
            raise ValueError(
                f"logits must be [rows, {shard.size}] of one dtype for this rank's columns {shard.start} to "
                f"{shard.start + shard.size - 1}, got {[(tuple(x.shape), x.dtype) for x in logits]}"
            )
        if len(each) and (each.stride(1) != 1 or each.stride() != first.stride()):
            raise ValueError("columns of logits must lie next to each other and rows alike; call .contiguous() first")
        if is_written and len(each) > 1 and each.stride(0) < each.shape[1]:
            raise ValueError("logits with consume=True must not share memory between rows (expand); call .contiguous()")


def check_targets(targets: Tensor, num_rows: int, shard: VocabShard) -> None:
    if targets.shape != (num_rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{num_rows}], got {targets.dtype} {tuple(targets.shape)}")
    if targets.is_cuda:  # reading them would wait for the GPU; the kernels give -inf for a target that nobody holds
        return
    if num_rows and (int(targets.min()) < 0 or int(targets.max()) >= shard.vocab_size):
        raise ValueError(
            f"targets range from {int(targets.min())} to {int(targets.max())}, but the vocabulary has ids 0 to "
            f"{shard.vocab_size - 1}; ids behind it are padding of the head"
        )


def check_live(live: Tensor | None, num_rows: int) -> Tensor | None:
    if live is not None and (live.shape != (num_rows,) or live.dtype != torch.bool):
        raise ValueError(f"live must be bool [{num_rows}], got {live.dtype} {tuple(live.shape)}")
    return None if live is None else live.contiguous()


def check_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be more than 0 and finite, got {temperature}")
    return temperature


def check_clip(kl_clip: float) -> float:
    if not kl_clip >= 0:
        raise ValueError(f"kl_clip must be 0 or more (infinity for none), got {kl_clip}")
    return kl_clip


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        live: Tensor | None,
        shard: VocabShard,
        scale: float,
        consume: bool,
        kernels: RowKernels,
    ) -> tuple[Tensor, ...]:
        block = TokenBlock(kernels, logits, targets.contiguous(), live, shard, scale)
        rows = block.finish(block.start())
        ctx.save_for_backward(logits, block.targets, live, rows)
        ctx.settings = (shard, scale, consume, kernels)
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in block.values(rows))  # `rows` is kept for backward

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_logprobs: Tensor | None, for_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if for_logprobs is None and for_entropy is None:
            return (None,) * 7
        shard, scale, consume, kernels = _settings_once(ctx)
        logits, targets, live, rows = ctx.saved_tensors
        out = logits if consume else torch.empty_like(logits)
        block = TokenBlock(kernels, logits, targets, live, shard, scale)
        if for_logprobs is None:
            for_logprobs = torch.zeros_like(rows[:, 0])
        block.grad(rows, for_logprobs, for_entropy, out=out)
        return (out, *(None,) * 6)


class _ClippedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        live: Tensor | None,
        shard: VocabShard,
        scale: float,
        kl_clip: float,
        consume: bool,
        kernels: RowKernels,
    ) -> tuple[Tensor, ...]:
        block = KLBlock(kernels, student, teacher, live, shard, scale, kl_clip)
        found = block.finish(block.start())
        ctx.save_for_backward(student, teacher, live, *found)
        ctx.settings = (shard, scale, kl_clip, consume, kernels)
        values = tuple(value.clone() for value in block.values(found))
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        shard, scale, kl_clip, consume, kernels = _settings_once(ctx)
        student, teacher, live, *found = ctx.saved_tensors
        out = teacher if consume else torch.empty_like(student)
        block = KLBlock(kernels, student, teacher, live, shard, scale, kl_clip)
        block.grad(KLRows(*found), for_loss, out=out)
        return (out, *(None,) * 7)


def _settings_once(ctx: Any) -> tuple[Any, ...]:
    """What forward kept. With consume=True the first backward overwrites the logits, so there is no second one."""
    settings = ctx.settings
    if settings is None:
        raise RuntimeError(
            "backward ran before and overwrote these logits with their gradient (consume=True); "
            "pass consume=False to keep them"
        )
    if settings[-2]:
        ctx.settings = None
    return settings
