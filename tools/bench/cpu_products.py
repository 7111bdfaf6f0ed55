"""Products of matrices on a CPU: by what PyTorch takes, and by OpenBLAS as trainer and engine do.

    python tools/bench/cpu_products.py

The four products of a layer, all layers in a row, on one thread: of the Qwen2 of `rollout.py decode`, and of two layers
of Qwen2.5-0.5B's size; with weights as checkpoints have them and with the same transposed in memory, and for the first
also those of backward; and from panels of the transposed ones, as the engine computes them (`cpu_overlap.py`). Then the
time to load those weights into either memory, as the CPU engine does it (`searche1/rollout/cpu_kernels.py`), and as a
weight sync writes them (`megatron_ext/cpu_layers.py`). Medians of calls in turn; JSON as the last line.

OPENBLAS_CORETYPE, where it is set, decides what OpenBLAS uses of the machine; the first line says what it does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext import blas
from megatron_ext.cpu_layers import copy_transposed
from searche1.rollout import engine_ops
from searche1.rollout.cpu_kernels import transpose_memory

LAYERS = {  # (in, out) of the products of all layers
    "3 million weights": [(256, 512), (256, 256), (256, 1408), (704, 256)] * 4,
    "two layers of 0.5B": [(896, 1152), (896, 896), (896, 9728), (4864, 896)] * 2,
}
ROWS = (1, 16, 64, 128, 1024)


def loadable(size: tuple[int, int]) -> torch.nn.Parameter:
    """[out, in], with a loader as SGLang's."""
    weight = torch.nn.Parameter(torch.randn(size[1], size[0]), requires_grad=False)
    weight.weight_loader = lambda held, loaded: held.data.copy_(loaded)  # type: ignore[attr-defined]
    return weight


def load_all(weights: list[Any], sent: list[Tensor]) -> None:
    for weight, tensor in zip(weights, sent, strict=True):
        weight.weight_loader(weight, tensor)


def write_all(weights: list[Any], sent: list[Tensor]) -> None:
    for weight, tensor in zip(weights, sent, strict=True):
        copy_transposed(tensor, weight)


Products = list[tuple[Tensor, Tensor, Tensor]]  # a, b, and where to put a b


def by_pytorch(products: Products) -> None:
    for a, b, out in products:
        torch.mm(a, b, out=out)


def by_openblas(products: Products) -> None:
    for a, b, out in products:
        if not blas.add_product(a, b, out):  # few rows stay with PyTorch's, as in training
            torch.mm(a, b, out=out)


def from_panels(products: Products, panels: list[Tensor]) -> None:
    for (x, weight, out), panel in zip(products, panels, strict=True):
        engine_ops.kernels().ops_product(
            *x.shape, weight.shape[1], x.data_ptr(), panel.data_ptr(), None, out.data_ptr()
        )


def forward(weights: list[Any], rows: int) -> Products:
    return [(torch.randn(rows, w.shape[1]), w.detach().t(), torch.empty(rows, w.shape[0])) for w in weights]


def backward(weights: list[Any], rows: int) -> Products:
    """Gradients of inputs and of weights."""
    found = []
    for w in weights:
        given, x = torch.randn(rows, w.shape[0]), torch.randn(rows, w.shape[1])
        found += [(given, w.detach(), torch.empty_like(x)), (given.t(), x, torch.empty(w.shape))]
    return found


def medians(works: dict[str, Callable[[], None]], *, repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure(sizes: list[tuple[int, int]], repeats: int) -> dict[str, Any]:
    held: dict[str, list[Any]] = {"as it comes": [], "transposed": []}
    for name, weights in held.items():
        weights += map(loadable, sizes)
        if name == "transposed":
            for weight in weights:
                transpose_memory(weight)
    panels = [engine_ops.empty_panels(weight) for weight in held["transposed"]]
    for weight, panel in zip(held["transposed"], panels, strict=True):
        engine_ops.to_panels(weight, panel)
    found: dict[str, Any] = {}
    for rows in ROWS:
        asked = {f"forward, weights {name}": forward(weights, rows) for name, weights in held.items()}
        asked["backward"] = backward(held["as it comes"], rows)
        works = {
            f"{what}, {name}": partial(work, products)
            for what, products in asked.items()
            for name, work in (("PyTorch", by_pytorch), ("OpenBLAS", by_openblas))
        }
        works["forward, panels, the engine's"] = partial(from_panels, asked["forward, weights transposed"], panels)
        taken = medians(works, repeats=repeats if rows < 1000 else max(3, repeats // 5))
        flop = 2 * rows * sum(a * b for a, b in sizes)
        found[f"{rows} rows, GFLOP/s"] = {
            name: round(flop * (2 if "backward" in name else 1) / s / 1e9) for name, s in taken.items()
        }
    sent = [torch.randn(size[1], size[0]) for size in sizes]
    loads = {name: partial(load_all, weights, sent) for name, weights in held.items()}
    loads["transposed by the trainer"] = partial(write_all, held["transposed"], sent)
    taken = medians(loads, repeats=9)
    bytes_ = 4 * sum(a * b for a, b in sizes)
    found["loading, GB/s"] = {name: round(bytes_ / s / 1e9, 1) for name, s in taken.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31, help="after one that does not count")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    if reason := blas.missing():
        parser.error(f"there is no OpenBLAS to measure: {reason}")
    if isinstance(reason := engine_ops.library(), str):
        parser.error(f"there are no kernels of the engine to measure: {reason}")
    print(f"OpenBLAS computes with its kernels for {blas.core()}", flush=True)
    result: dict[str, Any] = {"OpenBLAS's kernels": blas.core()}
    with torch.inference_mode():
        for name, sizes in LAYERS.items():
            result[name] = measure(sizes, parsed.repeats)
            print(name, json.dumps(result[name]), flush=True)
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
