"""The whole program under torchrun: sharded trainers, several engines, engines of several ranks, engines elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import POLICY, ROOT, searche1, settings
from conftest import STRICT

from searche1.rollout.engine import start_engine

pytestmark = pytest.mark.slow

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
FAST = str(ROOT / "configs" / "quickstart-fast.yaml")


def torchrun(num_processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, str(num_processes), "-m", "searche1", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def ems(out: Path) -> dict[str, float]:
    return {stage["name"]: stage["em"] for stage in json.loads((out / "summary.json").read_text())["stages"]}


def test_a_tensor_parallel_trainer_and_engine_learn_what_one_process_learns(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """Every synced weight is compared bit for bit in the engine; sampling is by seed, so rounding alone differs."""
    layout = ("parallel.tensor=2", "engine.tensor=2")
    result = torchrun(2, "quickstart", "--fast", "--out", str(tmp_path / "run"), *STRICT, *layout)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert ems(tmp_path / "run") == pytest.approx(ems(finished[0]), abs=0.02)


def test_pipeline_stages_feed_two_engines_that_different_ranks_lead(
    finished: tuple[Path, str], toy_world: Path, tmp_path: Path
) -> None:
    given = [*settings(toy_world, tmp_path / "run"), *STRICT, "parallel.pipeline=3", "engine.count=2"]
    result = torchrun(3, "eval", "--config", FAST, "--model", str(finished[0] / "final"), *given)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert ems(tmp_path / "run")["eval"] == pytest.approx(ems(finished[0])["cycle0/opsd"], abs=0.02)


def test_an_engine_elsewhere_takes_weights_from_a_folder(
    finished: tuple[Path, str], toy_world: Path, tmp_path: Path
) -> None:
    """It was started with the toy policy, and samples with the final model's weights."""
    with start_engine(
        model_path=POLICY,
        device="cpu",
        dtype="float32",
        tensor=1,
        port=0,
        seed=0,
        mem_fraction=0.2,
        max_total_tokens=60000,
        max_running=128,
        context_length=1000,
        attention_backend="",
        log_path=tmp_path / "engine.log",
    ) as engine:
        engine.wait_until_ready(timeout_s=300)
        given = [*settings(toy_world, tmp_path / "run"), f"engine.urls=[{engine.url}]"]
        result = searche1("eval", "--config", FAST, "--model", str(finished[0] / "final"), *given)
        assert result.returncode == 0, result.stdout + result.stderr
        assert ems(tmp_path / "run")["eval"] == pytest.approx(ems(finished[0])["cycle0/opsd"], abs=0.02)
        engine.stop()
        again = searche1("eval", "--config", FAST, "--model", str(POLICY), *given, f"run.out={tmp_path / 'other'}")
        assert again.returncode == 2 and "was not ready within 10 s" in again.stderr
