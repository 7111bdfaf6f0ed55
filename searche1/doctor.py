"""Is this machine ready? What was found, what is wrong with it, and what mends it.

The machine is inspected once into a finished value and judged from that. Nothing here needs a
package that could be the missing one: versions are read from metadata, torch only if it is there.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from searche1.runs import gpu_names, memory_bytes, num_cores, package_version

Level = Literal["ok", "warn", "fail"]

GIB = 2**30
MIN_OPEN_FILES = 16384  # rank 0 holds a connection for each trajectory under way: 512 for each of 31 engines
# SGLang releases that were run with this code, and the torch release each of them is built for.
TORCH_OF_SGLANG = {"0.5.17": "2.11.0", "0.5.21": "2.13.0", "0.5.23": "2.14.1"}
MEGATRON_CORE = "0.16.1"
TRANSFORMERS = "5.12.1"
PEFT = "0.21.2"
LIBRARIES = ("numpy", "pyarrow", "omegaconf", "rich", "httpx", "fastapi", "uvicorn", "safetensors", "matplotlib")
PACKAGES = (
    *("torch", "torchvision", "sglang", "megatron-core", "transformers", "peft"),
    *("faiss-cpu", "faiss-gpu", "transformer-engine", "tensorboard"),
    *LIBRARIES,
)
PLUGIN_GROUP = "sglang.srt.platforms"
PLUGIN_NAME = "searche1_cpu"
INSTALL_CPU = "pip install --no-deps -r requirements/cpu.txt"
INSTALL_SELF = "pip install --no-deps --no-build-isolation -e ."


@dataclass(frozen=True)
class Check:
    name: str
    level: Level
    found: str
    remedy: str = ""  # empty when ok


@dataclass(frozen=True)
class Machine:
    """What `inspect_machine` saw."""

    python: tuple[int, int]
    versions: Mapping[str, str | None]  # by distribution name; None if it is not installed
    torch_error: str  # why torch could not be imported; empty if it could, or is not installed
    driver_gpus: tuple[str, ...]  # as the NVIDIA driver lists them
    compute_modes: tuple[str, ...]  # of these GPUs, as the driver names them: "Default", "Exclusive_Process", ...
    num_torch_gpus: int  # as torch can use them
    no_native_losses: str  # why the losses' C++ kernels cannot be used; empty if they can
    openblas: str  # the CPUs whose kernels OpenBLAS uses on this one, as it names them; empty without OpenBLAS
    no_openblas: str  # why there is none; empty if there is
    has_plugin: bool  # SGLang will find the CPU platform
    omp_num_threads: str | None
    cores: int
    memory_bytes: int
    free_disk_bytes: int  # in the current folder
    shared_memory_bytes: int | None  # size of /dev/shm; None if there is none
    loopback_error: str  # why a local server could not be reached; empty if it could
    is_loopback_proxied: bool  # HTTP requests to 127.0.0.1 would go to a proxy
    open_files: int  # how many a process may have, once it has asked for as many as it may
    alloc_conf: str  # settings of torch's GPU memory; empty if there are none

    @property
    def has_gpu(self) -> bool:
        return bool(self.driver_gpus) or self.num_torch_gpus > 0


def run_doctor() -> list[Check]:
    """Every check of this machine, in the order in which they are best mended."""
    return list(judge(inspect_machine()))


def inspect_machine() -> Machine:
    versions = {name: package_version(name) for name in PACKAGES}
    missing = "torch is missing"
    torch_error, num_torch_gpus, no_native_losses, openblas, no_openblas = (
        _ask_torch() if versions["torch"] else ("", 0, missing, "", missing)
    )
    shared_memory = Path("/dev/shm")
    plugins = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    return Machine(
        python=sys.version_info[:2],
        versions=versions,
        torch_error=torch_error,
        driver_gpus=tuple(gpu_names()),
        compute_modes=_compute_modes(),
        num_torch_gpus=num_torch_gpus,
        no_native_losses=no_native_losses,
        openblas=openblas,
        no_openblas=no_openblas,
        has_plugin=any(plugin.name == PLUGIN_NAME for plugin in plugins),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        cores=num_cores(),
        memory_bytes=memory_bytes(),
        free_disk_bytes=shutil.disk_usage(".").free,
        shared_memory_bytes=shutil.disk_usage(shared_memory).total if shared_memory.is_dir() else None,
        loopback_error=_loopback_error(),
        is_loopback_proxied="http" in urllib.request.getproxies() and not urllib.request.proxy_bypass("127.0.0.1"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        alloc_conf=",".join(filter(None, map(os.environ.get, ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")))),
    )


def _ask_torch() -> tuple[str, int, str, str, str]:
    try:
        import torch

        from megatron_ext import blas
        from megatron_ext.vocab_parallel import native
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA does not load
        reason = "torch cannot be imported"
        return f"{type(error).__name__}: {error}", 0, reason, "", reason
    missing = blas.missing()
    return "", torch.cuda.device_count(), native.why_absent() or "", "" if missing else blas.core(), missing


def _compute_modes() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return ()
    return tuple(answer.stdout.strip().splitlines())


def _loopback_error() -> str:
    """Engines and retriever are servers on 127.0.0.1: binds a port there and connects to it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5.0):
            return ""
    except OSError as error:
        return str(error)


