"""Rollouts with searches at the lengths of the paper's task, a quarter of their scale, beside what a user would write.

    python tools/bench/rollout_task.py

As `rollout.py search`: our sampler, engine and retriever, beside a HuggingFace generate loop over turns with the same
retriever, and beside the engine alone, asked for the same tokens of the same contexts. Prompts have 200 tokens, which
the four trajectories of a question share, one to four turns about 30 and 12 to 100, observations 150. A Qwen2 of 3.1
million random weights writes no tags, so all decode as many tokens as a script says and go on with the script's words,
whose queries are searched. One thread each; what is idle is stopped. JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import torch
from cpu_engine import cpu_engine, stopped
from hf_loop import TOY_POLICY, TurnLoop
from rollout import ROOT, computing_seconds, decode_together, median_ratio, replay, small_model
from transformers import AutoModelForCausalLM

from searche1.config import Config, load_config
from searche1.models import load_tokenizer
from searche1.quickstart import make_world
from searche1.retrieval.build import Encoding, build_index
from searche1.retrieval.recipe import choose_recipe
from searche1.rollout import protocol
from searche1.rollout.engine import Engine, parse_completion
from searche1.rollout.fleet import Fleet
from searche1.rollout.sampler import Rollouts, Sampler, Start, turn_seed
from searche1.rollout.servers import make_retriever_client, start_retriever
from searche1.types import Completion, Question

SAMPLES = 4
PROMPT_TOKENS, OBSERVATION_TOKENS, MOST_TURNS = 200, 150, 4
LEAST_TURN_TOKENS, MOST_TURN_TOKENS = 12, 100
NEVER = ["</never>", "</no answer>"]  # stop strings cost something, whether they come or not

Turns = tuple[tuple[int, ...], ...]  # token ids of each


def longer_passages(world: Path, folder: Path) -> None:
    """The toy world with passages of about fifty words, and their index."""
    folder.mkdir()
    with (folder / "corpus.jsonl").open("w") as out:
        for line in (world / "corpus.jsonl").read_text().splitlines():
            passage = json.loads(line)
            title, text = passage["contents"].split("\n", 1)
            repeated = " ".join([text] * math.ceil(OBSERVATION_TOKENS / 3 / len(text.split())))
            out.write(json.dumps({"id": passage["id"], "contents": f"{title}\n{repeated}"}) + "\n")
    build_index(folder / "corpus.jsonl", folder / "index", Encoding(choose_recipe("minilm")))


class Script:
    """Trajectories of the same lengths for the same `number`, and of other words for every `reader`."""

    def __init__(self, tokenizer: Any, words: Sequence[str], *, together: int, number: int, reader: str) -> None:
        lengths, choice = random.Random(number), random.Random(f"{number} {reader}")

        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        def turn(is_last: bool) -> tuple[int, ...]:
            count = min(MOST_TURN_TOKENS, max(LEAST_TURN_TOKENS, round(lengths.lognormvariate(math.log(30), 0.7))))
            said = " ".join(choice.choice(words) for _ in range(3))
            end = encode(f" <answer> {said}</answer>" if is_last else f" <search> {said}</search>")
            thought = encode(" " + " ".join(choice.choice(words) for _ in range(MOST_TURN_TOKENS)))
            assert len(end) <= LEAST_TURN_TOKENS <= len(thought)
            return (*thought[: count - len(end)], *end)

        self.starts, self.turns = [], []  # of each question; of each trajectory
        for k in range(together // SAMPLES):
            prompt = encode(" ".join(choice.choice(words) for _ in range(PROMPT_TOKENS)))[:PROMPT_TOKENS]
            self.starts.append(Start(Question(f"{reader}-{number}-{k}", "", ("",), "script"), prompt))
            for _ in range(SAMPLES):
                count = lengths.randint(1, MOST_TURNS)
                self.turns.append(tuple(turn(n == count - 1) for n in range(count)))

    @property
    def tokens(self) -> int:
        return sum(len(turn) for turns in self.turns for turn in turns)


class ScriptedEngine:
    """Has the engine decode as many tokens as the script, and answers with the script's."""

    def __init__(self, engine: Engine, script: Script, *, seed: int) -> None:
        self.engine = engine
        self.turns = {
            turn_seed(seed, script.starts[k // SAMPLES].question, k % SAMPLES, n): turn
            for k, turns in enumerate(script.turns)
            for n, turn in enumerate(turns)
        }

    async def generate(
        self, session: aiohttp.ClientSession, token_ids: Sequence[int], *, seed: int, **_: Any
    ) -> Completion:
        turn = self.turns[seed]
        sampling = {"max_new_tokens": len(turn), "temperature": 1.0, "ignore_eos": True, "stop": NEVER}
        body = {"input_ids": list(token_ids), "return_logprob": True, "sampling_params": sampling}
        url, headers = f"{self.engine.url}/generate", self.engine._headers
        async with session.post(url, json=body, headers=headers) as response:
            found = parse_completion(await response.text())
        assert len(found.token_ids) == len(turn)
        return replace(found, token_ids=turn)


class ScriptedLoop(TurnLoop):
    """The same with HuggingFace generate."""

    def __init__(self, *arguments: Any, script: Script) -> None:
        super().__init__(*arguments, most_new_tokens=MOST_TURN_TOKENS)
        self.script, self.done = script, Counter[int]()

    def _generate(self, asked: dict[int, protocol.Generate]) -> list[Completion]:
        if not asked:
            return []
        turns = [self.script.turns[number][self.done[number]] for number in asked]
        self.done.update(asked.keys())
        decode_together(self.model, [one.context_ids for one in asked.values()], [len(turn) for turn in turns])
        return [Completion(turn, (0.0,) * len(turn), "", "stop", "") for turn in turns]


def settings(work: Path) -> Config:
    overrides = {
        "run.out": work / "run",
        "model.path": TOY_POLICY,
        "retriever.corpus": work / "longer" / "corpus.jsonl",
        "retriever.index": work / "longer" / "index",
        "rollout.max_response_tokens": MOST_TURN_TOKENS + 1,
        "rollout.max_observation_tokens": OBSERVATION_TOKENS,
        "rollout.max_context_tokens": 1000,
    }
    return load_config(str(ROOT / "configs/quickstart.yaml"), [f"{name}={value}" for name, value in overrides.items()])


def bench(parsed: argparse.Namespace, work: Path) -> dict[str, Any]:
    small_model(work / "model")
    make_world(work / "world", seed=0)
    longer_passages(work / "world", work / "longer")
    config = settings(work)
    corpus = (work / "world" / "corpus.jsonl").read_text()
    words = sorted({word for word in corpus.split() if word.isalpha()})
    rows = []
    with (
        cpu_engine(work / "model", work / "engine.log", max_running=max(parsed.together)) as engine,
        contextlib.ExitStack() as stack,
    ):
        retriever = start_retriever(config, log_dir=work, stack=stack)
        engine.wait_until_ready(timeout_s=300)
        tokenizer = load_tokenizer(TOY_POLICY, config.prompt)
        hf = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
        for together in parsed.together:
            seconds: dict[str, list[float]] = {"ours": [], "HuggingFace loop": [], "the engine alone": []}
            idle, lengths = [], []
            for repeat in range(parsed.repeats + 1):
                number = 1000 * together + repeat
                ours, theirs = (
                    Script(tokenizer, words, together=together, number=number, reader=reader)
                    for reader in ("ours", "theirs")
                )
                assert ours.tokens == theirs.tokens
                client = make_retriever_client(config, retriever)
                sampler = Sampler(
                    fleet=Fleet([ScriptedEngine(engine, ours, seed=repeat)]),
                    retriever=client,
                    tokenizer=tokenizer,
                    rollout=config.rollout,
                    prompt=config.prompt,
                )
                engine.flush_cache()
                busy_s = computing_seconds(engine)
                started = time.perf_counter()
                groups = sampler.sample(Rollouts(ours.starts, SAMPLES), temperature=1.0, seed=repeat)
                ours_s = time.perf_counter() - started
                busy_s = computing_seconds(engine) - busy_s
                trajectories = [t for group in groups for t in group.trajectories]
                assert sum(t.num_policy_tokens for t in trajectories) == ours.tokens
                assert all(t.status == "answered" for t in trajectories)
                engine.flush_cache()
                started = time.perf_counter()
                replayed = asyncio.run(replay(engine, trajectories))
                raw_s = time.perf_counter() - started
                assert replayed.tokens == ours.tokens
                with stopped(engine):
                    loop = ScriptedLoop(hf, config, client, script=theirs)
                    started = time.perf_counter()
                    found = loop.run([start.prompt_ids for start in theirs.starts for _ in range(SAMPLES)])
                    loop_s = time.perf_counter() - started
                assert sum(t.num_policy_tokens for t in found) == ours.tokens
                if repeat:
                    for name, taken in zip(seconds, (ours_s, loop_s, raw_s), strict=True):
                        seconds[name].append(taken)
                    idle.append(1 - busy_s / ours_s)
                    lengths += [len(t.prompt_ids) + len(t.response_ids) for t in trajectories]
            row: dict[str, Any] = {"trajectories": together, "tokens of a trajectory": round(statistics.mean(lengths))}
            for name, taken_s in seconds.items():
                row[f"trajectories/s, {name}"] = round(together / statistics.median(taken_s), 2)
            row["engine idle, share of the time of ours"] = round(statistics.median(idle), 2)
            row["ours over HuggingFace loop"] = median_ratio(seconds["HuggingFace loop"], seconds["ours"])
            row["ours over the engine alone"] = median_ratio(seconds["the engine alone"], seconds["ours"])
            rows.append(row)
            print(f"{together} trajectories: " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return {"task": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", type=int, nargs="+", default=[64, 128], help="trajectories at once")
    parser.add_argument("--repeats", type=int, default=3, help="after one that does not count")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = bench(parsed, Path(folder))
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
