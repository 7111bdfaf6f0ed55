"""How the cost of a GRPO step grows, and what it is made of.

    python tools/bench/end_to_end.py          with questions, trajectories of a question, searches, and model size

The toy world and its policy (for model sizes: random weights, whose turns all run to their limit), one engine and one
retriever for all runs. Every size runs `--steps` steps of `searche1 grpo`; counted is the median behind the first.
The exponent is the slope of log seconds over log size: 1 is linear, less has a part that does not grow. JSON as the
last line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_engine import cpu_engine
from hf_loop import TOY_POLICY

from searche1.quickstart import make_world
from searche1.retrieval.launch import launch_retriever
from searche1.rollout.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("sync", "rollout", "train")


@contextlib.contextmanager
def engine_for(model: Path, work: Path) -> Iterator[list[str]]:
    """Settings that name an engine which is up."""
    with cpu_engine(model, work / "engine.log") as engine:
        engine.wait_until_ready(timeout_s=300)
        yield settings_of(engine, work)


def settings_of(engine: Engine, work: Path) -> list[str]:
    token = work / "engine.token"
    token.write_text(engine.key + "\n")
    return [f"engine.urls=[{engine.url}]", f"engine.token_file={token}"]


def measure(work: Path, model: Path, given: list[str], sizes: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step's phases, and its tokens."""
    out = work / "run"
    world = work / "world"
    command = [sys.executable, "-m", "searche1", "grpo", "--config", str(ROOT / "configs/quickstart.yaml")]
    command += [f"run.out={out}", f"model.path={model}", "cycle.evaluate_stages=false", *given]
    command += [f"retriever.corpus={world / 'corpus.jsonl'}", f"retriever.index={world / 'index'}"]
    command += [f"data.{name}={world / name}.jsonl" for name in ("train", "validation", "test")]
    command += [f"{name}={value}" for name, value in sizes.items()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"searche1 grpo ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row.get("stage") == "grpo" and "values" in row][1:]
    subprocess.run(["rm", "-rf", str(out)], check=True)
    found = {phase: statistics.median(row["seconds"].get(phase, 0.0) for row in steps) for phase in PHASES}
    found["seconds"] = statistics.median(sum(row["seconds"].values()) for row in steps)
    found["policy_tokens"] = statistics.median(row["values"]["policy_tokens"] for row in steps)
    return {name: round(value, 4) for name, value in found.items()}


def slope(sizes: list[float], seconds: list[float]) -> float:
    """Least squares of log seconds over log size."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return round(products / sum((a - mean_x) ** 2 for a in x), 3)


def random_model(folder: Path, *, hidden: int, layers: int) -> int:
    """A Qwen2 with the toy's tokenizer; returns the weights behind the embedding."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    toy = json.loads((TOY_POLICY / "config.json").read_text())
    config = Qwen2Config(
        vocab_size=toy["vocab_size"],
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    for file in TOY_POLICY.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return sum(p.numel() for p in model.model.layers.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    base = {"grpo.steps": parsed.steps, "grpo.prompts_per_step": 16, "rollout.group_size": 5}
    sweeps: dict[str, list[tuple[float, dict[str, Any]]]] = {
        "questions": [(n, {"grpo.prompts_per_step": n}) for n in (8, 16, 32, 64)],
        "trajectories of a question": [(n, {"rollout.group_size": n}) for n in (4, 8, 16, 32)],
        "most searches": [(n, {"rollout.max_searches": n}) for n in (1, 2, 4)],
    }
    result: dict[str, Any] = {"steps": parsed.steps - 1, "sweeps": {}}

    def note(name: str, rows: list[dict[str, Any]]) -> None:
        exponent = slope([row["size"] for row in rows], [row["seconds"] for row in rows])
        result["sweeps"][name] = {"rows": rows, "exponent": exponent}
        print(f"{name}: exponent {exponent}", flush=True)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        make_world(work / "world", seed=0)
        retriever = launch_retriever(
            corpus=str(work / "world" / "corpus.jsonl"),
            index=str(work / "world" / "index"),
            topk=3,
            port=0,
            log_path=work / "retriever.log",
            device="cpu",
            threads=1,
            start_timeout_s=120,
        )
        stack.callback(retriever.stop)
        url = f"retriever.url={retriever.url}"
        with engine_for(TOY_POLICY, work) as engine:
            for name, sizes in sweeps.items():
                rows = []
                for size, change in sizes:
                    rows.append({"size": size, **measure(work, TOY_POLICY, [*engine, url], {**base, **change})})
                    print(f"{name} {size}: {rows[-1]}", flush=True)
                note(name, rows)
        rows = []
        for hidden, layers in ((128, 3), (256, 4), (512, 6)):
            model = work / f"model{hidden}"
            weights = random_model(model, hidden=hidden, layers=layers)
            with engine_for(model, work) as engine:
                sizes_of_step = {**base, "grpo.prompts_per_step": 8}
                rows.append({"size": weights, **measure(work, model, [*engine, url], sizes_of_step)})
                print(f"weights {weights:,}: {rows[-1]}", flush=True)
        note("weights", rows)
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
