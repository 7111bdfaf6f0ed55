"""The launchers of cycles, on one node, on several, and under Slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time

import pytest
from checkout import ROOT, Checkout

CYCLES = {"3b": 1, "7b": 2, "14b": 2, "32b": 4, "72b": 8, "30b_a3b": 4}  # nodes


def launch(checkout: Checkout, *arguments: str, script: str = "launch.sh", **variables: str):
    return checkout.run("bash", str(checkout.root / "scripts" / script), *arguments, **variables)


def torchrun(checkout: Checkout, body: str) -> None:
    """Puts a torchrun into the environment that does no more than `body`."""
    path = checkout.venv / "bin" / "torchrun"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("size", CYCLES)
def test_every_cycle_starts_its_config_on_its_number_of_nodes(size: str, checkout: Checkout):
    nodes = CYCLES[size]
    where = {"NODES": str(nodes), "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"} if nodes > 1 else {}
    result = launch(checkout, "--dry-run", "grpo.steps=3", script=f"run_{size}_cycle.sh", **where)
    assert result.returncode == 0, result.stderr
    command = result.stdout.splitlines()[-1]
    config = command.partition("--config ")[2].split()[0]
    assert (ROOT / config).is_file() and command.endswith(" grpo.steps=3")
    assert f"--nproc-per-node 8 -m searche1 cycle --config {config}" in command
    assert (f"--nnodes {nodes} " in command) == (nodes > 1) and ("--standalone" in command) == (nodes == 1)


@pytest.mark.parametrize("stage", ["grpo", "opsd"])
def test_a_stage_alone_is_started_in_the_same_way(stage: str, checkout: Checkout):
    given = ("--stage", stage, "--dry-run", "configs/qwen2.5-3b.yaml", "run.out=runs/one")
    result = launch(checkout, *given)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"-m searche1 {stage} --config configs/qwen2.5-3b.yaml run.out=runs/one\n")
    wrong = launch(checkout, "--stage", "sft", "configs/qwen2.5-3b.yaml")
    assert wrong.returncode == 2 and "--stage is 'sft', it must be grpo or opsd" in wrong.stderr


def test_a_config_for_two_nodes_on_one_says_how_to_start_it(checkout: Checkout):
    result = launch(checkout, script="run_7b_cycle.sh")
    assert result.returncode == 2 and checkout.calls() == []
    for words in ("made for 2 nodes", "NODES=2 NODE_RANK=0 MASTER_ADDR=", "sbatch --nodes 2", "NODES=1"):
        assert words in result.stderr
    alone = launch(checkout, "--dry-run", script="run_7b_cycle.sh", NODES="1", GPUS="4")
    assert "--standalone --max-restarts 3 --nproc-per-node 4 " in alone.stdout


def test_slurm_says_where_a_node_is(checkout: Checkout):
    checkout.program("scontrol", '#!/bin/sh\n[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"\n')
    job = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_LOCALID": "0"}
    result = launch(checkout, "--dry-run", script="run_7b_cycle.sh", SLURM_STEP_NUM_NODES="2", **job)
    expected = "--nnodes 2 --node-rank 1 --master-addr gpu3 --master-port 29500 --max-restarts 0 --nproc-per-node 8"
    assert expected in result.stdout
    batch_shell = launch(checkout, script="run_7b_cycle.sh", **job)
    assert batch_shell.returncode == 2 and "srun --ntasks-per-node=1" in batch_shell.stderr
    two_tasks = launch(checkout, script="run_7b_cycle.sh", **job | {"SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"})
    assert two_tasks.returncode == 2 and "several tasks on this node" in two_tasks.stderr
    by_hand = {"NODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1234"}
    result = launch(checkout, "--dry-run", script="run_7b_cycle.sh", SLURM_STEP_NUM_NODES="2", **job, **by_hand)
    assert "--nnodes 3 --node-rank 2 --master-addr 10.0.0.9 --master-port 1234" in result.stdout


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NODES": "2", "MASTER_ADDR": "a"}, "NODES=2 needs NODE_RANK"),
        ({"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 must be a number from 0 to 1"),
        ({"NODES": "2", "NODE_RANK": "0"}, "NODES=2 needs MASTER_ADDR"),
        ({"NODES": "two"}, "NODES=two must be a whole number"),
        ({"NODE_RANK": "1"}, "NODES does not say of how many"),
        ({"GPUS": "0"}, "GPUS=0 must be a whole number above 0"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "cannot be handed to an engine"),
    ],
)
def test_a_place_that_makes_no_sense_is_told_before_anything_is_made(variables, said, checkout: Checkout):
    result = launch(checkout, "configs/qwen2.5-3b.yaml", **variables)
    assert result.returncode == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert checkout.calls() == []


def test_fewer_gpus_than_processes_are_told_before_anything_is_made(checkout: Checkout):
    checkout.program("nvidia-smi", '#!/bin/sh\nfor gpu in 0 1 2 3; do echo "GPU $gpu: a card"; done\n')
    result = launch(checkout, "configs/qwen2.5-3b.yaml")
    assert result.returncode == 2 and "has 4 to use; set GPUS=4" in result.stderr
    hidden = launch(checkout, "configs/qwen2.5-3b.yaml", GPUS="4", CUDA_VISIBLE_DEVICES="0,2")
    assert hidden.returncode == 2 and "has 2 to use; set GPUS=2" in hidden.stderr
    assert checkout.calls() == []


def test_a_taken_port_is_told_on_the_node_that_needs_it(checkout: Checkout):
    checkout.make_env()
    torchrun(checkout, "echo started")
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = {"NODES": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "GPUS": "1"}
        refused = launch(checkout, "configs/qwen2.5-3b.yaml", NODE_RANK="0", **where)
        assert refused.returncode == 2 and "is taken" in refused.stderr and "MASTER_PORT" in refused.stderr
        assert launch(checkout, "configs/qwen2.5-3b.yaml", NODE_RANK="1", **where).stdout == "started\n"


def test_ctrl_c_reaches_torchrun_and_its_exit_status_is_the_launchers(checkout: Checkout):
    checkout.make_env()
    torchrun(checkout, "trap 'echo stopping; exit 7' INT; echo up; while :; do sleep 0.05; done")
    command = ["bash", str(checkout.root / "scripts" / "launch.sh"), "configs/qwen2.5-3b.yaml"]
    env = {**os.environ, "PATH": f"{checkout.fakes}:{os.environ['PATH']}", "SEARCHE1_DEVICE": "cpu"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)  # to the launcher alone: what torchrun gets is what it passes on
        assert process.communicate(timeout=30)[0] == "stopping\n" and process.returncode == 7


def test_a_users_own_variable_wins(checkout: Checkout):
    result = launch(checkout, "--dry-run", "configs/qwen2.5-3b.yaml", NCCL_DEBUG="INFO")
    assert result.stdout.splitlines()[:2] == ["CUDA_DEVICE_MAX_CONNECTIONS=1", "NCCL_DEBUG=INFO"]


def test_a_config_beside_the_caller_keeps_its_path(checkout: Checkout):
    (checkout.root.parent / "mine.yaml").touch()
    result = launch(checkout, "--dry-run", "mine.yaml")
    assert f"--config {checkout.root.parent}/mine.yaml" in result.stdout


def test_other_nodes_wait_for_the_environment_of_node_0(checkout: Checkout):
    """They make nothing; what they wait for is there already here."""
    assert checkout.make_env().returncode == 0
    checkout.calls()
    torchrun(checkout, 'echo "wait=$SEARCHE1_WAIT" "$@"')
    where = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "GPUS": "1"}
    result = launch(checkout, "configs/quickstart.yaml", **where)
    assert result.returncode == 0 and result.stdout.startswith("wait=1 --nnodes 2 --node-rank 1"), result.stderr
    assert checkout.calls() == []
    (checkout.venv / ".searche1").unlink()
    checkout.program("sleep", "#!/bin/sh\nkill -TERM $PPID\n")
    waiting = launch(checkout, "configs/quickstart.yaml", **where)
    assert waiting.returncode != 0 and "waiting for node 0 to make the environment" in waiting.stderr
    assert checkout.calls() == []


@pytest.fixture
def job(checkout: Checkout) -> dict[str, str]:
    """A Slurm job's variables on two nodes. Its programs say what they got, then run $FAKE/NAME.body if it is there."""
    for name in ("srun", "scancel", "scontrol"):
        body = f'if [ -f "$FAKE/{name}.body" ]; then source "$FAKE/{name}.body"; fi'
        checkout.program(name, f'#!/usr/bin/env bash\necho "{name} $*"\n{body}\n')
    variables = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "4"}
    return {**variables, "SLURM_SUBMIT_DIR": str(checkout.root)}


