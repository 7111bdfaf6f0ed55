"""SGLang's float32 layers on a CPU in C++ (engine_ops.cpp), where setup.py could build it; elsewhere plain torch.

A decoding step of a small model is dozens of tiny tensor operations a layer, each of which costs more to call than to
compute. What has another dtype, width or option goes to SGLang's own forward.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.native import load_kernels

HEAD_SIZES = (32, 64, 96, 128)
WIDTH = 16  # floats of a vector

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "ops_attention": (*[_INT64] * 4, *[_POINTER] * 4, _INT64, *[_POINTER] * 3, _FLOAT, _POINTER),
    "ops_rms_norm": (_INT64, _INT64, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER),
    "ops_silu_and_mul": (_INT64, _INT64, _POINTER, _POINTER),
    "ops_seeded_multinomial": (_INT64, _INT64, *[_POINTER] * 4),
    "ops_sample": (_INT64, _INT64, *[_POINTER] * 6),
    "ops_likeliest": (_INT64, _INT64, *[_POINTER] * 3),
    "ops_rotate": (*[_INT64] * 3, _POINTER, _POINTER, _POINTER, _INT64, _POINTER),
    "ops_panels": (_INT64, _INT64, _POINTER, _POINTER),
    "ops_product": (*[_INT64] * 3, *[_POINTER] * 4),
    "ops_layer": [_POINTER] * 7,
    "ops_start": [_POINTER] * 2,
    "ops_wait": [_INT64],
}


class Linear(ctypes.Structure):
    """weight [in, out] in memory, bias [out] or None, and the weight as `ops_panels` puts it or None."""

    _fields_ = [("weight", _POINTER), ("bias", _POINTER), ("panels", _POINTER)]


class Layer(ctypes.Structure):
    """`struct Layer` of engine_ops.cpp: sizes and weights of a decoder layer."""

    _fields_ = [
        ("sgemm", _POINTER),
        *((name, _INT64) for name in ("hidden", "heads", "kv_heads", "size", "width")),
        *((name, _FLOAT) for name in ("eps", "scale")),
        *((name, _POINTER) for name in ("angles", "before_attention", "before_mlp")),
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _POINTER) for name in ("keys", "values")),
    ]

    def scratch(self) -> int:
        """Floats that `ops_layer` needs for a token."""
        inner = self.heads * self.size
        return self.hidden + 2 * inner + max(inner + 2 * self.kv_heads * self.size, 2 * self.width)


class Tokens(ctypes.Structure):
    """`struct Tokens`: the new tokens of a batch, and where its requests lie."""

    _fields_ = [
        *((name, _INT64) for name in ("count", "requests", "slots_stride")),
        *((name, _POINTER) for name in ("positions", "places", "numbers", "lengths", "counts", "slots")),
    ]


class Model(ctypes.Structure):
    """`struct Model`: layers between an embedding and a head."""

    _fields_ = [
        ("layers", _POINTER),
        ("sgemm", _POINTER),
        *((name, _INT64) for name in ("count", "vocab", "scratch")),
        *((name, _POINTER) for name in ("embedding", "norm", "head")),
    ]


class Batch(ctypes.Structure):
    """`struct Batch`: new tokens of requests, and what is drawn after them."""

    _fields_ = [
        ("tokens", Tokens),
        *((name, _POINTER) for name in ("ids", "newest", "temperatures", "seeds", "drawn", "logprobs")),
    ]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    return load_kernels(Path(__file__).with_name("engine_ops.cpp"), SIGNATURES)


def can_attend(query: Tensor, keys: Tensor) -> bool:
    """Whether `attention` is built and knows these."""
    return (
        not isinstance(library(), str)
        and query.dtype == keys.dtype == torch.float32
        and query.shape[-1] in HEAD_SIZES
        and query.is_contiguous()
    )


def attention(
    query: Tensor,
    output: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    numbers: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    scale: float,
) -> Tensor:
    """Fills and returns `output`: the new tokens of each request over its tokens up to themselves.

    Args:
        query, output: float32 [new tokens, heads, size].
        keys, values: float32 [places, key-value heads, size].
        slots: int32 [requests of the pool, longest], the places of their tokens.
        numbers, lengths: int64 [requests], the row of `slots` and the tokens of each.
        counts: int64 [requests], how many of those are new, at its end; None is one each.
    """
    heads, size = query.shape[1:]
    assert slots.dtype == torch.int32 and slots.stride(1) == 1
    kernels().ops_attention(
        numbers.shape[0],
        heads,
        keys.shape[1],
        size,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        slots.data_ptr(),
        slots.stride(0),
        numbers.data_ptr(),
        lengths.data_ptr(),
        None if counts is None else counts.data_ptr(),
        scale,
        output.data_ptr(),
    )
    return output


def kernels() -> Any:
    found = library()
    assert not isinstance(found, str), found
    return found


def rms_norm(
    layer: Any, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None, **_: Any
) -> Any:
    """SGLang's RMSNorm: the norm, and with a residual also its sum with x."""
    tensors = [x, layer.weight] if residual is None else [x, layer.weight, residual]
    is_plain = layer.variance_size_override is None and post_residual_addition is None
    if not (is_plain and all(map(_is_simple, tensors))):
        return layer.forward_native(x, residual, post_residual_addition)
    width = x.shape[-1]
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    kernels().ops_rms_norm(
        x.numel() // width,
        width,
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        layer.weight.data_ptr(),
        layer.variance_epsilon,
        None if total is None else total.data_ptr(),
        out.data_ptr(),
    )
    return out if total is None else (out, total)


