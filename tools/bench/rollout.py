"""How fast rollouts are, against what a user would take instead. Same model, prompts and token counts, in turn.

    python tools/bench/rollout.py decode    tokens a second of the engine alone: every request decodes as many tokens
                                            as every other, beside SGLang without our kernels, HuggingFace generate,
                                            and the model's matrix products with nothing around them: the ceiling.
                                            Engines are asked twice: a request a prompt, as rollouts ask, and all
                                            prompts in one, as HuggingFace generate gets them
    python tools/bench/rollout.py turns     trajectories a second of engines alone, with uneven turns and passages as in
                                            the paper's task: ours, stock, and HuggingFace generate, turn by turn,
                                            which reads every context again and waits for the longest
    python tools/bench/rollout.py search    trajectories a second with the retriever: our sampler and engine, beside a
                                            HuggingFace generate loop over turns, the same with TRL's generation where
                                            TRL is installed (grpo_lengths.py says how), and the engine alone, which is
                                            asked for the same tokens of the same contexts and never searches

`decode` and `turns` take a Qwen2 of 3.1 million random weights, `search` the shipped toy policy in its world. One
thread each. What is idle is stopped (SIGSTOP). Prints medians and ratios, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from cpu_engine import cpu_engine, go_on, running, stop, stopped
from hf_loop import TOY_POLICY, TurnLoop, left_padded
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from megatron_ext.blas import add_product
from searche1.config import load_config
from searche1.data import load_questions
from searche1.models import load_tokenizer
from searche1.quickstart import make_world
from searche1.rollout.engine import Engine, http_session
from searche1.rollout.fleet import Fleet
from searche1.rollout.sampler import Rollouts, Sampler
from searche1.rollout.servers import make_retriever_client, start_retriever
from searche1.types import Question, Span, Trajectory

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 64
PROMPT_TOKENS = 16


def stock_engine(model: Path, log: Path, *, max_running: int, port: int) -> Engine:
    """SGLang as a user starts it on a CPU, with the smallest pool that is enough and no detours."""
    command = [sys.executable, str(ROOT / "tools/bench/stock_server.py"), "--model-path", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", "--device", "cpu"]
    command += ["--dtype", "float32", "--disable-cuda-graph"]
    command += ["--attention-backend", "torch_native", "--max-total-tokens", "60000", "--sleep-on-idle"]
    command += ["--mem-fraction-static", "0.2", "--max-running-requests", str(max_running)]
    command += ["--context-length", "1000", "--grammar-backend", "none"]

    def launch() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    return Engine(url=f"http://127.0.0.1:{port}", log_path=log, launch=launch)


# -- decode ---------------------------------------------------------------------------------------


async def decode(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: Sequence[int]) -> int:
    """Asks for so many tokens of each prompt, all at once; returns how many came."""

    async def one(session: aiohttp.ClientSession, number: int) -> int:
        sampling = {"max_new_tokens": num_tokens[number], "temperature": 1.0, "ignore_eos": True}
        body = {"input_ids": list(prompts[number]), "return_logprob": True, "sampling_params": sampling}
        async with session.post(f"{engine.url}/generate", json=body, headers=engine._headers) as response:
            answer = json.loads(await response.text())
        return len(answer["meta_info"]["output_token_logprobs"])

    async with http_session() as session:
        return sum(await asyncio.gather(*(one(session, number) for number in range(len(prompts)))))


def decode_batch(engine: Engine, prompts: Sequence[Sequence[int]]) -> int:
    """NEW_TOKENS of each prompt in one request, as HuggingFace's `generate` gets one batch; returns how many came."""
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": [list(ids) for ids in prompts], "return_logprob": True, "sampling_params": sampling}
    return sum(len(one["meta_info"]["output_token_logprobs"]) for one in engine._post("/generate", body).json())


