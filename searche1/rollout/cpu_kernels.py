"""What SGLang lacks on a CPU, in plain PyTorch: attention over many requests at once, sampling by seed, and weights
that lie as products of few rows want them.

Legend: B requests of a chunk, Q longest new part, L longest sequence, H query heads, K key-value heads, D head size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

CHUNK_TOKENS = 4096  # key-value tokens gathered at once: 2-4 MB in a small model, about a core's cache
ROWS_AT_ONCE = 64  # of a weight that is loaded


@dataclass(frozen=True)
class Chunk:
    """Requests attended together, padded on the right to the longest."""

    rows: slice  # their new tokens in the step's packed batch
    slots: torch.Tensor  # [B * L], places of their tokens in the key-value cache; 0 where padded
    is_new: torch.Tensor  # [B, Q], False where padded
    visible: torch.Tensor  # [B, 1, Q, L], keys a query may see: none later, so none of the padding


def make_chunks(slots: torch.Tensor, *, seq_lens: Sequence[int], query_lens: Sequence[int]) -> list[Chunk]:
    """Plans one step. slots [requests, longest]: where each request's tokens are in the key-value cache.

    `query_lens` counts the new tokens at the end of each sequence: 1 when decoding. One plan serves every layer.
    """
    chunks = []
    row = 0
    for first, last in chunk_ranges(seq_lens, max_tokens=CHUNK_TOKENS):
        lens = torch.tensor(seq_lens[first:last])  # [B]
        new = torch.tensor(query_lens[first:last])  # [B]
        key_positions = torch.arange(int(lens.max()))  # [L]
        columns = torch.arange(int(new.max()))  # [Q]
        query_positions = (lens - new)[:, None] + columns  # [B, Q]
        in_sequence = key_positions < lens[:, None]  # [B, L]
        num_rows = int(new.sum())
        chunks.append(
            Chunk(
                rows=slice(row, row + num_rows),
                slots=slots[first:last, : len(key_positions)].masked_fill(~in_sequence, 0).flatten().long(),
                is_new=columns < new[:, None],
                visible=(key_positions <= query_positions[:, :, None])[:, None],
            )
        )
        row += num_rows
    return chunks


def new_positions(known: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the tokens that requests get, packed, and where each request's begin in the pack.

    known, new: integers [requests], tokens that each has and gets. SGLang's own makes a tensor for every request.
    """
    starts = new.cumsum(0) - new
    within = torch.arange(int(new.sum())) - starts.repeat_interleave(new)
    return known.repeat_interleave(new) + within, starts.to(new.dtype)


def chunk_ranges(lengths: Sequence[int], *, max_tokens: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at least one length whose padded size, count x longest, stays within `max_tokens`."""
    ranges = []
    first, longest = 0, 0
    for i, length in enumerate(lengths):
        if i > first and (i + 1 - first) * max(longest, length) > max_tokens:
            ranges.append((first, i))
            first, longest = i, 0
        longest = max(longest, length)
    return [*ranges, (first, len(lengths))] if lengths else []


def attend(
    query: torch.Tensor,
    output: torch.Tensor,
    *,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunks: Sequence[Chunk],
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Causal attention: fills and returns `output` [tokens, H, D]. keys, values [cache size, K, D]."""
    for chunk in chunks:
        num_requests, width = chunk.is_new.shape
        padded = query.new_zeros(num_requests, width, *query.shape[1:])  # [B, Q, H, D]
        padded[chunk.is_new] = query[chunk.rows]
        k, v = (
            cache.index_select(0, chunk.slots).view(num_requests, -1, *cache.shape[1:]).transpose(1, 2).to(query.dtype)
            for cache in (keys, values)
        )  # [B, K, L, D]
        attended = scaled_dot_product_attention(
            padded.transpose(1, 2), k, v, attn_mask=chunk.visible, scale=scale, enable_gqa=enable_gqa
        )  # [B, H, Q, D]
        output[chunk.rows] = attended.transpose(1, 2)[chunk.is_new]
    return output


class _SomeRowsAtOnce(TorchDispatchMode):
    """Copies a matrix in blocks of rows: into transposed memory rows share lines, which then stay in the cache."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default or args[0].ndim != 2:
            return func(*args, **(kwargs or {}))
        held, sent = args[:2]
        for here, there in zip(held.split(ROWS_AT_ONCE), sent.split(ROWS_AT_ONCE), strict=True):
            here.copy_(there)
        return held


def transpose_memory(weight: Any) -> None:
    """Stores a parameter [out, in] of SGLang's as [in, out] in memory; its shape, values and loading stay as they are.

    A product of few rows is faster so, and loading slower (`tools/bench/cpu_products.py`): from the other order
    PyTorch's library packs the weight anew in every call.
    """
    weight.data = weight.data.t().contiguous().t()
    load = weight.weight_loader

    def load_transposed(held: Any, loaded: torch.Tensor, *shard: Any) -> None:
        with _SomeRowsAtOnce():
            load(held, loaded, *shard)

    weight.weight_loader = load_transposed


def seeded_multinomial(logprobs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One draw per row, decided by the row's seed and position alone. logprobs [B, V] -> ids [B, 1].

    Gumbel-max: the largest logprob + Gumbel noise is a sample of the distribution. The noise is a hash of
    (seed, position, id), so a request draws the same tokens whatever else is in its batch.
    """
    rows = _mix(seeds.long() ^ _mix(positions.long() + _GOLDEN))  # [B]
    ids = torch.arange(1, logprobs.shape[1] + 1)
    bits = _mix(rows[:, None] + ids * _GOLDEN)  # [B, V]
    uniform = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).div_(2.0**53)  # in (0, 1)
    gumbel = uniform.log_().neg_().log_().neg_()
    return gumbel.add_(logprobs).argmax(dim=1, keepdim=True)


def filtered_multinomial(
    draw: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """`draw`, a seeded multinomial, among each row's top k and top p. probs [B, V] -> ids [B], int32.

    SGLang draws from the sorted row, where noise belongs to ranks instead of ids: one request with a top k, such as a
    greedy one, then changes what all others of its batch draw.
    """
    in_order, ids = probs.sort(dim=-1, descending=True)
    before = in_order.cumsum(dim=-1).sub_(in_order)
    ranks = torch.arange(probs.shape[1])
    in_order.masked_fill_((ranks >= top_ks[:, None]) | (before > top_ps[:, None]), 0.0)
    kept = torch.empty_like(in_order).scatter_(1, ids, in_order)
    return draw(kept.double().log_(), seeds, positions).view(-1).to(torch.int32)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's increment; int64 arithmetic wraps around


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) on int64; the masks make its shifts logical."""
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return bits ^ ((bits >> 31) & (2**33 - 1))
