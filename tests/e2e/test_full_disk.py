"""A run directory on a disk that is really full: a tmpfs of a few megabytes in a mount namespace of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, settings

pytestmark = pytest.mark.slow

SCRIPT = """
set -u
mount -t tmpfs -o size=5m none "$DISK"
"$@" > "$LOGS/full.out" 2> "$LOGS/full.err"
echo $? > "$LOGS/full.rc"
ls "$DISK/run/grpo" "$DISK/run/grpo/checkpoints" > "$LOGS/full.files"
mount -o remount,size=500m "$DISK"
"$@" > "$LOGS/again.out" 2> "$LOGS/again.err"
echo $? > "$LOGS/again.rc"
ls -R "$DISK/run/grpo" > "$LOGS/again.files"
"""


def namespace() -> list[str]:
    """The command that may mount in a namespace of its own here."""
    for options in (["-m"], ["-r", "-m"]):
        command = ["unshare", *options]
        probe = [*command, "sh", "-c", "mount -t tmpfs none /mnt"]
        if shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0:
            return command
    pytest.skip("this machine lets nobody mount a small disk (unshare -m)")


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(toy_world: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    config = ["--config", str(ROOT / "configs" / "quickstart-fast.yaml"), *settings(toy_world, disk / "run")]
    sizes = ["grpo.steps=3", "grpo.prompts_per_step=8", "grpo.save_every=1", "cycle.evaluate_stages=false"]
    command = [sys.executable, "-m", "searche1", "grpo", *config, *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DISK": str(disk), "LOGS": str(tmp_path)}
    subprocess.run([*namespace(), "bash", "-c", SCRIPT, "bash", *command], env=environment, timeout=400, check=True)

    def seen(name: str) -> str:
        return (tmp_path / name).read_text()

    assert seen("full.rc").strip() == "2", seen("full.out") + seen("full.err")
    assert "No space left on device" in seen("full.err") and "run the same command again" in seen("full.err")
    assert "Traceback" not in seen("full.err") + seen("full.out")
    assert "rollouts\n" in seen("full.files") and not re.search(r"^step_\d+$", seen("full.files"), re.MULTILINE)
    assert seen("again.rc").strip() == "0", seen("again.out") + seen("again.err")
    assert "grpo 3/3" in seen("again.out") and "model.safetensors" in seen("again.files")
