import pytest

from searche1.rewards import em_reward, exact_match, normalize_answer
from searche1.types import Question, Span, Trajectory

QUESTION = Question(id="0", text="capital of China?", answers=("Beijing", "Peking"), source="nq")


def trajectory(*spans: tuple[str, str], status: str = "answered") -> Trajectory:
    made = tuple(
        Span(author=author, kind="answer" if author == "policy" else "error", token_ids=(1,), logprobs=(), text=text)
        for author, text in spans
    )
    return Trajectory(prompt_ids=(1,), spans=made, status=status)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Beatles!", ["beatles"], True),
        ("U.S.", ["us"], True),
        ("a-b", ["ab"], True),
        ("a-b", ["a b"], False),
        ("sinoatrial (SA) node", ["sinoatrial node"], False),
        ("Caf\u00e9", ["Cafe"], False),
        ("who", ["The Who"], True),
        ("two", ["2", "two"], True),
        ("x", [], False),
    ],
)
def test_exact_match_agrees_with_search_r1(prediction, answers, expected):
    assert exact_match(prediction, answers) is expected


def test_punctuation_goes_before_articles_do():
    assert normalize_answer("A. The-Band  an d") == "theband d"


def test_two_texts_that_normalize_to_nothing_match():
    assert exact_match("the", ["A."])


def test_the_last_answer_of_the_policy_counts():
    texts = ("policy", "<answer> Shanghai </answer>"), ("policy", "so <answer> peking. </answer>")
    assert em_reward(trajectory(*texts), QUESTION) == 1.0
    assert em_reward(trajectory(*reversed(texts)), QUESTION) == 0.0


def test_an_answer_that_the_environment_wrote_earns_nothing():
    observed = trajectory(
        ("policy", "no idea"), ("environment", "for example <answer> Beijing </answer>"), status="unanswered"
    )
    assert em_reward(observed, QUESTION) == 0.0


def test_an_unfinished_answer_earns_nothing():
    assert em_reward(trajectory(("policy", "<answer> Beijing"), status="unanswered"), QUESTION) == 0.0


def test_a_failed_trajectory_earns_nothing_whatever_it_holds():
    assert em_reward(trajectory(("policy", "<answer> Beijing </answer>"), status="error"), QUESTION) == 0.0


def test_an_answer_left_open_in_an_earlier_turn_does_not_hide_the_final_one():
    stray = trajectory(
        ("policy", "I may <answer> Shanghai"),
        ("environment", "not valid, write <answer> Shanghai </answer>"),
        ("policy", "then <answer> Beijing </answer>"),
    )
    assert em_reward(stray, QUESTION) == 1.0


def test_an_answer_glued_together_from_two_turns_earns_nothing():
    glued = trajectory(
        ("policy", "so <answer> Bei"), ("environment", "try again"), ("policy", "jing </answer>"), status="unanswered"
    )
    assert em_reward(glued, QUESTION) == 0.0
