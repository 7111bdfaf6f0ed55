"""The shell scripts: what they refuse, what they promise, and that an environment is never half used.

The environment tests run the real scripts/env.sh with a fake Python that writes down what it was asked to do.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/slurm/*.sbatch"), ROOT / ".ci" / "run"])
WITH_FLAGS = ("quickstart.sh", "gpu_check.sh", "make_gpu_bundle.sh", "launch.sh")
CYCLES = {"3b": 1, "7b": 2, "14b": 2, "32b": 4, "72b": 8, "30b_a3b": 4}  # nodes

# Answers the version question, makes "environments" with a copy of itself, and refuses what $FAKE/refuse holds.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
-c*) echo 3.11 ;;
"-m venv "*) echo "venv" >>"$FAKE/calls"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip install "*)
    echo "pip ${*:5}" >>"$FAKE/calls"
    if [ -s "$FAKE/refuse" ] && [[ "$*" == *"$(cat "$FAKE/refuse")"* ]]; then echo "ERROR: refused"; exit 1; fi
    bin=$(dirname "$0")
    printf '#!/bin/sh\nfor word; do echo "[$word]"; done\n' >"$bin/searche1"
    chmod +x "$bin/searche1" ;;
esac
"""


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs with `variables` and no setting of the caller's that changes what the scripts do."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SEARCHE1_", "OMP_", "NCCL_", "CUDA_", "SLURM_", "MASTER_", "PYTORCH_"))
        and name not in ("NODES", "NODE_RANK", "GPUS")
    }
    env = {**inherited, **variables}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


class Checkout:
    """A checkout with a two-package lock and a fake Python, in a folder whose name has a space."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "requirements").mkdir()
        self.lock = self.root / "requirements" / "cpu.txt"
        self.lock.write_text("# a comment\nidna==3.20\ntorch==2.13.0+cpu\n")
        self.setup = self.root / "setup.py"
        self.setup.write_text("# version 1\n")
        self.kernels = self.root / "megatron_ext" / "vocab_parallel" / "rows.cpp"
        self.kernels.parent.mkdir(parents=True)
        self.kernels.write_text("// version 1\n")
        for other in ("megatron_ext/vectors.h", "searche1/rollout/engine_ops.cpp"):
            (self.root / other).parent.mkdir(parents=True, exist_ok=True)
            (self.root / other).write_text("// version 1\n")
        self.fakes = folder / "fake"
        self.fakes.mkdir()
        self.python = self.program("python3.11", FAKE_PYTHON)
        self.program("df", "#!/bin/sh\necho; echo disk 0 0 104857600\n")  # 100 GB free
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.venv = self.root / ".venv"

    def program(self, name: str, text: str) -> Path:
        """Puts a program on the scripts' PATH, before the machine's own."""
        path = self.fakes / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs from a directory that is not the checkout."""
        path = f"{self.fakes}:{os.environ['PATH']}"
        fixed = {"PATH": path, "FAKE": str(self.fakes), "SEARCHE1_PYTHON": str(self.python)}
        return run(list(command), self.root.parent, **{**fixed, **variables})

    def make_env(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", str(self.root / "scripts" / "env.sh"), **variables)

    def refuse(self, text: str) -> None:
        (self.fakes / "refuse").write_text(text)

    def calls(self) -> list[str]:
        """What the fake Python was asked since the last look: "venv", "packages", "project" or "torch"."""
        log = self.fakes / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [
            "packages" if " -r " in line else "project" if " -e " in line else "torch" if "torch==" in line else line
            for line in lines
        ]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash_and_can_be_executed(script: Path):
    assert run(["bash", "-n", str(script)], ROOT).stderr == ""
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_an_unknown_flag_is_refused_in_one_line_before_anything_is_made(name: str, checkout: Checkout):
    result = checkout.run("bash", str(checkout.root / "scripts" / name), "--fsat")
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert "--fsat" in result.stderr and "--help" in result.stderr
    assert checkout.calls() == [] and not checkout.venv.exists()


@pytest.mark.parametrize("name", [*WITH_FLAGS, "test.sh"])
def test_help_needs_no_environment(name: str, checkout: Checkout):
    result = checkout.run("bash", str(checkout.root / "scripts" / name), "--help")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: scripts/{name}")
    assert checkout.calls() == [] and not checkout.venv.exists()


@pytest.mark.parametrize("flags", ["--seed", "--seed one", "--seed=-1", "--device tpu", "--out=", "x"])
def test_quickstart_refuses_a_flag_without_a_fitting_value(flags: str, checkout: Checkout):
    result = checkout.run("bash", str(checkout.root / "scripts" / "quickstart.sh"), *flags.split())
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert checkout.calls() == []


def test_quickstart_makes_the_environment_and_hands_its_arguments_to_one_command(checkout: Checkout):
    script = str(checkout.root / "scripts" / "quickstart.sh")
    result = checkout.run("bash", script, "--fast", "--seed=7", "--device", "cpu", "--new", "grpo.steps=2")
    assert result.returncode == 0, result.stderr
    words = ["quickstart", "--fast", "--seed", "7", "--device", "cpu", "--new", "grpo.steps=2"]
    assert result.stdout.splitlines() == [f"[{word}]" for word in words]


def test_a_relative_run_folder_is_the_callers(checkout: Checkout, tmp_path: Path):
    script = str(checkout.root / "scripts" / "quickstart.sh")
    from_beside = checkout.run("bash", script, "--out", "my run")
    assert from_beside.stdout.splitlines() == ["[quickstart]", "[--out]", f"[{tmp_path}/my run]"]
    from_within = checkout.run("bash", "-c", "cd 'a checkout' && scripts/quickstart.sh --out 'my run'")
    assert from_within.stdout.splitlines() == ["[quickstart]", "[--out]", "[my run]"]


def test_the_environment_is_made_once(checkout: Checkout):
    first = checkout.make_env()
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout.venv}\n"
    assert "installing 2 packages" in first.stderr
    assert checkout.calls() == ["venv", "torch", "packages", "project"]
    second = checkout.make_env()
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert checkout.calls() == []


