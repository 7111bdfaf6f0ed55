import asyncio
from collections.abc import Callable

import pytest
from char_tokenizer import CharTokenizer

from searche1.config import PromptConfig, RolloutConfig
from searche1.retrieval.client import Passage, RetrieverError
from searche1.rollout import sampler as sampler_module
from searche1.rollout.engine import EngineError
from searche1.rollout.fleet import Fleet
from searche1.rollout.sampler import Rollouts, Sampler, Start, turn_seed
from searche1.types import Completion, Group, Question, Stopped, Trajectory, UserError

TOKENIZER = CharTokenizer()
PROMPT = PromptConfig(user="{question}")


def question(name: str, answer: str = "b") -> Question:
    return Question(id=name, text=name, answers=(answer,), source="test")


QUESTIONS = [question(name) for name in "abcd"]


class FakeEngine:
    """Searches once, then answers: what `policy` says of (context, seed). Remembers what it saw."""

    def __init__(self, policy: Callable[[str, int], str] | None = None, *, delay_s: float = 0.0) -> None:
        self.policy = policy or (
            lambda context, seed: "<answer>b</answer>" if "information" in context else "<search>q</search>"
        )
        self.delay_s = delay_s
        self.contexts: list[str] = []
        self.seeds: list[int] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def generate(self, session, token_ids, *, max_new_tokens, temperature, top_p, stop, seed) -> Completion:
        context = TOKENIZER.decode(token_ids, skip_special_tokens=False)
        self.contexts.append(context)
        self.seeds.append(seed)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.delay_s)
        self.in_flight -= 1
        text = self.policy(context, seed)
        ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
        return Completion(ids, (-1.0,) * len(ids), text, "stop", "v1")


class FakeRetriever:
    def __init__(self, find: Callable[[str], str] = lambda query: '"T"\ntext') -> None:
        self.find = find
        self.is_closed = False

    async def search(self, query: str) -> tuple[Passage, ...]:
        await asyncio.sleep(0)
        return (Passage(id="0", contents=self.find(query), score=1.0),)

    async def close(self) -> None:
        self.is_closed = True


def make_sampler(*engines: FakeEngine, retriever: FakeRetriever | None = None, **rollout) -> Sampler:
    return Sampler(
        fleet=Fleet(engines or (FakeEngine(),)),
        retriever=retriever or FakeRetriever(),
        tokenizer=TOKENIZER,
        rollout=RolloutConfig(**rollout),
        prompt=PROMPT,
    )


def groups_of(sampler: Sampler, questions: list[Question], *, samples: int, **options) -> list[Group]:
    return sampler.sample(Rollouts(sampler.starts(questions), samples), **options)


def test_every_question_gets_its_group_in_order_with_rewards():
    questions = [question("a", "b"), question("c", "other")]
    retriever = FakeRetriever()
    groups = groups_of(make_sampler(retriever=retriever), questions, samples=3, temperature=1.0, seed=0)
    assert [group.question for group in groups] == questions
    assert [group.rewards for group in groups] == [(1.0,) * 3, (0.0,) * 3]
    assert {t.num_searches for group in groups for t in group.trajectories} == {1}
    assert groups[0].trajectories[0].prompt_ids == (ord("a"), ord("?"))
    assert retriever.is_closed


def test_slow_trajectories_do_not_change_the_order():
    class Slow(FakeEngine):
        async def generate(self, session, token_ids, **options):
            await asyncio.sleep(0.02 if token_ids[0] == ord("a") else 0.0)
            return await super().generate(session, token_ids, **options)

    groups = groups_of(make_sampler(Slow()), QUESTIONS, samples=2, temperature=1.0, seed=0)
    assert [chr(t.prompt_ids[0]) for group in groups for t in group.trajectories] == list("aabbccdd")


def test_a_group_stays_on_one_engine_and_groups_spread_over_all():
    engines = FakeEngine(delay_s=0.001), FakeEngine(delay_s=0.001)
    groups_of(make_sampler(*engines), QUESTIONS, samples=3, temperature=1.0, seed=0)
    first, second = ({context[0] for context in engine.contexts} for engine in engines)
    assert len(first) == len(second) == 2
    assert not first & second


def test_no_more_trajectories_are_in_flight_than_allowed():
    engine = FakeEngine(delay_s=0.001)
    groups_of(make_sampler(engine, max_in_flight=3), QUESTIONS, samples=5, temperature=1.0, seed=0)
    assert engine.most_in_flight == 3


def test_a_retriever_fault_marks_its_trajectory_and_no_other():
    def find(query: str) -> str:
        if query == "a":
            raise RetrieverError("the index is on fire")
        return '"T"\ntext'

    engine = FakeEngine(
        lambda context, seed: "<answer>b</answer>" if "information" in context else f"<search>{context[0]}</search>"
    )
    sampler = make_sampler(engine, retriever=FakeRetriever(find), max_errors=0.25)
    groups = groups_of(sampler, QUESTIONS, samples=1, temperature=1.0, seed=0)
    failed = groups[0].trajectories[0]
    assert (failed.status, failed.error) == ("error", "the index is on fire")
    assert [span.kind for span in failed.spans] == ["search"]
    assert [group.rewards for group in groups] == [(0.0,), (1.0,), (1.0,), (1.0,)]