def small_model(folder: Path) -> None:
    """Random weights in Qwen2's form, and the toy policy's tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    print(f"a Qwen2 of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million weights")
    model.save_pretrained(folder)
    for file in TOY_POLICY.glob("*token*"):
        shutil.copy(file, folder)


def bench_decode(parsed: argparse.Namespace, work: Path) -> dict[str, Any]:
    small_model(work / "model")
    hf = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
    most = max(parsed.together)
    with (
        cpu_engine(work / "model", work / "ours.log", max_running=most) as ours,
        stock_engine(work / "model", work / "stock.log", max_running=most, port=parsed.port) as stock,
    ):
        for engine in (ours, stock):
            engine.wait_until_ready(timeout_s=300)
            stop(engine)
        rows = []
        for together in parsed.together:
            seconds: dict[str, list[float]] = {}
            products = decoding_products(hf, rows=together)
            for repeat in range(parsed.repeats + 1):
                dice = random.Random(repeat)  # new prompts, so that no prefix is cached
                prompts = [[dice.randrange(3, 400) for _ in range(PROMPT_TOKENS)] for _ in range(together)]

                def on(engine: Engine, prompts: list[list[int]] = prompts) -> Callable[[], int]:
                    return lambda: asyncio.run(decode(engine, prompts, [NEW_TOKENS] * len(prompts)))

                def at_once(engine: Engine, prompts: list[list[int]] = prompts) -> Callable[[], int]:
                    # Others, of the same length: those above are in its cache.
                    return lambda: decode_batch(engine, [[499 - token for token in ids] for ids in prompts])

                def generate(prompts: list[list[int]] = prompts) -> int:
                    ids = torch.tensor(prompts)
                    sampling = {"do_sample": True, "top_k": 0, "min_new_tokens": NEW_TOKENS}
                    with torch.inference_mode():
                        out = hf.generate(
                            ids,
                            attention_mask=torch.ones_like(ids),
                            max_new_tokens=NEW_TOKENS,
                            pad_token_id=0,
                            output_logits=True,
                            return_dict_in_generate=True,
                            **sampling,
                        )
                    return out.sequences[:, ids.shape[1] :].numel()

                def multiply(together: int = together, products: Callable[[], None] = products) -> int:
                    for _ in range(NEW_TOKENS):
                        products()
                    return NEW_TOKENS * together

                works: dict[str, tuple[Callable[[], int], Engine | None]] = {
                    "ours": (on(ours), ours),
                    "stock SGLang": (on(stock), stock),
                    "ours, one batch": (at_once(ours), ours),
                    "stock SGLang, one batch": (at_once(stock), stock),
                    "HuggingFace generate": (generate, None),
                    "products alone": (multiply, None),
                }
                for name, (work_of, engine) in works.items():
                    with running(engine) if engine else contextlib.nullcontext():
                        started = time.perf_counter()
                        tokens = work_of()
                        taken = time.perf_counter() - started
                    assert tokens == NEW_TOKENS * together, (name, tokens)
                    if repeat:  # the first one warms up
                        seconds.setdefault(name, []).append(taken)
            row: dict[str, Any] = {"requests": together, "new_tokens": NEW_TOKENS, "prompt_tokens": PROMPT_TOKENS}
            for name, taken_s in seconds.items():
                row[name] = round(together * NEW_TOKENS / statistics.median(taken_s))
            for form in ("", ", one batch"):
                for name in (f"stock SGLang{form}", "HuggingFace generate", "products alone"):
                    row[f"ours{form} over {name}"] = median_ratio(seconds[name], seconds[f"ours{form}"])
            rows.append(row)
            print(f"{together} requests: " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        for engine in (ours, stock):
            go_on(engine)
    return {"decode": rows}


def decoding_products(model: PreTrainedModel, *, rows: int) -> Callable[[], None]:
    """The matrix products of one decoding step, and nothing else: what no engine on these products can pass.

    Fused, transposed in memory and by OpenBLAS as in our engine.
    """
    weights = [torch.cat([weight.data for weight in group]).t().contiguous() for group in product_weights(model)]
    inputs = [torch.randn(rows, len(weight)) for weight in weights]
    outputs = [torch.empty(rows, weight.shape[1]) for weight in weights]

    def multiply() -> None:
        for x, weight, out in zip(inputs, weights, outputs, strict=True):
            if not add_product(x, weight, out):
                torch.mm(x, weight, out=out)

    return multiply


def product_weights(model: PreTrainedModel) -> Iterator[tuple[Tensor, ...]]:
    """By the products that an engine takes together."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        yield (attention.o_proj.weight,)
        yield mlp.gate_proj.weight, mlp.up_proj.weight
        yield (mlp.down_proj.weight,)
    yield (model.lm_head.weight,)


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Of the pairs that ran one after the other: the machine's speed drifts."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 2)


