"""A GRPO step with search, as a whole: ours beside TRL's GRPOTrainer on the same model, questions and retriever.

    pip install --no-deps --target trl trl==1.16.0        its other packages are here already
    PYTHONPATH=trl python tools/bench/grpo_step.py        some steps of each, one after the other, several times

Rollouts, rewards, reference logprobs, one update, and weights to the engine where there is one. TRL's trainer rolls out
with HuggingFace generate in a loop over turns (`hf_loop.py`), which is what it has without vLLM, on the model that it
trains: it needs no weight sync. Both take 16 questions x 5 trajectories a step, the toy policy, float32, one thread a
process. Counted are seconds of a step and of a policy token, without each run's first step. JSON as the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hf_loop import TOY_POLICY, TurnLoop

from searche1.config import Config, GRPOConfig, load_config
from searche1.data import load_questions, question_batches
from searche1.models import load_tokenizer
from searche1.prompts import encode_prompt, student_prompt
from searche1.quickstart import make_world
from searche1.rewards import em_reward
from searche1.rollout.servers import make_retriever_client, start_retriever

ROOT = Path(__file__).resolve().parents[2]


def settings(work: Path, parsed: argparse.Namespace, **more: Any) -> list[str]:
    """What both of them do."""
    world = work / "world"
    chosen = {
        "model.path": TOY_POLICY,
        "retriever.corpus": world / "corpus.jsonl",
        "retriever.index": world / "index",
        **{f"data.{name}": world / f"{name}.jsonl" for name in ("train", "validation", "test")},
        "grpo.steps": parsed.steps,
        "grpo.prompts_per_step": parsed.prompts,
        "grpo.mini_batch_size": 0,
        "rollout.group_size": parsed.group,
        "cycle.evaluate_stages": "false",
        "run.seed": 0,
        **more,
    }
    return [f"{name}={value}" for name, value in chosen.items()]


def ours(work: Path, parsed: argparse.Namespace, url: str, number: int) -> list[dict[str, float]]:
    """Seconds and policy tokens of each step, from the command that a user types."""
    out = work / f"ours{number}"
    command = [sys.executable, "-m", "searche1", "grpo", "--config", str(ROOT / "configs/quickstart.yaml")]
    command += settings(work, parsed, **{"run.out": out, "retriever.url": url})
    output_of("searche1 grpo", command)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [
        {"seconds": sum(row["seconds"].values()), "tokens": row["values"]["policy_tokens"], **row["seconds"]}
        for row in rows
        if row.get("stage") == "grpo" and "values" in row
    ]


def trl_settings(out: Path, *, steps: int, trajectories: int, group: int, grpo: GRPOConfig) -> Any:
    """Of TRL's trainer: a step is one update of all trajectories, on a CPU."""
    from trl import GRPOConfig as TRLConfig

    return TRLConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=trajectories,
        num_generations=group,
        beta=grpo.kl_coef,
        epsilon=grpo.clip_eps,
        learning_rate=grpo.lr,
        max_grad_norm=grpo.grad_clip,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trl_clock(rows: list[dict[str, float]]) -> Any:
    """A callback of TRL's trainer: a new row for every step, and its seconds."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            rows.append({})
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            rows[-1]["seconds"] = time.perf_counter() - self.started

    return Clock()


def output_of(name: str, command: list[str]) -> str:
    """What a contestant prints; ends this program with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def theirs(work: Path, parsed: argparse.Namespace, url: str, number: int) -> list[dict[str, float]]:
    """The same of TRL, in a process of its own."""
    out = work / f"trl{number}.json"
    command = [sys.executable, __file__, "--trl", str(out), "--work", str(work), "--url", url]
    command += ["--steps", str(parsed.steps), "--prompts", str(parsed.prompts), "--group", str(parsed.group)]
    output_of("TRL's run", command)
    rows: list[dict[str, float]] = json.loads(out.read_text())
    return rows