def judge(machine: Machine) -> Iterator[Check]:
    """What the machine's state means for a run."""
    yield _python(machine)
    yield from _packages(machine)
    yield _faiss(machine)
    yield _plugin(machine)
    yield _gpus(machine)
    if machine.compute_modes:
        yield _compute_mode(machine)
    if machine.alloc_conf:
        yield _alloc_conf(machine)
    yield _transformer_engine(machine)
    yield _losses(machine)
    if not machine.num_torch_gpus:
        yield _products(machine)
    yield _threads(machine)
    yield _cores(machine)
    yield _memory(machine)
    yield _disk(machine)
    yield _shared_memory(machine)
    yield _loopback(machine)
    if machine.has_gpu:
        yield _open_files(machine)


def _python(machine: Machine) -> Check:
    found = ".".join(map(str, machine.python))
    if machine.python in ((3, 11), (3, 12)):
        return Check("python", "ok", found)
    remedy = "use Python 3.11 or 3.12; the locked requirements are made for them"
    return Check("python", "fail" if machine.python < (3, 11) else "warn", found, remedy)


def _packages(machine: Machine) -> Iterator[Check]:
    versions = machine.versions
    sglang, torch, torchvision = versions["sglang"], versions["torch"], versions["torchvision"]
    fits_torch = TORCH_OF_SGLANG.get(sglang or "", "2.13.0")

    if machine.torch_error:
        yield Check("torch", "fail", machine.torch_error, "install it again for this machine's CPU or CUDA version")
    else:
        yield _version("torch", torch, known=(fits_torch,))
    yield _version("sglang", sglang, known=tuple(TORCH_OF_SGLANG))
    yield _version("megatron-core", versions["megatron-core"], known=(MEGATRON_CORE,))
    yield _version("transformers", versions["transformers"], known=(TRANSFORMERS,))
    yield _version("peft", versions["peft"], known=(PEFT,))
    if torchvision and torch and "+cpu" in torch and "+cpu" not in torchvision:
        remedy = "pip uninstall torchvision: beside a CPU torch it does not load, and breaks transformers with it"
        yield Check("torchvision", "fail", torchvision, remedy)
    if versions["tensorboard"] is None:
        yield Check("tensorboard", "fail", "not installed", INSTALL_CPU)
    missing = [name for name in LIBRARIES if versions[name] is None]
    if missing:
        yield Check("libraries", "fail", f"not installed: {', '.join(missing)}", INSTALL_CPU)
    else:
        yield Check("libraries", "ok", f"all {len(LIBRARIES)} installed")


