"""The losses written down once more, in float64 and as plainly as possible: what every kernel is tested against.

Differentiable by autograd, whole vocabulary in one place. Shapes: R rows, V real columns (logits may have more).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.vocab_parallel.values import ClippedKL, TokenLogprobs


def token_logprobs(logits: Tensor, targets: Tensor, *, vocab_size: int, temperature: float = 1.0) -> TokenLogprobs:
    """log p(target) and entropy of each row, float64."""
    log_p = F.log_softmax(logits[:, :vocab_size].double() / temperature, dim=-1)
    return TokenLogprobs(log_p.gather(1, targets[:, None])[:, 0], _entropy(log_p))


def clipped_kl(
    student: Tensor, teacher: Tensor, *, vocab_size: int, kl_clip: float, temperature: float = 1.0
) -> ClippedKL:
    """Eq. 7's inner sum, sum_v min(P_t log(P_t / P_s), kl_clip), float64; differentiable in `student`."""
    log_q = F.log_softmax(student[:, :vocab_size].double() / temperature, dim=-1)
    log_p = F.log_softmax(teacher[:, :vocab_size].detach().double() / temperature, dim=-1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # P_t = 0 contributes nothing
    return ClippedKL(
        loss=terms.clamp(max=kl_clip).sum(dim=-1),
        kl=terms.detach().sum(dim=-1),
        clipped_mass=torch.where(terms > kl_clip, p, 0.0).sum(dim=-1),
        entropy=_entropy(log_q.detach()),
        is_suspect=(terms > kl_clip).any(dim=-1),
    )


def clipped_kl_gradient(
    student: Tensor, teacher: Tensor, *, vocab_size: int, kl_clip: float, temperature: float = 1.0
) -> Tensor:
    """d loss / d student logits by the formula Q S_A - P 1{kept}, over T: float64 [R, V]."""
    log_q = F.log_softmax(student[:, :vocab_size].double() / temperature, dim=-1)
    log_p = F.log_softmax(teacher[:, :vocab_size].double() / temperature, dim=-1)
    p = log_p.exp()
    kept = torch.where(p > 0, p * (log_p - log_q), 0.0) <= kl_clip
    return (log_q.exp() * (p * kept).sum(dim=-1, keepdim=True) - p * kept) / temperature


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp(min=-1e4)).sum(dim=-1)  # 0 * -inf would be NaN, in the gradient too
