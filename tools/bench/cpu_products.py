"""Products of a decoding step with weights as checkpoints have them, beside the same weights transposed in memory.

    python tools/bench/cpu_products.py

The four products of a layer, all layers in a row, in PyTorch on one thread: of the Qwen2 of `rollout.py decode`, and of
two layers of Qwen2.5-0.5B's size. Then the time to load those weights into either memory, as the CPU engine does it
(`searche1/rollout/cpu_kernels.py`), and as a weight sync writes them (`megatron_ext/cpu_layers.py`). Medians of calls
in turn; JSON as the last line.
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
from torch.nn.functional import linear

from megatron_ext.cpu_layers import copy_transposed
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


def multiply_all(weights: list[Any], inputs: list[Tensor]) -> None:
    for weight, x in zip(weights, inputs, strict=True):
        linear(x, weight)


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
    found: dict[str, Any] = {}
    for rows in ROWS:
        inputs = [torch.randn(rows, size[0]) for size in sizes]
        works = {name: partial(multiply_all, weights, inputs) for name, weights in held.items()}
        taken = medians(works, repeats=repeats)
        flop = 2 * rows * sum(a * b for a, b in sizes)
        found[f"{rows} rows, GFLOP/s"] = {name: round(flop / s / 1e9) for name, s in taken.items()}
        found[f"{rows} rows, gain"] = round(taken["as it comes"] / taken["transposed"], 2)
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
    result = {}
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
