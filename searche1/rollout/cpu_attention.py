"""SGLang's torch_native attention backend without its loops over requests.

The original computes one request after the other and recomputes the rows of a cached prefix. Rollouts are hundreds of
short requests: taking them together is several times faster and equal to rounding.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from searche1.rollout.cpu_kernels import attend, make_chunks


class BatchedNativeAttention(TorchNativeAttnBackend):
    """Causal text models only; the key-value cache is the original's."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        seq_lens = forward_batch.seq_lens.tolist()
        is_decode = forward_batch.forward_mode.is_decode()
        self.chunks = make_chunks(
            self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, : max(seq_lens, default=0)],
            seq_lens=seq_lens,
            query_lens=[1] * len(seq_lens) if is_decode else forward_batch.extend_seq_lens.tolist(),
        )

    # Names, first arguments and options are the original's; the arguments between are in the chunks already.

    def _run_sdpa_forward_extend(self, query, output, keys, values, *_, scaling, enable_gqa, **options):
        return self._attend(query, output, keys, values, scaling, enable_gqa, options)

    def _run_sdpa_forward_decode(self, query, output, keys, values, *_, scaling, enable_gqa, **options):
        return self._attend(query, output, keys, values, scaling, enable_gqa, options)

    def _attend(self, query, output, keys, values, scaling, enable_gqa, options):
        if options["is_cross_attn"] or options["sliding_window_size"] is not None:
            raise ValueError("a model with sliding windows or cross attention does not run on a CPU; use a GPU")
        return attend(query, output, keys=keys, values=values, chunks=self.chunks, scale=scaling, enable_gqa=enable_gqa)
