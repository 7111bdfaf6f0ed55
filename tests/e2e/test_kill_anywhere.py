"""The short form of tools/torture.py: a run that loses its parts at random moments ends with the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

pytestmark = pytest.mark.slow


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "tools/torture.py", "--kills", "3", "--out", str(tmp_path / "torture")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout and "1 of 1 ended as the undisturbed one" in result.stdout