def seeded_multinomial(logprobs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """`cpu_kernels.seeded_multinomial`: the same hash, and the same draws but for ties within rounding."""
    logprobs = logprobs.double().contiguous()
    seeds, positions = seeds.long().contiguous(), positions.long().contiguous()
    out = torch.empty(len(logprobs), 1, dtype=torch.int64)
    kernels().ops_seeded_multinomial(
        *logprobs.shape, logprobs.data_ptr(), seeds.data_ptr(), positions.data_ptr(), out.data_ptr()
    )
    return out


PANEL = 32  # columns of a weight that `to_panels` puts together on AVX-512, or a multiple of them


def empty_panels(weight: Tensor) -> Tensor:
    """Memory for `to_panels` of a weight [out, in]."""
    return torch.empty(weight.shape[1] * -(-len(weight) // PANEL) * PANEL)


def to_panels(weight: Tensor, panels: Tensor) -> None:
    """A weight [out, in] that lies transposed, out a multiple of WIDTH, in the order in which products read it."""
    assert weight.stride() == (1, len(weight)) and len(weight) % WIDTH == 0
    kernels().ops_panels(*weight.shape[::-1], weight.data_ptr(), panels.data_ptr())


def sample(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One draw per row, as `seeded_multinomial` of the logprobs at its temperature, and its logprob at temperature 1.

    logits: float32 [rows, vocabulary], contiguous. temperatures: float32 [rows], in any shape. seeds, positions:
    integers [rows]. Returns ids, int32 [rows], and logprobs, float32 [rows].
    """
    rows, vocab = logits.shape
    seeds, positions = seeds.long().contiguous(), positions.long().contiguous()
    temperatures = temperatures.contiguous()
    assert temperatures.dtype == torch.float32 and temperatures.numel() == len(seeds) == len(positions) == rows
    ids, logprobs = torch.empty(rows, dtype=torch.int32), torch.empty(rows)
    kernels().ops_sample(
        rows,
        vocab,
        logits.data_ptr(),
        temperatures.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        ids.data_ptr(),
        logprobs.data_ptr(),
    )
    return ids, logprobs


def sampler(forward: Callable[..., Tensor], has_original_logprobs: bool) -> Callable[..., Tensor]:
    """SGLang's `Sampler.forward`, in one pass where requests have seeds and want no more than a draw and its logprob.

    `has_original_logprobs`: SGLang is to return logprobs at temperature 1 (SGLANG_RETURN_ORIGINAL_LOGPROB).
    """

    def sample_batch(
        layer: Any, output: Any, info: Any, return_logprob: bool, top_nums: Any, token_ids: Any, positions: Tensor
    ) -> Tensor:
        logits = output.next_token_logits
        is_plain = (
            has_original_logprobs
            and info.sampling_seed is not None
            and not (info.is_all_greedy or info.need_top_p_sampling or info.need_top_k_sampling)
            and not (info.need_min_p_sampling or info.grammars or layer.rl_on_policy_target)
            and info.sampling_mask_batch_indices is None
            and not (return_logprob and (any(top_nums) or any(map(_is_set, token_ids))))
            and logits.dtype == info.temperatures.dtype == torch.float32
            and len(logits) == info.temperatures.numel() == len(info.sampling_seed) == len(positions)
            and logits.is_contiguous()
        )
        if not is_plain:
            return forward(layer, output, info, return_logprob, top_nums, token_ids, positions)
        logits = layer._preprocess_logits(logits, info)
        ids, logprobs = sample(logits, info.temperatures, info.sampling_seed, positions)
        if return_logprob:
            output.next_token_logprobs = logprobs
        return ids

    return sample_batch


def silu_and_mul(layer: Any, x: Tensor) -> Tensor:
    """SGLang's SiluAndMul: [..., 2 * width] -> [..., width]."""
    width = x.shape[-1] // 2
    if not (_is_simple(x) and width % WIDTH == 0):
        return layer.forward_native(x)
    out = x.new_empty(*x.shape[:-1], width)
    kernels().ops_silu_and_mul(out.numel() // width, width, x.data_ptr(), out.data_ptr())
    return out


def rotate(
    layer: Any, positions: Tensor, query: Tensor, key: Tensor, *more: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """SGLang's RotaryEmbedding of whole heads whose halves belong together."""
    size, angles = layer.head_size, layer.cos_sin_cache
    fits = (
        layer.is_neox_style
        and layer.rotary_dim == size
        and size % (2 * WIDTH) == 0
        and positions.dtype == torch.int64
        and positions.is_contiguous()
        and angles.dtype == torch.float32
        and not any(map(_is_set, (*more, *named.values())))
        and all(x.dtype == torch.float32 and x.ndim == 2 and x.stride(1) == 1 for x in (query, key))
    )
    if not fits:
        return layer.forward_native(positions, query, key, *more, **named)
    rotated = []
    for x in (query, key):
        out = torch.empty(x.shape)
        kernels().ops_rotate(
            len(x),
            x.shape[1] // size,
            size,
            positions.data_ptr(),
            angles.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            out.data_ptr(),
        )
        rotated.append(out)
    return rotated[0], rotated[1]


def register() -> None:
    """Puts them where SGLang looks for a platform's own layers; before 0.5.21 it looks nowhere."""
    try:
        from sglang.kernels.fused_op import BaseFusedOp
    except ModuleNotFoundError:
        return
    if not hasattr(BaseFusedOp, "register_oot_forward"):
        return
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    for layer, forward in ((RMSNorm, rms_norm), (SiluAndMul, silu_and_mul), (RotaryEmbedding, rotate)):
        BaseFusedOp.register_oot_forward(layer, forward, "native")


def _is_set(option: Any) -> bool:
    return option is not None


def _is_simple(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous() and x.shape[-1] % WIDTH == 0
