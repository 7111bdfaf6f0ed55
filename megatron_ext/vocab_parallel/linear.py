"""The same losses from hidden states: the head is applied to a chunk of rows at a time.

Logits live for one chunk only and are recomputed in backward, so memory is bounded by the chunk, not by R.
Shapes: R rows, H hidden size, v local vocabulary columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ext.vocab_parallel.logits import ClippedKL, TokenLogprobs, VocabShard, clipped_kl, token_logprobs


def linear_token_logprobs(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [v, H]
    targets: Tensor,  # [R] int64
    shard: VocabShard,
    *,
    temperature: float = 1.0,
    chunk: int,
) -> TokenLogprobs:
    """`token_logprobs` of `hidden @ weight.T`, chunked over rows."""

    def one(hidden: Tensor, targets: Tensor) -> TokenLogprobs:
        return token_logprobs(F.linear(hidden, weight), targets, shard, temperature=temperature)

    pieces = [_recomputed(one, h, t) for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
    return TokenLogprobs(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def linear_clipped_kl(
    student: Tensor,  # [R, H]
    teacher: Tensor,  # [R, H], no gradient
    weight: Tensor,  # [v, H], shared by both: the adapter leaves the head alone
    shard: VocabShard,
    *,
    kl_clip: float,
    temperature: float = 1.0,
    chunk: int,
) -> ClippedKL:
    """`clipped_kl` of the two heads' logits, chunked over rows."""

    def one(student: Tensor, teacher: Tensor) -> ClippedKL:
        with torch.no_grad():
            teacher_logits = F.linear(teacher, weight)
        return clipped_kl(F.linear(student, weight), teacher_logits, shard, kl_clip=kl_clip, temperature=temperature)

    pieces = [_recomputed(one, s, t) for s, t in zip(student.split(chunk), teacher.split(chunk), strict=True)]
    return ClippedKL(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _recomputed(function, *args):  # type: ignore[no-untyped-def]
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
