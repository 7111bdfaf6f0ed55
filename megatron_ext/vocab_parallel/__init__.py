"""Losses over a vocabulary that is split over tensor-parallel ranks, without ever gathering it.

Shapes: R rows, H hidden size, v = V_padded/tp local columns. Padding columns never enter a softmax.
All arithmetic is float32.
"""

from megatron_ext.vocab_parallel.linear import linear_clipped_kl, linear_token_logprobs
from megatron_ext.vocab_parallel.logits import ClippedKL, TokenLogprobs, VocabShard, clipped_kl, token_logprobs

__all__ = [
    "ClippedKL",
    "TokenLogprobs",
    "VocabShard",
    "clipped_kl",
    "linear_clipped_kl",
    "linear_token_logprobs",
    "token_logprobs",
]
