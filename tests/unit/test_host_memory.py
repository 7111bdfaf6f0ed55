"""What malloc does with freed memory on a CPU."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from megatron_ext.host_memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.ones(4)
before = resident()
tensor = torch.ones(50_000_000)  # 200 MB
assert resident() - before > 190e6
del tensor
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_what_is_freed_stays_with_the_process_once_it_was_asked_to():
    left = {
        how: int(
            subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, check=True, text=True).stdout
        )
        for how in ("given back", "kept")
    }
    assert left["given back"] < 50e6 and left["kept"] > 190e6
