"""Which pairs are mined from a group of trajectories, and why others are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searche1.config import PairsConfig
from searche1.pairs import compared_text, mine_pair
from searche1.types import Group, Question, Span, Trajectory, UserError

QUESTION = Question("1", "who wrote it?", ("ann",), "nq")


def trajectory(text="a", *, searches=0, length=None, status="answered", seen="doc"):
    """One turn a search, then an answer whose text is `text`; `length` is the number of the answer's tokens."""
    spans = []
    for _ in range(searches):
        spans.append(Span("policy", "search", (1,), (-1.0,), "s"))
        spans.append(Span("environment", "information", (2, 3), (), seen))
    count = length if length is not None else 2
    spans.append(Span("policy", "answer", (4,) * count, (-1.0,) * count, text))
    return Trajectory((9, 9), tuple(spans), status)


def mine(*scored, **settings):
    """The outcome, and the indices of reference and student, of a group of (trajectory, reward)."""
    trajectories, rewards = zip(*scored, strict=True)
    pair, record = mine_pair(Group(QUESTION, trajectories, rewards), PairsConfig(**settings))
    assert (pair is not None) == (record.outcome == "pair")
    if pair is not None:
        assert pair.reference is trajectories[record.reference] and pair.student is trajectories[record.student]
        assert pair.student_reward == rewards[record.student] and pair.distance == record.distance > 0
    return record.outcome, record.reference, record.student


# -- the reference --------------------------------------------------------------------------------


def test_a_question_without_a_correct_trajectory_gives_no_pair():
    assert mine((trajectory("a"), 0.0), (trajectory("b"), 0.0)) == ("no correct trajectory", None, None)


def test_the_reference_has_the_fewest_searches_whatever_its_length():
    short, thrifty = trajectory("xy", searches=2, length=1), trajectory("xyz", searches=1, length=50)
    assert mine((short, 1.0), (thrifty, 1.0), (trajectory("wrong"), 0.0))[1] == 1


def test_of_equally_many_searches_the_shortest_response_is_the_reference():
    long, short = trajectory("xy", searches=1, length=9), trajectory("xyz", searches=1, length=8)
    assert mine((long, 1.0), (short, 1.0), (trajectory("wrong"), 0.0))[1] == 1


def test_of_equals_the_first_is_the_reference():
    assert mine((trajectory("wrong"), 0.0), (trajectory("x"), 1.0), (trajectory("y"), 1.0))[1] == 1


def test_a_cheap_wrong_trajectory_is_no_reference():
    assert mine((trajectory("wrong"), 0.0), (trajectory("right", searches=4), 1.0))[1] == 1


def test_a_reference_may_be_asked_to_search():
    guessed, searched = trajectory("x"), trajectory("y", searches=2)
    wrong = (trajectory("wrong"), 0.0)
    assert mine((guessed, 1.0), (searched, 1.0), wrong)[1] == 0
    assert mine((guessed, 1.0), (searched, 1.0), wrong, min_ref_searches=1)[1] == 1
    assert mine((guessed, 1.0), wrong, min_ref_searches=1)[0] == "no correct trajectory"


# -- the student ----------------------------------------------------------------------------------


def test_a_wrong_sibling_is_preferred_to_a_more_different_correct_one():
    assert mine((trajectory("aaaa"), 1.0), (trajectory("zzzzzzzz"), 1.0), (trajectory("aaab"), 0.0))[2] == 2


def test_the_most_different_wrong_sibling_is_the_student():
    assert mine((trajectory("aaaa"), 1.0), (trajectory("aaab"), 0.0), (trajectory("bbbb"), 0.0))[2] == 2


def test_difference_is_a_share_so_running_on_is_not_difference():
    """Six letters appended to four are 6 of 10; four letters replaced are 4 of 4."""
    runs_on, differs = trajectory("aaaa" + "b" * 6), trajectory("bbbb")
    assert mine((trajectory("aaaa"), 1.0), (runs_on, 0.0), (differs, 0.0), text="policy")[2] == 2


