"""Builds the index of a corpus: python tools/build_index.py --corpus wiki-18.jsonl --out index."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from searche1.types import UserError

MAX_PROCESSES = 16  # on a CPU; each holds the encoder


def main(argv: list[str] | None = None) -> int:
    """Parses the options and builds. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    try:
        if arguments.kind == "BM25" and (arguments.style or arguments.vectors):
            raise UserError("a BM25 index has no encoder and no vectors; leave out --style and --vectors")
        devices = ["cpu"] if arguments.kind == "BM25" else _devices(arguments.device, arguments.processes, cores)
        threads = max(1, cores // len(devices))
        # Read by torch in the encoder processes, which run side by side; FAISS in this one runs alone.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        _build(arguments, devices, index_threads=arguments.threads or cores)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it is", file=sys.stderr)
        return 130
    return 0


def _build(arguments: argparse.Namespace, devices: list[str], *, index_threads: int) -> None:
    from searche1.retrieval.build import Encoding, build_index, build_keyword_index
    from searche1.retrieval.recipe import choose_recipe

    if arguments.kind == "BM25":
        build_keyword_index(arguments.corpus, arguments.out)
    else:
        from searche1.retrieval.index import set_threads

        set_threads(index_threads)
        recipe = choose_recipe(arguments.encoder, arguments.style)
        encoding = Encoding(recipe, devices, arguments.dtype, arguments.vectors)
        build_index(
            arguments.corpus, arguments.out, encoding, kind=arguments.kind, use_gpu=arguments.index_device == "cuda"
        )
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    rows = json.loads((arguments.out / "manifest.json").read_text())["num_rows"]
    print(f"wrote {arguments.out}: {rows:,} passages, {size / 1e9:.2f} GB")
    print(f"serve it: searche1 retriever --corpus {arguments.corpus} --index {arguments.out}")


def _devices(device: str, processes: int, cores: int) -> list[str]:
    """The device of each encoder process: every GPU, or the CPU's cores shared out. Raises UserError."""
    if processes < 0:
        raise UserError(f"--processes is {processes}; give how many encoder processes run, or 0 to have it chosen")
    if device in ("auto", "cuda"):
        import torch

        gpus = torch.cuda.device_count()
        if device == "cuda" and gpus < max(1, processes):
            raise UserError(f"--device cuda finds {gpus} GPUs, needs {max(1, processes)}; use fewer --processes or cpu")
        if gpus:
            return [f"cuda:{number}" for number in range(processes or gpus)]
        device = "cpu"
    return [device] * (processes or (min(cores, MAX_PROCESSES) if device == "cpu" else 1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Build the index of a corpus. A build that is stopped goes on with the same command.",
        epilog="docs/retrieval.md tells sizes, times and memory of each kind.",
    )
    parser.add_argument("--corpus", type=Path, required=True, help='.jsonl or .jsonl.gz of {"id", "contents"} rows')
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--kind", default="Flat", help="Flat (exact, the protocol), SQfp16, HNSW64, IVF-PQ or BM25")
    parser.add_argument("--encoder", default="minilm", help="minilm (small, default), a HuggingFace folder or hub id")
    parser.add_argument("--style", default="", help="how it was trained: e5, bge, plain or sentence-transformers")
    parser.add_argument(
        "--dtype", default="auto", help="of the encoder: auto (float16 on a GPU, else float32), bfloat16"
    )
    parser.add_argument("--device", default="auto", help="of the encoder: auto (all GPUs, or the CPU), cpu or cuda")
    parser.add_argument("--processes", type=int, default=0, help="encoder processes (default: GPUs, or cores up to 16)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of FAISS (default: all cores)")
    parser.add_argument(
        "--vectors", type=Path, help="folder to keep vectors in, for other kinds without encoding again"
    )
    parser.add_argument(
        "--index-device", default="cpu", choices=("cpu", "cuda"), help="cuda trains IVF-PQ on all GPUs (faiss-gpu)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
