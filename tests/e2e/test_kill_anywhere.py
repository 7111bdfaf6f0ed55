"""The short form of tools/torture.py: a run that loses its parts at random moments ends with the same bits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    kinds = ["driver", "engine", *(["clock"] if shutil.which(os.environ.get("CC", "cc")) else [])]
    command = [sys.executable, "tools/torture.py", "--kills", str(len(kinds)), "--only", *kinds]
    command += ["--out", str(tmp_path / "torture"), "--json", str(tmp_path / "figures.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["kills"] == dict.fromkeys(kinds, 1) and figures["same"] == figures["runs"] > 0