# -- search ---------------------------------------------------------------------------------------


@dataclass
class Replayed:
    """Tokens that came, tokens of all contexts, and how many of those were in the prefix cache."""

    tokens: int = 0
    context_tokens: int = 0
    cached_tokens: int = 0


async def replay(engine: Engine, trajectories: Sequence[Trajectory]) -> Replayed:
    """The same tokens from the same contexts, turn after turn of each trajectory; nothing is parsed or searched."""
    found = Replayed()

    async def one(session: aiohttp.ClientSession, trajectory: Trajectory) -> None:
        context = list(trajectory.prompt_ids)
        for span in trajectory.spans:
            if span.author == "policy" and span.token_ids:
                sampling = {"max_new_tokens": len(span.token_ids), "temperature": 1.0, "ignore_eos": True}
                body = {"input_ids": context, "return_logprob": True, "sampling_params": sampling}
                async with session.post(f"{engine.url}/generate", json=body, headers=engine._headers) as response:
                    meta = json.loads(await response.text())["meta_info"]
                found.tokens += len(meta["output_token_logprobs"])
                found.context_tokens += len(context)
                found.cached_tokens += meta["cached_tokens"]
            context = [*context, *span.token_ids]

    async with http_session() as session:
        await asyncio.gather(*(one(session, trajectory) for trajectory in trajectories))
    return found


def computing_seconds(engine: Engine) -> float:
    """Processor time that the engine's batches have taken so far, in the thread that cpu_overlap.py describes."""
    assert engine._process is not None
    workers = psutil.Process(engine._process.pid).children(recursive=True)
    (scheduler,) = (worker for worker in workers if "sglang::scheduler" in " ".join(worker.cmdline()))
    names = Path(f"/proc/{scheduler.pid}/task")
    (stream,) = (x for x in scheduler.threads() if (names / str(x.id) / "comm").read_text() == "searche1-stream\n")
    return stream.user_time + stream.system_time


class Deck:
    """Questions in random order, each dealt once."""

    def __init__(self, questions: list[Question]) -> None:
        self._left = random.Random(0).sample(questions, len(questions))

    def pop(self, count: int) -> list[Question]:
        dealt, self._left = self._left[:count], self._left[count:]
        assert len(dealt) == count, "no questions are left; lower --repeats"
        return dealt


# -- turns ----------------------------------------------------------------------------------------


def draw_script(dice: random.Random) -> Trajectory:
    """A prompt of 200 tokens, one to four turns of about 30 and at most 100, observations of 150: lengths of the
    paper's task at a quarter of its scale, and as uneven.
    """

    def ids(count: int) -> tuple[int, ...]:
        return tuple(dice.randrange(3, 400) for _ in range(count))

    spans = []
    for turn in range(num_turns := dice.randint(1, 4)):
        tokens = ids(min(100, max(1, round(dice.lognormvariate(math.log(30), 0.7)))))
        spans.append(Span("policy", "search", tokens, (0.0,) * len(tokens), ""))
        if turn < num_turns - 1:
            spans.append(Span("environment", "information", ids(150), (), ""))
    return Trajectory(ids(200), tuple(spans), "answered")