def test_a_job_starts_a_launcher_on_each_node_with_all_its_cpus(checkout: Checkout, job: dict[str, str]):
    (checkout.fakes / "srun.body").write_text('echo "$NODES nodes, $GPUS GPUs"; exit 3')
    result = launch(checkout, "c.yaml", "grpo.steps=2", script="slurm/cycle.sbatch", **job)
    assert result.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1 --cpus-per-task=64 bash scripts/launch.sh c.yaml grpo.steps=2",
        "2 nodes, 4 GPUs",
    ]
    assert result.returncode == 3  # and a run that failed is not queued again


def test_a_job_whose_time_is_up_stops_its_ranks_and_goes_back_into_the_queue(checkout: Checkout, job: dict[str, str]):
    # The batch shell is srun's parent. Slurm's TERM ends the step, which takes a while.
    (checkout.fakes / "srun.body").write_text(
        "kill -USR1 $PPID; until [ -e $FAKE/interrupted ]; do sleep 0.05; done; sleep 0.3; echo stopped; exit 130"
    )
    (checkout.fakes / "scancel.body").write_text("touch $FAKE/interrupted")
    result = launch(checkout, "c.yaml", script="slurm/cycle.sbatch", **job)
    assert result.stdout.splitlines()[1:] == ["scancel --signal=TERM 7", "stopped", "scontrol requeue 7"]
    assert "back into the queue" in result.stderr


