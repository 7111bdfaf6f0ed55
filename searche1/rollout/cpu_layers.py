"""A decoder layer of Qwen2 and Llama on a CPU without SGLang's modules between its operations.

A small model's layer is ten operations of some microseconds each, and the modules that lead to them cost as much again:
here it is one call of C++ (`ops_layer`). What a layer is not built for, such as another dtype, LoRA, quantized weights
or tensor parallelism, goes to SGLang's own forward.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch import Tensor

from megatron_ext import blas
from searche1.rollout.cpu_attention import BatchedNativeAttention
from searche1.rollout.cpu_kernels import transpose_memory
from searche1.rollout.engine_ops import HEAD_SIZES, WIDTH, Layer, Tokens, kernels

logger = logging.getLogger(__name__)

Forward = Callable[..., tuple[Tensor, Tensor]]


class DirectLayer:
    """What SGLang's modules of one layer compute, on their own weights."""

    def __init__(self, layer: Any) -> None:
        """Of a layer that `why_not` has nothing against."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = layer.input_layernorm, layer.post_attention_layernorm
        products = _products(layer)
        self.kernels = kernels()
        self.cache_number = attention.attn.layer_id
        self.layer = Layer(
            sgemm=blas.sgemm_address(),
            hidden=products[1].output_size,
            heads=attention.num_heads,
            kv_heads=attention.num_kv_heads,
            size=attention.head_dim,
            width=mlp.gate_up_proj.output_size // 2,
            eps=norms[0].variance_epsilon,
            scale=attention.attn.scaling,
        )
        self.scratch = self.layer.scratch()
        for product in products:
            transpose_memory(product.weight)
        self.rows: dict[str, Tensor] = {
            "angles": attention.rotary_emb.cos_sin_cache,
            "before_attention": norms[0].weight,
            "before_mlp": norms[1].weight,
        }
        names = ("qkv", "out", "gate_up", "down")
        self.linears: dict[str, tuple[Tensor, Tensor | None]] = {
            name: (product.weight, product.bias) for name, product in zip(names, products, strict=True)
        }

    def forward(
        self, tokens: Tokens, x: Tensor, backend: BatchedNativeAttention, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The layer's output before its sum with the residual, and the residual.

        x, residual: float32 [tokens, hidden size].
        """
        self.point(backend.token_to_kv_pool)
        out, total = torch.empty_like(x), torch.empty_like(x)
        scratch = x.new_empty(x.shape[0] * self.scratch)
        self.kernels.ops_layer(
            ctypes.byref(self.layer),
            ctypes.byref(tokens),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            scratch.data_ptr(),
            total.data_ptr(),
            out.data_ptr(),
        )
        return out, total

    def point(self, pool: Any) -> None:
        """At where its weights and its part of the cache are now: a sync may have them lie elsewhere."""
        keys, values = pool.get_kv_buffer(self.cache_number)
        self.layer.keys, self.layer.values = keys.data_ptr(), values.data_ptr()
        for name, row in self.rows.items():
            setattr(self.layer, name, row.data_ptr())
        for name, (weight, bias) in self.linears.items():
            assert weight.stride() == (1, len(weight)), "a weight came in rows: transpose_memory was undone"
            linear = getattr(self.layer, name)
            linear.weight = weight.data_ptr()
            linear.bias = None if bias is None else bias.data_ptr()


def _products(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def why_not(layer: Any) -> str:
    """What keeps a layer of SGLang's from being computed directly; empty if nothing does."""
    if reason := blas.missing():
        return f"no OpenBLAS: {reason}"
    attention = layer.self_attn
    if type(attention).__name__ not in ("LlamaAttention", "Qwen2Attention"):
        return "another kind of attention"
    rotary, core = attention.rotary_emb, attention.attn
    products = _products(layer)
    kinds = (QKVParallelLinear, RowParallelLinear, MergedColumnParallelLinear, RowParallelLinear)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    tensors = [*(product.weight for product in products), *(norm.weight for norm in norms), rotary.cos_sin_cache]
    if any(type(product) is not kind for product, kind in zip(products, kinds, strict=True)):
        return "products that are not SGLang's own"  # such as LoRA's
    if any(type(product.quant_method) is not UnquantizedLinearMethod for product in products):
        return "quantized weights"
    if any(product.weight.shape != (product.output_size, product.input_size) for product in products):
        return "the engine is tensor-parallel"
    if any(product.skip_bias_add for product in products):
        return "a bias is added later"
    if any(x.dtype != torch.float32 or not x.is_contiguous() for x in tensors):
        return "they are not in float32"
    if any(type(norm) is not RMSNorm or norm.variance_size_override is not None for norm in norms):
        return "norms with options"
    if norms[0].variance_epsilon != norms[1].variance_epsilon:
        return "its norms differ"
    is_whole = rotary.is_neox_style and rotary.rotary_dim == rotary.head_size == attention.head_dim
    if not is_whole or type(rotary).forward_native is not RotaryEmbedding.forward_native:
        return "another kind of rotary positions"
    if core.is_cross_attention or (core.sliding_window_size or -1) > -1:
        return "sliding windows or cross attention"
    widths = products[1].output_size, layer.mlp.gate_up_proj.output_size // 2
    if attention.head_dim not in HEAD_SIZES or any(width % WIDTH for width in widths):
        return f"heads of {attention.head_dim}, or widths of {widths} that are no multiples of {WIDTH}"
    return ""


@functools.cache
def tell(reason: str) -> None:
    """Once for all layers."""
    logger.warning("layers are computed by SGLang's own modules, which is slower on a CPU: %s", reason)


def direct_layer(layer: Any) -> DirectLayer | None:
    """Of a layer of SGLang's whose weights have their final form; None, which is told, if it cannot be."""
    found: DirectLayer | None
    try:
        found = layer.searche1_direct
    except AttributeError:  # the first call
        reason = why_not(layer)
        found = layer.searche1_direct = None if reason else DirectLayer(layer)
        if reason:
            tell(reason)
    return found


def direct(forward: Forward) -> Forward:
    """SGLang's `forward` of a decoder layer, computed directly where that is the same."""

    def decoder_layer(
        layer: Any, positions: Tensor, hidden_states: Tensor, forward_batch: Any, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        found = direct_layer(layer)
        places, backend = forward_batch.out_cache_loc, get_attn_backend()
        fits = (
            found is not None
            and type(backend) is BatchedNativeAttention
            and hidden_states.shape[0] > 0
            and positions.dtype == places.dtype == torch.int64
            and positions.shape == places.shape == hidden_states.shape[:1]
            and hidden_states.dtype == backend.token_to_kv_pool.dtype == torch.float32
            and (residual is None or residual.dtype == torch.float32)
            and all(x is None or x.is_contiguous() for x in (positions, places, hidden_states, residual))
        )
        if found is None or not fits:
            return forward(layer, positions, hidden_states, forward_batch, residual)
        return found.forward(backend.tokens(positions, places), hidden_states, backend, residual)

    return decoder_layer


def register() -> None:
    """Puts it into SGLang's models, whose layers hand on a residual up to 0.5.21."""
    from sglang.srt.models.llama import LlamaDecoderLayer
    from sglang.srt.models.qwen2 import Qwen2DecoderLayer

    for layer in (LlamaDecoderLayer, Qwen2DecoderLayer):
        if "residual" in inspect.signature(layer.forward).parameters:
            layer.forward = direct(layer.forward)
