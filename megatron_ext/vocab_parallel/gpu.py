"""Launches the Triton kernels: block sizes, grids, and the tiles' boundaries on the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_ext.vocab_parallel import protocol
from megatron_ext.vocab_parallel.shard import VocabShard

# No autotuning: a trial run of a kernel that works in place would spoil its input. With these, sm_80 and sm_90 code
# uses 16-byte loads and no local memory (tests/unit/test_vocab_parallel_triton.py compiles and looks).
BLOCK, NUM_WARPS = 4096, 8
SLAB = 2  # blocks of columns that a program of a gradient kernel works on


@functools.lru_cache(maxsize=256)
def _tiles(tiles: tuple[tuple[int, int], ...], width: int, device: torch.device) -> tuple[Tensor, int]:
    """What the kernels call TILES, int32 [3 num_tiles] on the device, and ALIGN."""
    align = 16 if width % 16 == 0 and all(begin % 16 == 0 for begin, _ in tiles) else 1
    bounds = [bound for begin, end in tiles for bound in (begin // align, -(-end // align), end)]
    return torch.tensor(bounds, dtype=torch.int32, device=device), align


class TritonRows:
    """`protocol.RowKernels` on a GPU."""

    name = "triton"
    merge_tokens = staticmethod(protocol.merge_tokens)
    merge_kl = staticmethod(protocol.merge_kl)

    def __init__(self, *, block: int = BLOCK) -> None:
        """`block` is the number of columns a program works on at a time; other than the default in tests only."""
        from megatron_ext.vocab_parallel import triton_kernels

        self._kernels, self._block = triton_kernels, block

    def token_stats(
        self, logits: Tensor, targets: Tensor, live: Tensor | None, shard: VocabShard, *, scale: float, stats: Tensor
    ) -> None:
        if len(logits) and shard.tiles:
            tiles, align = _tiles(shard.tiles, shard.size, logits.device)
            self._kernels.token_stats[(len(logits) * len(shard.tiles),)](
                logits, targets, live, stats, tiles, logits.stride(0), shard.start, len(shard.tiles), stats.shape[1],
                scale, HAS_LIVE=live is not None, ALIGN=align, BLOCK=self._block, num_warps=NUM_WARPS,
            )  # fmt: skip

    def token_grad(
        self,
        logits: Tensor,
        targets: Tensor,
        live: Tensor | None,
        rows: Tensor,
        shard: VocabShard,
        *,
        scale: float,
        for_logprobs: Tensor,
        for_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        slabs = -(-shard.size // (self._block * SLAB))
        if len(logits):
            self._kernels.token_grad[(len(logits) * slabs,)](
                logits, targets, live, rows, for_logprobs, for_entropy, out, logits.stride(0), out.stride(0),
                shard.start, shard.num_columns, shard.size, slabs, scale, HAS_LIVE=live is not None,
                HAS_ENTROPY=for_entropy is not None, BLOCK=self._block, SLAB=SLAB, num_warps=NUM_WARPS,
            )  # fmt: skip

    def kl_stats(
        self, student: Tensor, teacher: Tensor, live: Tensor | None, shard: VocabShard, *, scale: float, stats: Tensor
    ) -> None:
        if len(student) and shard.tiles:
            tiles, align = _tiles(shard.tiles, shard.size, student.device)
            self._kernels.kl_stats[(len(student) * len(shard.tiles),)](
                student, teacher, live, stats, tiles, student.stride(0), len(shard.tiles), stats.shape[1], scale,
                HAS_LIVE=live is not None, ALIGN=align, BLOCK=self._block, num_warps=NUM_WARPS,
            )  # fmt: skip

    def kl_scan(
        self,
        student: Tensor,
        teacher: Tensor,
        suspect: Tensor,
        rows: Tensor,
        shard: VocabShard,
        *,
        scale: float,
        kl_clip: float,
        sums: Tensor,
    ) -> None:
        if len(student) and shard.tiles:
            tiles, align = _tiles(shard.tiles, shard.size, student.device)
            self._kernels.kl_scan[(len(student) * len(shard.tiles),)](
                student, teacher, suspect, rows, sums, tiles, student.stride(0), len(shard.tiles), sums.shape[1],
                scale, kl_clip, ALIGN=align, BLOCK=self._block, num_warps=NUM_WARPS,
            )  # fmt: skip

    def kl_grad(
        self,
        student: Tensor,
        teacher: Tensor,
        live: Tensor | None,
        rows: Tensor,
        clipped_mass: Tensor,
        shard: VocabShard,
        *,
        scale: float,
        kl_clip: float,
        for_loss: Tensor,
        out: Tensor,
    ) -> None:
        slabs = -(-shard.size // (self._block * SLAB))
        if len(student):
            self._kernels.kl_grad[(len(student) * slabs,)](
                student, teacher, live, rows, clipped_mass, for_loss, out, student.stride(0), out.stride(0),
                shard.num_columns, shard.size, slabs, scale, kl_clip, HAS_LIVE=live is not None,
                BLOCK=self._block, SLAB=SLAB, num_warps=NUM_WARPS,
            )  # fmt: skip
