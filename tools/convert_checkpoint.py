"""Converts checkpoints between HuggingFace's format and Megatron's, with no GPU and no more memory than a few tensors.

    python tools/convert_checkpoint.py hf-to-megatron --hf Qwen2.5-3B --out qwen-megatron --verify
    python tools/convert_checkpoint.py megatron-to-hf --megatron qwen-megatron --out qwen-hf

The Megatron side is `megatron.core.dist_checkpointing` (torch_dist), which any tensor-, pipeline- and expert-parallel
layout loads; a folder of Megatron-LM or Megatron-Bridge, or a checkpoint of a run here, is read as it is. Config,
generation config, tokenizer and chat template go along in OUT/hf. Nothing appears at OUT before it is whole.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing here needs a GPU, and --verify runs Megatron on the CPU

import torch
from torch import Tensor

from megatron_ext.convert import (
    HF_FOLDER,
    check_checkpoint,
    hf_chunks,
    hf_specs,
    hf_to_megatron,
    megatron_to_hf,
)
from megatron_ext.hf_io import CONFIG_NAME, SHARD_BYTES, HFReader, check_weights, refuse_to_overwrite
from megatron_ext.hf_mapping import ModelShape
from megatron_ext.known_models import folder_shape
from megatron_ext.torch_dist import TorchDistReader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPTS = (
    "Who wrote the novel that the film was based on?",
    "<think> The capital of France is",
    "1 2 3 4 5 6 7 8 9 10",
)
SECONDS_BETWEEN_LINES = 5.0
RANDOM_PROMPTS, RANDOM_LENGTH = 2, 48
ALLOWED = 1e-4  # of the largest logit: float32 sums in another order


def main() -> int:
    arguments = parsed()
    try:
        if arguments.out.exists():
            raise ValueError(f"{arguments.out} is already there; remove it, or give another --out")
        if arguments.direction == "hf-to-megatron":
            to_megatron(arguments)
        else:
            to_hf(arguments)
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; nothing was left at {arguments.out}", file=sys.stderr)
        return 130
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = parser.add_subparsers(dest="direction", required=True, metavar="hf-to-megatron|megatron-to-hf")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to make")
    common.add_argument("--dtype", choices=DTYPES, help="type of all weights (default: each as it is)")
    common.add_argument(
        "--verify",
        action="store_true",
        help="read back and compare the SHA-256 of every tensor, then logits of a few prompts from transformers and "
        "from Megatron, which takes 4 bytes of memory per parameter",
    )
    forward = directions.add_parser("hf-to-megatron", parents=[common], help="a HuggingFace folder to a checkpoint")
    forward.add_argument("--hf", type=Path, required=True, help="HuggingFace folder with safetensors weights")
    forward.add_argument(
        "--tensor",
        type=int,
        default=1,
        help="cut blocks for this tensor-parallel size: its ranks then read their own only; any size can load them",
    )
    back = directions.add_parser("megatron-to-hf", parents=[common], help="a checkpoint to a HuggingFace folder")
    back.add_argument("--megatron", type=Path, required=True, help="checkpoint, or the folder that holds the latest")
    back.add_argument(
        "--config-from",
        type=Path,
        help="HuggingFace folder whose config and tokenizer the model has (default: what hf-to-megatron put beside it)",
    )
    back.add_argument(
        "--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="size of the files (default %(default).1f)"
    )
    return parser.parse_args()


def to_megatron(arguments: argparse.Namespace) -> None:
    shape, dtype = folder_shape(arguments.hf), DTYPES.get(arguments.dtype)
    refuse_to_overwrite(arguments.hf, arguments.out)
    divided = {"key-value heads": shape.num_kv_heads, "MLP features": shape.expert_ffn_size or shape.ffn_size}
    for what, number in divided.items():
        if arguments.tensor < 1 or number % arguments.tensor:
            raise ValueError(
                f"--tensor {arguments.tensor} does not divide the model's {number} {what}; "
                "give a divisor, or leave it out"
            )
    reader = HFReader(arguments.hf)
    check_weights(reader, shape)
    total = sum(chunk.nbytes for chunk in hf_chunks(reader, shape, dtype=dtype, tensor=arguments.tensor))
    hf_to_megatron(
        arguments.hf, arguments.out, shape, dtype=dtype, tensor=arguments.tensor, moved=Progress(total).moved
    )
    print(f"wrote {arguments.out}: {total / 1e9:.3g} GB of weights")
    if arguments.verify:
        verify(arguments.hf, arguments.out, shape, dtype)


def to_hf(arguments: argparse.Namespace) -> None:
    reader, dtype = TorchDistReader(arguments.megatron), DTYPES.get(arguments.dtype)
    refuse_to_overwrite(arguments.megatron, arguments.out)
    config_from = arguments.config_from or find_config(arguments.megatron)
    shape = folder_shape(config_from)
    if not arguments.shard_gb > 0:
        raise ValueError(f"--shard-gb must be above 0, got {arguments.shard_gb}")
    check_checkpoint(reader, shape)
    total = sum(spec.nbytes for spec in hf_specs(reader, shape, dtype=dtype).values())
    megatron_to_hf(
        reader,
        arguments.out,
        shape,
        config_from=config_from,
        dtype=dtype,
        shard_bytes=int(arguments.shard_gb * 1e9),
        moved=Progress(total).moved,
    )
    print(f"wrote {arguments.out}: {total / 1e9:.3g} GB of weights")
    if arguments.verify:
        verify(arguments.out, arguments.megatron, shape, dtype)


def find_config(checkpoint: Path) -> Path:
    for folder in (checkpoint / HF_FOLDER, checkpoint.parent / HF_FOLDER):
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise ValueError(
        f"{checkpoint} has no {HF_FOLDER}/{CONFIG_NAME} beside it, so the model's config and tokenizer are unknown; "
        "give --config-from with the HuggingFace folder that the model came from"
    )


class Progress:
    """A line every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._start = self._told = time.perf_counter()

    def moved(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.perf_counter()
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        speed = self._done / (now - self._start)
        print(
            f"  {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, "
            f"{(self._total - self._done) / speed:.0f} s left",
            flush=True,
        )


# -- verification -----------------------------------------------------------------------------------


def verify(hf: Path, megatron: Path, shape: ModelShape, dtype: torch.dtype | None) -> None:
    """Raises ValueError if the two are not the same model in the type that both can hold."""
    from transformers.utils import logging

    from megatron_ext.verify import compare_tensors, hf_logits, megatron_logits

    reader, checkpoint = HFReader(hf), TorchDistReader(megatron)
    kept = {name: spec.dtype for name, spec in hf_specs(checkpoint, shape, dtype=dtype).items()}
    print(f"comparing {len(kept)} tensors ...", flush=True)
    digest = compare_tensors(reader, checkpoint, shape, dtypes=kept)
    print(f"verified: all checksums are equal (SHA-256 of them: {digest[:16]})")
    prompts = sample_prompts(hf, shape)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # Megatron's, about torch
    print(f"comparing logits of {len(prompts)} prompts ...", flush=True)
    rounded = next(iter(kept.values()))
    expected = torch.cat(hf_logits(hf, prompts, dtype=rounded))
    found = torch.cat(megatron_logits(megatron, shape, prompts, dtype=rounded))
    gap, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not gap <= ALLOWED * max(largest, 1.0):
        raise ValueError(
            f"logits differ by up to {gap:.1e} where the largest is {largest:.1f}: Megatron does not compute what "
            "transformers does for this model, although the weights are the same"
        )
    print(f"verified: logits of transformers and Megatron differ by {gap:.1e} at most, the largest is {largest:.1f}")


def sample_prompts(folder: Path, shape: ModelShape) -> list[Tensor]:
    """Sentences where there is a tokenizer, and random tokens."""
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(shape.vocab_size, (RANDOM_LENGTH,), generator=generator) for _ in range(RANDOM_PROMPTS)]
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts += [torch.tensor(tokenizer.encode(text)) for text in PROMPTS]
    return prompts


if __name__ == "__main__":
    raise SystemExit(main())
