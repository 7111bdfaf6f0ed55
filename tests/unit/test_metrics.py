import io
import json
import math
import sys

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from searche1.metrics import MetricsLog, Phases, WandbTracker, read_metrics, rollout_metrics, step_line
from searche1.types import Group, Question, Span, Trajectory, UserError


def policy(kind, num_tokens=2, is_truncated=False):
    return Span("policy", kind, (1,) * num_tokens, (-0.5,) * num_tokens, "text", is_truncated)


def environment(kind, num_tokens=10):
    return Span("environment", kind, (2,) * num_tokens, (), "text")


SEARCHED = Trajectory((0,), (policy("search"), environment("information"), policy("answer", 3)), "answered")
DIRECT = Trajectory((0,), (policy("answer", 5),), "answered")
CONFUSED = Trajectory((0,), (policy("invalid", 4, True), environment("error", 6), policy("final", 2)), "unanswered")
FAULTY = Trajectory((0,), (policy("search"),), "error", error="retriever")


def group(key, *pairs, source="nq"):
    trajectories, rewards = zip(*pairs, strict=True)
    return Group(Question(key, "q?", ("a",), source), trajectories, rewards)


def open_log(path):
    printed = io.StringIO()
    return MetricsLog(path, console=Console(file=printed, width=80, highlight=False)), printed


def step(log, number, **values):
    log.log(stage="cycle0/grpo", step=number, num_steps=200, values=values, seconds={"rollout": 2.0, "train": 1.0})


def test_rollout_metrics_describe_what_the_policy_did():
    groups = [
        group("1", (SEARCHED, 1.0), (DIRECT, 0.0)),
        group("2", (CONFUSED, 0.0), (DIRECT, 0.0), source="hotpotqa"),
    ]
    metrics = rollout_metrics(groups)
    assert metrics["em"] == 0.25 and metrics["em/nq"] == 0.5 and metrics["em/hotpotqa"] == 0.0
    assert metrics["mean_searches"] == 0.25
    assert metrics["searches/nq"] == 0.5 and metrics["searches/hotpotqa"] == 0.0
    assert metrics["mean_response_tokens"] == (15 + 5 + 12 + 5) / 4
    assert metrics["policy_tokens"] == 5 + 5 + 6 + 5
    assert metrics["answered_share"] == 0.75
    assert metrics["truncated_share"] == 0.25
    assert metrics["invalid_action_share"] == 1 / 6
    assert metrics["same_reward_share"] == 0.5
    assert metrics["error_share"] == 0.0


def test_a_faulty_trajectory_is_counted_and_changes_nothing_else():
    clean = rollout_metrics([group("1", (SEARCHED, 1.0), (DIRECT, 0.0))])
    faulty = rollout_metrics([group("1", (SEARCHED, 1.0), (FAULTY, 0.0), (DIRECT, 0.0))])
    assert faulty.pop("error_share") == pytest.approx(1 / 3) and clean.pop("error_share") == 0.0
    assert faulty == clean


def test_a_fault_does_not_make_a_group_look_as_if_it_had_a_gradient():
    assert rollout_metrics([group("1", (SEARCHED, 1.0), (FAULTY, 0.0))])["same_reward_share"] == 1.0


def test_a_batch_of_faults_has_an_error_share_and_no_invented_em():
    assert rollout_metrics([group("1", (FAULTY, 0.0))]) == {"error_share": 1.0}


def test_phases_with_the_same_name_add_up_even_when_one_fails():
    times = iter([0.0, 1.0, 5.0, 7.0, 10.0, 14.0])
    phases = Phases(clock=lambda: next(times))
    with phases("rollout"):
        pass
    with phases("train"):
        pass
    with pytest.raises(RuntimeError), phases("rollout"):
        raise RuntimeError
    assert phases.seconds == {"rollout": 5.0, "train": 2.0}


def test_a_step_is_told_in_one_line_without_what_it_did_not_measure():
    line = step_line(
        stage="cycle0/grpo",
        step=7,
        num_steps=200,
        values={"em": 0.4123, "mean_searches": 1.834, "tokens_per_s": 8123.4, "em/nq": 0.3},
        seconds={"rollout": 22.14, "train": 11.0},
    )
    assert line == "cycle0/grpo   7/200  EM 0.412  searches 1.83  tokens/s 8,123  33.1 s (rollout 22.1, train 11.0)"


def test_a_logged_step_is_in_the_file_on_the_screen_and_in_tensorboard(tmp_path):
    log, printed = open_log(tmp_path / "metrics.jsonl")
    step(log, 1, em=0.25, kl=0.001)
    step(log, 2, em=0.5, kl=0.002)
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["stage"], r["step"], r["values"]["em"]) for r in rows] == [
        ("cycle0/grpo", 1, 0.25),
        ("cycle0/grpo", 2, 0.5),
    ]
    assert printed.getvalue().count("\n") == 2 and "KL 0.002" in printed.getvalue()
    events = EventAccumulator(str(tmp_path / "tb" / "cycle0" / "grpo"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("em")] == [(1, 0.25), (2, 0.5)]
    assert events.Scalars("seconds/rollout")[0].value == 2.0


def test_a_value_that_is_not_finite_is_null_in_the_file_and_named_on_the_screen(tmp_path):
    log, printed = open_log(tmp_path / "metrics.jsonl")
    step(log, 1, em=0.5, kl=math.nan, grad_norm=math.inf)
    log.close()
    values = json.loads((tmp_path / "metrics.jsonl").read_text())["values"]
    assert values == {"em": 0.5, "kl": None, "grad_norm": None}
    assert "KL nan  grad norm inf" in printed.getvalue()


def test_a_run_that_was_killed_in_a_line_goes_on_and_its_repeated_steps_count_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log, _ = open_log(path)
    step(log, 1, em=0.1)
    step(log, 2, em=0.2)
    log.close()
    path.write_text(path.read_text() + '{"stage": "cycle0/gr')
    log, printed = open_log(path)
    step(log, 2, em=0.9)
    log.close()
    assert "dropped a line" in printed.getvalue()
    assert [(row["step"], row["values"]["em"]) for row in read_metrics(path)] == [(1, 0.1), (2, 0.9)]


# -- Weights & Biases -----------------------------------------------------------------------------


def test_asking_for_weights_and_biases_without_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install wandb"):
        WandbTracker(project="p", directory=tmp_path, config={})


def test_weights_and_biases_gets_every_step_under_its_stage_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (1, 2):
        tracker = WandbTracker(project="p", directory=tmp_path, config={"grpo": {"lr": 1.0}})
        tracker.log("cycle0/grpo", step, {"em": 0.5})
        ids.append(wandb.run.id)
        assert wandb.run.summary["cycle0/grpo/em"] == 0.5 and wandb.run.config["grpo"] == {"lr": 1.0}
        tracker.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
