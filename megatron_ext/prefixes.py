"""Attention of responses that share a prompt, which a pack holds once: each sees the prompt, and itself causally.

Layers compute a shared prompt's tokens once instead of once a response. Nothing else changes: a response's token has
the same keys as after a prompt of its own, so the loss and its gradient are the same numbers, added in another order.

Shapes: T packed tokens, h query heads and g key-value heads on this tensor-parallel rank, d head size, S keys when
every response has a copy of its prompt's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.attention import MOST_PADDED_TOKENS, PackedSelfAttention, padding, together
from megatron_ext.cpu_layers import attention, can_attend, spans

_ops: Any = torch.ops.aten
_attend = _ops._scaled_dot_product_flash_attention_for_cpu
_attend_backward = _ops._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Prefix:
    """Tokens [start, end) of a pack are a prompt; the sequences of tokens [end, last) follow it."""

    start: int
    end: int
    last: int


@dataclass
class PackParams(PackedSeqParams):
    """A pack in which every token has a rotary angle of its own (`HiddenStateModel`), and prompts may be shared.

    Megatron is told by the padded lengths, which stay on the host, that all tokens are one sequence: from a GPU it
    would read the lengths of the sequences in every layer.
    """

    prefixes: tuple[Prefix, ...] = ()
    key_places: Tensor | None = None  # on a GPU where prompts are shared: `copied_keys`
    cu_seqlens_of_keys: Tensor | None = None

    def without_padding(self) -> PackedSeqParams:
        """What there really is: sequences without padding."""
        return PackedSeqParams(
            qkv_format=self.qkv_format,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_kv=self.cu_seqlens_kv,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_kv=self.max_seqlen_kv,
        )


def pack_params(
    cu_seqlens: Tensor, max_seqlen: int, *, device: torch.device, prefixes: tuple[Prefix, ...] = ()
) -> PackParams:
    """`cu_seqlens` int32 [n + 1] on the host, `max_seqlen` of a response with its prompt. No context parallelism."""
    whole = cu_seqlens[[0, -1]]
    on_device = cu_seqlens.to(device, non_blocking=True)
    is_copied = bool(prefixes) and device.type != "cpu"
    places, of_keys = copied_keys(cu_seqlens, prefixes, device=device) if is_copied else (None, None)
    return PackParams(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=whole,
        cu_seqlens_kv_padded=whole,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        prefixes=prefixes,
        key_places=places,
        cu_seqlens_of_keys=of_keys,
    )


# -- on a CPU -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """Queries and keys of one call of the kernel: `count` sequences, padded if there are several."""

    queries: slice
    keys: slice
    is_causal: bool
    count: int = 1
    padded: Tensor | None = None
    kept: Tensor | None = None

    def pad(self, x: Tensor, rows: slice) -> Tensor:
        """[T, h, ...] -> [count, h, longest, ...]."""
        part = x[rows] if self.padded is None else x[rows].index_select(0, self.padded)
        return part.unflatten(0, (self.count, -1)).transpose(1, 2)

    def pad_gradient(self, x: Tensor) -> Tensor:
        """As `pad` of queries, with zeros for padding, which nobody looks at."""
        part = x[self.queries]
        if self.padded is not None and self.kept is not None:
            part = part.new_zeros(len(self.padded), *part.shape[1:]).index_copy_(0, self.kept, part)
        return part.unflatten(0, (self.count, -1)).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[count, h, longest, ...] -> [tokens, h, ...]."""
        part = x.transpose(1, 2).flatten(0, 1)
        return part if self.kept is None else part.index_select(0, self.kept)


def _calls(bounds: Sequence[int], prefixes: Sequence[Prefix]) -> list[_Call]:
    """Every sequence causally, then responses to their prompts."""
    calls = []
    start = 0
    for lengths in together([b - a for a, b in itertools.pairwise(bounds)], max_tokens=MOST_PADDED_TOKENS):
        rows = slice(start, start := start + sum(lengths))
        calls.append(_Call(rows, rows, True, len(lengths), *(padding(lengths) if len(lengths) > 1 else ())))
    return calls + [_Call(slice(p.end, p.last), slice(p.start, p.end), False) for p in prefixes]


def _span_rows(bounds: Sequence[int], prefixes: Sequence[Prefix]) -> list[tuple[int, int, int, int, int]]:
    """Every sequence as a row of `cpu_layers.spans`."""
    rows = []
    following = iter([*prefixes, None])
    prefix = next(following)
    for start, end in itertools.pairwise(bounds):
        if prefix is not None and start >= prefix.last:
            prefix = next(following)
        known = (prefix.start, prefix.end) if prefix is not None and start >= prefix.end else (0, 0)
        rows.append((*known, start, end - start, start))
    return rows


