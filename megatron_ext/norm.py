"""RMSNorm for the local layer spec."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.cpu_layers import rms_norm


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that works under sequence parallelism, which Megatron's torch norm refuses.

    Under sequence parallelism each tensor-parallel rank sees a part of the sequence, so its weight gradient is
    partial; the `sequence_parallel` mark makes Megatron sum it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)
