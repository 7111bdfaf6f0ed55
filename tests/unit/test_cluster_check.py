"""What a look at the cluster calls wrong."""

from dataclasses import replace
from pathlib import Path

from searche1.cluster_check import Found, main, problems

FIRST = Found(0, "node0", "10.0.0.1", {"torch": "2.13.0", "sglang": "0.5.21"}, "H800, 79 GiB", 8, True)
SECOND = replace(FIRST, rank=8, node="node1", address="10.0.0.2")


def wrong(*found: Found) -> list[str]:
    return problems(list(found), directory=Path("/data/run"), ranks_per_node=8)


def test_nodes_that_agree_have_nothing_to_mend():
    assert wrong(FIRST, replace(FIRST, rank=1), SECOND) == []


def test_another_version_on_a_node_is_told_once():
    old = replace(SECOND, versions={"torch": "2.13.0", "sglang": "0.5.17"})
    (told,) = wrong(FIRST, old, replace(old, rank=9))
    assert "sglang is 0.5.21 on node0 and 0.5.17 on node1" in told and "one environment" in told


def test_a_node_that_does_not_see_the_run_folder_is_told():
    (told,) = wrong(FIRST, replace(SECOND, sees_token=False))
    assert told.startswith("node1 does not see what node0 writes into /data/run")


def test_other_or_too_few_gpus_are_told():
    told = wrong(FIRST, replace(SECOND, gpu="A100, 79 GiB", num_gpus=4))
    assert "rank 8 has A100, 79 GiB, rank 0 H800, 79 GiB" in told[0]
    assert "node1 shows 4 GPUs for 8 ranks" in told[1]


def test_a_single_process_is_sent_to_the_launcher(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main([]) == 2
    assert "scripts/launch.sh --check" in capsys.readouterr().err
