"""How close the rollout driver comes to the shortest possible time, on engines that sleep instead of computing.

    python tools/bench/driver.py                       512 questions x 5 trajectories, 16 engines
    python tools/bench/driver.py --slots 32            engines that decode 32 requests at once: most of them queue

Small HTTP servers answer SGLang's /generate after the time that their tokens would take; turns have log-normal
lengths. No schedule is shorter than the longest trajectory, nor than all work spread evenly over all engines. Beside
ours runs the usual one, in which every group stays on its engine. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import random
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from aiohttp import web

from searche1.config import PromptConfig, RolloutConfig
from searche1.retrieval.client import Passage
from searche1.rollout.engine import Engine
from searche1.rollout.fleet import Fleet
from searche1.rollout.sampler import Rollouts, Sampler, turn_seed
from searche1.types import Question

MEDIAN_TOKENS, SIGMA, MOST_TOKENS = 120, 0.8, 500  # of a turn
MOST_SEARCHES = 3  # 0 to this many, drawn for each trajectory
SEARCH_S = 0.1


class Letters:
    """A tokenizer of one id a letter."""

    chat_template = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(map(chr, ids))


def turn_tokens(seed: int) -> float:
    return min(MOST_TOKENS, random.Random(seed).lognormvariate(math.log(MEDIAN_TOKENS), SIGMA))


class StaysAtHome(Fleet[Engine]):
    """Every group stays on its first engine, whatever the others do."""

    def _is_much_busier(self, one: int, other: int) -> bool:
        return False


class InstantRetriever:
    async def search(self, query: str) -> tuple[Passage, ...]:
        await asyncio.sleep(SEARCH_S)
        return (Passage(id="0", contents='"T"\ntext', score=1.0),)

    async def close(self) -> None: ...


def serve(count: int, slots: int, seconds_per_token: float, ready: Connection) -> None:
    """`count` servers on free ports of this process; the ports go through `ready`."""

    async def run() -> None:
        ports = []
        for _ in range(count):
            free = asyncio.Semaphore(slots)

            async def generate(request: web.Request, free: asyncio.Semaphore = free) -> web.Response:
                asked = await request.json()
                seed = asked["sampling_params"]["sampling_seed"]
                async with free:
                    await asyncio.sleep(seconds_per_token * turn_tokens(seed))
                text = "".join(map(chr, asked["input_ids"]))
                is_last = text.count("<information>") >= seed % (MOST_SEARCHES + 1)
                answer = "<answer>b</answer>" if is_last else "<search>q</search>"
                return web.json_response(
                    {
                        "text": answer,
                        "meta_info": {
                            "finish_reason": {"type": "stop"},
                            "output_token_logprobs": [[-1.0, ord(letter), None] for letter in answer],
                            "weight_version": "1",
                        },
                    }
                )

            application = web.Application()
            application.router.add_post("/generate", generate)
            runner = web.AppRunner(application)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
            await site.start()
            ports.append(runner.addresses[0][1])
        ready.send(ports)
        await asyncio.Event().wait()

    asyncio.run(run())


def measure(
    fleet: Fleet[Engine], questions: list[Question], samples: int, *, in_flight: int
) -> tuple[float, list[float]]:
    """Seconds of one rollout, and the tokens of each of its trajectories."""
    sampler = Sampler(
        fleet=fleet,
        retriever=InstantRetriever(),
        tokenizer=Letters(),
        rollout=RolloutConfig(max_in_flight=in_flight, max_start_tokens=2048, max_context_tokens=100_000),
        prompt=PromptConfig(user="{question}"),
    )
    started = time.monotonic()
    groups = sampler.sample(Rollouts(sampler.starts(questions), samples), temperature=1.0, seed=0)
    seconds = time.monotonic() - started
    assert all(t.status == "answered" for group in groups for t in group.trajectories)
    tokens = [
        sum(turn_tokens(turn_seed(0, group.question, k, turn)) for turn in range(t.num_searches + 1))
        for group in groups
        for k, t in enumerate(group.trajectories)
    ]
    return seconds, tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=16)
    parser.add_argument("--slots", type=int, default=256, help="requests that an engine decodes together")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--in-flight", type=int, default=512, help="rollout.max_in_flight")
    parser.add_argument("--ms-per-token", type=float, default=20.0)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parsed = parser.parse_args()
    if min(parsed.engines, parsed.slots, parsed.questions, parsed.samples, parsed.in_flight, parsed.ms_per_token) <= 0:
        parser.error("every number must be more than 0")
    ours, theirs = multiprocessing.Pipe()
    servers = multiprocessing.Process(
        target=serve, args=(parsed.engines, parsed.slots, parsed.ms_per_token / 1e3, theirs), daemon=True
    )
    servers.start()
    engines = [Engine(url=f"http://127.0.0.1:{port}") for port in ours.recv()]
    questions = [Question(id=str(k), text=f"{k}", answers=("b",), source="bench") for k in range(parsed.questions)]
    rows = []
    for name, fleet in (("least busy", Fleet(engines)), ("stays at home", StaysAtHome(engines))):
        seconds, tokens = measure(fleet, questions, parsed.samples, in_flight=parsed.in_flight)
        per_token = parsed.ms_per_token / 1e3
        bound = per_token * max(max(tokens), sum(tokens) / (parsed.engines * parsed.slots))
        rows.append(
            {"schedule": name, "seconds": round(seconds, 2), "bound_s": round(bound, 2), "ratio": seconds / bound}
        )
        print(
            f"{name:15s} {seconds:7.1f} s   shortest possible {bound:6.1f} s   ratio {seconds / bound:.3f}", flush=True
        )
    servers.terminate()
    result = {name: value for name, value in vars(parsed).items() if name != "out"} | {"rows": rows}
    if parsed.out:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
