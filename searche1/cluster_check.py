"""Is the cluster set up? All ranks of a job meet, compare what they have and send messages: `launch.sh --check`.

torchrun ... -m searche1.cluster_check [--config FILE] [run.out=DIR]

Every question has a time limit, and what fails is told as a line that says what to mend.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from searche1.config import load_config
from searche1.doctor import MIN_OPEN_FILES, PACKAGES, package_version
from searche1.rollout.places import own_address
from searche1.runs import git_state
from searche1.types import UserError

TIMEOUT_S = 120.0  # of the first meeting, and of a message between ranks
CONNECT_TIMEOUT_S = 5.0
MESSAGE_BYTES = {"gloo": 4 << 20, "nccl": 256 << 20}
NUM_MESSAGES = 5
# Settings that must be the same on all nodes; names of interfaces and adapters may differ.
SHARED_SETTINGS = ("NCCL_", "TORCH_NCCL_", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF")
LOCAL_SETTINGS = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG_FILE")


@dataclass(frozen=True)
class Found:
    """What one rank sees."""

    rank: int
    node: str
    address: str  # where engines of this node listen
    port: int  # a free one there, listened at while the ranks look
    commit: str  # of the checkout; with a + where files were changed
    settings: dict[str, str]  # of the environment, those that all nodes must share
    open_files: int  # how many this rank may have
    versions: dict[str, str]
    gpu: str  # name and GiB of its GPU; empty without
    sees_token: bool  # the file that rank 0 wrote into the run directory


def look(token: Path, *, port: int) -> Found:
    """This rank's part, after rank 0 has written the token."""
    git = git_state()
    has_gpu = torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if has_gpu else None
    return Found(
        rank=dist.get_rank(),
        node=socket.gethostname(),
        address=own_address(),
        port=port,
        commit=git["commit"][:12] + "+" * git["is_dirty"] if git else "unknown",
        settings={
            name: value
            for name, value in os.environ.items()
            if name.startswith(SHARED_SETTINGS) and name not in LOCAL_SETTINGS
        },
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        versions={name: package_version(name) or "absent" for name in PACKAGES},
        gpu=f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else "",
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


def unreachable(addresses: Iterable[tuple[str, int]]) -> dict[str, str]:
    """Why this process cannot connect to each of the addresses; those that it can are not in it."""
    reasons = {}
    for address, port in addresses:
        try:
            socket.create_connection((address, port), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            reasons[address] = str(error)
    return reasons


def problems(found: Sequence[Found], *, directory: Path) -> list[str]:
    """What is wrong, each with its remedy."""
    told = []
    first = found[0]
    for other in found[1:]:
        if other.commit != first.commit:
            told.append(
                f"the checkout is at {first.commit} on {first.node} and at {other.commit} on {other.node}: all nodes "
                "must run the same code; put it on a disk that all see"
            )
        told += _different_settings(first, other)
        for name, version in other.versions.items():
            if version != first.versions[name]:
                told.append(
                    f"{name} is {first.versions[name]} on {first.node} and {version} on {other.node}: all nodes must "
                    "run one environment; put the checkout and its environment on a disk that all see"
                )
    if blind := sorted({f.node for f in found if not f.sees_token}):
        told.append(
            f"{' and '.join(blind)} cannot see what {first.node} writes into {directory.absolute()}: run.out must be "
            "on a disk that all nodes see under the same path"
        )
    for f in found:
        if f.gpu != first.gpu:
            told.append(f"rank {f.rank} has {f.gpu or 'no GPU'}, rank 0 {first.gpu or 'none'}: all must be alike")
        if f.open_files < MIN_OPEN_FILES:
            told.append(
                f"{f.node} lets a process open {f.open_files} files, and rank 0 holds a connection for each trajectory "
                f"under way; ulimit -n {MIN_OPEN_FILES}, or ask for a higher limit (nofile)"
            )
    return list(dict.fromkeys(told))


def _different_settings(first: Found, other: Found) -> list[str]:
    return [
        f"{name} is {first.settings.get(name, 'not set')} on {first.node} and {other.settings.get(name, 'not set')} on "
        f"{other.node}: ranks that disagree may wait for one another for ever; set it alike on all nodes"
        for name in sorted({*first.settings, *other.settings})
        if first.settings.get(name) != other.settings.get(name)
    ]


def bandwidth(backend: str) -> float:
    """GB/s of an all-reduce among all ranks: bytes a rank gives over the time. Collective.

    Raises RuntimeError if a message fails, is late, or sums up to something else.
    """
    device = "cuda" if backend == "nccl" else "cpu"
    # Else NCCL's watchdog would end the process when a message is late, before anybody could say why.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    group = dist.new_group(backend=backend, timeout=timedelta(seconds=TIMEOUT_S))
    message = torch.ones(MESSAGE_BYTES[backend] // 4, device=device)
    dist.all_reduce(message, group=group)
    if message[-1].item() != dist.get_world_size():
        raise RuntimeError(f"ones of {dist.get_world_size()} ranks sum up to {message[-1].item():g}")
    message.fill_(0.0)
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NUM_MESSAGES):
        dist.all_reduce(message, group=group)
    if device == "cuda":
        torch.cuda.synchronize()
    return NUM_MESSAGES * MESSAGE_BYTES[backend] / (time.perf_counter() - started) / 1e9


def show(found: Sequence[Found], speeds: Mapping[str, float], console: Console) -> None:
    table = Table(title=f"{len(found)} ranks on {len({f.node for f in found})} nodes")
    for column in ("node", "ranks", "address", "GPU", "run folder seen"):
        table.add_column(column)
    for node in dict.fromkeys(f.node for f in found):
        of_node = [f for f in found if f.node == node]
        ranks = f"{of_node[0].rank}-{of_node[-1].rank}" if len(of_node) > 1 else str(of_node[0].rank)
        seen = "yes" if all(f.sees_token for f in of_node) else "no"
        table.add_row(node, ranks, of_node[0].address, of_node[0].gpu or "none", seen)
    console.print(table)
    installed = {name: version for name, version in found[0].versions.items() if version != "absent"}
    console.print(f"commit {found[0].commit}; " + ", ".join(f"{name} {v}" for name, v in installed.items()))
    if found[0].settings:
        console.print("settings: " + " ".join(f"{name}={value}" for name, value in found[0].settings.items()))
    for backend, speed in speeds.items():
        console.print(
            f"all-reduce over {backend}: {speed:.2f} GB/s a rank, messages of {MESSAGE_BYTES[backend] >> 20} MiB"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is well, 1 when something is to be mended, 2 for a mistake in the call.

    With SEARCHE1_STATUS, that number goes into the file it names and 0 is returned: torchrun answers any other
    with a page of its own, under which the finding would be lost.
    """
    parser = argparse.ArgumentParser(prog="searche1.cluster_check", description="Look at the ranks of a job.")
    parser.add_argument("--config", help="YAML file whose run.out all nodes should see")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in `searche1 config`")
    parsed = parser.parse_args(arguments)
    try:
        code = check(Path(load_config(parsed.config, parsed.overrides).run.out))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # each node says what it has seen
            print(f"searche1: error: {error}", file=sys.stderr)
        code = 2
    status_file = os.environ.get("SEARCHE1_STATUS")
    if status_file is None:
        return code
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(status_file).write_text(str(code))
    return 0


def check(directory: Path) -> int:
    """Look at all ranks of this job and the run folder `directory`; rank 0 shows what was found.

    Collective. Returns 1 where something is to be mended, else 0. Raises UserError if the ranks do not meet.
    """
    if "RANK" not in os.environ:
        raise UserError("this looks at a job's ranks: start it with scripts/launch.sh --check, or with torchrun")
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        _take_gpu(int(os.environ["LOCAL_RANK"]), ranks_per_node=int(os.environ["LOCAL_WORLD_SIZE"]))
    _meet()
    try:
        with socket.create_server((own_address(), 0)) as server:
            code = _look_together(directory, port=server.getsockname()[1], backends=["gloo", *["nccl"] * has_gpu])
    finally:
        dist.destroy_process_group()
    return code


def _take_gpu(local_rank: int, *, ranks_per_node: int) -> None:
    num_gpus = torch.cuda.device_count()
    if num_gpus < ranks_per_node:
        raise UserError(
            f"{socket.gethostname()} has {num_gpus} GPUs to use and {ranks_per_node} processes; start fewer "
            f"(GPUS={num_gpus}), or look at nvidia-smi -L and CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)


def _meet() -> None:
    """Join gloo. Raises UserError if the others do not come."""
    try:
        # Longer than what it has to outlast, NCCL's failure on some ranks only.
        dist.init_process_group("gloo", timeout=timedelta(seconds=3 * TIMEOUT_S))
    except RuntimeError as error:  # what torch raises of stores and connections
        rank, ranks, node = os.environ["RANK"], os.environ["WORLD_SIZE"], socket.gethostname()
        raise UserError(
            f"rank {rank} of {ranks} on {node} did not meet the others in {TIMEOUT_S:.0f} s: see that all nodes are "
            f"started, and what the others say; if they have several networks, set GLOO_SOCKET_IFNAME to the interface "
            f"that leads to {os.environ['MASTER_ADDR']} ({str(error).splitlines()[0]})"
        ) from error


def _look_together(directory: Path, *, port: int, backends: Sequence[str]) -> int:
    is_first = dist.get_rank() == 0
    names = [uuid.uuid4().hex if is_first else ""]
    dist.broadcast_object_list(names, src=0)
    token = directory / f".cluster_check_{names[0]}"
    wrong: list[str] = []
    if is_first:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            wrong.append(f"run.out={directory} cannot be written: {error.strerror}; give a folder that can")
    dist.barrier()
    found: list[Found] = [look(token, port=port)] * dist.get_world_size()
    dist.all_gather_object(found, found[0])
    if is_first:  # as it will connect to the engines of all nodes
        token.unlink(missing_ok=True)
        for address, reason in unreachable({f.address: f.port for f in found}.items()).items():
            wrong.append(
                f"{found[0].node} cannot connect to {address}: {reason}; let the nodes reach one another on all ports, "
                "as engines choose free ones"
            )
        wrong += problems(found, directory=directory)
    speeds, failures = _speeds(backends)
    wrong += failures
    if is_first:
        console = Console(highlight=False)
        show(found, speeds, console)
        for problem in wrong:
            console.print(f"to mend: {problem}", markup=False, soft_wrap=True)
        well = "all ranks agree, see one run folder and reach one another"
        console.print("something is to be mended" if wrong else well)
    verdict = [int(bool(wrong))]
    dist.broadcast_object_list(verdict, src=0)
    return verdict[0]


def _speeds(backends: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """GB/s of each backend that works, and why the others do not. Collective; the reasons are the same on all ranks."""
    speeds, failures = {}, []
    for backend in backends:
        reason = ""
        try:
            speeds[backend] = bandwidth(backend)
        except RuntimeError as error:
            reason = f"{socket.gethostname()}: {str(error).splitlines()[0]}"
        if backend == "gloo":  # through which the ranks agree
            if reason:
                raise UserError(f"an all-reduce over gloo failed on {reason}; see what the other nodes say")
            continue
        reasons = [reason] * dist.get_world_size()
        try:
            dist.all_gather_object(reasons, reason)
        except RuntimeError as error:
            here = f"{socket.gethostname()}: {reason or 'no answer from others'}"
            raise UserError(f"an all-reduce over {backend} did not end on all ranks ({here})") from error
        if any(reasons):
            speeds.pop(backend, None)
            failures.append(
                f"an all-reduce over {backend} failed, first on {next(filter(None, reasons))}; NCCL_DEBUG=INFO says "
                "which network it took, NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose, NCCL_IB_DISABLE=1 tries without"
            )
    return speeds, failures


if __name__ == "__main__":
    sys.exit(main())
