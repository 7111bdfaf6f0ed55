import random

import pytest

from searche1.rewards import contains_answer, em_reward, exact_match, f1_score, normalize_answer, search_r1_reward
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


# -- against graders written from the formulas ----------------------------------------------------

WORDS = (
    "the",
    "The",
    "a",
    "an",
    "An",
    "A.",
    "who",
    "U.S.",
    "Beatles",
    "beatles!",
    "two",
    "2",
    "yes",
    "no",
    "caf\u00e9",
)
WORDS += ("S\u00e3o", "thé", "a-b", "ab", "_", "an.", "(the)", "\u2014", "9/11", "İstanbul", "Straße", "x_y", "\t", "")


def oracle_words(text: str) -> list[str]:
    """SQuAD's normalization character by character: lower case, no ASCII punctuation, no articles, single spaces."""
    kept = [c for c in text.lower() if not (c.isascii() and not c.isalnum() and not c.isspace() and c.isprintable())]
    runs, run = [], ""
    for character in [*kept, " "]:
        if character.isalnum() or character == "_":
            run += character
        else:
            runs.append(" " if run in ("a", "an", "the") else run)
            runs.append(character)
            run = ""
    return "".join(runs).split()


def oracle_f1(prediction: str, answer: str) -> float:
    ours, theirs = oracle_words(prediction), oracle_words(answer)
    if ours != theirs and ({" ".join(ours), " ".join(theirs)} & {"yes", "no", "noanswer"}):
        return 0.0
    left = list(theirs)
    shared = sum(word in left and left.remove(word) is None for word in ours)
    if not shared:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def random_text(generator: random.Random) -> str:
    words = generator.choices(WORDS, k=generator.randrange(5))
    return generator.choice((" ", "  ", "-", "")).join(words)


def test_the_grades_of_ten_thousand_random_answers_are_those_of_an_independent_grader():
    generator = random.Random(0)
    num_right = num_partly = 0
    for _ in range(10_000):
        prediction = random_text(generator)
        aliases = [random_text(generator) for _ in range(generator.randint(1, 3))]
        if generator.random() < 0.3:  # chance alone rarely makes a right answer
            aliases.append(f"The {prediction.upper()}?")
        words = oracle_words(prediction)
        is_right = any(words == oracle_words(alias) for alias in aliases)
        f1 = max(oracle_f1(prediction, alias) for alias in aliases)
        contains = any(" ".join(oracle_words(alias)) in " ".join(words) for alias in aliases)
        assert exact_match(prediction, aliases) is is_right, (prediction, aliases)
        assert f1_score(prediction, aliases) == pytest.approx(f1), (prediction, aliases)
        assert contains_answer(prediction, aliases) is contains, (prediction, aliases)
        num_right += is_right
        num_partly += 0 < f1 < 1
    assert num_right > 2000 and num_partly > 300  # the strings reach every branch


def test_yes_and_no_share_no_token_with_a_longer_answer():
    assert f1_score("no", ["no way"]) == 0.0
    assert f1_score("no way", ["way"]) == pytest.approx(2 / 3)


def test_search_r1_grades_its_own_prompts_example_when_there_is_no_answer():
    question = Question(id="0", text="capital of China?", answers=("Beijing",), source="nq")
    prompt = "between <answer> and </answer>. For example, <answer> Beijing </answer>."
    assert search_r1_reward(trajectory(("policy", "I do not know")), question, prompt_text=prompt) == 1.0
    assert em_reward(trajectory(("policy", "I do not know")), question) == 0.0
    told = trajectory(("policy", "hm"), ("environment", "like <answer> Paris </answer>"))
    assert search_r1_reward(told, question, prompt_text=prompt) == 0.0
    assert search_r1_reward(trajectory(("policy", "<answer>beijing</answer>")), question, prompt_text="no tags") == 0.0