def test_a_job_that_finishes_just_in_time_is_not_queued_again(checkout: Checkout, job: dict[str, str]):
    (checkout.fakes / "srun.body").write_text("kill -USR1 $PPID; sleep 0.5; exit 0")
    result = launch(checkout, "c.yaml", script="slurm/cycle.sbatch", **job)
    assert result.returncode == 0 and "scontrol" not in result.stdout


def test_a_machine_without_gpus_is_told_how_to_do_without(checkout: Checkout):
    result = launch(checkout, "configs/qwen2.5-3b.yaml")
    assert result.returncode == 2 and "SEARCHE1_DEVICE=cpu" in result.stderr and checkout.calls() == []


def test_a_step_that_skips_the_jobs_first_node_meets_on_its_own(checkout: Checkout):
    checkout.program("scontrol", '#!/bin/sh\n[ "$*" = "show hostnames n[2-3]" ] && printf "n2\\nn3\\n"\n')
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "n[2-3]", "SLURM_JOB_ID": "123456"}
    result = launch(checkout, "--dry-run", "configs/qwen2.5-3b.yaml", SLURM_JOB_NODELIST="n[1-3]", **step)
    assert "--master-addr n2 --master-port 23456 " in result.stdout, result.stderr


def test_a_job_waits_for_the_address_of_a_retriever(checkout: Checkout, job: dict[str, str]):
    checkout.program("sleep", f"#!/bin/sh\necho http://cpu1:8000 >'{checkout.root}/retriever.url'\n")
    result = launch(checkout, "c.yaml", script="slurm/cycle.sbatch", RETRIEVER_FILE="retriever.url", **job)
    assert result.stdout.endswith("c.yaml retriever.url=http://cpu1:8000\n"), result.stderr
    assert result.stderr.count("waiting for a retriever") == 1
    (checkout.root / "retriever.url.token").write_text("secret")
    result = launch(checkout, "c.yaml", script="slurm/cycle.sbatch", RETRIEVER_FILE="retriever.url", **job)
    assert result.stdout.endswith("8000 retriever.token_file=retriever.url.token\n") and "secret" not in result.stdout


def test_the_retrievers_address_is_in_its_file_while_it_answers(checkout: Checkout, job: dict[str, str]):
    checkout.make_env()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    (checkout.root / "health").touch()
    retriever = checkout.venv / "bin" / "searche1"
    retriever.write_text(f'#!/bin/sh\necho "$*" >&2\nexec python3 -m http.server {port} --bind 127.0.0.1\n')
    url_file = checkout.root / "runs" / "retriever.url"
    url_file.parent.mkdir()
    url_file.write_text("http://gone:8000\n")  # of a job that was killed
    command = ["bash", str(checkout.root / "scripts" / "slurm" / "retriever.sbatch"), "corpus", "index", str(url_file)]
    env = {**os.environ, **job, "PATH": f"{checkout.fakes}:{os.environ['PATH']}", "PORT": port, "SEARCHE1_VENV": ""}
    with subprocess.Popen([*command, "--topk", "5"], env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        asked = process.stderr.readline()
        start = f"retriever --corpus corpus --index index --host 0.0.0.0 --port {port} --threads 0"
        assert asked == f"{start} --token-file {url_file}.token --topk 5\n"
        while not url_file.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        assert url_file.read_text().strip().endswith(f":{port}") and "gone" not in url_file.read_text()
        process.terminate()  # as Slurm does when the time is up
        process.wait(timeout=30)
    assert not url_file.exists()


def test_a_job_sent_from_elsewhere_says_where_to_send_it_from(checkout: Checkout, job: dict[str, str]):
    elsewhere = launch(checkout, "c.yaml", script="slurm/cycle.sbatch", **job | {"SLURM_SUBMIT_DIR": "/"})
    assert elsewhere.returncode == 2 and elsewhere.stdout == "" and "no checkout" in elsewhere.stderr


@pytest.mark.parametrize("name", ["cycle.sbatch", "retriever.sbatch"])
def test_a_job_file_outside_slurm_says_how_it_is_submitted(name: str, checkout: Checkout):
    result = launch(checkout, "a", "b", "c", script=f"slurm/{name}")
    assert result.returncode != 0 and "sbatch" in result.stderr and checkout.calls() == []
