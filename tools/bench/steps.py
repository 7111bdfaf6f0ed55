"""One step of each kind on this machine's device, with a model of random weights: what a cycle is made of.

    python tools/bench/steps.py spec      Transformer Engine's layers against Megatron's own, same weights
    python tools/bench/steps.py train     a GRPO and an OPSD step: seconds, tokens a second, share of the GPU's peak
    python tools/bench/steps.py rollout   tokens a second of an engine, at two batch sizes

    --model NAME     a released model's shape (Qwen/Qwen2.5-3B-Instruct ...), or a HuggingFace folder; its weights are
                     drawn at random, because speed does not depend on them, and nothing is downloaded
Prints one line of JSON at the end. Where there is no GPU it runs on the CPU, with --model searche1/assets/toy_policy.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext import model as megatron_model
from megatron_ext.flops import head_flops, layer_flops
from megatron_ext.hf_io import CONFIG_NAME, TensorSpec, save_hf
from megatron_ext.hf_mapping import ModelShape, hf_sizes
from megatron_ext.known_models import HUB_IDS, hf_config, read_shape
from megatron_ext.lora import LoraSettings
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.parallel import Layout, close_parallel, init_parallel
from searche1.config import Config, GRPOConfig, OPSDConfig, TrainConfig
from searche1.grpo import grpo_step
from searche1.models import choose_device
from searche1.opsd import TrainedPair, opsd_step
from searche1.packing import Sample
from searche1.planner.hardware import GPUS
from searche1.policy import Policy
from searche1.rollout.engine import Engine, http_session, start_engine
from searche1.types import Group, Question, Span, Trajectory

TOKENIZER_FROM = Path(__file__).resolve().parents[2] / "searche1" / "assets" / "toy_policy"
PROMPT, TURN, OBSERVATION = 250, 120, 450  # tokens, as the planner assumes


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, the device's queue emptied before and behind, and what `work` returned."""
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started, result


def write_random_model(name: str, folder: Path, dtype: torch.dtype, device: str) -> None:
    """A HuggingFace folder of this shape with random weights, and the toy policy's tokenizer."""
    source = folder.with_name("source")
    if name in HUB_IDS:
        hf_config(HUB_IDS[name]).save_pretrained(source)
    else:
        source.mkdir()
        shutil.copy(Path(name) / CONFIG_NAME, source)
    for file in TOKENIZER_FROM.glob("*token*"):
        shutil.copy(file, source)
    generator = torch.Generator(device).manual_seed(0)
    specs = {tensor: TensorSpec(size, dtype) for tensor, size in hf_sizes(read_shape(str(source))).items()}

    def draw() -> Iterator[tuple[str, Tensor]]:
        for tensor, spec in specs.items():
            if len(spec.size) == 1 and not tensor.endswith("bias"):  # a norm
                yield tensor, torch.ones(spec.size, dtype=dtype)
            else:
                yield tensor, 0.02 * torch.randn(spec.size, generator=generator, device=device, dtype=dtype)

    save_hf(draw(), specs=specs, out=folder, config_from=source)


class Bench:
    """The model on disk and this process's place."""

    def __init__(self, parsed: argparse.Namespace, work: Path) -> None:
        self.parsed = parsed
        self.work = work
        self.device = choose_device("auto")
        self.dtype = "bfloat16" if self.device == "cuda" else "float32"
        self.layout: Layout = init_parallel(tensor=1, pipeline=1, sequence=False, device=self.device)
        self.model = work / "model"
        seconds, _ = timed(
            self.device,
            lambda: write_random_model(parsed.model, self.model, getattr(torch, self.dtype), self.device),
        )
        self.shape: ModelShape = read_shape(str(self.model))
        print(f"random weights of {parsed.model} written in {seconds:.0f} s", flush=True)

    def policy(self, *, lora: bool = False, optimizer: bool = True) -> Policy:
        return Policy(
            model_path=self.model,
            layout=self.layout,
            train=TrainConfig(dtype=self.dtype, recompute=self.parsed.recompute),
            optimizer=OptimizerSettings(lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0, distributed=True)
            if optimizer
            else None,
            lora=LoraSettings(rank=64, alpha=128, seed=0) if lora else None,
        )

    def engine(self, *, can_sleep: bool) -> Engine:
        is_gpu = self.device == "cuda"
        return start_engine(
            model_path=self.model,
            device="cuda:0" if is_gpu else "cpu",
            dtype=self.dtype,
            tensor=1,
            port=0,
            seed=0,
            mem_fraction=self.parsed.mem_fraction,
            max_total_tokens=0 if is_gpu else 60_000,
            max_running=512,
            context_length=min(4096, self.shape.max_positions),
            attention_backend=self.parsed.attention_backend,
            log_path=self.work / "engine.log",
            sampling_backend=self.parsed.sampling_backend,
            cuda_graph=self.parsed.cuda_graph,
            can_sleep=can_sleep,
        )


