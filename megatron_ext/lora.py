"""Low-rank adapters on Megatron's tensor-parallel linears, one per HuggingFace projection.

Megatron fuses q, k, v into one linear and gate, up into another; the adapters stay apart (each its own A and B,
as PEFT has them) and their outputs interleave as the fused weight's rows do.
Shapes: r rank, n projections in a fused linear, S tokens (S/tp under sequence parallelism), in/out local features.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_ext.hf_mapping import ModelShape, interleave_qkv
from megatron_ext.model import HiddenStateModel
from megatron_ext.parallel import Layout


@dataclass(frozen=True)
class LoraSettings:
    rank: int
    alpha: int
    seed: int  # A is drawn from it, the same for every layout

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# Megatron linear -> the HuggingFace projections fused in it.
TARGETS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
ROW_PARALLEL = ("linear_proj", "linear_fc2")
# Where a checkpoint has their adapters, whole and stacked over layers: a.K is [layers, r, in] and b.K [layers, out, r]
# of the K-th projection.
STORED = {target: f"decoder.layers.{'mlp' if 'fc' in target else 'self_attention'}.{target}.lora" for target in TARGETS}


class Adapter(torch.nn.Module):
    """scale * B A x for the projections of one linear. B starts at zero, so a fresh adapter changes nothing."""

    def __init__(
        self,
        linear: Any,
        target: str,
        layer: int,
        shape: ModelShape,
        settings: LoraSettings,
        layout: Layout,
    ) -> None:
        super().__init__()
        self.target = target
        self.layer = layer
        self.is_row_parallel = target in ROW_PARALLEL
        self.is_sequence_parallel = layout.sequence
        self.scale = settings.scale
        self.kv_heads = shape.num_kv_heads // layout.tensor
        self.is_enabled = True
        weight = linear.weight  # [out, in], this rank's slice
        head_rows = shape.head_dim * shape.num_heads // layout.tensor
        kv_rows = shape.head_dim * self.kv_heads
        out_sizes = {
            "linear_qkv": (head_rows, kv_rows, kv_rows),
            "linear_fc1": (weight.shape[0] // 2,) * 2,
        }.get(target, (weight.shape[0],))
        options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.a = torch.nn.ParameterList(
            torch.nn.Parameter(self._initial_a(name, layer, weight.shape[1], settings, layout).to(**options))
            for name in TARGETS[target]
        )
        self.b = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(size, settings.rank, **options)) for size in out_sizes
        )
        sharded, replicated, dim = (self.a, self.b, 1) if self.is_row_parallel else (self.b, self.a, 0)
        for parameter in sharded:  # counted on every tensor-parallel rank in the gradient norm
            parameter.tensor_model_parallel = True
            parameter.partition_dim, parameter.partition_stride = dim, 1
        for parameter in replicated:  # its gradient is partial when each rank sees a part of the sequence
            parameter.sequence_parallel = layout.sequence

    def _initial_a(self, name: str, layer: int, local_in: int, settings: LoraSettings, layout: Layout) -> Tensor:
        """PEFT's initialisation (Kaiming uniform, a = sqrt 5), drawn whole and then sliced: [r, in]."""
        full_in = local_in * layout.tensor if self.is_row_parallel else local_in
        digest = hashlib.sha256(f"{settings.seed}/{layer}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(full_in)
        whole = torch.empty(settings.rank, full_in).uniform_(-bound, bound, generator=generator)
        return whole.chunk(layout.tensor, dim=1)[layout.tensor_rank] if self.is_row_parallel else whole

    def forward(self, x: Tensor) -> Tensor:  # [S, 1, in] -> [S, 1, out]
        z = F.linear(x, torch.cat(list(self.a)))  # [S, 1, n r]
        if self.is_row_parallel:  # each rank saw a slice of the input features
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self.is_sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            z = reduce(z)
        elif self.is_sequence_parallel:  # each rank saw a slice of the sequence; its B is a slice of the output
            z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True)
        else:
            z = copy_to_tensor_model_parallel_region(z)
        parts = [F.linear(part, b) for part, b in zip(z.chunk(len(self.b), dim=-1), self.b, strict=True)]
        if self.target == "linear_qkv":
            grouped = [part.unflatten(-1, (self.kv_heads, -1)) for part in parts]
            return self.scale * torch.cat(grouped, dim=-1).flatten(-2)
        return self.scale * torch.cat(parts, dim=-1)

    @torch.no_grad()
    def weight_delta(self) -> Tensor:
        """scale * B A as an update of the fused weight's slice, float32 [out, in]. No collective is needed."""
        parts = [self.scale * (b.float() @ a.float()) for a, b in zip(self.a, self.b, strict=True)]
        return interleave_qkv(parts, self.kv_heads) if self.target == "linear_qkv" else torch.cat(parts)


