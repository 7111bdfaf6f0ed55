"""What the losses give for each row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenLogprobs(NamedTuple):
    logprobs: Tensor  # [R] log p(target), float32
    entropy: Tensor  # [R] nats, float32

    def detach(self) -> TokenLogprobs:
        return TokenLogprobs(*(value.detach() for value in self))


class ClippedKL(NamedTuple):
    loss: Tensor  # [R] sum_v min(P_t log(P_t / P_s), clip), float32; the rest carries no gradient
    kl: Tensor  # [R] the same without the clip
    clipped_mass: Tensor  # [R] S_C: teacher probability mass of the clipped entries, which teach nothing
    entropy: Tensor  # [R] of the student, nats
    is_suspect: Tensor  # [R] bool: the bound on the largest entry did not rule a clip out, so the row was read again

    def detach(self) -> ClippedKL:
        return ClippedKL(*(value.detach() for value in self))
