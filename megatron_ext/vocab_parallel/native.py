"""The row kernels in C++ (rows.cpp), for float32 and bfloat16 logits on an x86-64 CPU.

setup.py builds them for AVX-512 and for AVX2 where a compiler is at hand. Without them the kernels in plain torch do
the same work, a few times slower; `why_absent` says what is missing.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.native import load_kernels
from megatron_ext.vocab_parallel.cpu import for_rows
from megatron_ext.vocab_parallel.shard import VocabShard

DTYPES = (torch.float32, torch.bfloat16)

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "rows_token_stats": (_POINTER, _INT, _POINTER, _POINTER, _INT64, _POINTER),
    "rows_merge_tokens": (_INT64, _INT64, _POINTER, _POINTER),
    "rows_token_grad": (_POINTER, _INT, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _POINTER),
    "rows_kl_stats": (_POINTER, _INT, _POINTER, _POINTER, _POINTER),
    "rows_merge_kl": (_INT64, _INT64, _POINTER, _POINTER),
    "rows_kl_scan": (_POINTER, _INT, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER),
    "rows_kl_grad": (_POINTER, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER),
}


class _Block(ctypes.Structure):
    """`Block` of rows.cpp."""

    _fields_ = [
        *((name, _INT64) for name in ("rows", "columns", "width", "stride", "out_stride", "num_tiles", "slots")),
        ("tiles", _POINTER),
        ("live", _POINTER),
        ("scale", _FLOAT),
    ]


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernels, or why there are none."""
    return load_kernels(Path(__file__).with_name("rows.cpp"), SIGNATURES)


def why_absent() -> str | None:
    """What keeps the native kernels from being used here; None when nothing does."""
    found = _library()
    return found if isinstance(found, str) else None


class NativeRows:
    """`protocol.RowKernels` in C++."""

    name = "native"

    def __init__(self) -> None:
        found = _library()
        if isinstance(found, str):
            raise ValueError(f"the native row kernels cannot run here: {found}")
        self._library = found

    def merge_tokens(self, stats: Tensor) -> Tensor:
        rows = stats.new_empty(len(stats), 4)
        self._library.rows_merge_tokens(*stats.shape[:2], _pointer(stats), _pointer(rows))
        return rows

    def merge_kl(self, stats: Tensor) -> Tensor:
        rows = stats.new_empty(len(stats), 7)
        self._library.rows_merge_kl(*stats.shape[:2], _pointer(stats), _pointer(rows))
        return rows

    def token_stats(
        self, logits: Tensor, targets: Tensor, live: Tensor | None, shard: VocabShard, *, scale: float, stats: Tensor
    ) -> None:
        def block(rows: slice) -> None:
            here = _block(logits[rows], _of(live, rows), shard, scale, slots=stats.shape[1])
            self._library.rows_token_stats(
                here, *_typed(logits[rows]), _pointer(targets[rows]), shard.start, _pointer(stats[rows])
            )

        for_rows(len(logits), block)

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
        def block(part: slice) -> None:
            here = _block(logits[part], _of(live, part), shard, scale, out=out)
            self._library.rows_token_grad(
                here,
                *_typed(logits[part]),
                _pointer(targets[part]),
                shard.start,
                _pointer(rows[part]),
                _pointer(for_logprobs[part]),
                None if for_entropy is None else _pointer(for_entropy[part]),
                out[part].data_ptr(),
            )

        for_rows(len(logits), block)

    def kl_stats(
        self, student: Tensor, teacher: Tensor, live: Tensor | None, shard: VocabShard, *, scale: float, stats: Tensor
    ) -> None:
        def block(rows: slice) -> None:
            here = _block(student[rows], _of(live, rows), shard, scale, slots=stats.shape[1])
            self._library.rows_kl_stats(here, *_typed(student[rows], teacher[rows]), _pointer(stats[rows]))

        for_rows(len(student), block)

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
        def block(part: slice) -> None:
            here = _block(student[part], suspect[part], shard, scale, slots=sums.shape[1])
            self._library.rows_kl_scan(
                here, *_typed(student[part], teacher[part]), _pointer(rows[part]), kl_clip, _pointer(sums[part])
            )

        for_rows(len(student), block)

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
        def block(part: slice) -> None:
            here = _block(student[part], _of(live, part), shard, scale, out=out)
            self._library.rows_kl_grad(
                here,
                *_typed(student[part], teacher[part]),
                _pointer(rows[part]),
                _pointer(clipped_mass[part]),
                kl_clip,
                _pointer(for_loss[part]),
                out[part].data_ptr(),
            )

        for_rows(len(student), block)


def _of(live: Tensor | None, rows: slice) -> Tensor | None:
    return None if live is None else live[rows]


def _pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _typed(*logits: Tensor) -> tuple[int, ...]:
    """Whether logits are bfloat16, and where they are."""
    first = logits[0]
    assert first.dtype in DTYPES and all(x.stride() == first.stride() and x.stride(1) == 1 for x in logits)
    return int(first.dtype == torch.bfloat16), *(x.data_ptr() for x in logits)


@functools.lru_cache(maxsize=1024)
def _tile_bounds(tiles: tuple[tuple[int, int], ...]) -> ctypes.Array:
    return (_INT64 * (2 * len(tiles)))(*(bound for tile in tiles for bound in tile))


def _block(
    logits: Tensor, live: Tensor | None, shard: VocabShard, scale: float, *, slots: int = 0, out: Tensor | None = None
) -> object:
    bounds = _tile_bounds(shard.tiles)
    block = _Block(
        rows=len(logits),
        columns=shard.num_columns,
        width=shard.size,
        stride=logits.stride(0),
        out_stride=0 if out is None else out.stride(0),
        num_tiles=len(shard.tiles),
        slots=slots,
        tiles=ctypes.addressof(bounds),
        live=None if live is None else _pointer(live),
        scale=scale,
    )
    block.bounds = bounds  # kept as long as the block that points to it
    return ctypes.byref(block)
