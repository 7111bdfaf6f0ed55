"""Megatron's Adam with gradient clipping, sharded over data-parallel ranks where asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    distributed: bool


@dataclass(frozen=True)
class UpdateResult:
    is_applied: bool  # False: a gradient was not finite and the weights are untouched
    grad_norm: float


def build_optimizer(
    model: DistributedDataParallel, settings: OptimizerSettings, dtype: torch.dtype
) -> MegatronOptimizer:
    """Adam over float32 main parameters. Biases and norms take no weight decay, as is Megatron's rule."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        clip_grad=settings.grad_clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.distributed,
    )
    return get_megatron_optimizer(config, [model])


def apply_update(optimizer: MegatronOptimizer, *, lr: float) -> UpdateResult:
    """One optimizer step at this learning rate. A gradient that is not finite never reaches the weights."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if optimizer.prepare_grads():
        return UpdateResult(False, math.inf)
    # Asked for before the step: clipping by an infinite norm would turn weights into NaN.
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return UpdateResult(False, grad_norm)
    is_applied, _, _ = optimizer.step()
    return UpdateResult(is_applied, grad_norm)


def optimizer_tensors(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Main parameters and Adam's state of this rank, as far as they exist: the state appears in the first step."""
    inner = [o.optimizer for o in getattr(optimizer, "chained_optimizers", [optimizer])]
    tensors: list[Tensor] = []
    for adam in inner:
        tensors += [p for group in adam.param_groups for p in group["params"]]
        tensors += [t for state in adam.state.values() for t in state.values() if isinstance(t, Tensor)]
    return tensors
