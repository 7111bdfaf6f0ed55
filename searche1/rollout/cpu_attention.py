"""SGLang's torch_native attention backend without its loops over requests.

The original computes one request after the other and recomputes the rows of a cached prefix. Rollouts are hundreds of
short requests: taking them together is several times faster and equal to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor

from searche1.rollout import engine_ops
from searche1.rollout.cpu_kernels import Chunk, attend, make_chunks
from searche1.rollout.engine_ops import Tokens


class BatchedNativeAttention(TorchNativeAttnBackend):
    """Causal text models only; the key-value cache is the original's.

    In C++ where it is built and knows the model's sizes; else PyTorch's attention over padded chunks of requests.
    """

    chunks: list[Chunk] | None
    new_tokens: Tokens | None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self.batch = forward_batch
        self.numbers, self.lengths = forward_batch.req_pool_indices.long(), forward_batch.seq_lens.long()
        is_decode = forward_batch.forward_mode.is_decode()
        self.counts = None if is_decode else forward_batch.extend_seq_lens.long()
        self.chunks, self.new_tokens = None, None  # one plan serves every layer

    def _plan(self) -> list[Chunk]:
        seq_lens = self.lengths.tolist()
        return make_chunks(
            self.req_to_token_pool.req_to_token[self.numbers, : max(seq_lens, default=0)],
            seq_lens=seq_lens,
            query_lens=[1] * len(seq_lens) if self.counts is None else self.counts.tolist(),
        )

    def tokens(self, positions: Tensor, places: Tensor) -> Tokens:
        """This batch's new tokens, for layers in C++. positions, places: int64 [tokens], as SGLang's models get."""
        given = positions.data_ptr(), places.data_ptr()
        if self.new_tokens is None or (self.new_tokens.positions, self.new_tokens.places) != given:
            slots = self.req_to_token_pool.req_to_token
            assert slots.dtype == torch.int32 and slots.stride(1) == 1
            self.new_tokens = Tokens(
                count=positions.shape[0],
                requests=self.numbers.shape[0],
                slots_stride=slots.stride(0),
                positions=given[0],
                places=given[1],
                numbers=self.numbers.data_ptr(),
                lengths=self.lengths.data_ptr(),
                counts=None if self.counts is None else self.counts.data_ptr(),
                slots=slots.data_ptr(),
            )
        return self.new_tokens

    def attend(self, query, output, keys, values, scale):
        """Fills `output` in C++."""
        return engine_ops.attention(
            query,
            output,
            keys=keys,
            values=values,
            slots=self.req_to_token_pool.req_to_token,
            numbers=self.numbers,
            lengths=self.lengths,
            counts=self.counts,
            scale=scale,
        )

    # Names, first arguments and options are the original's; the arguments between are in the batch already.

    def _run_sdpa_forward_extend(self, query, output, keys, values, *_, scaling, enable_gqa, **options):
        return self._attend(query, output, keys, values, scaling, enable_gqa, options)

    def _run_sdpa_forward_decode(self, query, output, keys, values, *_, scaling, enable_gqa, **options):
        return self._attend(query, output, keys, values, scaling, enable_gqa, options)

    def _attend(self, query, output, keys, values, scaling, enable_gqa, options):
        _refuse(options)
        if engine_ops.can_attend(query, keys):
            return self.attend(query, output, keys, values, scaling)
        if self.chunks is None:
            self.chunks = self._plan()
        return attend(query, output, keys=keys, values=values, chunks=self.chunks, scale=scaling, enable_gqa=enable_gqa)


def _refuse(options: dict[str, Any]) -> None:
    if options["is_cross_attn"] or options["sliding_window_size"] is not None:
        raise ValueError("a model with sliding windows or cross attention does not run on a CPU; use a GPU")
