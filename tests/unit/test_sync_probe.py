"""A sync's probe: who computes when, and what is left under way when an engine fails."""

import contextlib
import types

import pytest
import torch

from searche1 import probe as probe_module
from searche1.config import load_config
from searche1.probe import SyncProbe
from searche1.rollout.engine import EngineLost
from searche1.types import UserError

LOGPROBS = [[-1.0, -2.0]]


class FakeEngine:
    def __init__(self, name, events, *, found=LOGPROBS, fault=None):
        self.name, self.events, self.found, self.fault = name, events, found, fault

    def begin_logprobs(self, token_ids):
        assert token_ids == [(1, 2, 3)]
        self.events.append(f"{self.name} asked")
        if self.fault == "asked":
            raise EngineLost(f"{self.name} is gone")

        def wait():
            self.events.append(f"{self.name} read")
            if self.fault == "read":
                raise EngineLost(f"{self.name} is gone")
            return self.found

        return wait


class FakeColocation:
    def __init__(self, events, *, moves):
        self.events, self.keeps_engine_weights = events, not moves

    def to(self, phase, policy):
        self.events.append(phase.value)


def probe_of(events, monkeypatch, *engines, overrides=()):
    @contextlib.contextmanager
    def half():
        events.append("half the cores")
        yield
        events.append("all cores")

    def of_trainer(_, policy):
        events.append("trainer computes")
        return LOGPROBS

    monkeypatch.setattr(probe_module, "half_the_threads", half)
    monkeypatch.setattr(SyncProbe, "_of_trainer", of_trainer)
    layout = types.SimpleNamespace(device=torch.device("cpu"))
    ranks = types.SimpleNamespace(from_writer=lambda work: work(), beat=lambda: None)
    probe = SyncProbe(load_config(overrides=list(overrides)), layout, ranks, engines)
    probe.token_ids = [(1, 2, 3)]
    return probe


POLICY = types.SimpleNamespace(dtype=torch.float32)


def test_where_nothing_moves_engines_compute_while_the_trainer_does(monkeypatch):
    events = []
    engines = [FakeEngine(name, events) for name in ("a", "b")]
    probe = probe_of(events, monkeypatch, *engines)
    probe.prove(POLICY, FakeColocation(events, moves=False))
    together = ["half the cores", "trainer computes", "all cores"]
    assert events == ["rollout", "a asked", "b asked", *together, "a read", "b read"]


def test_engines_elsewhere_need_none_of_our_cores(monkeypatch):
    events = []
    overrides = ["engine.urls=[http://elsewhere:30000]"]
    probe = probe_of(events, monkeypatch, FakeEngine("a", events), overrides=overrides)
    probe.prove(POLICY, FakeColocation(events, moves=False))
    assert events == ["rollout", "a asked", "trainer computes", "a read"]


def test_where_memory_moves_the_trainer_computes_before_it_gives_way(monkeypatch):
    events = []
    probe = probe_of(events, monkeypatch, FakeEngine("a", events))
    probe.prove(POLICY, FakeColocation(events, moves=True))
    assert events == ["trainer computes", "rollout", "a asked", "a read"]


@pytest.mark.parametrize(("fault", "asked"), [("asked", "ab"), ("read", "abc")])
def test_no_engine_is_at_work_when_another_has_failed(monkeypatch, fault, asked):
    """The next attempt writes weights that a forward pass would read."""
    events = []
    engines = [FakeEngine("a", events), FakeEngine("b", events, fault=fault), FakeEngine("c", events)]
    probe = probe_of(events, monkeypatch, *engines)
    with pytest.raises(EngineLost, match="b is gone"):
        probe.prove(POLICY, FakeColocation(events, moves=False))
    assert [e[0] for e in events if e.endswith(" asked")] == list(asked)
    assert {e[0] for e in events if e.endswith(" read")} == set(asked) - ({"b"} if fault == "asked" else set())


@pytest.mark.parametrize("found", [[[-1.0, -2.1]], [[-1.0, float("nan")]]])
def test_an_engine_with_other_logprobs_stops_the_run(monkeypatch, found):
    events = []
    probe = probe_of(events, monkeypatch, FakeEngine("a", events), FakeEngine("b", events, found=found))
    with pytest.raises(UserError, match=r"engine 1 and the trainer differ by .* more than 1e-04; the weights did not"):
        probe.prove(POLICY, FakeColocation(events, moves=False))
