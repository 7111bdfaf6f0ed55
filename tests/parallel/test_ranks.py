"""What one rank finds out, all ranks know; and a rank that hangs is found out too."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKER = """
import sys, time
from megatron_ext.parallel import close_parallel, init_parallel
from searche1.ranks import Ranks
from searche1.types import UserError

layout = init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
ranks = Ranks(layout, timeout_s=2.0)



def say(*words):
    sys.stdout.write(" ".join(map(str, [layout.rank, *words])) + "\\n")  # at once: ranks share the terminal
    sys.stdout.flush()


def work(seconds, *, beats):
    def run():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.1)
            if beats:
                ranks.beat()
        return "done"
    return run


def fail_on(rank):
    def run():
        if layout.rank == rank:
            raise UserError(f"rank {rank} cannot")
        return layout.rank
    return run


say("writer", ranks.from_writer(lambda: "value of 0" if layout.rank == 0 else "not called"))
say("everywhere", ranks.everywhere(lambda: layout.rank * 10))
for rank in (0, 1):
    try:
        ranks.everywhere(fail_on(rank))
    except UserError as error:
        say("told", error)
try:
    ranks.from_writer(fail_on(0))
except UserError as error:
    say("told by writer:", error)


def full_disk():
    raise OSError(28, "No space left on device", "rollouts.gz")


try:
    ranks.from_writer(full_disk)
except UserError as error:
    say("told by writer:", str(error).partition(";")[0])
say("long", ranks.from_writer(work(5.0, beats=True)))
if "hang" in sys.argv:
    try:
        ranks.from_writer(work(8.0, beats=False))
    except UserError as error:
        say("hang", error)
        sys.exit(3)
close_parallel()
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*torchrun, str(worker), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_results_and_mistakes_reach_every_rank_and_long_work_with_beats_is_waited_for(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in (0, 1):
        lines = [line[2:] for line in result.stdout.splitlines() if line.startswith(f"{rank} ")]
        assert lines == [
            "writer value of 0",
            "everywhere [0, 10]",
            "told rank 0 cannot",
            "told rank 1 cannot",
            "told by writer: rank 0 cannot",
            "told by writer: rollouts.gz could not be written: No space left on device",
            "long done",
        ]


def test_a_silent_rank_0_is_told_and_not_waited_for(tmp_path):
    result = run(tmp_path, "hang")
    assert result.returncode != 0
    assert "1 hang rank 0 has made no progress for 2 s" in result.stdout
    assert "0 hang" not in result.stdout


LONELY = """
import os, sys
from megatron_ext.parallel import init_parallel
from searche1.cli import _guarded
from searche1.ranks import Ranks

ranks = Ranks(init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu"), timeout_s=60.0)
ranks.everywhere(lambda: 1)
if ranks.rank == 1:
    os._exit(5)
os._exit(_guarded(lambda: [ranks.everywhere(lambda: 1) for _ in range(100)] and None))
"""


def test_a_rank_whose_neighbour_is_gone_says_so_without_a_stack_trace(tmp_path):
    """Without torchrun, which would end it first; on another node it does not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "lonely.py").write_text(LONELY)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "lonely.py")],
            env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 5], told
    assert "error on rank 0: another rank has ended; see what it said" in told[0] and "Traceback" not in told[0]
