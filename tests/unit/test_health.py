"""Alarms from rows of metrics, and what they ask for."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
from test_metrics import DIRECT, SEARCHED, group

from searche1.config import HealthConfig, config_keys
from searche1.health import COLLAPSE, Watch, average, find_alarms, find_collapse, read_health
from searche1.metrics import rollout_metrics

SETTINGS = HealthConfig(window=5)
HEALTHY = {
    "em": 0.4,
    "kl": 0.01,
    "entropy": 0.5,
    "ratio_max": 1.3,
    "grad_norm": 0.3,
    "engine_gap": 1e-3,
    "invalid_action_share": 0.02,
    "answered_share": 0.95,
    "truncated_share": 0.01,
    "error_share": 0.0,
    "same_reward_share": 0.5,
    "mean_response_tokens": 600.0,
    "mean_searches": 1.8,
}


def rows(number: int, **changed: float) -> list[dict[str, float]]:
    return [{**HEALTHY, **changed} for _ in range(number)]


def names(of: list[dict[str, float]], settings: HealthConfig = SETTINGS) -> list[str]:
    return [alarm.name for alarm in find_alarms(of, settings)]


def test_a_healthy_round_raises_no_alarm_with_the_defaults():
    generator = random.Random(0)
    noisy = [{name: value * generator.uniform(0.7, 1.4) for name, value in HEALTHY.items()} for _ in range(200)]
    for end in range(len(noisy)):
        for row in noisy[: end + 1]:
            row["answered_share"] = min(1.0, row["answered_share"])
        assert names(noisy[: end + 1], HealthConfig()) == []


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [
        ("KL", "kl", 1.5),
        ("entropy", "entropy", 0.001),
        ("ratio", "ratio_max", 500.0),
        ("gradient norm", "grad_norm", 1e4),
        ("engine gap", "engine_gap", 0.3),
        ("invalid actions", "invalid_action_share", 0.8),
        ("answered", "answered_share", 0.1),
        ("truncated", "truncated_share", 0.9),
        ("environment errors", "error_share", 0.19),
        ("equal rewards", "same_reward_share", 1.0),
        ("length", "mean_response_tokens", 2500.0),
        ("searches", "mean_searches", 0.1),
    ],
)
def test_every_rule_sees_its_fault_after_a_window_and_not_before(name, metric, value):
    sick = rows(10) + rows(5, **{metric: value})
    assert names(sick) == [name]
    assert names(rows(4, **{metric: value})) == []
    keys = [key.removeprefix("health.") for key in config_keys() if key.startswith(("health.max_", "health.min_"))]
    switched_off = dataclasses.replace(SETTINGS, **{key: 0 for key in keys if key != "max_roll_backs"})
    assert names(sick, switched_off) == []


def test_reward_that_falls_below_half_of_its_best_average_is_a_collapse():
    climbing = [{"em": 0.02 * step} for step in range(20)]
    assert find_collapse(climbing, SETTINGS) is None
    falling = climbing + [{"em": 0.1}] * 3  # the average of 0.36, 0.38 and these is 0.208; the best was 0.34
    assert find_collapse(falling, SETTINGS) is None
    collapse = find_collapse([*falling, {"em": 0.1}], SETTINGS)
    assert collapse is not None and collapse.name == COLLAPSE
    assert collapse.value == pytest.approx(0.156) and collapse.limit == pytest.approx(0.17)


def test_a_policy_that_never_found_anything_cannot_collapse():
    assert find_collapse([{"em": 0.01}] * 10 + [{"em": 0.0}] * 10, SETTINGS) is None


def test_a_value_that_was_not_measured_counts_nowhere():
    assert average([{"em": 1.0}, {}, {"em": 3.0}], "em", window=3) is None
    assert average([{"em": 1.0}, {"em": None}], "em", window=1) is None


def test_the_watch_tells_an_alarm_once_records_it_and_asks_for_what_the_settings_say(tmp_path: Path):
    said: list[str] = []
    watch = Watch(tmp_path / "health.jsonl", "cycle0/grpo", SETTINGS, said.append)
    actions = [watch.step(step, row) for step, row in enumerate(rows(10, em=0.6) + rows(10, em=0.0), start=1)]
    assert actions.count("end_round") == 1 and set(actions) == {"", "end_round"}
    assert len(said) == 1 and said[0].startswith("  ALARM reward collapse: ")
    recorded = read_health(tmp_path / "health.jsonl")
    assert [(row["stage"], row["action"], row["alarm"]["name"]) for row in recorded] == [
        ("cycle0/grpo", "end_round", COLLAPSE)
    ]


def test_a_watch_that_goes_on_does_not_repeat_what_was_told_before_the_restart(tmp_path: Path):
    said: list[str] = []
    watch = Watch(tmp_path / "health.jsonl", "grpo", dataclasses.replace(SETTINGS, on_alarm="stop"), said.append)
    watch.start(rows(10, kl=2.0))
    assert watch.step(11, rows(1, kl=2.0)[0]) == "" and said == []
    watch.start(rows(10))
    assert [watch.step(step, rows(1, kl=9.0)[0]) for step in (11, 12)] == ["stop", ""]


@pytest.mark.parametrize(("on_collapse", "actions"), [("end_round", ["end_round", ""]), ("warn", ["", ""])])
def test_a_collapse_that_stopped_the_run_is_acted_on_with_other_settings(tmp_path: Path, on_collapse, actions):
    settings = dataclasses.replace(SETTINGS, on_collapse=on_collapse)
    watch = Watch(tmp_path / "health.jsonl", "grpo", settings, lambda said: None)
    watch.start(rows(10, em=0.6) + rows(10, em=0.0))
    assert [watch.step(step, rows(1, em=0.0)[0]) for step in (21, 22)] == actions


def test_roll_backs_are_counted_for_their_stage_alone(tmp_path: Path):
    watch = Watch(tmp_path / "health.jsonl", "cycle1/grpo", SETTINGS, print)
    assert watch.num_roll_backs() == 0
    watch.record(50, rolled_back_to=50)
    Watch(tmp_path / "health.jsonl", "cycle0/grpo", SETTINGS, print).record(50, rolled_back_to=50)
    assert watch.num_roll_backs() == 1
    with open(tmp_path / "health.jsonl", "a") as file:
        file.write('{"stage": "cycle1/grpo", "rolled_ba')  # a kill cut this line
    assert watch.num_roll_backs() == 1


def test_the_rules_read_metrics_that_exist():
    measured = set(rollout_metrics([group("1", (SEARCHED, 1.0), (DIRECT, 0.0))]))
    measured |= {"kl", "entropy", "ratio_max", "grad_norm", "engine_gap"}  # of updates: test_grpo.py
    assert set(HEALTHY) <= measured