def test_of_equally_different_siblings_the_first_is_the_student():
    assert mine((trajectory("aaaa"), 1.0), (trajectory("aaac"), 0.0), (trajectory("aaab"), 0.0))[2] == 1


def test_when_all_are_correct_the_most_different_other_one_is_the_student():
    assert mine((trajectory("aaaa"), 1.0), (trajectory("aaab"), 1.0), (trajectory("bbbb"), 1.0)) == ("pair", 0, 2)


def test_a_student_that_equals_its_reference_is_dropped():
    assert mine((trajectory("same"), 1.0), (trajectory("same"), 1.0)) == ("student equals reference", 0, 1)


def test_a_group_of_one_has_no_sibling():
    assert mine((trajectory("x"), 1.0)) == ("no sibling", 0, None)
    assert mine((trajectory("x"), 0.0))[0] == "no correct trajectory"


def test_a_trajectory_with_a_fault_is_neither_reference_nor_student():
    faulty = trajectory("zzzz", status="error")
    assert mine((faulty, 1.0), (trajectory("aaaa", searches=3), 1.0), (trajectory("aaab"), 0.0)) == ("pair", 1, 2)
    assert mine((trajectory("aaaa"), 1.0), (faulty, 0.0), (trajectory("aaab"), 0.0)) == ("pair", 0, 2)
    assert mine((faulty, 1.0), (trajectory("aaaa"), 0.0))[0] == "no correct trajectory"
    assert mine((trajectory("aaaa"), 1.0), (faulty, 0.0))[0] == "no sibling"


def test_texts_are_compared_with_or_without_what_the_policy_only_read():
    reference = trajectory("aaaa", searches=1, seen="doc")
    read_else, said_else = trajectory("aaaa", searches=1, seen="x" * 90), trajectory("bbbb", searches=1, seen="doc")
    scored = ((reference, 1.0), (read_else, 0.0), (said_else, 0.0))
    assert mine(*scored, text="full")[2] == 1
    assert mine(*scored, text="policy")[2] == 2
    assert compared_text(reference, "full") == "sdocaaaa" and compared_text(reference, "policy") == "saaaa"
    with pytest.raises(UserError, match="full or policy, got 'all'"):
        compared_text(reference, "all")


drawn_groups = st.lists(
    st.tuples(
        st.builds(
            trajectory,
            st.text("ab", max_size=6),
            searches=st.integers(0, 3),
            length=st.integers(0, 4),
            status=st.sampled_from(["answered", "unanswered", "error"]),
        ),
        st.sampled_from([0.0, 1.0]),
    ),
    min_size=1,
    max_size=6,
)


@given(drawn_groups)
def test_every_pair_follows_the_rules_and_mining_twice_finds_the_same(scored):
    outcome, reference, student = mine(*scored)
    assert mine(*scored) == (outcome, reference, student)
    valid = [k for k, (t, _) in enumerate(scored) if t.status != "error"]
    cheapest = min((scored[k][0].num_searches for k in valid if scored[k][1] == 1.0), default=None)
    assert (outcome == "no correct trajectory") == (cheapest is None)
    if reference is not None:
        assert reference in valid and scored[reference][1] == 1.0
        assert scored[reference][0].num_searches == cheapest
    if student is not None:
        assert student in valid and student != reference and scored[student][0].num_policy_tokens
        others = [k for k in valid if k != reference and scored[k][0].num_policy_tokens]
        assert scored[student][1] == min(scored[k][1] for k in others)


def test_the_audit_record_tells_the_whole_group():
    scored = [(trajectory("aaaa", searches=1), 1.0), (trajectory("aabb", searches=3), 0.0), (trajectory("x"), 0.0)]
    trajectories, rewards = zip(*scored, strict=True)
    _, record = mine_pair(Group(QUESTION, trajectories, rewards), PairsConfig(text="policy"))
    assert (record.question, record.outcome) == ("nq:1", "pair")
    assert (record.rewards, record.num_searches) == ((1.0, 0.0, 0.0), (1, 3, 0))
    assert (record.reference, record.student, record.distance) == (0, 2, 1.0)
