"""Many trajectories at once: engines and the retriever driven from one event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import aiohttp

from searche1.config import PromptConfig, RolloutConfig
from searche1.prompts import Passage, Tokenizer, encode_prompt, student_prompt
from searche1.retrieval.client import RetrieverError
from searche1.rewards import em_reward
from searche1.rollout import protocol
from searche1.rollout.engine import EngineError, EngineLost, http_session
from searche1.rollout.fleet import Fleet
from searche1.tags import STOP_STRINGS
from searche1.types import Completion, Group, Question, Span, Trajectory, UserError

TICK_S = 1.0

T = TypeVar("T")
Place = tuple[int, int]  # number of the start, number of the sample of it
Progress = Callable[[int, int, float], None]  # trajectories done, in all, mean reward of those done
Take = Callable[[Place, Trajectory], None]


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


@dataclass
class Rollouts:
    """Trajectories under way: which are done, and how far the others are. They outlive the engines they began on."""

    starts: Sequence[Start]
    samples: int  # trajectories of each start
    take: Take | None = None  # gets what is done, which is not kept here then: it may be more than memory holds
    note: Take | None = None  # is told of what is done, which stays here
    rewards: dict[Place, float | None] = field(default_factory=dict)  # of those done; None where a fault ended it
    faults: dict[Place, str] = field(default_factory=dict)  # which it was
    trajectories: dict[Place, Trajectory] = field(default_factory=dict)
    states: dict[Place, protocol.State] = field(default_factory=dict)

    def finish(self, place: Place, trajectory: Trajectory) -> float | None:
        """Scores it, and keeps it or hands it on; returns its reward, None for a fault."""
        is_fault = trajectory.status == "error"
        reward = None if is_fault else em_reward(trajectory, self.starts[place[0]].question)
        if self.note is not None:
            self.note(place, trajectory)
        if self.take is not None:
            self.take(place, trajectory)
        else:
            self.trajectories[place] = trajectory
        self.rewards[place] = reward
        if is_fault:
            self.faults[place] = trajectory.error
        self.states.pop(place, None)
        return reward

    def left(self) -> list[Place]:
        """Trajectories that are not done, group by group."""
        places = ((i, sample) for i in range(len(self.starts)) for sample in range(self.samples))
        return [place for place in places if place not in self.rewards]

    def groups(self) -> list[Group]:
        """All of them, in order, once they are done."""
        assert self.take is None, "what was handed on is not here"
        groups = []
        for i, start in enumerate(self.starts):
            places = [(i, sample) for sample in range(self.samples)]
            trajectories = tuple(self.trajectories[place] for place in places)
            groups.append(Group(start.question, trajectories, tuple(self.rewards[place] or 0.0 for place in places)))
        return groups


class Sampler:
    """Samples groups of trajectories on all engines of a fleet."""

    def __init__(
        self,
        *,
        fleet: Fleet[TextEngine],
        retriever: Retriever,
        tokenizer: Tokenizer,
        rollout: RolloutConfig,
        prompt: PromptConfig,
    ) -> None:
        self.fleet = fleet
        self.retriever = retriever
        self.tokenizer = tokenizer
        self.rollout = rollout
        self.prompt = prompt

    def starts(self, questions: Sequence[Question]) -> list[Start]:
        """The student prompt of each question."""
        return [
            Start(question, encode_prompt(student_prompt(question.text, self.prompt), self.tokenizer))
            for question in questions
        ]

    def sample(
        self,
        rollouts: Rollouts,
        *,
        temperature: float,
        seed: int,
        progress: Progress | None = None,
        tick: Callable[[], None] | None = None,
    ) -> list[Group]:
        """One group a start, in order, with EM rewards; none where `rollouts` hand on what is done.

        Temperature 0 is greedy. `tick` is called every second, and what it raises ends the sampling.

        A fault of an engine or the retriever makes its trajectory's status "error": it stays in the group for the
        caller to leave out. Raises UserError when more than `rollout.max_errors` of all are such. An engine that stops
        answering is lost, and others take over its turns; raises NoEngineLeft when it was the last one, and the same
        `rollouts` may go on with new engines. The same seed gives the same draws to the same question, sample and
        turn; starts of one question share them.
        """
        assert rollouts.samples > 0
        work = self._sample(rollouts, temperature, seed, progress)
        asyncio.run(work if tick is None else ticking(work, tick))
        return rollouts.groups() if rollouts.take is None else []

    async def _sample(self, rollouts: Rollouts, temperature: float, seed: int, progress: Progress | None) -> None:
        tally = _Tally(
            total=len(rollouts.starts) * rollouts.samples, max_errors=self.rollout.max_errors, progress=progress
        )
        for place, reward in rollouts.rewards.items():
            tally.count(reward, rollouts.faults.get(place, ""))
        async with http_session() as session:

            async def roll_out(place: Place) -> None:
                start = rollouts.starts[place[0]]
                draw = partial(turn_seed, seed, start.question, place[1])
                trajectory = await self._trajectory(session, rollouts, place, temperature, draw)
                tally.add(rollouts.finish(place, trajectory), trajectory.error)

            left = rollouts.left()
            at_once = min(self.rollout.max_in_flight * len(self.fleet.engines), len(left))
            self.fleet.forget()
            try:
                await run_all(roll_out, iter(left), at_once=at_once)
            finally:
                await self.retriever.close()  # its connections belong to this event loop

    async def _trajectory(
        self,
        session: aiohttp.ClientSession,
        rollouts: Rollouts,
        place: Place,
        temperature: float,
        draw: Callable[[int], int],
    ) -> Trajectory:
        rollout, prompt, tokenizer = self.rollout, self.prompt, self.tokenizer
        start = rollouts.starts[place[0]]
        state = rollouts.states.get(place) or protocol.start(start.prompt_ids, start.spans, rollout=rollout)
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
                        completion = await self._complete(
                            place,
                            session,
                            context_ids,
                            max_new_tokens=max_new_tokens,
                            temperature=temperature,
                            seed=draw(state.num_turns),
                        )
                        state = protocol.add_completion(
                            state, completion, rollout=rollout, prompt=prompt, tokenizer=tokenizer
                        )
                rollouts.states[place] = state
        except (EngineError, RetrieverError) as error:  # anything else is a bug and stops the run
            return protocol.fail(state, str(error))

    async def _complete(
        self,
        place: Place,
        session: aiohttp.ClientSession,
        context_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> Completion:
        """One turn, on an engine that answers. Raises NoEngineLeft, or EngineError for a request that is refused."""
        while True:
            with self.fleet.engine_for(*place) as (number, engine):
                try:
                    return await engine.generate(
                        session,
                        context_ids,
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        top_p=self.rollout.top_p,
                        stop=STOP_STRINGS,
                        seed=seed,
                    )
                except EngineLost as error:
                    self.fleet.lost[number] = str(error)


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


async def ticking(work: Awaitable[None], tick: Callable[[], None]) -> None:
    """Waits for `work`, and calls `tick` every second meanwhile; what that raises ends the work."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            tick()
            await asyncio.wait({task}, timeout=TICK_S)
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def turn_seed(seed: int, question: Question, sample: int, turn: int) -> int:
    """The seed of one turn's draws: the same whatever else is sampled. Below 2**31."""
    digest = hashlib.blake2b(f"{seed}/{question.key}/{sample}/{turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


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

    def add(self, reward: float | None, error: str) -> None:
        """Counts one that is done, and tells."""
        self.count(reward, error)
        if self._progress is not None:
            self._progress(self._num_done, self.total, self._reward / max(1, self._num_done - self._num_errors))

    def count(self, reward: float | None, error: str) -> None:
        self._num_done += 1
        self._reward += reward or 0.0
        if reward is None:
            self._num_errors += 1
            self._first_error = self._first_error or error
        if self._num_errors > self._max_errors * self.total:
            raise UserError(
                f"{self._num_errors} of {self.total} trajectories failed, more than rollout.max_errors "
                f"({self._max_errors:g}) allows; mend the engine or the retriever. The first fault: {self._first_error}"
            )
