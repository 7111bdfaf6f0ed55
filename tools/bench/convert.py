"""Converts a checkpoint of a released model's shape both ways, beside reading and writing the same bytes.

    python tools/bench/convert.py [--layers 6] [--repeats 3] [--out FILE.json]

The floor is the safetensors library: load every file of the HuggingFace folder, save it, flush it to the disk. Each
measurement is a process of its own, the kinds take turns, and all files are in the page cache when it starts. Peak
memory is the process's resident set, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_ext.convert import hf_to_megatron, megatron_to_hf
from megatron_ext.hf_io import HFReader, TensorSpec, save_hf
from megatron_ext.hf_mapping import hf_sizes, model_shape
from megatron_ext.torch_dist import TorchDistReader

KINDS = ("floor", "hf-to-megatron", "megatron-to-hf")
# Qwen2.5-7B, of whose 28 alike layers --layers are made.
CONFIG = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="a folder must fit three times into free memory")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="size of the HuggingFace files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="folder for the files, on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]), arguments.shard_gb)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        report = compare(Path(folder), arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    make_source(folder / "source", arguments.layers, int(arguments.shard_gb * 1e9))
    sizes = [file.stat().st_size for file in (folder / "source").glob("*.safetensors")]
    print(
        f"{sum(sizes) / 1e9:.1f} GB bfloat16 in {len(sizes)} files, the largest {max(sizes) / 1e9:.2f} GB", flush=True
    )
    command = [sys.executable, __file__, "--shard-gb", str(arguments.shard_gb), "--measure"]
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for repeat in range(arguments.repeats):
        for kind in KINDS:
            warm(folder / ("hf-to-megatron" if kind == "megatron-to-hf" else "source"))
            done = subprocess.run([*command, kind, str(folder)], check=True, capture_output=True, text=True)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
            if kind != "hf-to-megatron":  # the next conversion back reads that
                shutil.rmtree(folder / kind)
            print(f"  {repeat + 1}/{arguments.repeats} {kind}: {found[kind][-1]['seconds']:.1f} s", flush=True)
    gb = sum(sizes) / 1e9
    floor = gb / median(run["seconds"] for run in found["floor"])
    print(f"\n{'':16}{'GB/s':>8}{'of floor':>10}{'peak GB':>9}{'of largest file':>17}")
    rows = {}
    for kind, runs in found.items():
        speed = gb / median(run["seconds"] for run in runs)
        peak = max(run["peak_bytes"] for run in runs)
        rows[kind] = {"gb_per_s": speed, "of_floor": speed / floor, "peak_of_largest_file": peak / max(sizes)}
        print(f"{kind:16}{speed:8.2f}{speed / floor:10.2f}{peak / 1e9:9.2f}{peak / max(sizes):17.2f}")
    return {
        "machine": {"cpu": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__},
        "bytes": sum(sizes),
        "largest_file_bytes": max(sizes),
        "results": rows,
        "runs": found,
    }


def warm(folder: Path) -> None:
    """Read files into the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(64 << 20):
                    pass


def make_source(folder: Path, layers: int, shard_bytes: int) -> None:
    """A HuggingFace folder of random values."""
    from transformers import Qwen2Config

    settings = folder.with_name("settings")
    settings.mkdir()
    config = Qwen2Config(**CONFIG, num_hidden_layers=layers, architectures=["Qwen2ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(settings)
    specs = {n: TensorSpec(size, torch.bfloat16) for n, size in hf_sizes(model_shape(config)).items()}
    tensors = ((name, torch.randn(spec.size, dtype=spec.dtype)) for name, spec in specs.items())
    save_hf(tensors, specs=specs, out=folder, config_from=settings, shard_bytes=shard_bytes)


def measure(kind: str, folder: Path, shard_gb: float) -> dict[str, float]:
    from transformers import Qwen2Config

    source, checkpoint = folder / "source", folder / "hf-to-megatron"
    shape = model_shape(Qwen2Config.from_pretrained(source))
    out = folder / kind
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    if kind == "floor":
        copy(source, out)
    elif kind == "hf-to-megatron":
        hf_to_megatron(source, out, shape)
    else:
        megatron_to_hf(TorchDistReader(checkpoint), out, shape, config_from=source, shard_bytes=int(shard_gb * 1e9))
    seconds = time.perf_counter() - start
    if kind == "megatron-to-hf":
        assert all(torch.equal(HFReader(source).tensor(name), HFReader(out).tensor(name)) for name in SAMPLED)
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


SAMPLED = ("model.layers.0.self_attn.k_proj.weight", "lm_head.weight")


def copy(source: Path, out: Path) -> None:
    out.mkdir()
    for file in source.glob("*.safetensors"):
        save_file(load_file(file), out / file.name)
        with (out / file.name).open("rb") as written:
            os.fsync(written.fileno())


if __name__ == "__main__":
    main()
