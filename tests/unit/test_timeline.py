import json

import pytest

from searche1.metrics import Phases
from searche1.timeline import Timeline, merge_traces, read_trace


def ticking(*times):
    times = iter(times)
    return lambda: next(times)


def named(path):
    return {event["name"]: event for event in read_trace(path)}


def test_blocks_become_events_of_their_rank_also_when_they_fail(tmp_path):
    timeline = Timeline(tmp_path, rank=3, clock=ticking(10.0, 10.5, 12.0, 13.0))
    with timeline("outer", step=7), pytest.raises(RuntimeError), timeline("inner"):
        raise RuntimeError
    events = named(tmp_path / "trace" / "rank3.json")
    outer, inner = events["outer"], events["inner"]
    assert (outer["ts"], outer["dur"], outer["pid"], outer["args"]) == (10_000_000, 3_000_000, 3, {"step": 7})
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert events["process_name"]["args"]["name"] == "rank 3"


def test_a_run_that_goes_on_after_a_kill_has_a_trace_of_both_starts(tmp_path):
    path = tmp_path / "trace" / "rank0.json"
    Timeline(tmp_path, rank=0).add("one", 1.0, 2.0)
    path.write_text(path.read_text() + ',\n{"name": "cut", "ph"')
    Timeline(tmp_path, rank=0).add("two", 3.0, 4.0)
    assert {"one", "two"} <= named(path).keys() and "cut" not in named(path)


def test_a_file_is_json_once_its_bracket_is_closed(tmp_path):
    Timeline(tmp_path, rank=0).add("one", 1.0, 2.0)
    assert len(json.loads((tmp_path / "trace" / "rank0.json").read_text() + "]")) == 2


def test_traces_of_all_ranks_become_one(tmp_path):
    assert merge_traces(tmp_path) is None
    for rank in (0, 1):
        Timeline(tmp_path, rank=rank).add("train", 1.0, 2.0)
    merged = json.loads(merge_traces(tmp_path).read_text())["traceEvents"]
    assert {event["pid"] for event in merged if event["name"] == "train"} == {0, 1}


def test_phases_of_a_step_are_on_the_timeline(tmp_path):
    phases = Phases(timeline=Timeline(tmp_path, rank=0), stage="cycle0/grpo", step=4)
    with phases("rollout"):
        pass
    event = named(tmp_path / "trace" / "rank0.json")["rollout"]
    assert event["args"] == {"stage": "cycle0/grpo", "step": 4}
    assert event["dur"] == pytest.approx(1e6 * phases.seconds["rollout"], abs=20_000)
