"""Where engines run, and which ranks feed them."""

import pytest

from searche1.rollout.engine_process import cores_of_ranks
from searche1.rollout.places import engine_places, own_address
from searche1.types import UserError


def test_engines_fill_the_gpus_of_all_nodes_in_rank_order():
    places = engine_places(count=0, tensor=2, device="cuda", world_size=16, ranks_per_node=8)
    assert [place.lead for place in places] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert places[5].sources == (10, 11)
    assert places[5].device == "cuda:2"  # the third GPU of the second node


def test_fewer_engines_take_the_first_gpus():
    places = engine_places(count=3, tensor=1, device="cuda", world_size=8, ranks_per_node=8)
    assert [(place.lead, place.device) for place in places] == [(0, "cuda:0"), (1, "cuda:1"), (2, "cuda:2")]


@pytest.mark.parametrize(
    ("count", "tensor", "message"),
    [
        (0, 3, "engine.tensor=3 does not divide the 8 GPUs of a node"),
        (0, 16, "engine.tensor=16 does not divide"),
        (5, 4, "engine.count=5 engines of engine.tensor=4 GPUs do not fit the job's 16 GPUs; lower it to 4"),
    ],
)
def test_engines_that_do_not_fit_are_told(count, tensor, message):
    with pytest.raises(UserError, match=message):
        engine_places(count=count, tensor=tensor, device="cuda", world_size=16, ranks_per_node=8)


def test_on_a_cpu_ranks_take_turns_and_an_engine_is_fed_by_its_lead_alone():
    assert len(engine_places(count=0, tensor=1, device="cpu", world_size=4, ranks_per_node=4)) == 1
    places = engine_places(count=3, tensor=2, device="cpu", world_size=2, ranks_per_node=2)
    assert [(place.lead, place.sources) for place in places] == [(0, (0, 0)), (1, (1, 1)), (0, (0, 0))]


def test_one_node_talks_over_the_loopback_and_several_over_an_address_that_reaches_the_master(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert own_address() == "127.0.0.1"  # this master is on this machine


def test_every_rank_of_an_engine_gets_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5, 6, 7})
    assert cores_of_ranks(2) == "0-3|4-7"
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert cores_of_ranks(2) == "0-0|0-0"