def _version(name: str, found: str | None, *, known: tuple[str, ...]) -> Check:
    if found is None:
        return Check(name, "fail", "not installed", f"{INSTALL_CPU}, or the lock for your GPUs in requirements/")
    if found.partition("+")[0] in known:  # "2.13.0+cpu" is a build of 2.13.0
        return Check(name, "ok", found)
    return Check(name, "warn", found, f"known to work: {', '.join(known)}; on trouble install one of these")


def _faiss(machine: Machine) -> Check:
    cpu, gpu = machine.versions["faiss-cpu"], machine.versions["faiss-gpu"]
    if cpu and gpu:
        remedy = "both own the module `faiss`: pip uninstall -y faiss-cpu faiss-gpu, then install one"
        return Check("faiss", "fail", f"faiss-cpu {cpu} and faiss-gpu {gpu}", remedy)
    if cpu or gpu:
        return Check("faiss", "ok", f"faiss-cpu {cpu}" if cpu else f"faiss-gpu {gpu}")
    return Check("faiss", "fail", "not installed", "pip install faiss-cpu; only an external retriever.url does without")


def _plugin(machine: Machine) -> Check:
    if machine.has_plugin:
        return Check("SGLang CPU platform", "ok", "steps aside for the GPU" if machine.has_gpu else PLUGIN_NAME)
    found = f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}"
    remedy = f"{INSTALL_SELF}: SGLang finds its CPU platform only through an installed package"
    return Check("SGLang CPU platform", "warn" if machine.has_gpu else "fail", found, remedy)


def _gpus(machine: Machine) -> Check:
    names = ", ".join(machine.driver_gpus)
    if machine.driver_gpus and machine.num_torch_gpus == 0:
        remedy = "install a torch built for this CUDA driver, and look at CUDA_VISIBLE_DEVICES"
        return Check("GPUs", "warn", f"{names}, but torch can use none: runs will be on the CPU", remedy)
    if machine.num_torch_gpus:
        return Check("GPUs", "ok", f"{machine.num_torch_gpus} usable ({names or 'the driver lists none'})")
    return Check("GPUs", "ok", "none: runs will be on the CPU")


def _compute_mode(machine: Machine) -> Check:
    found = ", ".join(sorted(set(machine.compute_modes)))
    if found == "Default":
        return Check("compute mode", "ok", found)
    remedy = "sudo nvidia-smi -c DEFAULT: a trainer's rank and an engine share each GPU"
    return Check("compute mode", "fail", found, remedy)


def _alloc_conf(machine: Machine) -> Check:
    if "expandable_segments:true" not in machine.alloc_conf.lower():
        return Check("GPU memory settings", "ok", machine.alloc_conf)
    remedy = "take expandable_segments out of PYTORCH_CUDA_ALLOC_CONF: engines cannot sleep with it"
    return Check("GPU memory settings", "fail", machine.alloc_conf, remedy)


def _transformer_engine(machine: Machine) -> Check:
    found = machine.versions["transformer-engine"]
    if found:
        return Check("transformer-engine", "ok", found)
    if machine.has_gpu:
        remedy = "optional: pip install 'transformer-engine[pytorch]' (needs nvcc and cuDNN) for faster layers"
        return Check("transformer-engine", "warn", "not installed", remedy)
    return Check("transformer-engine", "ok", "not installed, and not used on a CPU")


def _losses(machine: Machine) -> Check:
    if machine.num_torch_gpus:
        return Check("loss kernels", "ok", "Triton")
    if not machine.no_native_losses:
        return Check("loss kernels", "ok", "C++")
    remedy = f"install g++, then {INSTALL_SELF}: the losses take several times longer in plain torch"
    return Check("loss kernels", "warn", f"plain torch: {machine.no_native_losses}", remedy)


def _products(machine: Machine) -> Check:
    if not machine.no_openblas:
        return Check("products", "ok", f"OpenBLAS, with kernels for {machine.openblas}")
    remedy = "a CPU with AVX2, and scipy-openblas32 of requirements/cpu.txt: without them layers take longer"
    return Check("products", "warn", f"no OpenBLAS: {machine.no_openblas}", remedy)


