"""A checkout whose scripts run for real with a fake Python that writes down what it was asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
IDNA, TORCH = (
    f"{pin} \\\n    --hash=sha256:{'1' * 64} \\\n    --hash=sha256:{'2' * 64}\n"
    for pin in ("idna==3.20", "torch==2.13.0+cpu")
)

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
        self.lock.write_text(f"# a comment\n{IDNA}{TORCH}")
        self.setup = self.root / "setup.py"
        self.setup.write_text("# version 1\n")
        self.kernels = self.root / "megatron_ext" / "vocab_parallel" / "rows.cpp"
        self.kernels.parent.mkdir(parents=True)
        self.kernels.write_text("// version 1\n")
        for other in ("megatron_ext/vectors.h", "megatron_ext/layers.cpp", "searche1/rollout/engine_ops.cpp"):
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
            "torch" if "torch.txt" in line else "packages" if " -r " in line else "project" if " -e " in line else line
            for line in lines
        ]
