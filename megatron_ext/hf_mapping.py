"""One table maps HuggingFace and Megatron weights both ways, sharding included.

Loading, saving, weight sync, adapter merging and conversion all read it; there is no second mapping.
A rule names one Megatron parameter, the HuggingFace tensors it is made of, and how they interleave. What a model
stores is a rule; how large it is follows from `ModelShape`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

ShardLayout = Literal["replicated", "columns", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that both sides need."""

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
    num_experts: int = 0  # 0: dense
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalizes_experts: bool = True  # the chosen experts' weights sum to one


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter. `{i}` is the layer, `{e}` the expert; both count over the whole model.

    `layout` says how the HuggingFace tensors form each tensor-parallel shard.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: ShardLayout
    stored: str = ""  # its name in Megatron's checkpoints, which stack layers and experts; "": the name without numbers
    place: tuple[int, ...] = ()  # its layer and expert in the stack

    @property
    def key(self) -> str:
        return self.stored or self.megatron.replace(".{i}.", ".")

    @property
    def is_expert(self) -> bool:
        return len(self.place) == 2 or "{e}" in self.megatron


_D = "decoder.layers.{i}."
_M = "model.layers.{i}."
_A = _M + "self_attn."
_E = _M + "mlp.experts.{e}."

EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
FINAL = (Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),)
HEAD = Rule("output_layer.weight", ("lm_head.weight",), "vocab")
ATTENTION = (
    Rule(
        _D + "input_layernorm.weight",
        (_M + "input_layernorm.weight",),
        "replicated",
        stored="decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    ),
    Rule(
        _D + "self_attention.linear_qkv.weight",
        (_A + "q_proj.weight", _A + "k_proj.weight", _A + "v_proj.weight"),
        "qkv",
    ),
    Rule(_D + "self_attention.linear_proj.weight", (_A + "o_proj.weight",), "columns"),
)
QKV_BIAS = Rule(
    _D + "self_attention.linear_qkv.bias", (_A + "q_proj.bias", _A + "k_proj.bias", _A + "v_proj.bias"), "qkv"
)
QK_NORM = (
    Rule(_D + "self_attention.q_layernorm.weight", (_A + "q_norm.weight",), "replicated"),
    Rule(_D + "self_attention.k_layernorm.weight", (_A + "k_norm.weight",), "replicated"),
)
MLP_NORM = Rule(_D + "pre_mlp_layernorm.weight", (_M + "post_attention_layernorm.weight",), "replicated")
MLP = (
    replace(MLP_NORM, stored="decoder.layers.mlp.linear_fc1.layer_norm_weight"),
    Rule(_D + "mlp.linear_fc1.weight", (_M + "mlp.gate_proj.weight", _M + "mlp.up_proj.weight"), "gate_up"),
    Rule(_D + "mlp.linear_fc2.weight", (_M + "mlp.down_proj.weight",), "columns"),
)
ROUTED = (MLP_NORM, Rule(_D + "mlp.router.weight", (_M + "mlp.gate.weight",), "replicated"))
EXPERT = (
    Rule(
        _D + "mlp.experts.local_experts.{e}.linear_fc1.weight",
        (_E + "gate_proj.weight", _E + "up_proj.weight"),
        "gate_up",
        stored="decoder.layers.mlp.experts.experts.linear_fc1.weight",
    ),
    Rule(
        _D + "mlp.experts.local_experts.{e}.linear_fc2.weight",
        (_E + "down_proj.weight",),
        "columns",
        stored="decoder.layers.mlp.experts.experts.linear_fc2.weight",
    ),
)


@dataclass(frozen=True)
class Family:
    """In what an architecture differs from Llama's: RMSNorm, rotary positions, grouped queries, gated SiLU."""

    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_experts: bool = False  # in every layer, with a softmax router and no shared expert


# By the entry in a HuggingFace config's `architectures`. A family of the same structure is one line.
FAMILIES = {
    "Qwen2ForCausalLM": Family(has_qkv_bias=True),  # Qwen2, Qwen2.5
    "Qwen3ForCausalLM": Family(has_qk_norm=True),
    "Qwen3MoeForCausalLM": Family(has_qk_norm=True, has_experts=True),
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
    has_experts = FAMILIES[architecture].has_experts
    if has_experts and (hf_config.decoder_sparse_step != 1 or hf_config.mlp_only_layers):
        raise ValueError(
            "the checkpoint has experts in some of its layers only (decoder_sparse_step="
            f"{hf_config.decoder_sparse_step}, mlp_only_layers={hf_config.mlp_only_layers}); "
            "all layers must have them"
        )
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
        num_experts=hf_config.num_experts if has_experts else 0,
        experts_per_token=hf_config.num_experts_per_tok if has_experts else 0,
        expert_ffn_size=hf_config.moe_intermediate_size if has_experts else 0,
        normalizes_experts=hf_config.norm_topk_prob if has_experts else True,
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
    """Every rule of the whole model, numbers filled in; a tied head has no rule of its own."""
    yield EMBEDDING
    for i in range(shape.num_layers):
        yield from layer_rules(shape, i, experts=range(shape.num_experts))
    yield from FINAL
    if not shape.tied_embeddings:
        yield HEAD


def layer_rules(shape: ModelShape, layer: int, *, experts: Iterable[int]) -> Iterator[Rule]:
    """The rules of one layer with some of its experts, numbers filled in."""
    mlp = ROUTED if shape.num_experts else MLP
    for rule in (*ATTENTION, *(QKV_BIAS,) * shape.has_qkv_bias, *QK_NORM * shape.has_qk_norm, *mlp):
        yield _at(rule, layer)
    if shape.num_experts:
        for expert in experts:
            for rule in EXPERT:
                yield _at(rule, layer, expert)


def _at(rule: Rule, *place: int) -> Rule:
    def fill(name: str) -> str:
        for mark, number in zip(("{i}", "{e}"), place, strict=False):
            name = name.replace(mark, str(number))
        return name

    return Rule(fill(rule.megatron), tuple(fill(name) for name in rule.hf), rule.layout, rule.key, place)


def expert_rule(rule: Rule, expert: int) -> Rule:
    """The rule of the same parameter of another expert in the same layer."""
    layer, own = rule.place

    def rename(name: str) -> str:
        return name.replace(f"experts.{own}.", f"experts.{expert}.")

    hf = tuple(rename(name) for name in rule.hf)
    return Rule(rename(rule.megatron), hf, rule.layout, rule.stored, (layer, expert))


def local_rules(model: Any, shape: ModelShape) -> Iterator[tuple[Rule, torch.nn.Parameter]]:
    """This rank's parameters with their rules in whole-model numbers, in model order.

    `model` is a Megatron GPTModel. A tied head on the last of several stages is a copy and has no rule.
    """
    if model.pre_process:
        yield EMBEDDING, model.get_parameter(EMBEDDING.megatron)
    for i, layer in enumerate(model.decoder.layers):
        number = layer.layer_number - 1
        experts = layer.mlp.local_expert_indices if shape.num_experts else []
        for rule in layer_rules(shape, number, experts=experts):
            name = rule.megatron.replace(f"layers.{number}.", f"layers.{i}.")
            if rule.is_expert:
                name = _local_expert_name(name, experts.index(rule.place[1]), layer.mlp.experts)
            yield rule, model.get_parameter(name)
    if model.post_process:
        for rule in FINAL:
            yield rule, model.get_parameter(rule.megatron)
        if not shape.tied_embeddings:
            yield HEAD, model.get_parameter(HEAD.megatron)


def _local_expert_name(name: str, local: int, experts: Any) -> str:
    """Experts count from zero on every rank; Transformer Engine's grouped linears hold them as weight0, weight1, ..."""
    before, _, after = name.partition("local_experts.")
    linear = after.split(".")[1]
    if hasattr(experts, "local_experts"):
        return f"{before}local_experts.{local}.{linear}.weight"
    return f"{before}{linear}.weight{local}"


def hf_size(name: str, shape: ModelShape) -> tuple[int, ...]:
    """What the config says of the size of one HuggingFace tensor."""
    hidden, ffn = shape.hidden_size, shape.expert_ffn_size if ".experts." in name else shape.ffn_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    module, kind = name.split(".")[-2:]
    matrices = {
        "embed_tokens": (shape.vocab_size, hidden),
        "lm_head": (shape.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate": (shape.num_experts, hidden),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    if module in matrices:
        return matrices[module] if kind == "weight" else matrices[module][:1]
    return (shape.head_dim,) if module in ("q_norm", "k_norm") else (hidden,)


def hf_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every HuggingFace tensor of the model, in the order in which it is written."""
    return {name: hf_size(name, shape) for rule in model_rules(shape) for name in rule.hf}


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
        return _joined([mine, mine.new_zeros(rows - len(mine), *mine.shape[1:])])
    mine_parts = [part.chunk(size, dim=0)[rank] for part in parts]
    if rule.layout == "qkv":
        return interleave_qkv(mine_parts, shape.num_kv_heads // size)
    return torch.cat(mine_parts)  # gate_up: [gate of this rank; up of this rank]


def from_shards(rule: Rule, shards: Sequence[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Whole HuggingFace tensors from the shards of all tensor-parallel ranks, in rank order; views if possible."""
    size = len(shards)
    if rule.layout == "replicated":
        return {rule.hf[0]: shards[0]}
    if rule.layout == "columns":
        return {rule.hf[0]: _joined(shards, dim=1)}
    if rule.layout == "vocab":
        return {rule.hf[0]: _joined(shards)[: shape.vocab_size]}
    if rule.layout == "qkv":
        groups = shape.num_kv_heads // size
        split: list[tuple[Tensor, ...]] = [separate_qkv(shard, groups, shape.head_dim) for shard in shards]
    else:
        split = [shard.chunk(2) for shard in shards]
    return {name: _joined([parts[k] for parts in split]) for k, name in enumerate(rule.hf)}


def _joined(parts: Sequence[Tensor], *, dim: int = 0) -> Tensor:
    """One tensor of all; what is whole already is not copied."""
    filled = [part for part in parts if part.numel()] or parts[:1]
    return filled[0] if len(filled) == 1 else torch.cat(list(filled), dim=dim)