def _threads(machine: Machine) -> Check:
    found = machine.omp_num_threads
    if machine.has_gpu or found == "1":
        return Check("OMP_NUM_THREADS", "ok", found or "not set")
    remedy = "export OMP_NUM_THREADS=1: threads of processes that share cores wait for each other, ten times slower"
    return Check("OMP_NUM_THREADS", "warn", found or "not set", remedy)


def _cores(machine: Machine) -> Check:
    if machine.cores >= 2:
        return Check("CPU cores", "ok", str(machine.cores))
    return Check("CPU cores", "warn", str(machine.cores), "trainer, engine and retriever have to share it")


def _memory(machine: Machine) -> Check:
    found = f"{machine.memory_bytes / GIB:.1f} GiB"
    if machine.memory_bytes >= 6 * GIB:
        return Check("memory", "ok", found)
    return Check("memory", "warn", found, "trainer, engine and retriever together want 6 GiB even for a tiny model")


def _disk(machine: Machine) -> Check:
    found = f"{machine.free_disk_bytes / GIB:.1f} GiB free here"
    if machine.free_disk_bytes >= 10 * GIB:
        return Check("disk", "ok", found)
    level: Level = "warn" if machine.free_disk_bytes >= GIB else "fail"
    return Check(
        "disk",
        level,
        found,
        "free some, or point run.out to a larger disk; a 3B model takes 6 GiB, with Adam's state 40",
    )


def _shared_memory(machine: Machine) -> Check:
    if machine.shared_memory_bytes is None:
        return Check("/dev/shm", "fail", "not there", "mount a tmpfs: weights travel to the engines through it")
    found = f"{machine.shared_memory_bytes / GIB:.2f} GiB"
    if machine.shared_memory_bytes >= GIB:
        return Check("/dev/shm", "ok", found)
    remedy = "start the container with --shm-size=8g: weights travel to the engines through it"
    return Check("/dev/shm", "warn", found, remedy)


def _loopback(machine: Machine) -> Check:
    if machine.loopback_error:
        remedy = "let processes talk on 127.0.0.1: engines and retriever are servers there"
        return Check("loopback", "fail", machine.loopback_error, remedy)
    if machine.is_loopback_proxied:
        remedy = "export NO_PROXY=127.0.0.1,localhost: requests to the local servers would leave this machine"
        return Check("loopback", "warn", "HTTP requests to 127.0.0.1 go to a proxy", remedy)
    return Check("loopback", "ok", "a server on 127.0.0.1 can be reached")


def _open_files(machine: Machine) -> Check:
    if machine.open_files < 0:  # RLIM_INFINITY
        return Check("open files", "ok", "no limit")
    if machine.open_files >= MIN_OPEN_FILES:
        return Check("open files", "ok", f"up to {machine.open_files}")
    remedy = f"ask for a limit of {MIN_OPEN_FILES} (nofile): rank 0 holds a connection for each trajectory under way"
    return Check("open files", "warn", f"up to {machine.open_files}", remedy)


def print_doctor(checks: Sequence[Check]) -> int:
    """Prints the checks as a table and returns the exit code: 1 if any failed."""
    failed = [check.name for check in checks if check.level == "fail"]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # rich may be what is missing
        for check in checks:
            print(f"{check.level:5} {check.name}: {check.found}{'; ' if check.remedy else ''}{check.remedy}")
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        table = Table("", "check", "found", "remedy", box=None)
        for check in checks:
            colour = colours[check.level]
            table.add_row(f"[{colour}]{check.level}[/]", check.name, _literal(check.found), _literal(check.remedy))
        Console().print(table)
    print(f"{len(failed)} of {len(checks)} checks failed{': ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


def _literal(text: str) -> str:
    return text.replace("[", r"\[")  # rich reads [pytorch] as markup