def test_an_install_that_broke_off_is_done_again_from_the_start(checkout: Checkout):
    checkout.refuse("-r ")
    broken = checkout.make_env()
    assert broken.returncode == 1 and broken.stdout == ""
    assert "ERROR: refused" in broken.stderr and "install.log" in broken.stderr
    (checkout.venv / "half a package").touch()
    checkout.refuse("")
    checkout.calls()
    assert checkout.make_env().returncode == 0
    assert checkout.calls() == ["venv", "torch", "packages", "project"]
    assert not (checkout.venv / "half a package").exists()


def test_a_changed_lock_makes_the_environment_anew_and_a_changed_setup_only_installs_the_project(checkout: Checkout):
    checkout.make_env()
    checkout.calls()
    checkout.setup.write_text("# version 2\n")
    assert checkout.make_env().returncode == 0
    assert checkout.calls() == ["project"]
    checkout.kernels.write_text("// version 2\n")  # they are compiled when the project is installed
    assert checkout.make_env().returncode == 0
    assert checkout.calls() == ["project"]
    checkout.lock.write_text("idna==3.20\n")
    assert checkout.make_env().returncode == 0
    assert checkout.calls() == ["venv", "packages", "project"]


def test_a_checkout_that_moved_gets_a_new_environment(checkout: Checkout):
    checkout.make_env()
    checkout.calls()
    moved = checkout.root.rename(checkout.root.with_name("moved"))
    result = checkout.run("bash", str(moved / "scripts" / "env.sh"))
    assert result.stdout == f"{moved}/.venv\n"
    assert checkout.calls() == ["venv", "torch", "packages", "project"]


def test_cpu_torch_comes_from_pytorch_where_the_configured_sources_lack_it(checkout: Checkout):
    checkout.refuse("--progress-bar off torch==2.13.0+cpu")
    result = checkout.make_env()
    assert result.returncode == 0, result.stderr
    assert "PyTorch's CPU index" in result.stderr
    assert checkout.calls() == ["venv", "torch", "torch", "packages", "project"]


def test_a_folder_that_somebody_else_made_is_left_alone(checkout: Checkout):
    checkout.venv.mkdir()
    (checkout.venv / "precious").touch()
    result = checkout.make_env()
    assert result.returncode == 1 and "did not make it" in result.stderr
    assert [path.name for path in checkout.venv.iterdir()] == ["precious"]


