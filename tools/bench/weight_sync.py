"""Weights into an engine on the same device, beside a copy of the same bytes; and what sleep gives back.

    python tools/bench/weight_sync.py [--model NAME]

Syncs of all weights, the last of which compares bit by bit, and on a CPU as many into memory that the engine computes
with; GB/s of the median but for the first and last, beside plain copies of the same buckets. On a GPU also the memory
that engine and trainer give back when they are put to sleep, and how long that takes.
"""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

import torch
from steps import Bench, main, timed
from torch import Tensor

from megatron_ext.buckets import Bucket, SharedDoubleBuffer
from megatron_ext.shared_weights import SharedWeights
from searche1.colocation import Colocation, Phase
from searche1.config import EngineConfig
from searche1.engines import free_gpu_bytes
from searche1.policy import Policy
from searche1.rollout.places import engine_places
from searche1.sync import Link, sync_weights

BUCKET_BYTES = EngineConfig().sync_bucket_mb << 20
REPEATS = 5


def one_sync(
    bench: Bench, colocation: Colocation, policy: Policy, link: Link, memory: SharedWeights | None, is_exact: bool
) -> dict[str, Any]:
    """Its seconds, and those of handing the GPU over before and behind it."""

    def sync() -> None:
        sync_weights(policy, [link], version="1", bucket_bytes=BUCKET_BYTES, memory=memory, is_exact=is_exact)

    to_sync_s, _ = timed(bench.device, lambda: colocation.to(Phase.SYNC, policy))
    seconds, _ = timed(bench.device, sync)
    to_rollout_s, _ = timed(bench.device, lambda: colocation.to(Phase.ROLLOUT, policy))
    to_train_s, _ = timed(bench.device, lambda: colocation.to(Phase.TRAIN, policy))
    row = {
        "weights": "copied" if memory is None else "shared",
        "is_exact": is_exact,
        "seconds": round(seconds, 4),
        "to_sync_s": round(to_sync_s, 4),
        "to_rollout_s": round(to_rollout_s, 4),
        "to_train_s": round(to_train_s, 4),
    }
    print(f"sync: {row}", flush=True)
    return row


def bench_sync(bench: Bench) -> dict[str, Any]:
    is_gpu = bench.device == "cuda"
    free = free_gpu_bytes if is_gpu else None
    before = free() if free else 0
    with bench.engine(can_sleep=True) as engine:
        engine.wait_until_ready(timeout_s=600)
        (place,) = engine_places(count=1, tensor=1, device=bench.device, world_size=1, ranks_per_node=1)
        link = Link(place, engine)
        colocation = Colocation(
            is_on=True,
            engines={0: engine},
            free_bytes=free,
            free_before_engines=before,
            together=lambda work: work(),
        )
        taken = before - free() if free else None
        asleep_s, _ = timed(bench.device, lambda: colocation.to(Phase.TRAIN, None))
        came_free = None if free is None or taken is None else taken - (before - free())
        policy = bench.policy(optimizer=is_gpu)  # whose memory is put to sleep
        rows = []
        for memory in (None,) if is_gpu else (None, SharedWeights(policy.shape, policy.dtype)):
            exact = [False] * (1 + REPEATS) + [True]
            rows += [one_sync(bench, colocation, policy, link, memory, is_exact) for is_exact in exact]
        parts: list[Bucket] = list(policy.hf_buckets(bucket_bytes=BUCKET_BYTES))  # on a CPU in the same two buffers
        num_bytes = sum(len(part.buffer) for part in parts)
        room = torch.empty(max(len(part.buffer) for part in parts), dtype=torch.uint8, device=bench.layout.device)

        def copy() -> None:
            for part in parts:
                room[: len(part.buffer)].copy_(part.buffer)

        copy()
        copy_s = median(timed(bench.device, copy)[0] for _ in range(REPEATS))
        ways = dict.fromkeys(row["weights"] for row in rows)
        seconds = {way: median([row["seconds"] for row in rows if row["weights"] == way][1:-1]) for way in ways}
        shared = [] if is_gpu else shared_memory_seconds(room)
        return {
            "weight_bytes": num_bytes,
            "syncs": rows,
            "gb_per_s": {weights: round(num_bytes / s / 1e9, 3) for weights, s in seconds.items()},
            "device_copy_gb_per_s": round(num_bytes / copy_s / 1e9, 3),
            "of_the_copys_speed": {weights: round(copy_s / s, 2) for weights, s in seconds.items()},
            **{f"{age}_shared_memory_gb_per_s": round(len(room) / s / 1e9, 2) for age, s in shared},
            "engine_took_bytes": taken,
            "engine_gave_bytes": came_free,
            "asleep_s": round(asleep_s, 4),
        }


def shared_memory_seconds(filled: Tensor) -> list[tuple[str, float]]:
    """Seconds of a copy into shared memory: the first into new pages, the second into the same."""
    allocate = SharedDoubleBuffer()
    room = allocate(len(filled))
    return [(age, timed("cpu", lambda: room.copy_(filled))[0]) for age in ("new", "old")]


if __name__ == "__main__":
    sys.exit(main({"sync": bench_sync}, __doc__))
