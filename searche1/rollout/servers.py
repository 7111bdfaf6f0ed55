"""The servers of a run and what drives them: SGLang engines, the retriever, and samplers. On rank 0 only."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from searche1.config import Config, RolloutConfig
from searche1.prompts import encode_prompt, student_prompt
from searche1.retrieval.client import RetrieverClient
from searche1.retrieval.server import launch_retriever
from searche1.rollout.engine import Engine, start_engine
from searche1.rollout.sampler import Sampler
from searche1.types import Question


@dataclass(frozen=True)
class Servers:
    """Everything that answers. `student` samples under the run's caps, `teacher` leaves room for a reference."""

    engines: tuple[Engine, ...]
    student: Sampler
    teacher: Sampler
    tokenizer: Any
    config: Config

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a user message."""
        return encode_prompt(text, self.tokenizer)

    def student_prompt(self, question: Question) -> tuple[int, ...]:
        """P_S(q) of Eq. 3 as token ids."""
        return self.encode(student_prompt(question.text, self.config.prompt))

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], *, version: str) -> None:
        """Put HuggingFace-named tensors into every engine."""
        groups = buckets(weights, self.config.engine.sync_bucket_mb << 20)
        if len(self.engines) == 1:
            self.engines[0].load_weights(groups, version=version)
            return
        kept = list(groups)  # several engines read the same tensors
        for engine in self.engines:
            engine.load_weights(kept, version=version)


def start_servers(
    config: Config,
    *,
    model_path: Path,
    device: str,
    dtype: str,
    log_dir: Path,
    stack: contextlib.ExitStack,
    tell: Callable[[str], None],
) -> Servers:
    """Start engines and retriever together and wait for all; `stack` stops them. Raises UserError."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    started = time.monotonic()
    tell(f"starting {config.engine.count or 1} SGLang engine(s) and the retriever, logs in {log_dir}")
    engines = []
    for number in range(config.engine.count or 1):
        engine = start_engine(
            model_path=model_path,
            device=f"cuda:{number * config.engine.tensor}" if device == "cuda" else device,
            dtype=dtype,
            tensor=config.engine.tensor,
            port=config.engine.port + number if config.engine.port else 0,
            seed=config.run.seed + number,
            mem_fraction=config.engine.mem_fraction,
            max_total_tokens=config.engine.max_total_tokens,
            max_running=config.engine.max_running,
            context_length=longest_context(config) + config.rollout.max_response_tokens,
            attention_backend=config.engine.attention_backend,
            sampling_backend=config.engine.sampling_backend,
            cuda_graph=config.engine.cuda_graph,
            log_path=log_dir / f"engine{number}.log",
            request_timeout_s=config.engine.request_timeout_s,
        )
        stack.callback(engine.stop)
        engines.append(engine)
    url = config.retriever.url
    if not url:  # it starts while the engines load
        server = launch_retriever(
            corpus=config.retriever.corpus,
            index=config.retriever.index,
            topk=config.retriever.topk,
            port=config.retriever.port,
            log_path=log_dir / "retriever.log",
            device=config.retriever.device,
            encoder=config.retriever.encoder,
            style=config.retriever.style,
            threads=config.retriever.threads,
            start_timeout_s=config.engine.start_timeout_s,
        )
        stack.callback(server.stop)
        url = server.url
    check_retriever(url, config)
    for engine in engines:
        engine.wait_until_ready(timeout_s=config.engine.start_timeout_s)
    tell(f"retriever and {len(engines)} SGLang engine(s) ready ({time.monotonic() - started:.0f} s)")
    retriever = RetrieverClient(
        url=url, topk=config.retriever.topk, timeout_s=config.retriever.timeout_s, retries=config.retriever.retries
    )

    def sampler(rollout: RolloutConfig) -> Sampler:
        return Sampler(engines=engines, retriever=retriever, tokenizer=tokenizer, rollout=rollout, prompt=config.prompt)

    longest = longest_context(config)
    return Servers(
        engines=tuple(engines),
        student=sampler(config.rollout),
        # The teacher's prompt holds a whole trajectory: the student's caps would cut it.
        teacher=sampler(replace(config.rollout, max_start_tokens=longest, max_context_tokens=longest)),
        tokenizer=tokenizer,
        config=config,
    )


def check_retriever(url: str, config: Config) -> None:
    """One search, with few tries: a retriever that is down should be told now, not after a rollout batch."""
    client = RetrieverClient(url=url, topk=config.retriever.topk, timeout_s=config.retriever.timeout_s, retries=2)

    async def search() -> None:
        async with client:
            await client.search("is anybody there?")

    asyncio.run(search())


def longest_context(config: Config) -> int:
    """Tokens an engine must take: a whole trajectory when a sync is probed, or a teacher prompt with one in it."""
    return max(config.rollout.max_start_tokens + config.rollout.max_context_tokens, config.opsd.max_teacher_tokens)


def buckets(weights: Iterator[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors in lists of about `bucket_bytes`, so that a sync never holds the whole model."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
