"""scripts/env.sh: an environment is made once, is never half used, and holds only files the lock has the hashes of."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from checkout import FAKE_PYTHON, IDNA, ROOT, TORCH, Checkout


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
    checkout.lock.write_text(IDNA)
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
    checkout.refuse(f"--progress-bar off -r {checkout.venv}/torch.txt")
    result = checkout.make_env()
    assert result.returncode == 0, result.stderr
    assert "PyTorch's CPU index" in result.stderr
    assert checkout.calls() == ["venv", "torch", "torch", "packages", "project"]
    assert (checkout.venv / "torch.txt").read_text() == TORCH


def test_a_changed_hash_makes_the_environment_anew(checkout: Checkout):
    checkout.make_env()
    checkout.calls()
    checkout.lock.write_text(checkout.lock.read_text().replace("1111", "1112"))
    assert checkout.make_env().returncode == 0
    assert checkout.calls() == ["venv", "torch", "packages", "project"]


def test_every_package_of_every_lock_has_a_hash():
    for lock in (ROOT / "requirements").glob("*.txt"):
        pins = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        packages = [line for line in pins if not line.startswith(" ")]
        assert len(packages) > 100
        assert all(line.endswith(" \\") for line in packages), lock.name
        hashes = [line for line in pins if line.startswith(" ")]
        assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes), lock.name


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
