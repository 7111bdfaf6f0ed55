"""Losses over a vocabulary that is split over tensor-parallel ranks, without ever gathering or copying it.

GRPO's token log-probabilities and entropy, and the clipped forward KL of self-distillation, with their gradients.
`values.py` says what a row gives; `protocol.py` what ranks exchange; `cpu.py`, `native.py` and `gpu.py` hold the
arithmetic; `logits.py` and `linear.py` are the entrances, from logits or from hidden states; `reference.py` is the
same in float64. All arithmetic is float32; padding columns enter no softmax. docs/losses.md has the derivation.
"""

from megatron_ext.vocab_parallel.backends import kernels_for, row_kernels
from megatron_ext.vocab_parallel.linear import (
    MODES,
    RowLoss,
    kl_loss,
    linear_clipped_kl,
    linear_token_logprobs,
    token_loss,
)
from megatron_ext.vocab_parallel.logits import clipped_kl, token_logprobs
from megatron_ext.vocab_parallel.shard import SAME_BITS_FOR, VocabShard, tile_cuts, whole_vocabulary
from megatron_ext.vocab_parallel.values import ClippedKL, TokenLogprobs

__all__ = [
    "MODES",
    "SAME_BITS_FOR",
    "ClippedKL",
    "RowLoss",
    "TokenLogprobs",
    "VocabShard",
    "clipped_kl",
    "kernels_for",
    "kl_loss",
    "linear_clipped_kl",
    "linear_token_logprobs",
    "row_kernels",
    "tile_cuts",
    "token_logprobs",
    "token_loss",
    "whole_vocabulary",
]