def test_a_python_of_another_version_is_refused_with_a_way_out(checkout: Checkout):
    checkout.program("python3.11", FAKE_PYTHON.replace("echo 3.11", "echo 3.9"))
    result = checkout.make_env()
    assert result.returncode == 1
    assert "needs Python 3.11" in result.stderr and "SEARCHE1_PYTHON=" in result.stderr


def test_a_gpu_asked_for_where_none_is_listed_is_refused(checkout: Checkout):
    result = checkout.make_env(SEARCHE1_DEVICE="cuda")
    assert result.returncode == 1 and "lists no GPU" in result.stderr
    assert checkout.calls() == []


def test_a_gpu_brings_the_gpu_lock_and_its_python(checkout: Checkout):
    checkout.program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: a card'\n")
    shutil.copy(ROOT / "requirements" / "gpu-sglang0.5.21-py312.txt", checkout.root / "requirements")
    result = checkout.make_env()
    assert result.returncode == 1
    assert "gpu-sglang0.5.21-py312.txt needs Python 3.12" in result.stderr and "--device cpu" in result.stderr


def test_too_small_a_disk_is_told_before_the_download(checkout: Checkout):
    checkout.program("df", "#!/bin/sh\necho; echo disk 0 0 1048576\n")
    result = checkout.make_env()
    assert result.returncode == 1
    assert "needs 4 GB" in result.stderr and "has 1 GB free" in result.stderr
    assert checkout.calls() == []


def test_two_shells_at_once_install_once(checkout: Checkout):
    checkout.program("python3.11", FAKE_PYTHON.replace("echo 3.11", "sleep 0.5; echo 3.11"))
    script = f"bash '{checkout.root}/scripts/env.sh'"
    result = checkout.run("bash", "-c", f"{script} & {script}; first=$?; wait $! && exit $first")
    assert result.returncode == 0 and result.stdout == f"{checkout.venv}\n" * 2, result.stderr
    assert checkout.calls() == ["venv", "torch", "packages", "project"]


def test_a_disk_without_locks_is_told_and_used(checkout: Checkout):
    checkout.program("flock", "#!/bin/sh\necho 'flock: 9: No locks available' >&2\nexit 71\n")
    result = checkout.make_env()
    assert result.returncode == 0 and "knows no locks" in result.stderr and "No locks available" not in result.stderr
    assert checkout.calls() == ["venv", "torch", "packages", "project"]


def test_sourcing_activates_and_keeps_a_chosen_number_of_threads(checkout: Checkout):
    command = f'source "{checkout.root}/scripts/env.sh" && command -v searche1 && echo "$OMP_NUM_THREADS"'
    assert checkout.run("bash", "-c", command).stdout.splitlines() == [f"{checkout.venv}/bin/searche1", "1"]
    assert checkout.run("bash", "-c", command, OMP_NUM_THREADS="6").stdout.splitlines()[-1] == "6"


def test_a_failed_environment_does_not_end_the_shell_that_sources_it(checkout: Checkout):
    checkout.refuse("-r ")
    command = f'source "{checkout.root}/scripts/env.sh" || echo "still here"'
    assert checkout.run("bash", "-c", command).stdout == "still here\n"


def test_a_bundle_runs_the_checkout_on_the_python_that_is_there(checkout: Checkout, tmp_path: Path):
    (tmp_path / "bundle" / "site").mkdir(parents=True)
    command = f'source "{checkout.root}/scripts/env.sh" && echo "$PYTHONPATH"'
    result = checkout.run("bash", "-c", command, SEARCHE1_BUNDLE="bundle", PYTHONPATH="")
    assert result.stdout == f"{tmp_path}/bundle/site:{checkout.root}\n"
    assert checkout.calls() == []
    missing = checkout.run("bash", "-c", command, SEARCHE1_BUNDLE="elsewhere")
    assert missing.returncode == 1 and "site/" in missing.stderr


def test_make_lists_its_targets():
    listed = [line.split()[1] for line in run(["make"], ROOT).stdout.splitlines()]
    assert listed == ["help", "quickstart", "test", "lint", "format", "clean"]


# -- launchers ------------------------------------------------------------------------------------


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