def attach_adapters(model: HiddenStateModel, shape: ModelShape, settings: LoraSettings, layout: Layout) -> None:
    """Freeze the model and give the projections of every layer an adapter: all seven, or attention's beside experts.

    A linear keeps its name and weight; its adapter becomes the submodule `.lora` and adds to its output.
    """
    model.requires_grad_(False)
    if model.pre_process:
        # Activation recompute keeps a graph only if what enters the first layer needs a gradient.
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    for layer in model.decoder.layers:
        for target, linear in _linears(layer):
            linear.lora = Adapter(linear, target, layer.layer_number - 1, shape, settings, layout)
            linear.register_forward_hook(_add_adapter_output)
            linear.sharded_state_dict = functools.partial(_sharded_with_adapter, linear, linear.sharded_state_dict)


def _linears(layer: Any) -> Iterator[tuple[str, Any]]:
    for parent in (layer.self_attention, layer.mlp):
        for target in TARGETS:
            if target in parent._modules:
                yield target, parent._modules[target]


def _add_adapter_output(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    out, bias = output
    return (out + linear.lora(inputs[0]), bias) if linear.lora.is_enabled else output


def _sharded_with_adapter(
    linear: Any,
    of_linear: Callable[..., dict[str, Any]],
    prefix: str = "",
    sharded_offsets: Any = (),
    metadata: Any = None,
) -> dict[str, Any]:
    """Megatron's description of a linear for checkpoints, in which it takes an adapter's tensors for replicated."""
    state = of_linear(prefix, sharded_offsets, metadata)
    adapter = linear.lora
    sharded_a, sharded_b = (1, None) if adapter.is_row_parallel else (None, 0)
    for kind, parameters, dim in (("a", adapter.a, sharded_a), ("b", adapter.b, sharded_b)):
        for k, parameter in enumerate(parameters):
            name = f"{prefix}lora.{kind}.{k}"
            options: dict[str, Any] = {"key": name, "prepend_offsets": sharded_offsets}
            if dim is None:
                state[name] = make_sharded_tensor_for_checkpoint(parameter, **options)
            else:
                state[name] = make_tp_sharded_tensor_for_checkpoint(parameter, tp_axis=dim, **options)
    return state


def adapters(model: torch.nn.Module) -> list[Adapter]:
    """Every adapter of this rank's stage, in model order."""
    return [module for module in model.modules() if isinstance(module, Adapter)]


@contextlib.contextmanager
def adapters_disabled(model: torch.nn.Module) -> Iterator[None]:
    """The frozen model itself, as the teacher of Eq. 6 sees it."""
    found = adapters(model)
    for adapter in found:
        adapter.is_enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.is_enabled = True


def adapter_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor, int | None]]:
    """(PEFT name, this rank's tensor, dimension to gather over tensor-parallel ranks or None) of one adapter."""
    for name, a, b in zip(hf_modules(adapter.target, adapter.layer), adapter.a, adapter.b, strict=True):
        prefix = f"base_model.model.{name}"
        yield f"{prefix}.lora_A.weight", a.detach(), 1 if adapter.is_row_parallel else None
        yield f"{prefix}.lora_B.weight", b.detach(), None if adapter.is_row_parallel else 0


def hf_modules(target: str, layer: int) -> list[str]:
    """HuggingFace's names of the linears that are fused in one of Megatron's."""
    parent = "self_attn" if target in ("linear_qkv", "linear_proj") else "mlp"
    return [f"model.layers.{layer}.{parent}.{name}" for name in TARGETS[target]]


def peft_config(settings: LoraSettings, shape: ModelShape) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of these adapters."""
    targets = [target for target in TARGETS if not shape.num_experts or "fc" not in target]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name for target in targets for name in TARGETS[target]),
    }
