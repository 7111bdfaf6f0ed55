"""The servers of a run and what drives them: SGLang engines on all nodes, the retriever, and samplers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from searche1.config import Config, RolloutConfig
from searche1.prompts import encode_prompt, student_prompt
from searche1.retrieval.client import RetrieverClient
from searche1.retrieval.launch import launch_retriever
from searche1.retrieval.token import read_token
from searche1.rollout.engine import Engine, start_engine
from searche1.rollout.fleet import Fleet
from searche1.rollout.places import EnginePlace
from searche1.rollout.sampler import Sampler
from searche1.types import Question, UserError


@dataclass(frozen=True)
class Servers:
    """What rank 0 drives. `student` samples under the run's caps, `teacher` leaves room for a reference."""

    fleet: Fleet[Engine]
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


def make_servers(config: Config, engines: Sequence[Engine], *, retriever_url: str, model_path: Path) -> Servers:
    """Samplers over engines and a retriever that are ready."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    fleet = Fleet(engines)
    retriever = make_retriever_client(config, retriever_url)

    def sampler(rollout: RolloutConfig) -> Sampler:
        return Sampler(fleet=fleet, retriever=retriever, tokenizer=tokenizer, rollout=rollout, prompt=config.prompt)

    longest = longest_context(config)
    return Servers(
        fleet=fleet,
        student=sampler(config.rollout),
        # The teacher's prompt holds a whole trajectory: the student's caps would cut it.
        teacher=sampler(replace(config.rollout, max_start_tokens=longest, max_context_tokens=longest)),
        tokenizer=tokenizer,
        config=config,
    )


def start_engine_at(
    place: EnginePlace,
    config: Config,
    *,
    model_path: Path,
    dtype: str,
    context_length: int,
    log_dir: Path,
    host: str,
    can_sleep: bool,
) -> Engine:
    """Start one engine on this node and return at once. Raises UserError."""
    return start_engine(
        model_path=model_path,
        device=place.device,
        dtype=dtype,
        tensor=config.engine.tensor,
        port=config.engine.port + place.number if config.engine.port else 0,
        seed=config.run.seed + place.number,
        mem_fraction=config.engine.mem_fraction,
        max_total_tokens=config.engine.max_total_tokens,
        max_running=config.engine.max_running,
        context_length=context_length,
        attention_backend=config.engine.attention_backend,
        sampling_backend=config.engine.sampling_backend,
        cuda_graph=config.engine.cuda_graph,
        log_path=log_dir / f"engine{place.number}.log",
        request_timeout_s=config.engine.request_timeout_s,
        host=host,
        can_sleep=can_sleep,
    )


def start_retriever(config: Config, *, log_dir: Path, stack: contextlib.ExitStack) -> str:
    """The address of the retriever: the one that is given, or one that `stack` stops. Raises UserError."""
    settings = config.retriever
    url = settings.url
    if not url:
        server = launch_retriever(
            corpus=settings.corpus,
            index=settings.index,
            topk=settings.topk,
            port=settings.port,
            log_path=log_dir / "retriever.log",
            device=settings.device,
            encoder=settings.encoder,
            style=settings.style,
            threads=settings.threads,
            start_timeout_s=config.engine.start_timeout_s,
        )
        stack.callback(server.stop)
        url = server.url
    check_retriever(url, config)
    return url


def make_retriever_client(config: Config, url: str) -> RetrieverClient:
    """A client with the run's patience."""
    return RetrieverClient(
        url=url,
        topk=config.retriever.topk,
        timeout_s=config.retriever.timeout_s,
        retries=config.retriever.retries,
        deadline_s=config.retriever.deadline_s,
        token=retriever_token(config),
    )


def check_retriever(url: str, config: Config) -> None:
    """One search, with few tries: a retriever that is down should be told now, not after a rollout batch."""
    client = RetrieverClient(
        url=url,
        topk=config.retriever.topk,
        timeout_s=config.retriever.timeout_s,
        retries=2,
        token=retriever_token(config),
    )

    async def search() -> None:
        async with client:
            await client.search("is anybody there?")

    asyncio.run(search())


def retriever_token(config: Config) -> str:
    """The token of a retriever elsewhere, "" for none. Raises UserError."""
    return read_token(Path(config.retriever.token_file)) if config.retriever.token_file else ""


def engine_key(config: Config) -> str:
    """The API key of engines elsewhere, "" for none. Raises UserError."""
    file = config.engine.token_file
    if not file:
        return ""
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"engine.token_file={file} cannot be read ({error}); it holds the --api-key of the servers in engine.urls"
        ) from error
    if not key.isascii() or not key.isprintable():
        raise UserError(
            f"engine.token_file={file} holds more than a key; it has one line, the --api-key of the servers in "
            "engine.urls, in ASCII"
        )
    return key


def longest_context(config: Config) -> int:
    """Tokens an engine must take: a whole trajectory when a sync is probed, or a teacher prompt with one in it."""
    return max(config.rollout.max_start_tokens + config.rollout.max_context_tokens, config.opsd.max_teacher_tokens)
