"""Attention on a CPU: our C++ kernels beside PyTorch's, on the same tensors, in turn.

    python tools/bench/cpu_attention.py

Engine: new tokens of several requests over a paged key-value cache; PyTorch's takes requests together, padded, from a
gathered copy (`cpu_kernels.attend`, which is what runs where ours is not built). Trainer: forward and backward over a
pack of sequences; PyTorch's takes them one after the other, or short ones padded (`PackedSelfAttention` without the
kernel). One thread. GFLOP/s of what causal attention needs; JSON as the last line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_ext import attention as packed
from megatron_ext.host import keep_freed_memory
from searche1.rollout import engine_ops
from searche1.rollout.cpu_kernels import attend, make_chunks

# requests, new tokens, tokens in all, heads, key-value heads, head size
PREFILLS = [(64, 16, 16, 4, 2, 64), (64, 30, 100, 2, 1, 64), (16, 150, 600, 4, 2, 64), (4, 256, 1024, 14, 2, 64)]
PACKS = [(40, 100, 4, 2, 64), (16, 500, 4, 2, 64), (4, 1500, 14, 2, 64)]  # sequences, tokens of each, and as above


def seconds_of(contestants: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, float]:
    """Medians, one after the other each time; the first time does not count."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def row_of(what: dict[str, Any], flops: float, taken: dict[str, float]) -> dict[str, Any]:
    row = {**what, **{f"{name}, GFLOP/s": round(flops / s / 1e9, 1) for name, s in taken.items()}}
    row["PyTorch over ours, time"] = round(taken["PyTorch"] / taken["ours"], 2)
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def prefill(requests: int, new: int, length: int, heads: int, groups: int, size: int, repeats: int) -> dict[str, Any]:
    places = requests * length
    slots = torch.randperm(places).view(requests, length).int()
    keys, values = torch.randn(2, places, groups, size)
    query = torch.randn(requests * new, heads, size)
    found, expected = torch.empty_like(query), torch.empty_like(query)
    chunks = make_chunks(slots, seq_lens=[length] * requests, query_lens=[new] * requests)
    options = {"numbers": torch.arange(requests), "lengths": torch.full((requests,), length)}
    options |= {"counts": torch.full((requests,), new), "slots": slots}
    cache = {"keys": keys, "values": values, "scale": size**-0.5}
    taken = seconds_of(
        {
            "ours": lambda: engine_ops.attention(query, found, **cache, **options),
            "PyTorch": lambda: attend(query, expected, **cache, chunks=chunks, enable_gqa=heads != groups),
        },
        repeats=repeats,
    )
    assert torch.allclose(found, expected, atol=1e-4)
    flops = 4 * requests * heads * size * (new * (length - new) + new * (new + 1) / 2)
    what = {"engine": f"{requests} requests, {new} new of {length} tokens", "heads": f"{heads}/{groups} of {size}"}
    return row_of(what, flops, taken)


def training(sequences: int, length: int, heads: int, groups: int, size: int, repeats: int) -> dict[str, Any]:
    bounds = torch.arange(0, sequences * length + 1, length)
    shapes = [(sequences * length, count, size) for count in (heads, groups, groups, heads)]
    *inputs, gradient = (torch.randn(shape) for shape in shapes)
    inputs = [x.requires_grad_() for x in inputs]
    module = SimpleNamespace(scale=None, context_group=None)
    module._attend = packed.PackedSelfAttention._attend.__get__(module)
    gradients = {}

    def step(name: str) -> None:
        params = SimpleNamespace(cu_seqlens_q=bounds)
        found = packed.PackedSelfAttention.forward(module, *inputs, None, packed_seq_params=params)
        gradients[name] = torch.autograd.grad(found, inputs, gradient.flatten(1))

    def without() -> None:
        with mock.patch.object(packed, "can_attend", lambda *_: False):
            step("PyTorch")

    taken = seconds_of({"ours": lambda: step("ours"), "PyTorch": without}, repeats=repeats)
    for ours, theirs in zip(*gradients.values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3)
    pairs = sum((b - a) * (b - a + 1) / 2 for a, b in itertools.pairwise(bounds.tolist()))
    what = {"trainer": f"{sequences} sequences of {length} tokens", "heads": f"{heads}/{groups} of {size}"}
    return row_of(what, 14 * heads * size * pairs, taken)  # two products forward, five backward


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    if isinstance(engine_ops.library(), str):
        sys.exit(f"our kernels are not there: {engine_ops.library()}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()  # for both
    rows = [prefill(*case, parsed.repeats) for case in PREFILLS]
    rows += [training(*case, parsed.repeats) for case in PACKS]
    result = {"attention": rows}
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
