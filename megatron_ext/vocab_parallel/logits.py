"""Token log-probabilities, entropy and clipped forward KL from vocabulary-parallel logits.

Shapes: R rows, v local columns of a vocabulary of V that is split over the ranks of `VocabShard.group`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard(NamedTuple):
    """The columns [start, start + v) of this rank; `vocab_size` is the real V, columns past it are padding."""

    group: dist.ProcessGroup | None  # None: the vocabulary is whole here
    start: int
    vocab_size: int


class TokenLogprobs(NamedTuple):
    logprobs: Tensor  # [R] log p(target), float32
    entropy: Tensor  # [R] nats, float32


class ClippedKL(NamedTuple):
    loss: Tensor  # [R] sum_v min(P_t log(P_t / P_s), clip), float32
    kl: Tensor  # [R] the same without the clip, detached
    clip_fraction: Tensor  # [R] teacher probability mass of the clipped entries, detached


class _SumOverRanks(torch.autograd.Function):
    """Partial values -> their sum, the same on every rank. What follows is replicated, so its gradient is too."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _UseOnRanks(torch.autograd.Function):
    """The mirror: a replicated value goes into rank-local arithmetic, so the ranks' gradients add up."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sum_over_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return local if group is None else _SumOverRanks.apply(local, group)


def _live(logits: Tensor, shard: VocabShard) -> Tensor:
    """Local logits without padding columns, float32 [R, <= v]; a rank may hold padding only."""
    return logits[:, : max(0, min(logits.shape[1], shard.vocab_size - shard.start))].float()


def _shifted(logits: Tensor, shard: VocabShard) -> Tensor:
    """Logits minus the row maximum over all ranks. Kept apart from the log-sum: folding both loses digits."""
    maximum = logits.detach().amax(dim=-1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
    if shard.group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=shard.group)
    return logits - maximum[:, None]


def _log_softmax(logits: Tensor, shard: VocabShard) -> Tensor:
    """Local columns of the log-softmax over the whole vocabulary, [R, <= v]."""
    shifted = _shifted(logits, shard)
    log_sum = _sum_over_ranks(shifted.exp().sum(dim=-1), shard.group).log()
    if shard.group is not None:
        log_sum = _UseOnRanks.apply(log_sum, shard.group)
    return shifted - log_sum[:, None]


def token_logprobs(logits: Tensor, targets: Tensor, shard: VocabShard, *, temperature: float = 1.0) -> TokenLogprobs:
    """log p(target) and the entropy of each row, differentiable in `logits`. Two collectives: a maximum and a sum.

    Args:
        logits: [R, v], this rank's columns.
        targets: [R] int64 ids in [0, V).
    """
    shifted = _shifted(_live(logits, shard) / temperature, shard)
    local = targets - shard.start
    here = (local >= 0) & (local < shifted.shape[1])
    if shifted.shape[1]:
        picked = shifted.gather(1, local.clamp(0, shifted.shape[1] - 1)[:, None])[:, 0]
        picked = torch.where(here, picked, torch.zeros_like(picked))
    else:
        picked = shifted.new_zeros(len(shifted))
    exps = shifted.exp()
    sums = torch.stack([picked, exps.sum(dim=-1), (exps * shifted).sum(dim=-1)])
    picked, exp_sum, weighted = _sum_over_ranks(sums, shard.group)
    log_sum = exp_sum.log()
    return TokenLogprobs(logprobs=picked - log_sum, entropy=log_sum - weighted / exp_sum)


def clipped_kl(
    student: Tensor, teacher: Tensor, shard: VocabShard, *, kl_clip: float, temperature: float = 1.0
) -> ClippedKL:
    """Forward KL(teacher || student) with every vocabulary entry clipped from above: Eq. 7's inner sum.

    Differentiable in `student` only. A clipped entry has no gradient, so a row whose teacher mass sits on
    clipped entries learns nothing: watch `clip_fraction`. The clipped sum can be negative (>= -1/e).

    Args:
        student, teacher: [R, v] logits, this rank's columns.
        kl_clip: tau_clip; infinity gives the plain forward KL.
    """
    with torch.no_grad():
        teacher_logprobs = _log_softmax(_live(teacher, shard) / temperature, shard)
        teacher_probs = teacher_logprobs.exp()
    student_logprobs = _log_softmax(_live(student, shard) / temperature, shard)
    log_ratio = teacher_logprobs - student_logprobs
    # P_t = 0 contributes nothing, also where its log is -inf.
    terms = torch.where(teacher_probs > 0, teacher_probs * log_ratio, torch.zeros_like(log_ratio))
    clipped = (terms > kl_clip).detach()
    loss = _sum_over_ranks(terms.clamp(max=kl_clip).sum(dim=-1), shard.group)
    with torch.no_grad():
        sums = torch.stack([terms.sum(dim=-1), (teacher_probs * clipped).sum(dim=-1)])
        kl, clip_fraction = _sum_over_ranks(sums, shard.group)
    return ClippedKL(loss, kl, clip_fraction)
