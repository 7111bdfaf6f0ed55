"""What Megatron's layers do between matrix products on a CPU, in C++ (layers.cpp) where setup.py could build it.

PyTorch's attention for CPUs takes sequences one by one or padded, and knows neither shared prompts nor groups of heads
(`tools/bench/cpu_attention.py` measures both); its operations write several tensors for one gate, norm or rotation. All
of it is float32: what has another dtype or size stays with PyTorch.

Shapes: T packed tokens, h query heads and g key-value heads on this tensor-parallel rank, d head size.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.native import load_kernels
from megatron_ext.vocab_parallel.cpu import for_rows

logger = logging.getLogger(__name__)

HEAD_SIZES = (32, 64, 96, 128)
WIDTH = 16  # floats of a vector
TILE = 8  # rows and columns that are transposed in registers
ROWS_AT_ONCE = 256  # whose part of a line stays in the first-level cache until the rest of it is needed

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_HEADS = (_POINTER, _INT64, _INT64)
_ATTEND = (_INT64, _POINTER, *[_INT64] * 5, *[*_HEADS] * 3, _FLOAT)
SIGNATURES = {
    "layers_attend": (*_ATTEND, _POINTER, _POINTER),
    "layers_attend_backward": (*_ATTEND, *[_POINTER] * 6),
    "layers_gate": (_INT64, _INT64, _POINTER, _POINTER),
    "layers_gate_backward": (_INT64, _INT64, *[_POINTER] * 3),
    "layers_norm": (_INT64, _INT64, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER),
    "layers_norm_backward": (_INT64, _INT64, *[_POINTER] * 6),
    "layers_rotate": (*[_INT64] * 3, _POINTER, *_HEADS, _INT64, _POINTER),
    "layers_transpose": (_INT64, _INT64, _POINTER, _INT64, _POINTER, _INT64),
}


@functools.cache
def library() -> ctypes.CDLL | str:
    """The kernels, or why there are none, which is told once."""
    found = load_kernels(Path(__file__).with_name("layers.cpp"), SIGNATURES)
    if isinstance(found, str):
        logger.warning("the trainer's layers run in plain PyTorch, which is slower, instead of C++: %s", found)
    return found


def _kernels() -> Any:
    found = library()
    assert not isinstance(found, str), found
    return found


# -- attention ------------------------------------------------------------------------------------


def spans(rows: Sequence[tuple[int, int, int, int, int]]) -> Tensor:
    """What `attention` takes, of rows (known, known end, own, count, query).

    The queries of `count` tokens from `query` on see the keys from known to known end, and of the `count` keys from
    `own` on those up to their own.
    """
    return torch.tensor(rows, dtype=torch.int64).view(-1, 5)


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` is built and knows these."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and query.shape[-1] in HEAD_SIZES
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and not isinstance(library(), str)
    )


def attention(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, *, scale: float | None) -> Tensor:
    """Every query over the keys that its span lets it see; each query must be in one span.

    Args:
        query: float32 [T, h, d]. key, value: float32 [keys, g, d], g a divisor of h. A token's head must be contiguous.
        spans: int64 [n, 5], from `spans`.
        scale: of the scores; None is 1 / sqrt(d).
    Returns:
        [T, h, d], the same bits with any number of threads.
    """
    found: Tensor = _Attention.apply(query, key, value, spans, query.shape[-1] ** -0.5 if scale is None else scale)
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scale: float) -> Tensor:
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:2])
        _of_heads("layers_attend", query, key, value, spans, scale, (out, lse))
        ctx.save_for_backward(query, key, value, spans, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, spans, out, lse = ctx.saved_tensors
        of_query = query.new_empty(query.shape)
        of_key, of_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
        others = (out, lse, gradients[0].contiguous(), of_query, of_key, of_value)
        _of_heads("layers_attend_backward", query, key, value, spans, ctx.scale, others)
        return of_query, of_key, of_value, None, None


def _of_heads(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scale: float, others: Sequence[Tensor]
) -> None:
    """Calls it for a share of the key-value heads on each of torch's threads."""
    heads = [number for x in (query, key, value) for number in (x.data_ptr(), x.stride(0), x.stride(1))]
    sizes = (query.shape[1], key.shape[1], query.shape[2])
    pointers = [x.data_ptr() for x in others]

    def work(part: slice) -> None:
        getattr(_kernels(), kernel)(
            len(spans), spans.data_ptr(), *sizes, part.start, part.stop, *heads, scale, *pointers
        )

    for_rows(key.shape[1], work)


# -- rotary positions -----------------------------------------------------------------------------


