"""One table maps HuggingFace and Megatron weights both ways, sharding included.

Loading, saving, weight sync, adapter merging and conversion all read it; there is no second mapping.
A rule names one Megatron parameter, the HuggingFace tensors it is made of, and how they interleave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

ShardLayout = Literal["replicated", "columns", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a dense decoder that both sides need."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_base: float
    rope_factor: float  # Llama 3's scaling of low frequencies; 1 is none
    has_qkv_bias: bool
    has_qk_norm: bool  # each head's queries and keys are normalized
    tied_embeddings: bool


@dataclass(frozen=True)
class Rule:
    """`{i}` is the layer number. `layout` says how the HuggingFace tensors form each tensor-parallel shard."""

    megatron: str
    hf: tuple[str, ...]
    layout: ShardLayout


_D = "decoder.layers.{i}."
_M = "model.layers.{i}."
_A = _M + "self_attn."

EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
FINAL = (Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),)
HEAD = Rule("output_layer.weight", ("lm_head.weight",), "vocab")
LAYER = (
    Rule(_D + "input_layernorm.weight", (_M + "input_layernorm.weight",), "replicated"),
    Rule(
        _D + "self_attention.linear_qkv.weight",
        (_A + "q_proj.weight", _A + "k_proj.weight", _A + "v_proj.weight"),
        "qkv",
    ),
    Rule(_D + "self_attention.linear_proj.weight", (_A + "o_proj.weight",), "columns"),
    Rule(_D + "pre_mlp_layernorm.weight", (_M + "post_attention_layernorm.weight",), "replicated"),
    Rule(_D + "mlp.linear_fc1.weight", (_M + "mlp.gate_proj.weight", _M + "mlp.up_proj.weight"), "gate_up"),
    Rule(_D + "mlp.linear_fc2.weight", (_M + "mlp.down_proj.weight",), "columns"),
)
QKV_BIAS = Rule(
    _D + "self_attention.linear_qkv.bias", (_A + "q_proj.bias", _A + "k_proj.bias", _A + "v_proj.bias"), "qkv"
)

QK_NORM = (
    Rule(_D + "self_attention.q_layernorm.weight", (_A + "q_norm.weight",), "replicated"),
    Rule(_D + "self_attention.k_layernorm.weight", (_A + "k_norm.weight",), "replicated"),
)


@dataclass(frozen=True)
class Family:
    """In what an architecture differs from Llama's: RMSNorm, rotary positions, grouped queries, gated SiLU."""

    has_qkv_bias: bool = False
    has_qk_norm: bool = False


# By the entry in a HuggingFace config's `architectures`. A family of the same structure is one line.
FAMILIES = {
    "Qwen2ForCausalLM": Family(has_qkv_bias=True),  # Qwen2, Qwen2.5
    "Qwen3ForCausalLM": Family(has_qk_norm=True),
    "LlamaForCausalLM": Family(),  # Llama 2, 3, 3.1, 3.2, 3.3
    "MistralForCausalLM": Family(),
}
# The parameters of Llama 3's rope that Megatron fixes.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def model_shape(hf_config: Any) -> ModelShape:
    """Read a HuggingFace config. Raises ValueError for an architecture that has no rules here."""
    architecture = (hf_config.architectures or ["unknown"])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"the checkpoint is a {architecture}; this trainer maps {', '.join(sorted(FAMILIES))}. "
            "Choose such a model, or add the family to megatron_ext/hf_mapping.py"
        )
    # Qwen's configs carry a window that a switch of their own leaves off; Mistral's have no switch.
    window = getattr(hf_config, "sliding_window", None)
    if window is not None and getattr(hf_config, "use_sliding_window", True):
        raise ValueError(
            f"the checkpoint uses sliding-window attention ({window} tokens), which is not supported; choose another "
            "model, or one of the same family without it (Mistral from v0.2 on has none)"
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, name, False) and not FAMILIES[architecture].has_qkv_bias:
            raise ValueError(f"the checkpoint's config has {name}=true, which is not supported for {architecture}")
    if hf_config.hidden_act != "silu":
        raise ValueError(f"the checkpoint's activation is {hf_config.hidden_act!r}; only 'silu' is supported")
    rope = hf_config.rope_parameters
    heads = hf_config.num_attention_heads
    return ModelShape(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=hf_config.intermediate_size,
        num_heads=heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        vocab_size=hf_config.vocab_size,
        max_positions=hf_config.max_position_embeddings,
        norm_eps=hf_config.rms_norm_eps,
        rope_base=rope["rope_theta"],
        rope_factor=_rope_factor(rope),
        has_qkv_bias=FAMILIES[architecture].has_qkv_bias,
        has_qk_norm=FAMILIES[architecture].has_qk_norm,
        tied_embeddings=hf_config.tie_word_embeddings,
    )