# -- training -------------------------------------------------------------------------------------


def trajectory(dice: random.Random, vocab: int, turns: int) -> Trajectory:
    """Searches and an answer, of the mean lengths that the planner assumes."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(dice.randrange(vocab) for _ in range(count))

    spans: list[Span] = []
    for turn in range(turns):
        is_last = turn == turns - 1
        tokens = ids(TURN)
        spans.append(Span("policy", "answer" if is_last else "search", tokens, (-5.0,) * TURN, ""))
        if not is_last:
            spans.append(Span("environment", "information", ids(OBSERVATION), (), ""))
    return Trajectory(ids(PROMPT), tuple(spans), "answered")


def peak_flops() -> float | None:
    """Of this GPU, if its name says which it is."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((gpu.flops for key, gpu in GPUS.items() if key in name), None)


def share_of_peak(flops: float, seconds: float) -> dict[str, float | None]:
    peak = peak_flops()
    return {
        "tflops_per_s": round(flops / seconds / 1e12, 2),
        "share_of_peak": None if peak is None else round(flops / seconds / peak, 4),
    }


def take_peak() -> int | None:
    """The most memory of the GPU that was taken at once since the last call."""
    if not torch.cuda.is_available():
        return None
    most = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def bench_train(bench: Bench) -> dict[str, Any]:
    parsed, shape = bench.parsed, bench.shape
    dice = random.Random(0)
    groups = [
        Group(
            Question(str(k), "q?", ("a",), "bench"),
            tuple(trajectory(dice, shape.vocab_size, 1 + (k + n) % 4) for n in range(4)),
            (1.0, 0.0, 0.0, 1.0),
        )
        for k in range(max(1, parsed.trajectories // 4))
    ]
    config = Config(
        train=TrainConfig(dtype=bench.dtype, recompute=parsed.recompute, max_tokens=parsed.max_tokens),
        grpo=GRPOConfig(mini_batch_size=0, kl_coef=0.0),
        opsd=OPSDConfig(pairs_per_step=len(groups)),
    )
    all_of_them = [t for group in groups for t in group.trajectories]
    lengths = [len(t.prompt_ids) + len(t.response_ids) for t in all_of_them]
    rows = sum(t.num_policy_tokens for t in all_of_them)
    forward = sum(layer_flops(shape, n, n) for n in lengths) + head_flops(shape, rows)

    policy = bench.policy()
    timed(bench.device, lambda: grpo_step(policy, None, groups, config=config, lr=1e-6))  # Adam's state, kernels
    seconds, (update,) = timed(bench.device, lambda: grpo_step(policy, None, groups, config=config, lr=1e-6))
    grpo: dict[str, Any] = {
        "seconds": round(seconds, 4),
        "tokens": sum(lengths),
        "tokens_per_s": round(sum(lengths) / seconds, 1),
        "ratio_mean": update["ratio_mean"],
        "grad_norm": update["grad_norm"],
        **share_of_peak(3 * forward, seconds),  # forward, and backward that counts twice
    }
    grpo["peak_memory_bytes"] = take_peak()
    print(f"GRPO step: {grpo}", flush=True)
    del policy
    gc.collect()  # it is cyclic garbage, and its memory is needed
    take_peak()
    pairs = []
    for group in groups:
        student = group.trajectories[0]
        prompt = tuple(dice.randrange(shape.vocab_size) for _ in range(len(student.prompt_ids) + 1500))
        pairs.append(
            TrainedPair(
                question=group.question.key,
                student=Sample(student.prompt_ids, student.response_ids, student.policy_mask),
                teacher=Sample(prompt, student.response_ids, student.policy_mask),
            )
        )
    policy = bench.policy(lora=True)
    timed(bench.device, lambda: opsd_step(policy, pairs, config=config, lr=1e-6))
    seconds, metrics = timed(bench.device, lambda: opsd_step(policy, pairs, config=config, lr=1e-6))
    teacher = sum(layer_flops(shape, p.teacher.num_inputs, p.teacher.num_inputs) for p in pairs)
    student_flops = sum(layer_flops(shape, p.student.num_inputs, p.student.num_inputs) for p in pairs)
    pair_rows = sum(p.student.num_rows for p in pairs)
    # Frozen weights have no gradient: backward goes through them once. Both heads, and the student's once more.
    flops = teacher + 2 * student_flops + 3 * head_flops(shape, pair_rows)
    opsd: dict[str, Any] = {
        "seconds": round(seconds, 4),
        "pairs": len(pairs),
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        **share_of_peak(flops, seconds),
    }
    opsd["peak_memory_bytes"] = take_peak()
    print(f"OPSD step: {opsd}", flush=True)
    return {"grpo": grpo, "opsd": opsd}


# -- sampling -------------------------------------------------------------------------------------


def bench_rollout(bench: Bench) -> dict[str, Any]:
    dice = random.Random(0)
    rows = []
    with bench.engine(can_sleep=False) as engine:
        engine.wait_until_ready(timeout_s=600)

        async def run(prompts: Sequence[Sequence[int]]) -> int:
            async with http_session() as session:
                completions = await asyncio.gather(
                    *(
                        engine.generate(session, ids, max_new_tokens=TURN, temperature=1.0, top_p=1.0, stop=(), seed=k)
                        for k, ids in enumerate(prompts)
                    )
                )
            return sum(len(completion.token_ids) for completion in completions)

        for together in (bench.parsed.together // 8, bench.parsed.together):
            prompts = [[dice.randrange(3, 400) for _ in range(PROMPT)] for _ in range(max(1, together))]
            timed(bench.device, lambda prompts=prompts: asyncio.run(run(prompts[:2])))
            seconds, tokens = timed(bench.device, lambda prompts=prompts: asyncio.run(run(prompts)))
            rows.append(
                {"together": len(prompts), "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds)}
            )
            print(f"rollout: {rows[-1]}", flush=True)
    return {"prompt_tokens": PROMPT, "most_new_tokens": TURN, "rollouts": rows}


# -- layers ---------------------------------------------------------------------------------------


def bench_spec(bench: Bench) -> dict[str, Any]:
    """Hidden states of both layer specs from the same weights, on a pack of three sequences."""
    from searche1.packing import make_batches, row_weights

    dice = random.Random(0)
    samples = []
    for length in (700, 90, 1300):
        ids = tuple(dice.randrange(bench.shape.vocab_size) for _ in range(length))
        samples.append(Sample(ids[:40], ids[40:], (True,) * (length - 40)))
    batches = make_batches(samples, row_weights(samples, "token_mean"), max_tokens=4096, rank=0, num_ranks=1)
    found = {}
    original = megatron_model.has_transformer_engine
    for name, answer in (("transformer engine", original), ("local", lambda: False)):
        megatron_model.has_transformer_engine = answer
        policy = bench.policy(optimizer=False)
        policy.logprobs(batches, temperature=1.0)
        seconds, logprobs = timed(bench.device, lambda policy=policy: policy.logprobs(batches, temperature=1.0))
        found[name] = (seconds, torch.cat(logprobs))
        del policy
    megatron_model.has_transformer_engine = original
    (engine_s, engine), (local_s, local) = found["transformer engine"], found["local"]
    gap = (engine - local).abs()
    assert gap.mean() < 0.05, f"the two layer specs differ by {gap.mean():.3f} per logprob"
    return {
        "mean_gap": round(gap.mean().item(), 6),
        "max_gap": round(gap.max().item(), 6),
        "transformer_engine_s": round(engine_s, 5),
        "local_s": round(local_s, 5),
    }


BENCHES = {"spec": bench_spec, "train": bench_train, "rollout": bench_rollout}


def main(benches: dict[str, Callable[[Bench], dict[str, Any]]], description: str | None) -> int:
    """The command line of one or several benches, the first argument if there are several."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(benches) > 1:
        parser.add_argument("kind", choices=benches)
    else:
        parser.set_defaults(kind=next(iter(benches)))
    parser.add_argument("--model", default="Qwen/Qwen2.5-3B-Instruct")
    parser.add_argument("--trajectories", type=int, default=64, help="of the GRPO step; a quarter of them are pairs")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="full")
    parser.add_argument("--mem-fraction", type=float, default=0.35, help="of the GPU, for the engine")
    parser.add_argument("--together", type=int, default=256, help="requests decoded together")
    parser.add_argument("--attention-backend", default="", help="of SGLang")
    parser.add_argument("--sampling-backend", default="", help="of SGLang")
    parser.add_argument("--no-cuda-graph", dest="cuda_graph", action="store_false")
    parser.add_argument("--work", type=Path, help="folder for the model (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    if parsed.model not in HUB_IDS and not (Path(parsed.model) / CONFIG_NAME).is_file():
        parser.error(f"--model {parsed.model} is neither a folder with a config.json nor one of {', '.join(HUB_IDS)}")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {"kind": parsed.kind, "model": parsed.model, "device": name}
    if parsed.kind == "spec" and not megatron_model.has_transformer_engine():
        result["skipped"] = "Transformer Engine does not import here; its layers are not used"
    else:
        with tempfile.TemporaryDirectory(dir=parsed.work) as folder:
            bench = Bench(parsed, Path(folder))
            result |= {"dtype": bench.dtype, **benches[parsed.kind](bench)}
            close_parallel()
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(BENCHES, __doc__))
