import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from searche1.evaluation import summary
from searche1.evaluation.intervals import bootstrap_means
from searche1.evaluation.scores import scores_of
from searche1.evaluation.stages import format_table, stage_row
from searche1.types import Group, Question, Span, Trajectory, UserError

ANSWER = Span("policy", "answer", (1, 2, 3), (-0.1,) * 3, "<answer>x</answer>")
SEARCH = (Span("policy", "search", (1, 2), (-0.1,) * 2, "q"), Span("environment", "information", (4,) * 9, (), "docs"))


def answered(num_searches=0):
    return Trajectory((0,), (*SEARCH * num_searches, ANSWER), "answered")


def wrong(trajectory):
    spans = (replace(span, text=span.text.replace("x", "y")) for span in trajectory.spans)
    return replace(trajectory, spans=tuple(spans))


FAULTY = Trajectory((0,), (), "error", error="the engine is gone")
LOST = Trajectory((0,), (Span("policy", "final", (1,), (-0.1,), "hm"),), "unanswered")


def summarize(groups, **options):
    return summary.summarize(scores_of(groups), **options)


def group(key, *pairs, source="nq"):
    pairs = [(wrong(trajectory) if reward == 0.0 else trajectory, reward) for trajectory, reward in pairs]
    trajectories, rewards = zip(*pairs, strict=True)
    return Group(Question(key, "q?", ("x",), source), trajectories, rewards)


def scored(num, num_right, source="nq"):
    return [group(str(i), (answered(), float(i < num_right)), source=source) for i in range(num)]


def printed(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


BENCHMARKS = {
    "nq": 3610,
    "triviaqa": 11313,
    "popqa": 14267,
    "hotpotqa": 7405,
    "2wikimultihopqa": 12576,
    "musique": 2417,
    "bamboogle": 125,
}


def test_all_51713_questions_of_the_seven_benchmarks_count_once_each():
    one = answered()
    groups = [
        group(str(i), (one, float(i % 4 == 0)), source=source)
        for source, size in BENCHMARKS.items()
        for i in range(size)
    ]
    result = summarize(groups)
    assert result.overall.num_questions == 51_713
    assert {source.source: source.num_questions for source in result.sources} == BENCHMARKS
    by_source = {source.source: source.em for source in result.sources}
    assert by_source["bamboogle"] == 32 / 125  # no batch of one item weighs as much as one of 512
    assert result.macro_em == pytest.approx(sum(by_source.values()) / 7)


def test_the_macro_average_weighs_sources_and_the_item_mean_weighs_questions():
    result = summarize(scored(90, 45) + scored(10, 9, source="bamboogle"))
    assert [(s.source, s.em, s.num_questions) for s in result.sources] == [("bamboogle", 0.9, 10), ("nq", 0.5, 90)]
    assert result.macro_em == pytest.approx(0.7)
    assert result.overall.em == pytest.approx(0.54)


def test_the_order_of_groups_changes_nothing():
    groups = scored(50, 20) + scored(30, 9, source="popqa")
    shuffled = random.Random(0).sample(groups, len(groups))
    assert summarize(shuffled) == summarize(groups)


def test_a_question_counts_once_however_many_samples_it_has():
    groups = [group("1", *[(answered(), 1.0)] * 9), group("2", (answered(), 0.0))]
    result = summarize(groups).overall
    assert result.em == 0.5 and result.num_questions == 2 and result.num_samples == 10


def test_samples_of_a_question_may_come_in_several_groups():
    together = [group("1", (answered(1), 1.0), (answered(), 0.0)), group("2", (LOST, 0.0), (answered(), 1.0))]
    apart = [
        group("1", (answered(1), 1.0)),
        group("2", (LOST, 0.0)),
        group("1", (answered(), 0.0)),
        group("2", (answered(), 1.0)),
    ]
    assert summarize(apart) == summarize(together)


def test_faults_are_counted_and_excluded():
    result = summarize([group("1", (answered(2), 1.0), (FAULTY, 0.0)), group("2", (FAULTY, 0.0))]).overall
    assert (result.em, result.num_questions, result.num_unscored, result.num_errors) == (1.0, 1, 1, 2)
    assert (result.mean_searches, result.mean_policy_tokens, result.answered_share) == (2.0, 7.0, 1.0)


def test_a_source_with_nothing_but_faults_is_refused_rather_than_scored():
    with pytest.raises(UserError, match="all 2 trajectories of 'popqa' failed"):
        summarize([*scored(3, 1), group("1", (FAULTY, 0.0), (FAULTY, 0.0), source="popqa")])
    with pytest.raises(UserError, match="nothing to evaluate"):
        summarize([])


def test_the_bootstrap_interval_agrees_with_the_binomial_and_with_resampling_by_hand():
    values = [1.0] * 120 + [0.5] * 60 + [0.0] * 120
    means = bootstrap_means(values, seed=0)
    rng = np.random.default_rng(1)
    by_hand = np.array([rng.choice(values, size=len(values)).mean() for _ in range(2000)])
    assert means.std() == pytest.approx(np.std(values) / np.sqrt(len(values)), rel=0.05)
    assert np.percentile(means, [2.5, 97.5]) == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.006)


def test_the_interval_is_seeded_holds_the_mean_and_narrows_with_more_questions():
    few, many = summarize(scored(50, 20)), summarize(scored(5000, 2000))
    assert few == summarize(scored(50, 20)) and many != summarize(scored(5000, 2000), seed=1)
    for result in (few, many):
        low, high = result.overall.em_interval
        assert low < 0.4 < high
    assert many.overall.em_interval[1] - many.overall.em_interval[0] < 0.03


def test_the_macro_interval_of_one_source_is_its_own():
    result = summarize(scored(50, 20))
    assert result.macro_interval == result.sources[0].em_interval


def test_a_result_survives_json():
    tree = json.loads(json.dumps(summarize(scored(10, 5)).to_json()))
    assert tree["macro_em"] == 0.5 and tree["sources"][0]["source"] == "nq"


def test_at_temperature_zero_the_result_is_the_greedy_one():
    row = stage_row("start", summarize(scored(10, 5)), temperature=0.0, greedy=None, seconds=1.0)
    assert row.em == row.em_greedy == 0.5
    text = printed(format_table([row]))
    assert "EM greedy" in text and "EM at T" not in text


def test_the_table_shows_both_decodings_and_fits_a_terminal():
    sampled, greedy = summarize(scored(300, 150)), summarize(scored(300, 210))
    names = ("start", "cycle0/grpo", "cycle0/opsd", "cycle1/grpo", "cycle1/opsd")
    rows = [stage_row(name, sampled, temperature=1.0, greedy=greedy, seconds=1234.5) for name in names]
    text = printed(format_table(rows))
    assert "EM at T=1" in text and "EM greedy" in text and "300 questions" in text
    assert all(name in text for name in names)
    assert text.count("0.500 +/- 0.05") == 5 and text.count("0.700 +/- 0.05") == 5
    assert "..." not in text and "\u2026" not in text


def test_a_stage_without_greedy_evaluation_has_a_dash_beside_one_that_has_it():
    result = summarize(scored(10, 5))
    rows = [
        stage_row("start", result, temperature=1.0, greedy=None, seconds=1.0),
        stage_row("cycle0/grpo", result, temperature=1.0, greedy=result, seconds=1.0),
    ]
    start = next(line for line in printed(format_table(rows)).splitlines() if line.startswith("start"))
    assert start.split()[4] == "-"