def test_too_many_faults_stop_the_run_and_quote_the_first():
    def die(context: str, seed: int) -> str:
        raise EngineError(f"died on {context}")

    engine = FakeEngine(die)
    with pytest.raises(UserError, match=r"3 of 8 trajectories failed.*max_errors \(0.25\).*died on a\?"):
        groups_of(make_sampler(engine, max_errors=0.25, max_in_flight=1), QUESTIONS, samples=2, temperature=1.0, seed=0)
    assert len(engine.contexts) == 3


def test_a_bug_is_raised_instead_of_being_counted_as_a_fault():
    def find(query: str) -> str:
        raise KeyError("contents")

    retriever = FakeRetriever(find)
    with pytest.raises(KeyError):
        groups_of(make_sampler(retriever=retriever, max_errors=1.0), QUESTIONS, samples=2, temperature=1.0, seed=0)
    assert retriever.is_closed


def test_a_seed_belongs_to_a_turn_of_a_sample_of_a_question():
    def seeds(questions: list[Question], seed: int) -> list[int]:
        engine = FakeEngine()
        groups_of(make_sampler(engine), questions, samples=2, temperature=1.0, seed=seed)
        return engine.seeds

    together = seeds(QUESTIONS, seed=0)
    assert len(set(together)) == len(together) == 16  # two turns each
    assert set(seeds(QUESTIONS[2:3], seed=0)) < set(together)
    assert not set(seeds(QUESTIONS, seed=1)) & set(together)
    assert all(0 <= turn_seed(i, QUESTIONS[0], 0, 0) < 2**31 for i in range(100))


def test_a_trajectory_goes_on_from_given_spans():
    engine = FakeEngine()
    sampler = make_sampler(engine)
    whole = groups_of(sampler, QUESTIONS[:1], samples=1, temperature=1.0, seed=0)[0].trajectories[0]
    start = Start(QUESTIONS[0], tuple(map(ord, "longer prompt")), whole.spans[:2])
    trajectory = sampler.sample(Rollouts([start], samples=1), temperature=1.0, seed=0)[0].trajectories[0]
    assert trajectory.spans[:2] == whole.spans[:2]
    assert trajectory.num_searches == 1
    assert engine.contexts[-1] == "longer prompt" + whole.spans[0].text + whole.spans[1].text


def test_progress_counts_up_and_leaves_faults_out_of_the_mean():
    def policy(context: str, seed: int) -> str:
        if context[0] == "a":
            raise EngineError("gone")
        return "<answer>b</answer>"

    calls: list[tuple[int, int, float]] = []
    sampler = make_sampler(FakeEngine(policy), max_errors=0.5, max_in_flight=1)
    groups_of(sampler, QUESTIONS[:2], samples=1, temperature=1.0, seed=0, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2, 0.0), (2, 2, 1.0)]


def test_a_tick_comes_while_nothing_finishes_and_may_end_it(monkeypatch):
    monkeypatch.setattr(sampler_module, "TICK_S", 0.01)
    ticks = []

    def tick() -> None:
        ticks.append(None)
        if len(ticks) == 5:
            raise Stopped("enough")

    engine = FakeEngine(delay_s=60.0)
    retriever = FakeRetriever()
    sampler = make_sampler(engine, retriever=retriever)
    with pytest.raises(Stopped, match="enough"):
        groups_of(sampler, QUESTIONS, samples=2, temperature=1.0, seed=0, tick=tick)
    assert retriever.is_closed


def test_the_first_fault_is_told_although_it_is_of_an_earlier_try():
    rollouts = Rollouts([Start(QUESTIONS[0], (1,)), Start(QUESTIONS[1], (1,))], 1)
    rollouts.finish((0, 0), Trajectory((1,), (), "error", error="no passage for you"))
    with pytest.raises(UserError, match="The first fault: no passage for you"):
        make_sampler(max_errors=0.1).sample(rollouts, temperature=1.0, seed=0)


def test_settings_of_the_rollout_reach_the_engine():
    class Strict(FakeEngine):
        async def generate(self, session, token_ids, **options):
            assert (options["max_new_tokens"], options["temperature"], options["top_p"]) == (7, 0.5, 0.9)
            assert set(options["stop"]) == {"</search>", "</answer>"}
            return await super().generate(session, token_ids, **options)

    sampler = make_sampler(Strict(), max_response_tokens=7, top_p=0.9)
    assert groups_of(sampler, QUESTIONS[:1], samples=1, temperature=0.5, seed=0)[0].rewards == (1.0,)
