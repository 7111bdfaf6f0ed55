"""An OPSD step, ours beside the plain one: PyTorch, transformers and PEFT, the loss as the paper writes it.

    python tools/bench/opsd_step.py                    4 pairs, Qwen's vocabulary of 151,936, a small model around it
    python tools/bench/opsd_step.py --pairs 8 --tau 0.05

Both teach the same adapter on the same pairs: per-entry clipped forward KL at the policy's tokens, mean over each
sequence and over pairs, gradient norm clipped, AdamW. The plain one has all logits of student and teacher and lets
autograd go back through them. Each runs in a process of its own, in turn, with one thread. Counted are seconds of a
step behind the first, and bytes that a step takes beyond what is there before it (peak resident memory). The losses of
the first step are compared. JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER_FROM = ROOT / "searche1" / "assets" / "toy_policy"
RANK, ALPHA, LR, GRAD_CLIP = 16, 32, 1e-4, 1.0
PROMPT, TEACHER_PROMPT, TURN, OBSERVATION = 60, 140, 50, 60  # tokens; two turns, an observation between them


def make_model(folder: Path, parsed: argparse.Namespace) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=parsed.vocab,
        hidden_size=parsed.hidden,
        intermediate_size=2 * parsed.hidden,
        num_hidden_layers=parsed.layers,
        num_attention_heads=parsed.hidden // 64,
        num_key_value_heads=parsed.hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for file in TOKENIZER_FROM.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())


def draw_pairs(parsed: argparse.Namespace) -> list[Any]:
    from searche1.opsd import TrainedPair
    from searche1.packing import Sample

    dice = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(dice.randrange(parsed.vocab) for _ in range(count))

    pairs = []
    for _ in range(parsed.pairs):
        response = ids(2 * TURN + OBSERVATION)
        mask = (True,) * TURN + (False,) * OBSERVATION + (True,) * TURN
        pairs.append(
            TrainedPair(
                question="bench/0",
                student=Sample(ids(PROMPT), response, mask),
                teacher=Sample(ids(TEACHER_PROMPT), response, mask),
            )
        )
    return pairs


def resident(name: str) -> int:
    """Bytes; VmRSS is what is there, VmHWM the most since `measured` began."""
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024


def measured(step: Callable[[], float], steps: int) -> dict[str, Any]:
    """Loss of the first step, seconds of the others, bytes that the last one took at its peak."""
    losses, seconds = [], []
    for _ in range(steps):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
        taken = resident("VmHWM") - before
    return {"loss": losses[0], "seconds": seconds[1:], "bytes": taken}


def ours(model: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    import megatron_ext.parallel
    from megatron_ext.lora import LoraSettings
    from megatron_ext.optimizer import OptimizerSettings
    from megatron_ext.parallel import close_parallel, init_parallel
    from searche1.config import Config, OPSDConfig, TrainConfig
    from searche1.opsd import opsd_step
    from searche1.policy import Policy

    megatron_ext.parallel.keep_freed_memory = lambda: True  # a step's memory is what appears with it, as in theirs
    layout = init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
    train = TrainConfig(dtype="float32", recompute="none", max_tokens=16384)
    config = Config(train=train, opsd=OPSDConfig(pairs_per_step=parsed.pairs, kl_clip=parsed.tau, grad_clip=GRAD_CLIP))
    policy = Policy(
        model_path=model,
        layout=layout,
        train=train,
        optimizer=OptimizerSettings(lr=LR, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=GRAD_CLIP, distributed=True),
        lora=LoraSettings(rank=RANK, alpha=ALPHA, seed=0),
    )
    pairs = draw_pairs(parsed)
    found = measured(lambda: opsd_step(policy, pairs, config=config, lr=LR)["loss"], parsed.steps)
    close_parallel()
    return found


def plain(model: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    policy = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    pairs = draw_pairs(parsed)
    mask = torch.tensor([pair.student.policy_mask for pair in pairs])
    weights = mask / mask.sum(1, keepdim=True) / len(pairs)

    def logits(samples: list[Any]) -> Tensor:  # at the positions that predict the response, [pairs, response, vocab]
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids] for sample in samples])
        first = len(samples[0].prompt_ids) - 1
        return policy(ids).logits[:, first:-1]

    def step() -> float:
        with torch.no_grad(), policy.disable_adapter():
            teacher = F.log_softmax(logits([pair.teacher for pair in pairs]), dim=-1)
        student = F.log_softmax(logits([pair.student for pair in pairs]), dim=-1)
        entries = teacher.exp() * (teacher - student)
        loss = (entries.clamp(max=parsed.tau).sum(-1) * weights).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return measured(step, parsed.steps)


CONTESTANTS = {"ours": ours, "plain": plain}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tau", type=float, default=10.0, help="the clip of an entry")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    if parsed.only:
        print(json.dumps(CONTESTANTS[parsed.only](parsed.model, parsed)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), parsed)
        for _ in range(parsed.repeats):
            for name, rows in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--model", folder]
                done = subprocess.run(
                    command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                if done.returncode:
                    sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {rows[-1]}", flush=True)
    one, other = (rows[0]["loss"] for rows in found.values())
    assert abs(one - other) <= 1e-4 * abs(other), f"the losses differ: {one} and {other}"
    result: dict[str, Any] = {key: getattr(parsed, key) for key in ("pairs", "vocab", "hidden", "layers", "tau")}
    for name, rows in found.items():
        result[name] = {
            "seconds": round(statistics.median(s for row in rows for s in row["seconds"]), 3),
            "bytes": statistics.median(row["bytes"] for row in rows),
        }
    result["plain over ours, seconds"] = round(result["plain"]["seconds"] / result["ours"]["seconds"], 2)
    result["plain over ours, bytes"] = round(result["plain"]["bytes"] / result["ours"]["bytes"], 1)
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
