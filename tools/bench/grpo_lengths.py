"""A GRPO step with the lengths of the paper's task at a quarter of their scale: ours beside TRL's GRPOTrainer.

    pip install --no-deps --target trl trl==1.16.0        its other packages are here already
    PYTHONPATH=trl python tools/bench/grpo_lengths.py     some steps of each, one after the other, several times

16 questions x 5 trajectories a step, scripted: prompts of 200 tokens, one to four turns, observations of 150 between
them (`rollout.py turns`). Engines decode as many tokens as the script says, and both trainers train on the script's, so
that tokens are equal; no retriever is asked. A step is rollout, reference logprobs, one update, and weights to the
engine where there is one: TRL rolls out with HuggingFace generate, turn by turn, on the model that it trains. Qwen2 of
3.1 million random weights, float32, one thread; the engine stands still while we train. JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cpu_engine import cpu_engine, stopped
from grpo_step import output_of, trl_clock, trl_settings
from rollout import draw_script, lock_step, replay, small_model

from megatron_ext import blas
from searche1.config import GRPOConfig
from searche1.types import Group, Question

GRPO = GRPOConfig(lr=1e-6, clip_eps=0.2, kl_coef=0.001, grad_clip=1.0, mini_batch_size=0)


def scripted(step: int, parsed: argparse.Namespace) -> list[Group]:
    """A step's trajectories; those of a group share their prompt."""
    dice = random.Random(step)
    groups = []
    for number in range(parsed.prompts):
        scripts = [draw_script(dice) for _ in range(parsed.group)]
        scripts = [replace(script, prompt_ids=scripts[0].prompt_ids) for script in scripts]
        rewards = tuple(float(dice.random() < 0.4) for _ in scripts)
        groups.append(Group(Question(f"{step}-{number}", "", ("",), "script"), tuple(scripts), rewards))
    return groups


def run_ours(parsed: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    from megatron_ext.flops import head_flops, layer_flops
    from megatron_ext.optimizer import OptimizerSettings
    from megatron_ext.parallel import close_parallel, init_parallel
    from megatron_ext.shared_weights import SharedWeights
    from searche1.config import Config, TrainConfig
    from searche1.grpo import grpo_step
    from searche1.policy import Policy
    from searche1.rollout.places import engine_places
    from searche1.sync import Link, sync_weights

    config = Config(grpo=GRPO, train=TrainConfig(dtype="float32", recompute="none", max_tokens=16384))
    layout = init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
    policy = Policy(
        model_path=work / "model",
        layout=layout,
        train=config.train,
        optimizer=OptimizerSettings(lr=GRPO.lr, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0, distributed=True),
    )
    reference = policy.snapshot()
    (place,) = engine_places(count=1, tensor=1, device="cpu", world_size=1, ranks_per_node=1)
    rows = []
    with cpu_engine(work / "model", work / "engine.log", max_running=128) as engine:
        engine.wait_until_ready(timeout_s=300)
        link, memory = Link(place, engine), SharedWeights(policy.shape, policy.dtype)
        for step in range(parsed.steps):
            groups = scripted(step, parsed)
            trajectories = [trajectory for group in groups for trajectory in group.trajectories]
            times = [time.perf_counter()]
            tokens = asyncio.run(replay(engine, trajectories)).tokens
            times.append(time.perf_counter())
            with stopped(engine):
                grpo_step(policy, reference, groups, config=config, lr=GRPO.lr)
            times.append(time.perf_counter())
            sync_weights(policy, [link], version=str(step), bucket_bytes=1 << 29, memory=memory)
            times.append(time.perf_counter())
            lengths = [len(t.prompt_ids) + len(t.response_ids) for t in trajectories]
            repeated = [len(group.trajectories[0].prompt_ids) for group in groups] * (parsed.group - 1)
            forward = sum(layer_flops(policy.shape, n, n) for n in lengths) + head_flops(policy.shape, tokens)
            forward -= sum(layer_flops(policy.shape, n, n) for n in repeated)  # prompts are computed once a group
            phases = zip(("rollout", "train", "sync"), times[1:], times[:-1], strict=True)
            rows.append({"tokens": tokens, "seconds": times[-1] - times[0], **{n: b - a for n, b, a in phases}})
            rows[-1]["gflop_per_s"] = 4 * forward / rows[-1]["train"] / 1e9  # reference, forward, twice that back
    close_parallel()
    return rows


def run_trl(parsed: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    rows: list[dict[str, float]] = []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        groups = scripted(len(rows) - 1, parsed)
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        assert len(trajectories) == len(prompts)
        started = time.perf_counter()
        trainer.model.eval()
        tokens = lock_step(trainer.model, trajectories)
        trainer.model.train()
        rows[-1] |= {"tokens": tokens, "rollout": time.perf_counter() - started}
        return {
            "prompt_ids": [list(t.prompt_ids) for t in trajectories],
            "completion_ids": [list(t.response_ids) for t in trajectories],
            "env_mask": [[int(own) for own in t.policy_mask] for t in trajectories],
            "logprobs": [[0.0] * len(t.response_ids) for t in trajectories],
            "em": [reward for group in groups for reward in group.rewards],
        }

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda em, **_: em,
        args=trl_settings(
            work / "trl",
            steps=parsed.steps,
            trajectories=parsed.prompts * parsed.group,
            group=parsed.group,
            grpo=GRPO,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"question {n}" for n in range(parsed.steps * parsed.prompts)]}),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        rollout_func=rollout,
        callbacks=[trl_clock(rows)],
    )
    trainer.train()
    return [{**row, "train": row["seconds"] - row["rollout"]} for row in rows]


def products_gflop_per_s() -> float:
    """What one core gives in the largest products of these layers' size, as ours computes them; the median of some."""
    left, right, out = torch.randn(4096, 256), torch.randn(256, 704), torch.empty(4096, 704)
    by_openblas = not blas.why_not()
    seconds = []
    for _ in range(30):
        started = time.perf_counter()
        if not (by_openblas and blas.add_product(left, right, out)):
            torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * left.numel() * right.shape[1] / statistics.median(seconds) / 1e9


RUNS = {"ours": run_ours, "TRL": run_trl}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each")
    parser.add_argument("--threads", type=int, default=1, help="of both trainers; our engine has one")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed; the first lines of --help say how to get it")
    torch.set_num_threads(parsed.threads)
    if parsed.run:
        print(json.dumps(RUNS[parsed.run](parsed, parsed.work)))
        return 0
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        small_model(Path(folder) / "model")
        for _ in range(parsed.repeats):
            for name, rows in runs.items():
                command = [sys.executable, __file__, "--run", name, "--work", folder, "--steps", str(parsed.steps)]
                command += ["--prompts", str(parsed.prompts), "--group", str(parsed.group)]
                command += ["--threads", str(parsed.threads)]
                rows += json.loads(output_of(name, command).splitlines()[-1])[1:]
                print(f"{name}: " + ", ".join(f"{row['seconds']:.2f} s" for row in rows), flush=True)
    assert [row["tokens"] for row in runs["ours"]] == [row["tokens"] for row in runs["TRL"]]
    result: dict[str, Any] = {"prompts": parsed.prompts, "group": parsed.group, "steps": parsed.steps - 1}
    result["threads"] = parsed.threads
    result["products alone, gflop_per_s"] = round(products_gflop_per_s(), 1)
    for name, rows in runs.items():
        result[name] = {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
    for key in ("seconds", "rollout", "train"):
        ratios = [b[key] / a[key] for a, b in zip(runs["ours"], runs["TRL"], strict=True)]
        result[f"TRL over ours, {key}"] = round(statistics.median(ratios), 2)
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
