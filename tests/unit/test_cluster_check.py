"""What a look at the cluster calls wrong, and the look itself: two nodes of one rank on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from searche1.cluster_check import Found, main, problems, unreachable

ROOT = Path(__file__).parents[2]
FIRST = Found(
    rank=0,
    node="node0",
    address="10.0.0.1",
    port=40001,
    commit="0123456789ab",
    settings={"NCCL_DEBUG": "WARN"},
    open_files=65536,
    versions={"torch": "2.13.0", "sglang": "0.5.21"},
    gpu="H800, 79 GiB",
    sees_token=True,
)
SECOND = replace(FIRST, rank=8, node="node1", address="10.0.0.2")


def wrong(*found: Found) -> list[str]:
    return problems(found, directory=Path("/data/run"))


def test_nodes_that_agree_have_nothing_to_mend():
    assert wrong(FIRST, replace(FIRST, rank=1), SECOND) == []


def test_another_version_on_a_node_is_told_once():
    old = replace(SECOND, versions={"torch": "2.13.0", "sglang": "0.5.17"})
    (told,) = wrong(FIRST, old, replace(old, rank=9))
    assert "sglang is 0.5.21 on node0 and 0.5.17 on node1" in told and "one environment" in told


def test_other_code_on_a_node_is_told():
    (told,) = wrong(FIRST, replace(SECOND, commit="0123456789ab+"))
    assert "at 0123456789ab on node0 and at 0123456789ab+ on node1" in told


def test_a_setting_that_one_node_lacks_is_told():
    (told,) = wrong(FIRST, replace(SECOND, settings={"NCCL_DEBUG": "WARN", "NCCL_IB_DISABLE": "1"}))
    assert "NCCL_IB_DISABLE is not set on node0 and 1 on node1" in told


def test_a_node_that_does_not_see_the_run_folder_is_told():
    (told,) = wrong(FIRST, replace(SECOND, sees_token=False))
    assert told.startswith("node1 cannot see what node0 writes into /data/run")


def test_other_gpus_are_told():
    (told,) = wrong(FIRST, replace(SECOND, gpu="A100, 79 GiB"))
    assert "rank 8 has A100, 79 GiB, rank 0 H800, 79 GiB" in told


def test_few_open_files_are_told():
    (told,) = wrong(FIRST, replace(SECOND, open_files=1024))
    assert told.startswith("node1 lets a process open 1024 files") and "ulimit -n" in told


def test_an_address_that_nothing_listens_at_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreachable([("127.0.0.1", port)]) == {}
    assert "refused" in unreachable([("127.0.0.1", port)])["127.0.0.1"]


def test_a_single_process_is_sent_to_the_launcher(capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SEARCHE1_STATUS"):
        monkeypatch.delenv(name, raising=False)
    assert main([]) == 2
    assert "scripts/launch.sh --check" in capsys.readouterr().err


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Starts the check with scripts/launch.sh on two nodes, which are this machine; node 1 gets `second` besides."""
    bundle = tmp_path / "bundle"  # an environment that is there already
    (bundle / "site").mkdir(parents=True)
    (bundle / "bin").symlink_to(Path(sys.executable).parent)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def start(*arguments: str, second: dict[str, str]) -> list[subprocess.CompletedProcess[str]]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NCCL_", "SLURM_"))}
        shared = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GPUS": "1"}
        shared |= {"SEARCHE1_BUNDLE": str(bundle), "SEARCHE1_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = ["bash", str(ROOT / "scripts" / "launch.sh"), "--check", *arguments]
        nodes = [
            subprocess.Popen(
                command,
                env={**inherited, **shared, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for own in ({"NODE_RANK": "0"}, {"NODE_RANK": "1", **second})
        ]
        told = [node.communicate(timeout=300) for node in nodes]
        return [subprocess.CompletedProcess([], n.returncode, *out) for n, out in zip(nodes, told, strict=True)]

    return start


@pytest.mark.slow
def test_two_nodes_that_are_set_up_alike_are_called_well(look, tmp_path: Path):
    first, second = look(f"run.out={tmp_path / 'run'}", second={})
    assert first.returncode == 0, first.stderr
    assert "2 ranks" in first.stdout and "all-reduce over gloo" in first.stdout
    assert "all ranks agree, see one run folder and reach one another" in first.stdout
    assert second.returncode == 0 and second.stdout == ""
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_node_that_differs_is_told_without_a_page_of_torchrun(look, tmp_path: Path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"run:\n  out: {tmp_path / 'run'}\n")
    first, second = look(str(config), second={"NCCL_IB_DISABLE": "1"})
    assert first.returncode == second.returncode == 1
    assert "to mend: NCCL_IB_DISABLE is not set" in first.stdout and "Traceback" not in first.stderr
    assert (tmp_path / "run").is_dir()  # the folder that the config names
