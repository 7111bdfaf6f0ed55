from dataclasses import dataclass, replace

import pytest
from char_tokenizer import END, CharTokenizer

from searche1.config import PromptConfig, RolloutConfig
from searche1.rollout import protocol
from searche1.rollout.protocol import Generate, Search, State
from searche1.types import Completion, Trajectory

TOKENIZER = CharTokenizer()
PROMPT = PromptConfig()
ROLLOUT = RolloutConfig()
THOUGHT = "<think> hm </think>"


@dataclass(frozen=True)
class FakePassage:
    contents: str


def completion(text: str, *, end: bool = False, finish_reason: str = "stop") -> Completion:
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False)) + ((END,) if end else ())
    logprobs = tuple(-float(i) for i in range(len(ids)))
    return Completion(ids, logprobs, text, finish_reason, weight_version="v7")


def say(state: State, text: str, *, rollout: RolloutConfig = ROLLOUT, **options) -> State:
    return protocol.add_completion(
        state, completion(text, **options), rollout=rollout, prompt=PROMPT, tokenizer=TOKENIZER
    )


def see(state: State, contents: str = '"T"\ntext', *, rollout: RolloutConfig = ROLLOUT) -> State:
    return protocol.add_passages(state, [FakePassage(contents)], rollout=rollout, prompt=PROMPT, tokenizer=TOKENIZER)


def step(state: State, rollout: RolloutConfig = ROLLOUT):
    return protocol.next_step(state, rollout=rollout, tokenizer=TOKENIZER)


def begin(prompt: str = "Q", spans=(), rollout: RolloutConfig = ROLLOUT) -> State:
    return protocol.start(TOKENIZER.encode(prompt, add_special_tokens=False), spans, rollout=rollout)


def play(*turns: str, rollout: RolloutConfig = ROLLOUT) -> Trajectory:
    """Plays the turns; every search finds the same passage. The turns must be all that is asked for."""
    state, left = begin(rollout=rollout), list(turns)
    while not isinstance(todo := step(state, rollout), Trajectory):
        state = see(state, rollout=rollout) if isinstance(todo, Search) else say(state, left.pop(0), rollout=rollout)
    assert not left
    return todo


def kinds(trajectory: Trajectory) -> list[str]:
    return [span.kind for span in trajectory.spans]


def test_a_fresh_trajectory_generates_from_its_prompt():
    assert step(begin("ab")) == Generate((ord("a"), ord("b")), max_new_tokens=500)


def test_a_search_is_looked_up_and_its_observation_joins_the_context():
    state = say(begin(), THOUGHT + "<search> who is x </search>")
    assert step(state) == Search("who is x")
    state = see(state, '"X"\nis y')
    observed = '\n\n<information>Doc 1(Title: "X") is y</information>\n\n'
    todo = step(state)
    assert isinstance(todo, Generate)
    assert TOKENIZER.decode(todo.context_ids, skip_special_tokens=False) == (
        "Q" + THOUGHT + "<search> who is x </search>" + observed
    )


def test_an_empty_query_is_a_search():
    assert step(say(begin(), "<search></search>")) == Search("")


def test_an_answer_ends_the_trajectory():
    trajectory = play("<search>a</search>", "<answer> b </answer>")
    assert trajectory.status == "answered"
    assert kinds(trajectory) == ["search", "information", "answer"]
    assert trajectory.num_searches == 1
    assert trajectory.weight_version == "v7"


def test_four_searches_make_five_generations():
    trajectory = play(*["<search>a</search>"] * 4, "<answer>b</answer>")
    assert trajectory.num_searches == 4
    assert kinds(trajectory) == ["search", "information"] * 4 + ["answer"]


def test_a_search_in_the_final_turn_executes_nothing():
    trajectory = play(*["<search>a</search>"] * 5)
    assert trajectory.num_searches == 4
    assert kinds(trajectory)[-1] == "final"
    assert trajectory.status == "unanswered"


def test_a_final_turn_without_a_tag_gets_no_error_message():
    trajectory = play(*["<search>a</search>"] * 4, "hm")
    assert kinds(trajectory)[-1] == "final"
    assert trajectory.status == "unanswered"


def test_an_invalid_turn_is_told_so_and_uses_up_a_turn():
    trajectory = play("hm", *["<search>a</search>"] * 3, "<search>a</search>")
    assert kinds(trajectory)[:2] == ["invalid", "error"]
    assert trajectory.spans[1].text == PROMPT.invalid_action
    assert trajectory.num_searches == 3
    assert kinds(trajectory)[-1] == "final"


