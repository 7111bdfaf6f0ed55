"""Many engines, one queue: nobody idles, nothing is lost, and groups stay together while that costs nothing.

Time is simulated: an event loop whose clock jumps to the next thing that happens.
"""

import asyncio
import contextlib
import math
import random
import selectors
from collections.abc import Iterator

import pytest
from char_tokenizer import CharTokenizer

from searche1.config import PromptConfig, RolloutConfig
from searche1.retrieval.client import Passage
from searche1.rollout.engine import EngineError, EngineLost
from searche1.rollout.fleet import Fleet, NoEngineLeft
from searche1.rollout.sampler import Rollouts, Sampler, turn_seed
from searche1.types import Completion, Group, Question, Trajectory

TOKENIZER = CharTokenizer()
SECONDS_PER_TOKEN = 0.02
QUESTIONS = [Question(id=str(k), text=f"{k}", answers=("b",), source="test") for k in range(512)]


class JumpingLoop(asyncio.SelectorEventLoop):
    """Sleeping takes no time: the clock is moved on instead."""

    def __init__(self) -> None:
        loop = self
        loop.now = 0.0

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None):
                loop.now += max(0.0, timeout or 0.0)
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now


class JumpingPolicy(asyncio.DefaultEventLoopPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.loops: list[JumpingLoop] = []

    def new_event_loop(self) -> JumpingLoop:
        self.loops.append(JumpingLoop())
        return self.loops[-1]


@pytest.fixture
def clock() -> Iterator[JumpingPolicy]:
    policy = JumpingPolicy()
    asyncio.set_event_loop_policy(policy)
    yield policy
    asyncio.set_event_loop_policy(None)


class SimulatedEngine:
    """Decodes up to `slots` requests together; a turn's length follows a log-normal law, drawn by its seed."""

    def __init__(self, *, slots: int = 32, dies_at: float = math.inf) -> None:
        self.slots = asyncio.Semaphore(slots)
        self.dies_at = dies_at
        self.is_alive = True
        self.busy_s = 0.0
        self.groups: set[str] = set()

    async def generate(self, session, token_ids, *, max_new_tokens, temperature, top_p, stop, seed) -> Completion:
        context = TOKENIZER.decode(token_ids, skip_special_tokens=False)
        self.groups.add(context.partition("?")[0])
        seconds = turn_seconds(seed)
        async with self.slots:
            now = asyncio.get_running_loop().time()
            if now + seconds > self.dies_at:
                await asyncio.sleep(max(0.0, self.dies_at - now))
                self.is_alive = False
                raise EngineLost("killed")
            await asyncio.sleep(seconds)
        self.busy_s += seconds
        num_searches = context.count("<information>")
        text = "<answer>b</answer>" if num_searches >= seed % 4 else "<search>q</search>"
        return Completion(tuple(map(ord, text)), (-1.0,) * len(text), text, "stop", "v1")


def turn_seconds(seed: int) -> float:
    return SECONDS_PER_TOKEN * min(500.0, random.Random(seed).lognormvariate(math.log(120), 0.8))


class Retriever:
    async def search(self, query: str) -> tuple[Passage, ...]:
        await asyncio.sleep(0.1)
        return (Passage(id="0", contents='"T"\ntext', score=1.0),)

    async def close(self) -> None: ...


def sampler_of(engines: list[SimulatedEngine], **rollout) -> Sampler:
    return Sampler(
        fleet=Fleet(engines),
        retriever=Retriever(),
        tokenizer=TOKENIZER,
        rollout=RolloutConfig(**rollout),
        prompt=PromptConfig(user="{question}"),
    )


def run(sampler: Sampler, questions: list[Question], samples: int) -> list[Group]:
    return sampler.sample(Rollouts(sampler.starts(questions), samples), temperature=1.0, seed=0)


def longest_chain_s(groups: list[Group]) -> float:
    """The longest trajectory's turns, one after another."""
    return max(
        sum(turn_seconds(turn_seed(0, group.question, sample, turn)) for turn in range(num_turns(trajectory)))
        for group in groups
        for sample, trajectory in enumerate(group.trajectories)
    )


def num_turns(trajectory: Trajectory) -> int:
    return sum(span.author == "policy" for span in trajectory.spans)


def test_2560_trajectories_on_16_engines_take_little_longer_than_they_must(clock):
    """No schedule can be faster than all engines busy all the time, nor than the longest trajectory."""
    engines = [SimulatedEngine(slots=256) for _ in range(16)]  # SGLang's limit here: engine.max_running
    groups = run(sampler_of(engines), QUESTIONS, 5)
    assert len(groups) == 512 and all(len(group.trajectories) == 5 for group in groups)
    least = max(sum(engine.busy_s for engine in engines) / (16 * 256), longest_chain_s(groups))
    assert clock.loops[-1].now < 1.1 * least


def test_16_small_engines_are_as_fast_as_one_of_their_size(clock):
    """Five times more trajectories than can be decoded at once: engines queue, and none idles meanwhile."""
    many = run(sampler_of([SimulatedEngine(slots=32) for _ in range(16)]), QUESTIONS, 5)
    one = run(sampler_of([SimulatedEngine(slots=16 * 32)], max_in_flight=16 * 512), QUESTIONS, 5)
    assert many == one
    spread, together = (loop.now for loop in clock.loops)
    assert spread < 1.05 * together


def test_most_groups_stay_on_one_engine(clock):
    engines = [SimulatedEngine() for _ in range(16)]
    run(sampler_of(engines), QUESTIONS, 5)
    homes = {question.text: sum(question.text in engine.groups for engine in engines) for question in QUESTIONS}
    assert sum(count == 1 for count in homes.values()) > 0.8 * len(homes)


def test_an_engine_that_dies_loses_no_group_and_changes_no_trajectory(clock):
    whole = run(sampler_of([SimulatedEngine() for _ in range(4)]), QUESTIONS[:64], 5)
    engines = [SimulatedEngine(), SimulatedEngine(dies_at=4.0), SimulatedEngine(), SimulatedEngine(dies_at=9.0)]
    sampler = sampler_of(engines)
    assert run(sampler, QUESTIONS[:64], 5) == whole
    assert sorted(sampler.fleet.lost) == [1, 3] and sampler.fleet.alive == [0, 2]


def test_what_was_sampled_survives_the_last_engine(clock):
    whole = run(sampler_of([SimulatedEngine()]), QUESTIONS[:16], 5)
    sampler = sampler_of([SimulatedEngine(dies_at=6.0)])
    rollouts = Rollouts(sampler.starts(QUESTIONS[:16]), 5)
    with pytest.raises(NoEngineLeft, match="killed"):
        sampler.sample(rollouts, temperature=1.0, seed=0)
    done = dict(rollouts.trajectories)
    assert 0 < len(done) < 80 and any(state.spans for state in rollouts.states.values())
    again = sampler_of([SimulatedEngine()])
    assert again.sample(rollouts, temperature=1.0, seed=0) == whole
    assert all(rollouts.trajectories[place] is trajectory for place, trajectory in done.items())


def test_a_refusal_is_a_fault_of_its_trajectory_and_not_of_the_engine(clock):
    class Picky(SimulatedEngine):
        async def generate(self, session, token_ids, **options):
            if token_ids[0] == ord("7"):
                raise EngineError("HTTP status 400")
            return await super().generate(session, token_ids, **options)

    sampler = sampler_of([Picky()], max_errors=0.5)
    groups = run(sampler, QUESTIONS[6:9], 2)
    assert [[t.status == "error" for t in group.trajectories] for group in groups] == [
        [False] * 2,
        [True] * 2,
        [False] * 2,
    ]
    assert not sampler.fleet.lost


def test_owners_stay_at_home_until_it_is_much_busier_than_another():
    fleet = Fleet(["a", "b"])
    with contextlib.ExitStack() as stack:

        def request(owner: str) -> str:
            return stack.enter_context(fleet.engine_for(owner, 0))[1]

        assert [request("x"), request("y")] == ["a", "b"]
        assert [request("x") for _ in range(5)] == ["a"] * 5  # four more than the other are nothing
        assert [request("x") for _ in range(3)] == ["b"] * 3  # the sixth moves, and its home with it
        fleet.lost[1] = "gone"
        assert request("x") == request("z") == "a"
        fleet.lost[0] = "gone too"
        with pytest.raises(NoEngineLeft, match="gone too"):
            request("x")
