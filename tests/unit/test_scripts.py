"""The shell scripts: what they refuse and what they promise."""

from __future__ import annotations

import importlib
import os
import runpy
from pathlib import Path

import pytest
from checkout import ROOT, Checkout, run

SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/slurm/*.sbatch"), ROOT / ".ci" / "run"])
WITH_FLAGS = ("quickstart.sh", "gpu_check.sh", "make_gpu_bundle.sh", "launch.sh")


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


def test_the_bench_of_overhead_clocks_methods_that_exist():
    clocked = runpy.run_path(str(ROOT / "tools/bench/overhead.py"))["CLOCKED"]
    for module, kind, methods in clocked.values():
        assert all(hasattr(getattr(importlib.import_module(module), kind), name) for name in methods), (kind, methods)


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


def test_make_lists_its_targets():
    listed = [line.split()[1] for line in run(["make"], ROOT).stdout.splitlines()]
    assert listed == ["help", "quickstart", "test", "lint", "format", "clean"]
