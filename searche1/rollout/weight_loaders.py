"""Runs inside an SGLang engine: what else than a copy a tensor from the trainer can be good for.

The engine's own loader knows how it fuses and cuts the tensors of a checkpoint. Here it loads with every copy into a
parameter replaced: by a comparison, or by a note of where the parameter's parts already lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.host import give_back_freed_memory

Named = list[tuple[str, Tensor]]


class _InsteadOfCopies(TorchDispatchMode):
    """Tells `meet` where something would be copied, and what, and copies nothing."""

    def __init__(self, meet: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._meet = meet

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self._meet(*args[:2])
        return args[0]


@torch.no_grad()
def compare(model: torch.nn.Module, named_tensors: Named) -> None:
    """Raises RuntimeError, which ends the engine with the message in its log, if any weight is another."""
    numbers = different = 0

    def meet(held: Tensor, sent: Tensor) -> None:
        nonlocal numbers, different
        numbers += held.numel()
        # Copying converts types, as loading does. NaN is no bit pattern that a trained weight should have.
        different += int((held != sent.to(held.device, held.dtype)).sum())

    for name, tensor in named_tensors:
        numbers = different = 0
        with _InsteadOfCopies(meet):
            model.load_weights([(name, tensor)])  # type: ignore[operator]
        if different:
            raise RuntimeError(f"{name} differs from the trainer's in {different} of {numbers} numbers")


@torch.no_grad()
def adopt(model: torch.nn.Module, named_tensors: Named) -> None:
    """From now on the model's parameters are the memory of `named_tensors`, which the trainer goes on writing.

    For tensors that lie as the model holds them (`megatron_ext/shared_weights.py`). Raises RuntimeError, which ends the
    engine with the message in its log, if some do not.
    """
    parts = defaultdict(list)
    with _InsteadOfCopies(lambda held, sent: parts[held.untyped_storage().data_ptr()].append((held, sent))):
        model.load_weights(named_tensors)  # type: ignore[operator]
    wholes = []
    for name, parameter in model.named_parameters():
        if found := parts.pop(parameter.untyped_storage().data_ptr(), None):
            wholes.append((parameter, _whole(name, parameter, found)))
    if parts:
        raise RuntimeError(
            f"{len(parts)} of the memories that SGLang loads weights into belong to no parameter; "
            "set engine.share_weights=never"
        )
    for parameter, whole in wholes:
        parameter.data = whole
    give_back_freed_memory()


def _whole(name: str, parameter: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The memory around the tensors that would be copied into consecutive rows of a parameter, in its size."""
    first = parts[0][1]
    row = first.stride(0)
    rows, starts = 0, set()
    for held, sent in parts:
        begin, rest = divmod(int(held.storage_offset() - parameter.storage_offset()), parameter.stride(0))
        fits = (
            not rest
            and held.shape == sent.shape
            and held.shape[1:] == parameter.shape[1:]
            and sent.dtype == parameter.dtype
            and sent.stride() == first.stride()
            and sent.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        )
        starts.add(sent.storage_offset() - begin * row if fits else None)
        rows += len(held)
    start = starts.pop()
    if start is None or starts:
        raise RuntimeError(
            f"the trainer's tensors of {name} do not lie as this engine holds them; set engine.share_weights=never"
        )
    whole = first.as_strided(parameter.shape, first.stride(), start)
    if not torch.equal(whole[rows:], parameter[rows:]):  # such as the rows behind a vocabulary, which are zero
        raise RuntimeError(
            f"{name} has {len(parameter)} rows, of which the trainer sends {rows}; set engine.share_weights=never"
        )
    return whole
