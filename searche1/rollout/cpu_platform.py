"""SGLang platform plugin: text models on a CPU with plain PyTorch.

SGLang's own ways to a CPU need a build of vLLM or sgl_kernel that no package index has, but it loads platforms from
the entry-point group `sglang.srt.platforms` (see setup.py) in every process it starts, the spawned scheduler and
detokenizer included. On a machine with CUDA this one steps aside.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import deque
from typing import Any

import torch  # SGLang has imported it before it looks for plugins, and these three modules too
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from searche1.rollout.torchvision_stub import stub_torchvision

logger = logging.getLogger(__name__)


def activate() -> str | None:
    """The platform class for a machine without CUDA, else None. SGLang calls it in each of its processes."""
    if torch.cuda.is_available():
        return None
    if importlib.util.find_spec("torchvision") is None:  # engine_server has done it in the server's own processes
        stub_torchvision()  # here, because SGLang imports its model configurations right after
    return "searche1.rollout.cpu_platform:CpuPlatform"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Native PyTorch kernels, no graphs. Other SGLang modules are imported late: they ask for the platform."""

    _enum = PlatformEnum.OOT  # "out of tree": SGLang then asks this class instead of its own tables
    device_name = "cpu"
    device_type = "cpu"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False  # pinning needs an accelerator

    def get_dispatch_key_name(self) -> str:
        return "native"  # layers take their forward_native instead of a fused kernel

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Admits torch_native to deterministic inference, the mode in which a request's own seed counts.

        The overlap schedule is for what cpu_overlap.py can compute beside the scheduler.
        """
        from sglang.srt import server_args as choices

        from megatron_ext import blas
        from searche1.rollout import engine_ops

        if server_args.tp_size > 1 or blas.missing() or isinstance(engine_ops.library(), str):
            server_args.disable_overlap_schedule = True
        choices.add_deterministic_attention_backend_choices(["torch_native"])
        choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])

    def init_backend(self) -> None:
        """Puts our kernels where SGLang looks for its own. Runs in the scheduler before the model is made."""
        from sglang.srt import batch_invariant_ops
        from sglang.srt.layers import sampler
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.model_executor import forward_batch_info

        from megatron_ext.blas import multiply_by_openblas
        from searche1.rollout import cpu_layers, cpu_overlap, engine_ops
        from searche1.rollout.cpu_attention import BatchedNativeAttention
        from searche1.rollout.cpu_kernels import filtered_multinomial, new_positions, seeded_multinomial

        multiply_by_openblas()
        # Under the old name, by which SGLang knows that there is no Triton.
        register_attention_backend("torch_native")(BatchedNativeAttention)
        # Its hash exists in CUDA and in sgl_kernel only.
        is_native = not isinstance(engine_ops.library(), str)
        draw = engine_ops.seeded_multinomial if is_native else seeded_multinomial
        sampler.multinomial_with_seed = draw
        in_order_of_rank = sampler.top_k_top_p_min_p_sampling_from_probs_torch

        def sample(  # type: ignore[no-untyped-def]
            probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **options
        ):
            if sampling_seed is None or need_min_p_sampling or any(options.values()):
                arguments = (probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions)
                return in_order_of_rank(*arguments, **options)
            return filtered_multinomial(draw, probs, top_ks, top_ps, sampling_seed, positions)

        sampler.top_k_top_p_min_p_sampling_from_probs_torch = sample
        if is_native:
            sampler.Sampler.forward = engine_ops.sampler(
                sampler.Sampler.forward, has_original_logprobs=sampler.SGLANG_RETURN_ORIGINAL_LOGPROB
            )
            engine_ops.register()
            cpu_layers.register()
            cpu_overlap.register()
        else:
            logger.warning("plain PyTorch, which is slower, instead of C++ kernels: %s", engine_ops.library())
        forward_batch_info.compute_position_torch = new_positions
        keep_mapped(2)  # what a weight sync writes in turn
        # The other half of deterministic inference replaces matrix products by Triton kernels.
        batch_invariant_ops.enable_batch_invariant_mode = lambda: None


def keep_mapped(count: int) -> None:
    """Keeps the last shared memories that tensors came in: else every sync maps all their pages anew."""
    from torch.multiprocessing import reductions

    rebuild = reductions.rebuild_storage_filename
    kept: deque[Any] = deque(maxlen=count)

    def rebuild_and_keep(*arguments: Any) -> Any:
        storage = rebuild(*arguments)
        if not any(storage.data_ptr() == other.data_ptr() for other in kept):
            kept.append(storage)
        return storage

    reductions.rebuild_storage_filename = rebuild_and_keep
