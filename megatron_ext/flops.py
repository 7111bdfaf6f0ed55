"""Floating-point operations of a model's passes; a multiply-add counts two."""

from __future__ import annotations

from megatron_ext.hf_mapping import ModelShape
from megatron_ext.memory import active_parameters


def layer_flops(shape: ModelShape, tokens: float, sequence: float) -> float:
    """Of one forward pass of `tokens` through all layers; the mean position looks back at half its `sequence`."""
    queries = shape.num_heads * shape.head_dim
    return 2 * active_parameters(shape) * tokens + 2 * shape.num_layers * queries * sequence * tokens


def head_flops(shape: ModelShape, rows: float) -> float:
    """Of the language-model head on `rows` positions, forward."""
    return 2 * shape.vocab_size * shape.hidden_size * rows


def attention_cost(shape: ModelShape) -> float:
    """A sequence of n tokens costs n + attention_cost n^2 times a token's way through all linears."""
    return (layer_flops(shape, 1, 1) - layer_flops(shape, 1, 0)) / layer_flops(shape, 1, 0)
