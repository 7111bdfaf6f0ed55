"""Many trajectories at once: engines and the retriever driven from one event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import aiohttp

from searche1.config import PromptConfig, RolloutConfig
from searche1.prompts import Passage, Tokenizer, encode_prompt, student_prompt
from searche1.retrieval.client import RetrieverError
from searche1.rewards import em_reward
from searche1.rollout import protocol
from searche1.rollout.engine import EngineError
from searche1.tags import STOP_STRINGS
from searche1.types import Completion, Group, Question, Span, Trajectory, UserError

T = TypeVar("T")
Progress = Callable[[int, int, float], None]  # trajectories done, in all, mean reward of those done


class TextEngine(Protocol):
    """The part of `Engine` that is used."""

    async def generate(
        self,
        session: aiohttp.ClientSession,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
        seed: int,
    ) -> Completion: ...


class Retriever(Protocol):
    """The part of `RetrieverClient` that is used."""

    async def search(self, query: str) -> Sequence[Passage]: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class Start:
    """Where trajectories of a question begin: at a prompt, or after `spans` that end with an observation."""

    question: Question
    prompt_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()


class Sampler:
    """Samples groups of trajectories. A question's group stays on one engine, for its prefix cache."""

    def __init__(
        self,
        *,
        engines: Sequence[TextEngine],
        retriever: Retriever,
        tokenizer: Tokenizer,
        rollout: RolloutConfig,
        prompt: PromptConfig,
    ) -> None:
        assert engines
        self.engines = engines
        self.retriever = retriever
        self.tokenizer = tokenizer
        self.rollout = rollout
        self.prompt = prompt

    def groups(
        self,
        questions: Sequence[Question],
        *,
        samples: int,
        temperature: float,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Group]:
        """`samples` trajectories of each question under the student prompt. See `sample`."""
        starts = [
            Start(question, encode_prompt(student_prompt(question.text, self.prompt), self.tokenizer))
            for question in questions
        ]
        return self.sample(starts, samples=samples, temperature=temperature, seed=seed, progress=progress)

    def sample(
        self,
        starts: Sequence[Start],
        *,
        samples: int,
        temperature: float,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Group]:
        """One group a start, in order, with EM rewards; temperature 0 is greedy.

        A fault of an engine or the retriever makes its trajectory's status "error": it stays in the group for the
        caller to leave out. Raises UserError when more than `rollout.max_errors` of all are such. The same seed gives
        the same draws to the same question, sample and turn; starts of one question share them.
        """
        assert samples > 0
        return asyncio.run(self._sample(starts, samples, temperature, seed, progress))

    async def _sample(
        self, starts: Sequence[Start], samples: int, temperature: float, seed: int, progress: Progress | None
    ) -> list[Group]:
        tally = _Tally(total=len(starts) * samples, max_errors=self.rollout.max_errors, progress=progress)
        engines = _LeastLoaded(self.engines)
        results: dict[tuple[int, int], tuple[Trajectory, float]] = {}

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def roll_out(place: tuple[int, int]) -> None:
                i, sample = place
                state = protocol.start(starts[i].prompt_ids, starts[i].spans, rollout=self.rollout)
                draw = partial(turn_seed, seed, starts[i].question, sample)
                with engines.engine_for(i) as engine:
                    trajectory = await self._trajectory(engine, session, state, temperature, draw)
                results[place] = (trajectory, em_reward(trajectory, starts[i].question))
                tally.add(*results[place])

            try:
                places = ((i, sample) for i in range(len(starts)) for sample in range(samples))
                await run_all(roll_out, places, at_once=min(self.rollout.max_in_flight, tally.total))
            finally:
                await self.retriever.close()  # its connections belong to this event loop

        groups = []
        for i, start in enumerate(starts):
            trajectories, rewards = zip(*(results[i, sample] for sample in range(samples)), strict=True)
            groups.append(Group(start.question, trajectories, rewards))
        return groups

    async def _trajectory(
        self,
        engine: TextEngine,
        session: aiohttp.ClientSession,
        state: protocol.State,
        temperature: float,
        draw: Callable[[int], int],
    ) -> Trajectory:
        rollout, prompt, tokenizer = self.rollout, self.prompt, self.tokenizer
        try:
            while True:
                match protocol.next_step(state, rollout=rollout, tokenizer=tokenizer):
                    case Trajectory() as trajectory:
                        return trajectory
                    case protocol.Search(query):
                        passages = await self.retriever.search(query)
                        state = protocol.add_passages(
                            state, passages, rollout=rollout, prompt=prompt, tokenizer=tokenizer
                        )
                    case protocol.Generate(context_ids, max_new_tokens):
                        completion = await engine.generate(
                            session,
                            context_ids,
                            max_new_tokens=max_new_tokens,
                            temperature=temperature,
                            top_p=rollout.top_p,
                            stop=STOP_STRINGS,
                            seed=draw(state.num_turns),
                        )
                        state = protocol.add_completion(
                            state, completion, rollout=rollout, prompt=prompt, tokenizer=tokenizer
                        )
        except (EngineError, RetrieverError) as error:  # anything else is a bug and stops the run
            return protocol.fail(state, str(error))


async def run_all(work: Callable[[T], Awaitable[None]], items: Iterator[T], *, at_once: int) -> None:
    """Does `work` on every item, `at_once` together. The first exception cancels the rest and is raised."""

    async def worker() -> None:
        for item in items:  # shared: each worker takes the next
            await work(item)

    workers = [asyncio.create_task(worker()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def turn_seed(seed: int, question: Question, sample: int, turn: int) -> int:
    """The seed of one turn's draws: the same whatever else is sampled. Below 2**31."""
    digest = hashlib.blake2b(f"{seed}/{question.key}/{sample}/{turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class _LeastLoaded:
    """Gives a group the engine with the fewest trajectories under way, when its first one starts."""

    def __init__(self, engines: Sequence[TextEngine]) -> None:
        self._engines = engines
        self._loads = [0] * len(engines)
        self._chosen: dict[int, int] = {}

    @contextmanager
    def engine_for(self, group: int) -> Iterator[TextEngine]:
        """The group's engine, counted as busy meanwhile."""
        if group not in self._chosen:
            self._chosen[group] = self._loads.index(min(self._loads))
        chosen = self._chosen[group]
        self._loads[chosen] += 1
        try:
            yield self._engines[chosen]
        finally:
            self._loads[chosen] -= 1


class _Tally:
    """Counts what is done, tells `progress`, and stops the run when too much failed."""

    def __init__(self, *, total: int, max_errors: float, progress: Progress | None) -> None:
        self.total = total
        self._max_errors = max_errors
        self._progress = progress
        self._num_done = 0
        self._num_errors = 0
        self._first_error = ""
        self._reward = 0.0

    def add(self, trajectory: Trajectory, reward: float) -> None:
        self._num_done += 1
        self._reward += reward
        if trajectory.status == "error":
            self._num_errors += 1
            self._first_error = self._first_error or trajectory.error
        if self._num_errors > self._max_errors * self.total:
            raise UserError(
                f"{self._num_errors} of {self.total} trajectories failed, more than rollout.max_errors "
                f"({self._max_errors:g}) allows; mend the engine or the retriever. The first fault: {self._first_error}"
            )
        if self._progress is not None:
            self._progress(self._num_done, self.total, self._reward / max(1, self._num_done - self._num_errors))
