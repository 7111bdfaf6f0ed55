"""Is the cluster set up? All ranks of a job meet, compare what they have and send messages: `launch.sh --check`.

torchrun ... -m searche1.cluster_check [--config FILE] [run.out=DIR]
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from searche1.config import load_config
from searche1.doctor import PACKAGES, package_version
from searche1.rollout.places import own_address
from searche1.types import UserError

TIMEOUT_S = 120.0
MESSAGE_BYTES = {"gloo": 4 << 20, "nccl": 256 << 20}
NUM_MESSAGES = 5


@dataclass(frozen=True)
class Found:
    """What one rank sees."""

    rank: int
    node: str
    address: str  # where engines of this node listen
    versions: dict[str, str]
    gpu: str  # name and GiB of its GPU; empty without
    num_gpus: int
    sees_token: bool  # the file that rank 0 wrote into the run directory


def look(token: Path) -> Found:
    """This rank's part, after rank 0 has written the token."""
    has_gpu = torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if has_gpu else None
    return Found(
        rank=dist.get_rank(),
        node=socket.gethostname(),
        address=own_address(),
        versions={name: package_version(name) or "absent" for name in PACKAGES},
        gpu=f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else "",
        num_gpus=torch.cuda.device_count(),
        sees_token=_appears(token),
    )


def _appears(path: Path) -> bool:
    """Whether a file of another node is seen; networked folders may be some seconds late."""
    deadline = time.monotonic() + 20.0
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def problems(found: list[Found], *, directory: Path, ranks_per_node: int) -> list[str]:
    """What is wrong, each with its remedy."""
    told = []
    first = found[0]
    for other in found[1:]:
        for name, version in other.versions.items():
            if version != first.versions[name]:
                told.append(
                    f"{name} is {first.versions[name]} on {first.node} and {version} on {other.node}: all nodes must "
                    "run one environment; put the checkout and its environment on a disk that all see"
                )
    if blind := sorted({f.node for f in found if not f.sees_token}):
        told.append(
            f"{', '.join(blind)} does not see what {first.node} writes into {directory.absolute()}: run.out must be "
            "on a disk that all nodes see under the same path"
        )
    for f in found:
        if f.gpu != first.gpu:
            told.append(f"rank {f.rank} has {f.gpu or 'no GPU'}, rank 0 {first.gpu or 'none'}: all must be alike")
        if f.gpu and f.num_gpus < ranks_per_node:
            told.append(
                f"{f.node} shows {f.num_gpus} GPUs for {ranks_per_node} ranks; start fewer (GPUS=...), or look "
                "at CUDA_VISIBLE_DEVICES"
            )
    return list(dict.fromkeys(told))


def bandwidth(backend: str) -> float:
    """GB/s of an all-reduce among all ranks: bytes a rank gives over the time. Collective."""
    device = "cuda" if backend == "nccl" else "cpu"
    message = torch.ones(MESSAGE_BYTES[backend], dtype=torch.uint8, device=device).view(torch.float32)
    dist.all_reduce(message)
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NUM_MESSAGES):
        dist.all_reduce(message)
    if device == "cuda":
        torch.cuda.synchronize()
    return NUM_MESSAGES * MESSAGE_BYTES[backend] / (time.perf_counter() - started) / 1e9


def show(found: list[Found], speeds: dict[str, float], console: Console) -> None:
    table = Table(title=f"{len(found)} ranks on {len({f.node for f in found})} nodes")
    for column in ("node", "ranks", "address", "GPU", "run folder seen"):
        table.add_column(column)
    for node in dict.fromkeys(f.node for f in found):
        of_node = [f for f in found if f.node == node]
        ranks = f"{of_node[0].rank}-{of_node[-1].rank}" if len(of_node) > 1 else str(of_node[0].rank)
        seen = "yes" if all(f.sees_token for f in of_node) else "no"
        table.add_row(node, ranks, of_node[0].address, of_node[0].gpu or "none", seen)
    console.print(table)
    console.print("versions: " + ", ".join(f"{name} {version}" for name, version in found[0].versions.items()))
    for backend, speed in speeds.items():
        console.print(
            f"all-reduce over {backend}: {speed:.2f} GB/s a rank, messages of {MESSAGE_BYTES[backend] >> 20} MiB"
        )


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well, 1 when something is to be mended, 2 for a mistake in the call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file whose run.out is looked at")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        if "RANK" not in os.environ:
            raise UserError("this looks at a job's ranks: start it with scripts/launch.sh --check, or with torchrun")
    except UserError as error:
        print(f"searche1: error: {error}", file=sys.stderr)
        return 2
    directory = Path(config.run.out)
    backends = ["gloo", "nccl"] if torch.cuda.is_available() else ["gloo"]
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if "nccl" in backends else "gloo", timeout=timedelta(seconds=TIMEOUT_S)
    )
    is_first = dist.get_rank() == 0
    names = [uuid.uuid4().hex if is_first else ""]
    dist.broadcast_object_list(names, src=0)
    token = directory / f".cluster_check_{names[0]}"
    if is_first:
        directory.mkdir(parents=True, exist_ok=True)
        token.touch()
    dist.barrier()
    found: list[Found] = [look(token)] * dist.get_world_size()
    dist.all_gather_object(found, found[0])
    speeds = {backend: bandwidth(backend) for backend in backends}
    code = 0
    if is_first:
        token.unlink()
        console = Console(highlight=False)
        show(found, speeds, console)
        wrong = problems(found, directory=directory, ranks_per_node=int(os.environ["LOCAL_WORLD_SIZE"]))
        for problem in wrong:
            console.print(f"to mend: {problem}", soft_wrap=True)
        console.print(
            "something is to be mended" if wrong else "all ranks agree, see one run folder and reach one another"
        )
        code = int(bool(wrong))
    dist.barrier()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
