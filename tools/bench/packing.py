"""How evenly trajectories are shared by data-parallel ranks, and how full their packs are.

    python tools/bench/packing.py [--model Qwen/Qwen2.5-3B-Instruct] [--out FILE]

Trajectories have log-normal lengths, cut at the longest that a rollout allows; mini-batches of 256 are planned for some
numbers of ranks. Each plan is made twice: balanced by tokens, the usual way, and by compute, which counts attention.
`excess` is the slowest rank's compute over the mean's, less one: the others wait that long. `padding` is the share of
tokens that only fill up. `full` is the mean pack's tokens over train.max_tokens. Nothing is timed: it is arithmetic.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_ext.flops import attention_cost
from megatron_ext.known_models import HUB_IDS, read_shape
from searche1.packing import Sharing, compute_cost, plan

LONGEST = 6144  # rollout.max_start_tokens + rollout.max_context_tokens
MEDIAN, SIGMA = 1200, 0.7
MINI_BATCH = 256


def measure(
    lengths: list[int], cost_per_pair: float, *, num_ranks: int, sharing: Sharing, max_tokens: int, by: str
) -> Any:
    """Means over the mini-batches of one plan."""
    excess, padding, full = [], [], []
    for start in range(0, len(lengths) - MINI_BATCH + 1, MINI_BATCH):
        part = lengths[start : start + MINI_BATCH]
        costs = [compute_cost(length, cost_per_pair) for length in part]
        given = costs if by == "compute" else [float(length) for length in part]
        loads, packed, used, num_packs = [], 0, 0, 0
        for rank in range(num_ranks):
            bins = plan(part, given, max_tokens, sharing, rank=rank, num_ranks=num_ranks)
            loads.append(sum(costs[i] for members in bins for i in members))
            multiple = sharing.sequence_multiple
            for members in bins:
                size = sum(-(-part[i] // multiple) * multiple for i in members)
                size = max(1, -(-size // sharing.pack_multiple)) * sharing.pack_multiple
                packed += size
                used += sum(part[i] for i in members)
                num_packs += bool(members)
        excess.append(max(loads) / fmean(loads) - 1)
        padding.append(1 - used / packed)
        full.append(used / num_packs / max_tokens)
    return {"excess": round(fmean(excess), 4), "padding": round(fmean(padding), 5), "full": round(fmean(full), 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-3B-Instruct", choices=sorted(HUB_IDS), metavar="NAME")
    parser.add_argument("--max-tokens", type=int, default=16384, help="train.max_tokens")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    if parsed.max_tokens < LONGEST:
        parser.error(f"--max-tokens must hold the longest trajectory, {LONGEST}")
    dice = random.Random(0)
    lengths = [min(LONGEST, max(300, int(dice.lognormvariate(math.log(MEDIAN), SIGMA)))) for _ in range(2560)]
    cost_per_pair = attention_cost(read_shape(parsed.model))
    rows = []
    print(f"{'ranks':>5} {'shared by':22} {'balanced by':11} {'excess':>8} {'padding':>8} {'full':>6}")
    for num_ranks in (1, 8, 16, 64):
        for name, sharing in (
            ("nobody", Sharing()),
            ("tensor 8 + sequence", Sharing(sequence=8)),
            ("context 4", Sharing(context=4)),
        ):
            for by in ("tokens", "compute"):
                found = measure(
                    lengths, cost_per_pair, num_ranks=num_ranks, sharing=sharing, max_tokens=parsed.max_tokens, by=by
                )
                rows.append({"data_ranks": num_ranks, "pack_shared_by": name, "balanced_by": by, **found})
                print(
                    f"{num_ranks:5d} {name:22} {by:11} {found['excess']:8.2%} {found['padding']:8.3%} "
                    f"{found['full']:6.1%}"
                )
    result = {"model": parsed.model, "max_tokens": parsed.max_tokens, "trajectories": len(lengths), "rows": rows}
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
