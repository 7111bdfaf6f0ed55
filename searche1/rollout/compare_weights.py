"""Runs inside an SGLang engine: its weights against the trainer's, bit for bit.

The engine's own loader knows how it fuses and cuts the tensors of a checkpoint. Here it loads once more, with every
copy into a parameter replaced by a comparison.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Compares(TorchDispatchMode):
    """Asks whether a copy would change its destination, instead of copying."""

    def __init__(self) -> None:
        super().__init__()
        self.num_compared = 0
        self.num_different = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        held, sent = args[:2]
        self.num_compared += held.numel()
        # Copying converts types, as loading does. NaN is no bit pattern that a trained weight should have.
        self.num_different += int((held != sent.to(held.device, held.dtype)).sum())
        return held


@torch.no_grad()
def compare(model: torch.nn.Module, named_tensors: list[tuple[str, Tensor]]) -> None:
    """Raises RuntimeError, which ends the engine with the message in its log, if any weight is another."""
    for name, tensor in named_tensors:
        with _Compares() as found:
            model.load_weights([(name, tensor)])  # type: ignore[operator]
        if found.num_different:
            raise RuntimeError(
                f"{name} differs from the trainer's in {found.num_different} of {found.num_compared} numbers"
            )