def rotate(x: Tensor, angles: Tensor) -> Tensor | None:
    """x [T, h, d] with the halves of each head turned by its token's angles [T, 1, 1, d]; None if it cannot be done.

    Both halves of the angles are the same. Their cosines and sines are computed for the first layer that asks.
    """
    is_known = (
        not isinstance(library(), str)
        and x.dtype == torch.float32
        and x.ndim == 3
        and x.stride(-1) == 1
        and angles.shape == (len(x), 1, 1, x.shape[-1])
        and x.shape[-1] % (2 * WIDTH) == 0
    )
    if not is_known:
        return None
    table: Tensor | None = getattr(angles, "_cosines_and_sines", None)
    if table is None:
        half = angles.detach()[:, 0, 0, : x.shape[-1] // 2]
        table = torch.cat([half.cos(), half.sin()], dim=-1)
        angles._cosines_and_sines = table  # type: ignore[attr-defined]  # goes with the angles
    found: Tensor = _Rotate.apply(x, table)
    return found


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _rotated(x, table, is_back=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(gradients[0].contiguous(), *ctx.saved_tensors, is_back=True), None


def _rotated(x: Tensor, table: Tensor, *, is_back: bool) -> Tensor:
    out = x.new_empty(x.shape)

    def work(part: slice) -> None:
        _kernels().layers_rotate(
            part.stop - part.start,
            *x.shape[1:],
            table[part].data_ptr(),
            x[part].data_ptr(),
            x.stride(0),
            x.stride(1),
            is_back,
            out[part].data_ptr(),
        )

    for_rows(len(x), work)
    return out


# -- norms ----------------------------------------------------------------------------------------

ROWS_OF_A_SUM = 512  # of a weight's gradient: the same sums with any number of threads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    is_known = x.dtype == weight.dtype == torch.float32 and x.shape[-1] % WIDTH == 0 and x.device.type == "cpu"
    if not is_known or isinstance(library(), str):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    found: Tensor = _Norm.apply(x, weight, eps)
    return found


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, scales = x.new_empty(x.shape), x.new_empty(x.shape[:-1])
        rows, of_rows, of_scales = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1]), scales.view(-1)

        def work(part: slice) -> None:
            pointers = (y.data_ptr() for y in (of_rows[part], of_scales[part]))
            count = part.stop - part.start
            _kernels().layers_norm(count, len(weight), rows[part].data_ptr(), weight.data_ptr(), eps, *pointers)

        for_rows(len(rows), work)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        of_x, width = x.new_empty(x.shape), len(weight)
        rows, given, of_rows = (y.view(-1, width) for y in (x, gradients[0].contiguous(), of_x))
        of_scales = scales.view(-1)
        sums = x.new_zeros(-(-len(rows) // ROWS_OF_A_SUM), width) if ctx.needs_input_grad[1] else None

        def work(part: slice) -> None:
            tensors = (rows[part], weight, of_scales[part], given[part], of_rows[part])
            of_weight = None if sums is None else sums[part.start // ROWS_OF_A_SUM].data_ptr()
            pointers = (y.data_ptr() for y in tensors)
            _kernels().layers_norm_backward(part.stop - part.start, width, *pointers, of_weight)

        for_rows(len(rows), work, at_once=ROWS_OF_A_SUM)
        return of_x, None if sums is None else sums.sum(0), None


# -- the feed-forward layer -----------------------------------------------------------------------


def gated_activation(x: Tensor) -> Tensor:
    """silu(gate) * up of a dense layer's [..., 2 * width]: gate, then up."""
    is_known = x.dtype == torch.float32 and x.shape[-1] % (2 * WIDTH) == 0 and not isinstance(library(), str)
    if not is_known:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    found: Tensor = _Gate.apply(x.contiguous())
    return found


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows, out = x.flatten(0, -2), x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        ctx.save_for_backward(x)
        kernels, width = _kernels(), out.shape[-1]

        def work(part: slice) -> None:
            kernels.layers_gate(
                part.stop - part.start, width, rows[part].data_ptr(), out.view(-1, width)[part].data_ptr()
            )

        for_rows(len(rows), work)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        of_x = x.new_empty(x.shape)
        kernels, width = _kernels(), x.shape[-1] // 2
        given = gradients[0].contiguous().view(-1, width)
        rows, of_rows = x.view(-1, 2 * width), of_x.view(-1, 2 * width)

        def work(part: slice) -> None:
            pointers = (y[part].data_ptr() for y in (rows, given, of_rows))
            kernels.layers_gate_backward(part.stop - part.start, width, *pointers)

        for_rows(len(rows), work)
        return of_x


# -- weights --------------------------------------------------------------------------------------


def copy_transposed(x: Tensor, out: Tensor) -> None:
    """out = x [rows, width], where a column of `out` lies in a row: PyTorch would walk through it against the lines."""
    is_plain = x.dtype == out.dtype == torch.float32 and x.stride(1) == out.stride(0) == 1
    is_aligned = not (out.data_ptr() % (4 * TILE) or out.stride(1) % TILE)
    fits = is_plain and is_aligned and not (x.shape[0] % (2 * TILE) or x.shape[1] % TILE)
    is_native = fits and not isinstance(library(), str)

    def work(part: slice) -> None:
        rows, columns = x[part], out[part]
        if not is_native:
            columns.copy_(rows)
            return
        _kernels().layers_transpose(*rows.shape, rows.data_ptr(), rows.stride(0), columns.data_ptr(), columns.stride(1))

    for_rows(x.shape[0], work, at_once=ROWS_AT_ONCE)
