"""Whether a HuggingFace folder and a Megatron checkpoint are the same model: tensor by tensor, and by their logits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor

from megatron_ext.convert import checkpoint_tensors
from megatron_ext.hf_io import HFReader
from megatron_ext.hf_mapping import ModelShape
from megatron_ext.model import ModelSettings, build_model
from megatron_ext.parallel import close_parallel, init_parallel
from megatron_ext.torch_dist import TorchDistReader, find_checkpoint
from megatron_ext.training import MicroBatch, run_schedule


def compare_tensors(
    hf: HFReader, megatron: TorchDistReader, shape: ModelShape, *, dtypes: Mapping[str, torch.dtype]
) -> str:
    """Compare the SHA-256 of every tensor on both sides, and return one of all. Raises ValueError if any differs.

    Args:
        dtypes: the type in which each tensor is compared, by HuggingFace name: the one it was converted to.
    """
    total = hashlib.sha256()
    for name, stored in checkpoint_tensors(megatron, shape):
        ours, theirs = (_checksum(tensor.to(dtypes[name])) for tensor in (hf.tensor(name), stored))
        if ours != theirs:
            raise ValueError(
                f"{name} is not the same in {hf.folder} ({ours[:12]}) and {megatron.folder} ({theirs[:12]}); "
                "do not use what was written"
            )
        total.update(f"{name} {ours}\n".encode())
    return total.hexdigest()


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


@torch.no_grad()
def hf_logits(folder: Path, prompts: Sequence[Tensor], *, dtype: torch.dtype) -> list[Tensor]:
    """transformers' logits of each prompt (int64 [T]), float32 [T, V], from weights rounded to `dtype`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float().eval()
    return [model(prompt[None]).logits[0] for prompt in prompts]


@torch.no_grad()
def megatron_logits(folder: Path, shape: ModelShape, prompts: Sequence[Tensor], *, dtype: torch.dtype) -> list[Tensor]:
    """The same from Megatron, which loads the checkpoint itself, on the CPU."""
    layout = init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
    try:
        model = build_model(shape, ModelSettings(torch.float32, "none"), layout)
        checkpoint = find_checkpoint(folder)
        numbered = any(name.startswith("decoder.layers.0.") for name in TorchDistReader(checkpoint).names())
        state = model.sharded_state_dict(metadata={"non_homogeneous_layers": numbered})
        # Megatron unpickles these, whatever they hold; in a checkpoint of weights they hold nothing.
        wanted = {name: sharded for name, sharded in state.items() if "_extra_state" not in name}
        try:
            loaded = dist_checkpointing.load({"model": wanted}, str(checkpoint))["model"]
        except CheckpointingException as error:
            raise ValueError(f"Megatron cannot load {checkpoint}: {error}") from error
        model.load_state_dict({name: tensor for name, tensor in loaded.items() if tensor is not None}, strict=False)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        model.eval()
        head = model.head_weight()[: shape.vocab_size]
        return run_schedule(
            model,
            [_micro_batch(prompt) for prompt in prompts],
            lambda hidden, index: (hidden.new_zeros(()), hidden @ head.T),
            layout,
            forward_only=True,
        )
    finally:
        close_parallel()


def _micro_batch(prompt: Tensor) -> MicroBatch:
    length = len(prompt)
    positions = torch.arange(length)
    return MicroBatch(prompt, positions, torch.tensor([0, length], dtype=torch.int32), length, positions)