class _PrefixedAttention(torch.autograd.Function):
    """Parts of a softmax are merged by their log-sum-exp; the merged one gives every part its gradient.

    Dao et al. 2022, FlashAttention, section 3.1 and appendix B: P = exp(q k - lse), whichever keys are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: list[_Call], scale: float | None
    ) -> Tensor:  # all [T, h, d]
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)  # [T, h]
        for call in calls:
            q, k, v = call.pad(query, call.queries), call.pad(key, call.keys), call.pad(value, call.keys)
            found, found_lse = (call.unpad(x) for x in _attend(q, k, v, is_causal=call.is_causal, scale=scale))
            if not call.is_causal:
                ours, theirs = lse[call.queries], found_lse
                found_lse = torch.logaddexp(ours, theirs)
                shares = ((part - found_lse).exp()[..., None] for part in (ours, theirs))  # of the merged softmax
                found = output[call.queries] * next(shares) + found * next(shares)
            output[call.queries], lse[call.queries] = found, found_lse
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.calls, ctx.scale = calls, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
        for call in ctx.calls:
            of_q, of_k, of_v = _attend_backward(
                call.pad_gradient(gradient),
                call.pad(query, call.queries),
                call.pad(key, call.keys),
                call.pad(value, call.keys),
                call.pad(output, call.queries),
                call.pad(lse, call.queries),
                0.0,
                call.is_causal,
                scale=ctx.scale,
            )
            of_query[call.queries] += call.unpad(of_q)
            of_key[call.keys] += call.unpad(of_k)
            of_value[call.keys] += call.unpad(of_v)
        return of_query, of_key, of_value, None, None


class PrefixedSelfAttention(PackedSelfAttention):
    """Packed attention that on a CPU also knows prompts that are shared."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, packed_seq_params: Any = None, **options: Any
    ) -> Tensor:  # [T, h, d], [T, g, d], [T, g, d] -> [T, h * d]
        if not isinstance(packed_seq_params, PackParams) or not packed_seq_params.prefixes:
            return super().forward(query, key, value, *arguments, packed_seq_params=packed_seq_params, **options)
        if can_attend(query, key, value):
            rows = _span_rows(packed_seq_params.cu_seqlens_q.tolist(), packed_seq_params.prefixes)
            return attention(query, key, value, spans(rows), scale=self.scale).flatten(1)
        heads_of_key = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(heads_of_key, dim=1) for x in (key, value))  # the kernel knows no groups
        calls = _calls(packed_seq_params.cu_seqlens_q.tolist(), packed_seq_params.prefixes)
        output: Tensor = _PrefixedAttention.apply(query, keys, values, calls, self.scale)
        return output.flatten(1)


# -- on GPUs --------------------------------------------------------------------------------------


def copied_keys(cu_seqlens: Tensor, prefixes: Sequence[Prefix], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the keys of each sequence are when every response has its prompt's in front of its own.

    `cu_seqlens` int32 [n + 1] on the host. Returns places int64 [S] and cumulative lengths int32 [n + 1] on `device`.
    """
    rows = _span_rows(cu_seqlens.tolist(), prefixes)
    places = [torch.cat([torch.arange(a, b), torch.arange(own, own + count)]) for a, b, own, count, _ in rows]
    lengths = [len(seen) for seen in places]
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    return torch.cat(places).to(device, non_blocking=True), bounds.to(device, non_blocking=True)


@functools.cache
def transformer_engine_attention() -> type[torch.nn.Module]:
    """Transformer Engine's attention, for packs with shared prompts too: it gets copies of a prompt's keys.

    Only keys and values are copied, and a copy's gradient is added to its original's. Needs Transformer Engine.
    """
    import transformer_engine.pytorch as te
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PrefixedTEAttention(TEDotProductAttention):  # type: ignore[misc]
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *arguments: Any,
            packed_seq_params: Any = None,
            **options: Any,
        ) -> Tensor:
            params = packed_seq_params
            if not isinstance(params, PackParams) or params.key_places is None:
                if isinstance(params, PackParams):
                    params = params.without_padding()
                return super().forward(query, key, value, *arguments, packed_seq_params=params, **options)
            places = params.key_places
            return te.DotProductAttention.forward(
                self,
                query,
                key.index_select(0, places),
                value.index_select(0, places),
                qkv_format="thd",
                cu_seqlens_q=params.cu_seqlens_q,
                cu_seqlens_kv=params.cu_seqlens_of_keys,
                max_seqlen_q=params.max_seqlen_q,
                max_seqlen_kv=params.max_seqlen_kv,
                attn_mask_type="padding_causal_bottom_right",  # a response's last token sees all its keys
            )

    return PrefixedTEAttention