def _rope_factor(rope: dict[str, Any]) -> float:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return 1.0
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not supported; 'default' and 'llama3' are")
    for name, value in LLAMA3_ROPE.items():
        if rope[name] != value:
            raise ValueError(
                f"rope type 'llama3' is supported with {name}={value:g}, as Llama 3.1 to 3.3 have it; "
                f"the checkpoint has {rope[name]:g}"
            )
    return float(rope["factor"])


def model_rules(shape: ModelShape) -> Iterator[Rule]:
    """Every rule of the whole model, layer numbers filled in; a tied head has no rule of its own."""
    yield EMBEDDING
    for i in range(shape.num_layers):
        for rule in layer_rules(shape):
            yield at_layer(rule, i)
    yield from FINAL
    if not shape.tied_embeddings:
        yield HEAD


def layer_rules(shape: ModelShape) -> tuple[Rule, ...]:
    """The rules of one layer, "{i}" not filled in."""
    return (*LAYER, *(QKV_BIAS,) * shape.has_qkv_bias, *QK_NORM * shape.has_qk_norm)


def at_layer(rule: Rule, layer: int) -> Rule:
    """The rule with its layer number filled in."""
    return Rule(
        rule.megatron.replace("{i}", str(layer)), tuple(n.replace("{i}", str(layer)) for n in rule.hf), rule.layout
    )


def local_rules(model: Any, shape: ModelShape) -> Iterator[tuple[Rule, torch.nn.Parameter]]:
    """This stage's parameters with their rules in whole-model layer numbers, in model order.

    `model` is a Megatron GPTModel. A tied head on the last of several stages is a copy and has no rule.
    """
    parameters = dict(model.named_parameters())
    if model.pre_process:
        yield EMBEDDING, parameters[EMBEDDING.megatron]
    for i, layer in enumerate(model.decoder.layers):
        for rule in layer_rules(shape):
            yield at_layer(rule, layer.layer_number - 1), parameters[at_layer(rule, i).megatron]
    if model.post_process:
        for rule in FINAL:
            yield rule, parameters[rule.megatron]
        if not shape.tied_embeddings:
            yield HEAD, parameters[HEAD.megatron]


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Megatron's rule: a multiple of 128 x tp, so that every rank's slice is equal and aligned."""
    multiple = 128 * tensor
    return (vocab_size + multiple - 1) // multiple * multiple


def interleave_qkv(parts: Sequence[Tensor], num_kv_heads: int) -> Tensor:
    """[q; k; v] by rows -> Megatron's order: per key-value group its queries, then its key, then its value.

    Works on any slice that holds whole groups: weights [n, H], biases [n] and adapter outputs alike.
    """
    grouped = [part.reshape(num_kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def separate_qkv(fused: Tensor, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `interleave_qkv`."""
    grouped = fused.reshape(num_kv_heads, -1, *fused.shape[1:])
    sizes = [grouped.shape[1] - 2 * head_dim, head_dim, head_dim]
    q, k, v = (part.flatten(0, 1) for part in grouped.split(sizes, dim=1))
    return q, k, v


def to_shard(rule: Rule, parts: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
    """This tensor-parallel rank's Megatron tensor from whole HuggingFace tensors.

    "vocab" rows past the real vocabulary are zero.
    """
    if rule.layout == "replicated":
        return parts[0]
    if rule.layout == "columns":
        return parts[0].chunk(size, dim=1)[rank]
    if rule.layout == "vocab":
        rows = padded_vocab_size(shape.vocab_size, size) // size
        mine = parts[0][rank * rows : (rank + 1) * rows]
        return torch.cat([mine, mine.new_zeros(rows - len(mine), *mine.shape[1:])])
    mine_parts = [part.chunk(size, dim=0)[rank] for part in parts]
    if rule.layout == "qkv":
        return interleave_qkv(mine_parts, shape.num_kv_heads // size)
    return torch.cat(mine_parts)  # gate_up: [gate of this rank; up of this rank]


def from_shards(rule: Rule, shards: Sequence[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Whole HuggingFace tensors from the shards of all tensor-parallel ranks, in rank order."""
    size = len(shards)
    if rule.layout == "replicated":
        return {rule.hf[0]: shards[0]}
    if rule.layout == "columns":
        return {rule.hf[0]: torch.cat(list(shards), dim=1)}
    if rule.layout == "vocab":
        return {rule.hf[0]: torch.cat(list(shards))[: shape.vocab_size]}
    if rule.layout == "qkv":
        groups = shape.num_kv_heads // size
        split: list[tuple[Tensor, ...]] = [separate_qkv(shard, groups, shape.head_dim) for shard in shards]
    else:
        split = [shard.chunk(2) for shard in shards]
    return {name: torch.cat([parts[k] for parts in split]) for k, name in enumerate(rule.hf)}