def decode_together(model: PreTrainedModel, contexts: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
    """So many tokens of each context with HuggingFace generate: all are decoded until the last has its own."""
    ids, mask = left_padded(contexts)
    wanted = torch.tensor(counts)

    class HasAll(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return input_ids.shape[1] - ids.shape[1] >= wanted

    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=max(counts),
            stopping_criteria=StoppingCriteriaList([HasAll()]),
            output_logits=True,
            return_dict_in_generate=True,
        )


def lock_step(model: PreTrainedModel, scripts: Sequence[Trajectory]) -> int:
    """HuggingFace generate, turn by turn over all that still run: a batch is as long as its longest turn."""
    contexts = [list(script.prompt_ids) for script in scripts]
    tokens = 0
    for turn in range(4):
        running = [k for k, script in enumerate(scripts) if len(script.spans) > 2 * turn]
        if not running:
            break
        decode_together(
            model, [contexts[k] for k in running], [len(scripts[k].spans[2 * turn].token_ids) for k in running]
        )
        for k in running:
            policy, *observed = scripts[k].spans[2 * turn : 2 * turn + 2]
            contexts[k] += [*policy.token_ids, *(observed[0].token_ids if observed else ())]
            tokens += len(policy.token_ids)
    return tokens


def bench_turns(parsed: argparse.Namespace, work: Path) -> dict[str, Any]:
    small_model(work / "model")
    hf = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
    most = max(parsed.together)
    rows = []
    with (
        cpu_engine(work / "model", work / "ours.log", max_running=most) as ours,
        stock_engine(work / "model", work / "stock.log", max_running=most, port=parsed.port) as stock,
    ):
        for engine in (ours, stock):
            engine.wait_until_ready(timeout_s=300)
            stop(engine)
        for together in parsed.together:
            seconds: dict[str, list[float]] = {"ours": [], "stock SGLang": [], "HuggingFace loop": []}
            for repeat in range(parsed.repeats + 1):
                dice = random.Random(1000 * together + repeat)
                scripts = [draw_script(dice) for _ in range(together)]
                wanted = sum(script.num_policy_tokens for script in scripts)
                for name, engine in (("ours", ours), ("stock SGLang", stock), ("HuggingFace loop", None)):
                    with running(engine) if engine else contextlib.nullcontext():
                        if engine:
                            engine.flush_cache()
                        started = time.perf_counter()
                        tokens = asyncio.run(replay(engine, scripts)).tokens if engine else lock_step(hf, scripts)
                        taken = time.perf_counter() - started
                    assert tokens == wanted, (name, tokens, wanted)
                    if repeat:
                        seconds[name].append(taken)
            row: dict[str, Any] = {"trajectories": together}
            for name, taken_s in seconds.items():
                row[f"trajectories/s, {name}"] = round(together / statistics.median(taken_s), 2)
            for name in list(seconds)[1:]:
                row[f"ours over {name}"] = median_ratio(seconds[name], seconds["ours"])
            rows.append(row)
            print(f"{together} trajectories: " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        for engine in (ours, stock):
            go_on(engine)
    return {"turns": rows}


def bench_search(parsed: argparse.Namespace, work: Path) -> dict[str, Any]:
    world = work / "world"
    make_world(world, seed=0)
    config = load_config(
        str(ROOT / "configs/quickstart.yaml"),
        [
            f"run.out={work / 'run'}",
            f"model.path={TOY_POLICY}",
            f"retriever.corpus={world / 'corpus.jsonl'}",
            f"retriever.index={world / 'index'}",
        ],
    )
    # All of them: no question is asked twice.
    files = ("train.jsonl", "validation.jsonl", "test.jsonl")
    questions = Deck([question for file in files for question in load_questions(str(world / file))])
    has_trl = importlib.util.find_spec("trl") is not None
    if not has_trl:
        print("TRL is not installed; its generation is left out")
    rows = []
    with (
        cpu_engine(TOY_POLICY, work / "engine.log", max_running=max(parsed.together)) as engine,
        contextlib.ExitStack() as stack,
    ):
        retriever = start_retriever(config, log_dir=work, stack=stack)
        engine.wait_until_ready(timeout_s=300)
        tokenizer = load_tokenizer(TOY_POLICY, config.prompt)
        hf = AutoModelForCausalLM.from_pretrained(TOY_POLICY, dtype=torch.float32).eval()
        for together in parsed.together:
            loops = ["HuggingFace loop", *(["TRL"] if has_trl else [])]
            seconds: dict[str, list[float]] = {name: [] for name in ("ours", *loops, "the engine alone")}
            counts: dict[str, list[int]] = {name: [] for name in ("ours", *loops)}
            idle, hits = [], []
            samples = 4
            for repeat in range(parsed.repeats + 1):
                # Questions nobody has asked before: the retriever remembers answers.
                asked, *of_loops = (questions.pop(together // samples) for _ in range(1 + len(loops)))
                client = make_retriever_client(config, retriever)
                sampler = Sampler(
                    fleet=Fleet([engine]),
                    retriever=client,
                    tokenizer=tokenizer,
                    rollout=config.rollout,
                    prompt=config.prompt,
                )
                starts = sampler.starts(asked)
                engine.flush_cache()
                busy_s = computing_seconds(engine)
                started = time.perf_counter()
                groups = sampler.sample(Rollouts(starts, samples), temperature=1.0, seed=repeat)
                ours_s = time.perf_counter() - started
                busy_s = computing_seconds(engine) - busy_s
                trajectories = [t for group in groups for t in group.trajectories]
                engine.flush_cache()
                started = time.perf_counter()
                replayed = asyncio.run(replay(engine, trajectories))
                raw_s = time.perf_counter() - started
                own = sum(t.num_policy_tokens for t in trajectories)
                assert replayed.tokens >= own
                took, tokens = {"ours": ours_s, "the engine alone": raw_s}, {"ours": own}
                longest = max(len(span.token_ids) for t in trajectories for span in t.spans)
                for name, others in zip(loops, of_loops, strict=True):
                    if name == "TRL":
                        from trl_loop import TrlLoop  # where TRL is

                        loop = TrlLoop(hf, config, client, most_new_tokens=longest, trajectories=together, work=work)
                    else:
                        loop = TurnLoop(hf, config, client, most_new_tokens=longest)
                    with stopped(engine):
                        started = time.perf_counter()
                        starts = sampler.starts(others)
                        theirs = loop.run([start.prompt_ids for start in starts for _ in range(samples)])
                        took[name] = time.perf_counter() - started
                    tokens[name] = sum(t.num_policy_tokens for t in theirs)
                if repeat:
                    for name, taken in took.items():
                        seconds[name].append(taken)
                    for name, count in tokens.items():
                        counts[name].append(count)
                    idle.append(1 - busy_s / ours_s)
                    hits.append(replayed.cached_tokens / replayed.context_tokens)
            row: dict[str, Any] = {"trajectories": together}
            for name, taken_s in seconds.items():
                row[f"trajectories/s, {name}"] = round(together / statistics.median(taken_s), 1)
            row["policy tokens/s, ours"] = round(statistics.median(counts["ours"]) / statistics.median(seconds["ours"]))
            row["policy tokens"] = counts
            row["engine idle, share of the time of ours"] = round(statistics.median(idle), 2)
            row["context tokens in the prefix cache, share"] = round(statistics.median(hits), 2)
            for name in (*loops, "the engine alone"):
                row[f"ours over {name}"] = median_ratio(seconds[name], seconds["ours"])
            rows.append(row)
            print(f"{together} trajectories: " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return {"search": rows}


BENCHES = {"decode": bench_decode, "turns": bench_turns, "search": bench_search}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=BENCHES)
    parser.add_argument("--together", type=int, nargs="+", default=[64, 128], help="requests or trajectories at once")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="after one that does not count; of `search` the toy world's questions allow 5",
    )
    parser.add_argument("--port", type=int, default=31377, help="of the stock server")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = BENCHES[parsed.kind](parsed, Path(folder))
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
