"""What malloc does with freed memory on a CPU, and OpenMP with a fork."""

import subprocess
import sys

import pytest

from searche1.runs import share_of_cores

PROGRAM = """
import sys
from pathlib import Path
import torch
from megatron_ext.host import keep_freed_memory

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


FORK = """
import os, sys, torch
from megatron_ext.host import use_threads

if sys.argv[1] == "ours":
    use_threads(2)
else:
    torch.set_num_threads(2)
x = torch.ones(1_000_000)
assert float((x + 1).sum()) == 2e6 and torch.get_num_threads() == 2
child = os.fork()
if not child:
    os._exit(0 if float((x + 1).sum()) == 2e6 and torch.get_num_threads() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.get_num_threads() == 2
"""


def test_a_fork_of_a_process_with_threads_computes_on_one():
    subprocess.run([sys.executable, "-c", FORK, "ours"], check=True, timeout=60)


HALF = """
import sys, torch
from megatron_ext import blas
from megatron_ext.host import half_the_threads, use_threads

count, half = map(int, sys.argv[1:])
use_threads(count)
has_openblas = blas.multiply_by_openblas()  # not on every machine

def used():
    return {torch.get_num_threads(), *([blas.library().scipy_openblas_get_num_threads()] if has_openblas else [])}

try:
    with half_the_threads():
        assert used() == {half}, used()
        raise KeyError
except KeyError:
    assert used() == {count}, used()
"""


@pytest.mark.parametrize(("count", "half"), [("1", "1"), ("2", "1"), ("5", "2")])
def test_half_the_threads_are_left_to_another_and_come_back(count, half):
    subprocess.run([sys.executable, "-c", HALF, count, half], check=True, timeout=60)


@pytest.mark.parametrize(("ranks", "cores", "share"), [(None, 8, 8), ("2", 8, 4), ("3", 8, 2), ("4", 2, 1)])
def test_ranks_of_a_machine_share_its_cores(monkeypatch, ranks, cores, share):
    monkeypatch.setattr("searche1.runs.num_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert share_of_cores() == share
