"""Builds a Megatron-core GPT from a HuggingFace config, and stops it at hidden states.

Shapes: T packed tokens, R rows (positions that predict a policy token), H hidden size, V vocabulary, tp ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.cpu_layers import gated_activation
from megatron_ext.hf_mapping import ModelShape, local_rules, padded_vocab_size
from megatron_ext.norm import RMSNorm
from megatron_ext.parallel import Layout
from megatron_ext.prefixes import (
    PackParams,
    Prefix,
    PrefixedSelfAttention,
    pack_params,
    transformer_engine_attention,
)
from megatron_ext.vocab_parallel import SAME_BITS_FOR, VocabShard, tile_cuts

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class ModelSettings:
    """What of the model is the trainer's choice rather than the checkpoint's."""

    dtype: torch.dtype
    recompute: str  # a key of RECOMPUTE


def transformer_config(shape: ModelShape, settings: ModelSettings, layout: Layout) -> TransformerConfig:
    """Megatron's config for a HuggingFace model. Raises ValueError if the layout cannot hold the model."""
    for what, number, size in (
        ("attention heads", shape.num_heads, layout.tensor),
        ("key-value heads", shape.num_kv_heads, layout.tensor),
        ("layers", shape.num_layers, layout.pipeline),
    ):
        if number % size:
            axis = "pipeline" if what == "layers" else "tensor"
            raise ValueError(
                f"the model has {number} {what}, which {axis}-parallel size {size} does not divide; "
                f"set parallel.{axis} to a divisor of {number}"
            )
    if shape.num_experts % layout.expert or (layout.expert > 1 and not shape.num_experts):
        raise ValueError(
            f"the model has {shape.num_experts or 'no'} experts, which expert-parallel size {layout.expert} does not "
            f"divide; set parallel.expert to {'a divisor of their number' if shape.num_experts else 1}"
        )
    if shape.num_experts and layout.tensor > 1 and not layout.sequence:
        raise ValueError(
            "experts and tensor parallelism need sequence parallelism, or Megatron does not train; "
            "set parallel.sequence=true"
        )
    if settings.recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {sorted(RECOMPUTE)}, got {settings.recompute!r}")
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=layout.device.type == "cpu" and not shape.num_experts,  # ours, in fact: see layer_spec
        add_bias_linear=False,
        add_qkv_bias=shape.has_qkv_bias,
        qk_layernorm=shape.has_qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        cp_comm_type="p2p",  # keys and values go round; all-to-all would split the few key-value heads once more
        sequence_parallel=layout.sequence,
        pipeline_dtype=settings.dtype,
        params_dtype=settings.dtype,
        bf16=settings.dtype == torch.bfloat16,
        # Packed micro-batches differ in length, so pipeline stages announce shapes to one another.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the only one that takes lengths that vary; asked for dense models too
        # Row weights already sum to one over the global batch: nothing may rescale the loss or its gradient.
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize_without_rescaling,
        # Weights come from a checkpoint; building on the host keeps GPUs free of throw-away copies.
        use_cpu_initialization=True,
        perform_initialization=False,
        # These fusions need Apex or CUDA-only kernels.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **RECOMPUTE[settings.recompute],
        **_experts(shape, layout),
    )


def _experts(shape: ModelShape, layout: Layout) -> dict[str, Any]:
    """Nothing balances the experts' load: the losses of the paper are the only ones, as when the model is used."""
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn_size,
        "moe_router_pre_softmax": not shape.normalizes_experts,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": has_transformer_engine(),
        "expert_model_parallel_size": layout.expert,
    }


def _finalize_without_rescaling(model: list[torch.nn.Module], num_tokens: Any = None, **options: Any) -> None:
    """Megatron's gradient reductions, without its division by a token count: weights are normalised already."""
    finalize_model_grads(model, None, **options)