def run_trl(parsed: argparse.Namespace) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOTrainer

    config: Config = load_config(
        str(ROOT / "configs/quickstart.yaml"), settings(parsed.work, parsed, **{"run.out": parsed.work / "unused"})
    )
    tokenizer = load_tokenizer(TOY_POLICY, config.prompt)
    questions = load_questions(config.data.train)
    batches = question_batches(questions, batch_size=parsed.prompts, seed=0, round_index=0, start=0)
    asked = [question for _ in range(parsed.steps) for question in next(batches)]
    by_text = {student_prompt(question.text, config.prompt): question for question in asked}
    model = AutoModelForCausalLM.from_pretrained(TOY_POLICY, dtype=torch.float32)
    client = make_retriever_client(config, parsed.url)
    rows: list[dict[str, float]] = []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        started = time.perf_counter()
        ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
        trainer.model.eval()
        trajectories = TurnLoop(trainer.model, config, client, most_new_tokens=parsed.longest).run(ids)
        trainer.model.train()
        rows[-1] |= {
            "tokens": sum(t.num_policy_tokens for t in trajectories),
            "trajectories": len(trajectories),
            "rollout": time.perf_counter() - started,
        }
        logprobs = []
        for trajectory in trajectories:
            engine = iter(trajectory.engine_logprobs)
            logprobs.append([next(engine) if own else 0.0 for own in trajectory.policy_mask])
        return {
            "prompt_ids": [list(t.prompt_ids) for t in trajectories],
            "completion_ids": [list(t.response_ids) for t in trajectories],
            "env_mask": [[int(own) for own in t.policy_mask] for t in trajectories],
            "logprobs": logprobs,
            "em": [em_reward(t, by_text[prompt]) for t, prompt in zip(trajectories, prompts, strict=True)],
        }

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda em, **_: em,
        args=trl_settings(
            parsed.work / "trl",
            steps=parsed.steps,
            trajectories=parsed.prompts * parsed.group,
            group=parsed.group,
            grpo=config.grpo,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(by_text)}),
        processing_class=tokenizer,
        rollout_func=rollout,
        callbacks=[trl_clock(rows)],
    )
    trainer.train()
    assert all(row["trajectories"] == parsed.prompts * parsed.group for row in rows), rows
    parsed.trl.write_text(json.dumps(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each")
    parser.add_argument("--longest", type=int, default=40, help="tokens that end a turn of TRL's rollouts")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    for hidden in ("--trl", "--work"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed; the first lines of --help say how to get it")
    torch.set_num_threads(1)
    if parsed.trl:
        run_trl(parsed)
        return 0
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        make_world(work / "world", seed=0)
        config = load_config(
            str(ROOT / "configs/quickstart.yaml"), settings(work, parsed, **{"run.out": work / "unused"})
        )
        url = start_retriever(config, log_dir=work, stack=stack)
        runs: dict[str, list[list[dict[str, float]]]] = {"ours": [], "TRL": []}
        for number in range(parsed.repeats):
            runs["ours"].append(ours(work, parsed, url, number)[1:])
            runs["TRL"].append(theirs(work, parsed, url, number)[1:])
            for name, steps in runs.items():
                print(f"{name}: " + ", ".join(f"{row['seconds']:.2f} s" for row in steps[-1]), flush=True)
    result: dict[str, Any] = {"prompts": parsed.prompts, "group": parsed.group, "steps": parsed.steps - 1}
    for name, steps in runs.items():
        every = [row for run in steps for row in run]
        result[name] = {
            key: round(statistics.median(row[key] for row in every), 4) for key in every[0] if key != "trajectories"
        }
        result[name]["ms_per_token"] = round(statistics.median(1000 * r["seconds"] / r["tokens"] for r in every), 4)
    result["TRL over ours, seconds a step"] = round(result["TRL"]["seconds"] / result["ours"]["seconds"], 2)
    result["TRL over ours, seconds a policy token"] = round(
        result["TRL"]["ms_per_token"] / result["ours"]["ms_per_token"], 2
    )
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
