"""Saves and loads model and optimizer with Megatron's dist_checkpointing, in any layout from any layout."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# Stored per parameter in a canonical shape, so that any tensor, pipeline and data layout can read it.
# Gathered parameter by parameter: all at once is three float32 copies of the model in every rank's host memory.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


def save_checkpoint(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, folder: Path, *, state: dict[str, Any]
) -> None:
    """Write a checkpoint. Collective. Atomic: `folder` appears when it is whole.

    Args:
        state: small plain values that return from `load_checkpoint`, such as the step.
    """
    partial = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({**_sharded(model, optimizer, is_loading=False), "state": state}, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def load_checkpoint(model: DistributedDataParallel, optimizer: MegatronOptimizer, folder: Path) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint of any layout; returns its `state`. Collective."""
    inner = [o.optimizer for o in getattr(optimizer, "chained_optimizers", [optimizer])]
    # What follows is about torch's Adam; Transformer Engine's keeps its step elsewhere.
    inner = [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]
    for adam in inner:
        _allocate_adam_state(adam)
    with _step_survives_resharding():
        wanted = {**_sharded(model, optimizer, is_loading=True), "state": {}}
        loaded = dist_checkpointing.load(wanted, str(folder))
        optimizer.load_state_dict(loaded.pop("optimizer"))
    for adam in inner:
        for parameter_state in adam.state.values():
            # Loading shares one tensor between parameters; each would advance it in every step.
            parameter_state["step"] = parameter_state["step"].clone()
    state: dict[str, Any] = loaded.pop("state")
    model.module.load_state_dict(loaded["model"], strict=False)
    return state


def _sharded(model: DistributedDataParallel, optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    weights = model.module.sharded_state_dict()  # named as Megatron-LM names them, so that tools read them
    return {
        "model": dict(weights),
        "optimizer": optimizer.sharded_state_dict(dict(weights), is_loading=is_loading, metadata=_SHARDING),
    }


def _allocate_adam_state(adam: torch.optim.Optimizer) -> None:
    """Give torch's Adam the state that it would make in its first step: loading fills what exists."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state.get(parameter):
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextlib.contextmanager
def _step_survives_resharding() -> Iterator[None]:
    """Torch's Adam keeps a 0-dimensional `step` per parameter, which Megatron's reshard would slice like a moment."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def keep_step(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        own = self._get_main_param_and_optimizer_states(model_param)
        if "step" in own and "step" not in tensors:
            tensors = {**tensors, "step": own["step"]}
        original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original
