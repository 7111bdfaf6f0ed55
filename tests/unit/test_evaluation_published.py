from dataclasses import replace
from statistics import fmean

import pytest

from searche1.benchmarks import BENCHMARKS
from searche1.evaluation.published import doubt, doubts, published_rows
from searche1.evaluation.scores import Score
from searche1.evaluation.summary import summarize

ROWS = published_rows()


def name(row):
    return f"table {row.table} {row.method}"


def scores_with(em, source, num_questions):
    """As many right answers as make a published EM, or the nearest to it."""
    num_right = round(em * num_questions)
    blank = Score("", source, 0, "answered", 0.0, 0.0, 0.0, None, 1, 10, 20, "x")
    return [replace(blank, key=f"{source}:{i}", em=float(i < num_right)) for i in range(num_questions)]


@pytest.mark.parametrize("row", [row for row in ROWS if row.average is not None], ids=name)
def test_every_published_average_is_the_unweighted_mean_of_its_seven(row):
    assert len(row.em) == 7
    assert abs(row.average - fmean(row.em.values())) <= 0.001


@pytest.mark.parametrize("row", [row for row in ROWS if row.method == "Search-E1-Instruct"], ids=name)
def test_item_by_item_answers_of_the_right_sizes_give_the_published_average(row):
    scores = [s for b in BENCHMARKS for s in scores_with(row.em[b.name], b.name, b.num_questions)]
    result = summarize(scores)
    assert result.overall.num_questions == 51_713
    for source in result.sources:
        slack = 0.004 if doubts(row).get(source.source) else 0.0005
        assert source.em == pytest.approx(row.em[source.source], abs=slack)
    assert result.macro_em == pytest.approx(row.average, abs=0.001)


def test_the_impossible_numbers_are_found_and_no_other():
    found = {(row.table, row.method): set(doubts(row)) for row in ROWS if doubts(row)}
    assert found == {
        (1, "ReSearch-Instruct"): {"bamboogle"},
        (1, "GiGPO-Instruct"): {"bamboogle"},
        (2, "MR-Search-Base"): {"bamboogle"},
        (2, "StepSearch-Base"): {"bamboogle"},
        (2, "GiGPO-Instruct"): {"bamboogle"},
        (2, "Search-E1-Instruct"): {"bamboogle"},
    }


@pytest.mark.parametrize(
    ("em", "reason"),
    [
        (0.641, "(35/124 + 1)/2"),
        (0.689, "(47/124 + 1)/2"),
        (0.452, "56/124"),
        (0.266, "33/124"),
        (0.534, "several runs"),
    ],
)
def test_a_doubt_says_how_the_number_may_have_come_about(em, reason):
    assert reason in doubt(em, 125)


def test_counts_of_the_right_size_raise_no_doubt():
    assert all(doubt(round(right / 125, 3), 125) is None for right in range(126))
    assert all(doubt(thousandth / 1000, 3610) is None for thousandth in range(1001))


def test_gigpos_averages_item_by_item():
    sizes = {1: (0.288, 0.370), 2: (0.384, 0.428)}
    for row in ROWS:
        if row.method == "GiGPO-Instruct":
            bamboogle, average = sizes[row.table]
            assert fmean((row.em | {"bamboogle": bamboogle}).values()) == pytest.approx(average, abs=0.0006)