def layer_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Transformer Engine layers where it imports, Megatron's local layers with our attention and norm elsewhere.

    The norms stay apart from the linears in both, so that parameter names, LoRA inputs and checkpoints are the same.
    """
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    layer = spec.submodules
    attention = layer.self_attention.submodules
    norm: Any
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TENorm,
            TERowParallelLinear,
        )
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        norm = TENorm
        # Its kernels for packs take no float32.
        is_float32 = config.params_dtype == torch.float32
        attention.core_attention = PrefixedSelfAttention if is_float32 else transformer_engine_attention()
        attention.linear_qkv, attention.linear_proj = TEColumnParallelLinear, TERowParallelLinear
        if config.num_moe_experts:
            module, submodules = TESpecProvider().grouped_mlp_modules(True, False)
            layer.mlp.submodules.experts = ModuleSpec(module, submodules=submodules)
        else:
            layer.mlp.submodules.linear_fc1 = TEColumnParallelLinear
            layer.mlp.submodules.linear_fc2 = TERowParallelLinear
    else:
        norm, attention.core_attention = RMSNorm, PrefixedSelfAttention
        if config.use_te_activation_func:
            layer.mlp.submodules.activation_func = gated_activation
    if config.num_moe_experts:
        # Megatron's router asks whether this is None, and forgets to define it where Transformer Engine is absent.
        moe_utils.__dict__.setdefault("te_general_gemm", None)
        # Megatron's local layers store this norm as a part of a dense MLP, Transformer Engine's and our table do not.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can run here: it imports and there is a GPU."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


class HiddenStateModel(GPTModel):
    """A GPT whose last stage returns hidden states: only rows that predict policy tokens reach the head."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Every token gets the angle of its own position; in Megatron a sequence's positions start from 0.

        A response's go on from the end of its prompt, which may be a sequence of its own.
        """
        decoder_input, angles, *others = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if isinstance(kwargs.get("packed_seq_params"), PackParams):
            angles = angles[position_ids[0]]  # [T, 1, 1, d], from those of positions [max_seqlen, 1, 1, d]
        return decoder_input, angles, *others

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states  # [T or T/tp under sequence parallelism, 1, H]

    def gather_rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Hidden states of `rows` (int64 [R]), whole on every tensor-parallel rank: [R, H].

        Backward sums the ranks' partial gradients, because each rank's head is a slice of the vocabulary.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return hidden[:, 0].index_select(0, rows)

    def head_weight(self) -> Tensor:
        """This rank's slice of the language-model head, [V_padded/tp, H]; the embedding when tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(shape: ModelShape, settings: ModelSettings, layout: Layout) -> HiddenStateModel:
    """This rank's part of the model on its device, with uninitialised weights: load them with hf_io."""
    config = transformer_config(shape, settings, layout)
    model = HiddenStateModel(
        config=config,
        transformer_layer_spec=layer_spec(config),
        vocab_size=padded_vocab_size(shape.vocab_size, layout.tensor),
        max_sequence_length=shape.max_positions,
        pre_process=layout.pipeline_rank == 0,
        post_process=layout.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_base,
        rope_scaling=shape.rope_factor != 1,
        rope_scaling_factor=shape.rope_factor,
    )
    for rule, parameter in local_rules(model, shape):
        if rule.layout != "replicated":
            _mark_sharded(parameter, dim=1 if rule.layout == "columns" else 0)
    if shape.tied_embeddings and model.post_process and not model.pre_process:
        _mark_sharded(model.output_layer.weight, dim=0)
    return model.to(device=layout.device)


def _mark_sharded(parameter: Any, *, dim: int) -> None:
    """Megatron counts unmarked parameters once per tensor-parallel group in the gradient norm.

    Its layers leave the mark to their weight initialisation, which is off here.
    """
    parameter.tensor_model_parallel = True
    parameter.partition_dim, parameter.partition_stride = dim, 1


def vocab_shard(shape: ModelShape, layout: Layout) -> VocabShard:
    """Which columns of the vocabulary this rank's head holds; columns past the real vocabulary are padding."""
    from megatron.core import parallel_state

    sizes = {tp: padded_vocab_size(shape.vocab_size, tp) // tp for tp in (*SAME_BITS_FOR, layout.tensor)}
    size = sizes[layout.tensor]
    group = parallel_state.get_tensor_model_parallel_group() if layout.tensor > 1 else None
    cuts = tile_cuts(shape.vocab_size, tuple(sizes.values()))
    return VocabShard(group, layout.tensor_rank * size, size, shape.vocab_size, cuts)


def why_no_shared_prefix(layout: Layout, dtype: torch.dtype) -> str:
    """What keeps several responses from sharing one copy of their prompt in a pack; "" if nothing does."""
    if layout.context > 1:
        return f"{layout.context} context-parallel ranks cut every sequence into chunks of one size"
    if layout.device.type != "cpu" and not has_transformer_engine():
        return "on a GPU it takes Transformer Engine's attention, and the package is not installed"
    if layout.device.type != "cpu" and dtype == torch.float32:
        return "on a GPU it takes Transformer Engine's attention, which knows no packs in float32"
    return ""


def packed_params(
    cu_seqlens: Tensor, max_seqlen: int, *, layout: Layout, prefixes: tuple[Prefix, ...] = ()
) -> PackedSeqParams:
    """Megatron's description of a packed batch from cumulative lengths (int32 [n + 1], on the host) of its sequences.

    Context-parallel ranks need sequences of equal chunks: padding is part of its sequence, and as it comes last nothing
    attends to it. Transformer Engine is told of no padding otherwise, or it would refuse Flash Attention.
    """
    if layout.context == 1:
        return pack_params(cu_seqlens, max_seqlen, device=layout.device, prefixes=prefixes)
    cu_seqlens = cu_seqlens.to(layout.device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
