"""Merges a LoRA adapter, in PEFT's format or in Megatron's shards, into the HuggingFace folder it was trained on.

    python tools/merge_lora.py --base runs/NAME/cycle0/grpo/hf --adapter runs/NAME/cycle0/opsd/adapter --out merged

A tensor at a time, in float32, rounded once to the base's type. Refused: an adapter of other weights, one that is in
the base already or lacks updates that it says it has, and kinds of adapters whose merge is more than W + scale * B A.
`--verify` loads base and adapter with peft and compares its logits with the merged folder's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from megatron_ext.hf_io import HFReader, check_space, refuse_to_overwrite, save_hf
from megatron_ext.peft_io import (
    CONFIG_NAME,
    PREFIX,
    PeftAdapter,
    check_base,
    merged_tensors,
    read_adapter,
    record_merge,
    write_peft_folder,
)

VERIFIED_TOKENS = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="HuggingFace folder the adapter was trained on")
    parser.add_argument(
        "--adapter", type=Path, required=True, help="PEFT folder, or Megatron checkpoint of its training"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--verify", action="store_true", help="compare logits with peft's; loads the model twice")
    arguments = parser.parse_args()
    try:
        merge(arguments.base, arguments.adapter, arguments.out)
        if arguments.verify:
            verify(arguments.base, arguments.adapter, arguments.out)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"merge_lora.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def merge(base: Path, adapter_folder: Path, out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} is already there; remove it, or give another --out")
    for source in (base, adapter_folder):
        refuse_to_overwrite(source, out)
    adapter = read_adapter(adapter_folder)
    print(f"reading {base}: is it what the adapter was trained on?", flush=True)
    base_fingerprint = check_base(adapter, base)
    if adapter.base_fingerprint is None:
        print("  the adapter does not name its weights (PEFT's own do not): only names and shapes were compared")
    reader = HFReader(base)
    specs = {name: reader.spec(name) for name in reader.in_file_order()}
    check_space(out, sum(spec.nbytes for spec in specs.values()))
    save_hf(
        with_progress(merged_tensors(adapter, base), total=len(specs)),
        specs=specs,
        out=out,
        config_from=base,
        finish=lambda partial: record_merge(adapter, base, partial, base_fingerprint=base_fingerprint),
    )
    print(f"wrote {out}: {len(adapter.low_rank)} weights changed, scale {adapter.scale:g}")


def to_peft_folder(adapter: PeftAdapter, folder: Path, base: Path) -> None:
    tensors = {}
    for name, pair in adapter.low_rank.items():
        module = PREFIX + name.removesuffix(".weight")
        tensors.update({f"{module}.lora_{kind}.weight": tensor for kind, tensor in zip("AB", pair, strict=True)})
    rank = next(iter(tensors.values())).shape[0]
    targets = sorted({name.split(".")[-2] for name in adapter.low_rank})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": adapter.scale * rank, "target_modules": targets}
    write_peft_folder(folder, tensors, config, base=base)


def with_progress(tensors: Iterator[tuple[str, Tensor]], *, total: int) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with a line for every tenth of them."""
    for number, item in enumerate(tensors, start=1):
        yield item
        if number * 10 // total > (number - 1) * 10 // total:
            print(f"  {number} of {total} tensors", flush=True)


def verify(base: Path, adapter_folder: Path, merged: Path) -> None:
    """Raises ValueError if peft's logits with the adapter are not those of the merged folder, to rounding."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter: PeftAdapter = read_adapter(adapter_folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, VERIFIED_TOKENS), generator=generator)
    with torch.no_grad():
        before = model(ids).logits
        with tempfile.TemporaryDirectory() as converted:
            if not (adapter_folder / CONFIG_NAME).is_file():
                adapter_folder = Path(converted) / "adapter"
                to_peft_folder(adapter, adapter_folder, base)
            expected = PeftModel.from_pretrained(model, adapter_folder).eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    change, gap = float((expected - before).abs().mean()), float((expected - found).abs().mean())
    # Rounding of merged bfloat16 weights is part of the merge; it must be small beside what the adapter does.
    stored = HFReader(merged).tensor(next(iter(adapter.low_rank))).dtype
    allowed = 1e-4 if stored == torch.float32 else max(0.05, 0.2 * change)
    if not gap <= allowed:
        raise ValueError(
            f"{merged} is not what peft computes: logits differ by {gap:.2e} on average (allowed {allowed:.0e}; "
            f"the adapter changes them by {change:.2e}); do not use it"
        )
    print(f"verified: logits are peft's to {gap:.1e} on average; the adapter changes them by {change:.1e}")


if __name__ == "__main__":
    raise SystemExit(main())
