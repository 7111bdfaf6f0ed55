"""Scaled-dot-product core attention over packed sequences, for machines without Transformer Engine.

Under context parallelism C ranks share every sequence: it is cut in 2C chunks, and rank r holds chunks r and 2C-1-r.
A late chunk sees many keys and an early one few, so all ranks have the same work.

Shapes: T packed tokens, h query heads and g key-value heads on this tensor-parallel rank, d head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_ext.cpu_layers import attention, can_attend, spans

MOST_PADDED_TOKENS = 4096  # of short sequences that are attended to in one call
LONGEST_PADDED = 128  # tokens; what a longer sequence's padding costs is more than its own call


def context_positions(cu_seqlens: Tensor, *, rank: int, size: int) -> Tensor:
    """The tokens of a pack that a context-parallel rank holds, in its order: int64 [T / size], on the CPU.

    Every sequence (cumulative lengths `cu_seqlens` [n + 1], padding included) must be a multiple of 2 x size long.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    held = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        chunks = torch.arange(start, end).view(2 * size, -1)
        held += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(held)


def together(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Consecutive lengths up to LONGEST_PADDED whose padded size, count times longest, stays within `max_tokens`.

    At least one each: longer ones are alone.
    """
    parts: list[list[int]] = []
    for length in lengths:
        longest = max(length, *parts[-1]) if parts else length
        if parts and longest <= LONGEST_PADDED and (len(parts[-1]) + 1) * longest <= max_tokens:
            parts[-1].append(length)
        else:
            parts.append([length])
    return parts


def padding(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where sequences that are padded to the longest come from, and where they are then: int64 [n * longest], [T].

    Padding repeats a sequence's last token; nobody looks at it, so its gradient is zero.
    """
    size = torch.tensor(lengths)[:, None]
    columns = torch.arange(max(lengths))
    starts = size.cumsum(0) - size
    return (starts + columns.minimum(size - 1)).flatten(), (columns < size).flatten().nonzero()[:, 0]


class PackedSelfAttention(torch.nn.Module):
    """Causal attention inside each sequence of a packed batch; tokens never see a neighbour sequence.

    Megatron's own local attention refuses packed input, so this takes its place in the layer spec. Of context-parallel
    ranks each attends with its own queries to all keys, which it gathers; `cu_seqlens` are those of whole sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal
        self.scale = config.softmax_scale  # None: 1 / sqrt(d)
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,  # [T, h, d], of T/C tokens under context parallelism; so are key, value and the output
        key: Tensor,  # [T, g, d]
        value: Tensor,  # [T, g, d]
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # [T, h * d]
        assert packed_seq_params is not None and attention_bias is None
        bounds: Tensor = packed_seq_params.cu_seqlens_q
        if self.context_group is not None:
            return self._of_this_context_rank(query, key, value, bounds, self.context_group)
        if can_attend(query, key, value):
            rows = [(0, 0, start, end - start, start) for start, end in itertools.pairwise(bounds.tolist())]
            return attention(query, key, value, spans(rows), scale=self.scale).flatten(1)
        outputs = []
        start = 0
        for lengths in together(bounds.diff().tolist(), max_tokens=MOST_PADDED_TOKENS):
            part = slice(start, start := start + sum(lengths))
            if len(lengths) == 1:  # and so no copy
                outputs.append(self._attend(query[None, part], key[None, part], value[None, part], is_causal=True)[0])
                continue
            padded, kept = (index.to(query.device) for index in padding(lengths))
            q, k, v = (x[part].index_select(0, padded).unflatten(0, (len(lengths), -1)) for x in (query, key, value))
            attended = self._attend(q, k, v, is_causal=True)  # no token sees the padding, which is behind it
            outputs.append(attended.flatten(0, 1).index_select(0, kept))
        return torch.cat(outputs).flatten(1)

    def _of_this_context_rank(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, group: dist.ProcessGroup
    ) -> Tensor:  # [T/C, h * d]
        """Backward sums every rank's gradients of the keys and values that this rank lent them."""
        rank, size = group.rank(), group.size()
        every = torch.cat([context_positions(bounds, rank=other, size=size) for other in range(size)])
        gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
        keys, values = gathered[every.argsort().to(gathered.device)].chunk(2, dim=-1)  # [T, g, d], in sequence order
        rows = []
        start = 0
        for first, last in itertools.pairwise(bounds.tolist()):
            chunk = (last - first) // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                own = first + number * chunk
                rows.append((first, own, own, chunk, start))
                start += chunk
        if can_attend(query, keys, values):
            return attention(query, keys, values, spans(rows), scale=self.scale).flatten(1)
        outputs = [
            self._attend(
                query[None, start : start + count],
                keys[None, first : own + count],
                values[None, first : own + count],
                attn_mask=causal_lower_right(count, own + count - first),  # the last query sees all
            )[0]
            for first, _, own, count, start in rows
        ]
        return torch.cat(outputs).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        """Of sequences, or of chunks of their queries: [sequences, chunk, h, d]."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True, **mask).transpose(1, 2)
