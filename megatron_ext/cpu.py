"""Runs the real Megatron-core on a CPU, with gloo instead of NCCL.

Megatron-core names the CUDA device in many places that have nothing to do with kernels: it allocates
buffers with device="cuda", asks for streams, and recognises parameters by `.type()`. On a machine without
CUDA this module answers those questions so that schedules, DDP, optimizers and checkpoints run unchanged.
Nothing here is used on a GPU.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_ext.cpu_layers import rotate


class _NoStream:
    """Stands for a CUDA stream or event: work on a CPU is done when the call returns, so nothing waits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _NoStream:
        return self

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


_equal_all_gather = dist.all_gather


def _all_gather(outputs: list[Tensor], own: Tensor, group: Any = None, **options: Any) -> Any:
    """As NCCL does it, tensors of unequal sizes included: experts under tensor parallelism exchange such."""
    if len({output.shape for output in outputs}) == 1:
        return _equal_all_gather(outputs, own, group=group, **options)
    outputs[dist.get_rank(group)].copy_(own)
    for rank, output in enumerate(outputs):
        dist.broadcast(output, group=group, group_src=rank)
    return None


def _reduce_scatter(output: Tensor, inputs: list[Tensor], *, group: Any = None, **options: Any) -> None:
    """The same of its backward, which gloo has for no sizes."""
    for rank, part in enumerate(inputs):
        mine = rank == dist.get_rank(group)
        summed = output.copy_(part) if mine else part.clone()
        dist.reduce(summed, group=group, group_dst=rank, **options)


class _CudaMeansCpu(TorchFunctionMode):
    """Maps device="cuda" to the CPU in every torch call, and names CPU tensor types as Megatron expects them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs:  # most calls
            result = func(*args)
            # Optimizers sort parameters by "torch.cuda.FloatTensor" and friends.
            is_name = func is torch.Tensor.type and isinstance(result, str)
            return result.replace("torch.", "torch.cuda.", 1) if is_name else result
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):  # pinning serves copies to a GPU
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Counts of tokens per expert, as Megatron's dispatcher brings them from a GPU: sizes of messages as numbers."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _rotary(megatron: Any) -> Any:
    """Megatron's function, with our kernel for packs in which every token has an angle of its own.

    Context-parallel ranks have a table of positions instead, which may happen to be as long as the pack.
    """

    def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, config: Any, *arguments: Any, **options: Any) -> Tensor:
        group = options.get("cp_group")
        is_plain = (
            not (config.rotary_interleaved or config.multi_latent_attention)
            and options.get("mscale", 1.0) == 1.0
            and (group is None or group.size() == 1)
        )
        found = rotate(t, freqs) if is_plain else None
        return megatron(t, freqs, config, *arguments, **options) if found is None else found

    return apply_rotary_pos_emb


_mode: _CudaMeansCpu | None = None


def enable_cpu_mode() -> None:
    """Call once per process, before Megatron builds anything. Does nothing when called again."""
    global _mode
    if _mode is not None:
        return
    assert not torch.cuda.is_available(), "CPU mode on a machine with CUDA would move tensors off the GPU"

    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import attention
    from megatron.core.transformer.moe import token_dispatcher

    answers: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),  # used as `device=` of new buffers
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda *args, **kwargs: None,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": lambda *args, **kwargs: _NoStream(),
        "default_stream": lambda *args, **kwargs: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    # Activation recompute saves and restores the GPU's random state; without dropout there is none to keep.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8)
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    # Megatron's own inference tracker: forking it is a no-op. Dropout is zero everywhere in this project.
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)

    distributed: Any = dist
    distributed.all_gather, distributed.reduce_scatter = _all_gather, _reduce_scatter
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host

    attention.apply_rotary_pos_emb = _rotary(attention.apply_rotary_pos_emb)

    _mode = _CudaMeansCpu()
    _mode.__enter__()