def test_a_turn_that_runs_into_its_token_limit_is_invalid_and_the_trajectory_goes_on():
    state = say(begin(), "x" * 500, finish_reason="length")
    assert [span.kind for span in state.spans] == ["invalid", "error"]
    assert state.spans[0].is_truncated
    assert isinstance(step(state), Generate)


def test_a_closing_tag_without_its_opener_is_invalid():
    assert say(begin(), "a </search>").spans[0].kind == "invalid"


def test_the_end_of_sequence_is_stripped_with_its_logprob():
    turn = say(begin(), "hm", end=True).spans[0]
    assert turn.token_ids == (ord("h"), ord("m"))
    assert turn.logprobs == (0.0, -1.0)
    assert turn.text == "hm"


def test_a_turn_that_is_nothing_but_the_end_of_sequence_still_counts():
    state = say(begin(), "", end=True)
    assert state.num_turns == 1
    assert state.spans[0].token_ids == ()
    assert [span.kind for span in state.spans] == ["invalid", "error"]


def test_characters_behind_the_tag_stay_in_the_span_but_not_in_the_query():
    state = say(begin(), "<search> a </search>\n\n")
    assert step(state) == Search("a")
    assert state.spans[0].text.endswith("</search>\n\n")
    assert state.spans[0].token_ids[-1] == ord("\n")


def test_a_long_observation_loses_its_end():
    rollout = replace(ROLLOUT, max_observation_tokens=30)
    span = see(say(begin(), "<search>a</search>"), '"T"\n' + "x" * 99, rollout=rollout).spans[1]
    assert len(span.token_ids) == 30
    assert span.is_truncated
    assert span.text == '\n\n<information>Doc 1(Title: "T") xx'[:30]


def test_a_long_prompt_loses_its_left_end():
    assert begin("abcdef", rollout=replace(ROLLOUT, max_start_tokens=3)).prompt_ids == tuple(map(ord, "def"))


def test_a_long_context_loses_its_left_end():
    rollout = replace(ROLLOUT, max_context_tokens=400)
    state = say(begin("p" * 300, rollout=rollout), "hm", rollout=rollout)
    todo = step(state, rollout)
    assert isinstance(todo, Generate)
    assert len(todo.context_ids) == 400
    everything = "p" * 300 + "hm" + PROMPT.invalid_action
    assert TOKENIZER.decode(todo.context_ids, skip_special_tokens=False) == everything[-400:]


def test_a_long_response_keeps_its_first_tokens_and_an_answer_cut_off_is_none():
    rollout = replace(ROLLOUT, max_context_tokens=100)
    trajectory = play("<search>a</search>", "<answer>" + "b" * 99 + "</answer>", rollout=rollout)
    assert len(trajectory.response_ids) == 100
    assert trajectory.status == "unanswered"
    last = trajectory.spans[-1]
    assert (last.kind, last.is_truncated) == ("final", True)
    assert len(last.logprobs) == len(last.token_ids) == len(last.text)


def test_nothing_is_asked_for_once_the_response_is_full():
    rollout = replace(ROLLOUT, max_context_tokens=18)
    trajectory = step(say(begin(), "<search>a</search>", rollout=rollout), rollout)
    assert isinstance(trajectory, Trajectory)
    assert trajectory.num_searches == 0
    assert trajectory.status == "unanswered"


def test_the_mask_covers_the_policys_tokens_and_no_others():
    trajectory = play("hm", "<search>a</search>", "<answer>b</answer>")
    text = "".join(c for c, own in zip(trajectory.text, trajectory.policy_mask, strict=True) if own)
    assert text == trajectory.policy_text == "hm<search>a</search><answer>b</answer>"
    assert sum(trajectory.policy_mask) == trajectory.num_policy_tokens == len(trajectory.engine_logprobs)


def test_a_continued_trajectory_counts_the_turns_it_has_used():
    state = begin()
    for _ in range(3):
        state = see(say(state, "<search>a</search>"))
    state = begin("another prompt", state.spans)
    state = see(say(state, "<search>a</search>"))
    trajectory = step(say(state, "<search>a</search>"))
    assert isinstance(trajectory, Trajectory)
    assert trajectory.num_searches == 4


def test_continuing_in_the_middle_of_a_turn_is_refused():
    with pytest.raises(AssertionError):
        begin("Q", say(begin(), "<search>a</search>").spans)


def test_a_failed_trajectory_keeps_what_it_had():
    failed = protocol.fail(say(begin(), "<search>a</search>"), "the retriever is down")
    assert (failed.status, failed.error) == ("error", "the retriever is down")
    assert kinds(failed) == ["search"]
