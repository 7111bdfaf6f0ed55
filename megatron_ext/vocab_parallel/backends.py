"""Which row kernels run where."""

from __future__ import annotations

import functools

from torch import Tensor

from megatron_ext.vocab_parallel import native
from megatron_ext.vocab_parallel.cpu import TorchRows
from megatron_ext.vocab_parallel.protocol import RowKernels


@functools.cache
def row_kernels(name: str) -> RowKernels:
    """ "torch" (any CPU), "native" (C++ on x86-64) or "triton" (CUDA). Raises ValueError where they cannot run."""
    if name == "torch":
        return TorchRows()
    if name == "native":
        return native.NativeRows()
    if name == "triton":
        from megatron_ext.vocab_parallel.gpu import TritonRows

        return TritonRows()
    raise ValueError(f"row kernels are torch, native or triton, got {name!r}")


def kernels_for(logits: Tensor) -> RowKernels:
    """The fastest that can take these logits."""
    if logits.is_cuda:
        return row_kernels("triton")
    is_native = logits.dtype in native.DTYPES and native.why_absent() is None
    return row_kernels("native" if is_native else "torch")
