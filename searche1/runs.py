"""The run directory: the contract between stages, and between a run and its reader.

    NAME/ config.yaml provenance.json summary.json metrics.jsonl tb/ curve.png report.html
          cycle0/grpo/manifest.json ...  cycle0/opsd/manifest.json ...
          final/

A stage is finished when its manifest.json is there: it is written last, and in one piece.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from searche1.config import Config, config_keys, load_config
from searche1.types import UserError

# Settings of where, how fast and how far a run computes, not of what: a run may be continued with others.
HARMLESS_KEYS = frozenset(
    {
        "run.out",
        "engine.port",
        "engine.count",
        "engine.urls",
        "engine.token_file",
        "engine.verify_sync",
        "engine.mem_fraction",
        "engine.max_total_tokens",
        "engine.max_running",
        "engine.sync_bucket_mb",
        "engine.share_weights",
        "engine.start_timeout_s",
        "engine.request_timeout_s",
        "run.wandb",
        "retriever.url",
        "retriever.port",
        "retriever.timeout_s",
        "retriever.retries",
        "retriever.deadline_s",
        "retriever.token_file",
        "retriever.device",
        "retriever.threads",
        "engine.tensor",
        "engine.attention_backend",
        "engine.sampling_backend",
        "engine.cuda_graph",
        "parallel.tensor",  # checkpoints are read in any layout
        "parallel.pipeline",
        "parallel.context",
        "parallel.expert",
        "parallel.sequence",
        "train.max_tokens",  # row weights make the loss the same however a batch is packed
        "train.offload",
        "train.threads",
        "train.keep_last",
        "train.keep_every",
        "train.recompute",
        "train.loss_mode",
        "train.logits_chunk",
        "train.sync_tolerance",
        "train.timeout_s",
        "rollout.max_errors",
        "opsd.teacher_check_questions",
        "rollout.max_in_flight",
        "grpo.save_every",
        "cycle.cycles",  # a finished run may be continued with more
        "cycle.until_no_gain",
        *(key for key in config_keys() if key.startswith("health.")),  # only what is done about an alarm
    }
)
RECORDED_PACKAGES = (
    "torch",
    "sglang",
    "megatron-core",
    "transformers",
    "peft",
    "faiss-cpu",
    "faiss-gpu",
    "transformer-engine",
    "numpy",
)
RECORDED_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE")
PAIR_KL_FILE = "pair_kl.jsonl"  # of an OPSD stage
SELECTION_FILE = "selection.json"  # of an OPSD stage: validation EMs, and which adapter was merged
CHECKSUM_LIMIT_BYTES = 64 * 2**20  # larger files are recorded by size only


@dataclass(frozen=True)
class Run:
    """An open run directory."""

    directory: Path

    def stage_dir(self, name: str) -> Path:
        """The folder of a stage such as "cycle0/grpo", made if it is missing."""
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def metrics_path(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def final_dir(self) -> Path:
        return self.directory / "final"


@dataclass(frozen=True)
class StageRow:
    """One stage in summary.json, judged on the held-out questions. EMs are unweighted means over the sources."""

    name: str  # "start", "cycle0/grpo", "cycle0/opsd", ...
    em: float  # at `temperature`
    em_interval: tuple[float, float]  # bootstrap 95 %
    temperature: float
    em_greedy: float | None  # None where greedy decoding was not evaluated
    em_greedy_interval: tuple[float, float] | None
    em_by_source: dict[str, float]  # at `temperature`
    mean_searches: float
    answered_share: float
    num_questions: int
    seconds: float  # the stage and its evaluation


@dataclass(frozen=True)
class Summary:
    stages: tuple[StageRow, ...]
    final_model: str | None  # folder inside the run; None until the run is finished


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name `path` only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never a part."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def atomic_write_json(path: Path, value: Any) -> None:
    """Like `atomic_write_text`; raises ValueError on NaN and infinity, which are not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError if the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or delete it with what was made of it") from error


@contextmanager
def only_run_in(directory: Path) -> Iterator[None]:
    """Keeps a second process out of a run directory, made if it is missing. Raises UserError if one is in it."""
    _make_directory(directory)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is running in {directory}; wait for it, or give another run.out"
            ) from error
        except OSError as error:  # some network file systems know no locks
            print(
                f"searche1: {directory} cannot be locked ({error.strerror}): see that one process runs in it",
                file=sys.stderr,
            )
        yield


def open_run(out: str | Path, config: Config, *, inputs: Mapping[str, Sequence[Path]] | None = None) -> Run:
    """A new run directory, or an earlier one to continue.

    Every start is added to provenance.json. Raises UserError if the directory holds a run whose
    settings differ in anything but `HARMLESS_KEYS`, or whose `inputs` have changed (`keep_inputs`).
    """
    directory = Path(out)
    _make_directory(directory)
    config_path = directory / "config.yaml"
    if config_path.exists():
        _refuse_other_settings(config_path, config)
    keep_inputs(directory, inputs or {})
    atomic_write_text(config_path, config_to_yaml(config))
    provenance_path = directory / "provenance.json"
    starts = read_json(provenance_path)["starts"] if provenance_path.exists() else []
    atomic_write_json(provenance_path, {"starts": [*starts, provenance(seed=config.run.seed)]})
    return Run(directory)


def _make_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run.out={directory} is a file; give the name of a folder that exists or can be made")
    directory.mkdir(parents=True, exist_ok=True)


def config_to_yaml(config: Config) -> str:
    """YAML that `load_config` reads back to the same settings."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _refuse_other_settings(config_path: Path, config: Config) -> None:
    try:
        earlier = _flat(asdict(load_config(config_path)))
    except UserError as error:
        raise UserError(
            f"{config_path} does not fit this version of searche1: {error} "
            f"Give a new run.out, or continue the run with the version in its provenance.json."
        ) from error
    now = _flat(asdict(config))
    differing = [key for key in now if now[key] != earlier[key] and key not in HARMLESS_KEYS]
    if differing:
        listing = "\n".join(f"  {key}: {earlier[key]!r} there, {now[key]!r} now" for key in differing)
        raise UserError(
            f"{config_path.parent} holds a run with other settings:\n{listing}\n"
            f"Give a new run.out, or continue it with the settings in {config_path}."
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value  # YAML has no tuples
    return flat


def provenance(*, seed: int) -> dict[str, Any]:
    """What a start ran on: code, versions, hardware, seed and command line. Holds no environment but a named few."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [_without_credentials(argument) for argument in sys.argv],
        "seed": seed,
        "git": git_state(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in RECORDED_PACKAGES},
        "hardware": {
            "platform": platform.platform(),
            "cores": num_cores(),
            "memory_gib": round(memory_bytes() / 2**30, 1),
            "gpus": gpu_names(),
        },
        "environment": {name: os.environ[name] for name in RECORDED_ENVIRONMENT if name in os.environ},
    }


def _without_credentials(argument: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", argument)  # http://user:password@host


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this package is imported from; None if it is not a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside somebody else's checkout
        return {"commit": git("rev-parse", "HEAD"), "is_dirty": git("status", "--porcelain") != ""}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def package_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def num_cores() -> int:
    """CPU cores that this process may use, fewer than the machine has inside a limited container."""
    cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")  # "<quota> <period>" or "max <period>"
    if limit.exists():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def share_of_cores() -> int:
    """Cores for one of the trainer's ranks on this machine, at least one."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def memory_bytes() -> int:
    """Memory that this process may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        memory = min(memory, int(text))
    return memory


def gpu_names() -> list[str]:
    """NVIDIA GPUs of the machine with their memory, asked of the driver: torch would take a CUDA context for it."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.strip().splitlines()


def write_manifest(
    stage_dir: Path,
    *,
    stage: str,
    inputs: Mapping[str, str | Path],
    outputs: Mapping[str, Path],
    config: Config,
    metrics: Mapping[str, float],
) -> None:
    """Declares a stage finished. Call it when everything else of the stage is on disk.

    `outputs` are files or folders inside `stage_dir`. `inputs` are files, folders or hub ids. Files are
    recorded by size, and up to 64 MiB by checksum too.
    """
    for name, path in outputs.items():
        assert path.exists(), f"output {name} of {stage} is not there: {path}"
    manifest = {
        "stage": stage,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": {name: {"path": str(path), "files": file_records(Path(path))} for name, path in inputs.items()},
        "outputs": {
            name: {"path": path.relative_to(stage_dir).as_posix(), "files": file_records(path)}
            for name, path in outputs.items()
        },
        "config": asdict(config),
        "metrics": dict(metrics),
    }
    atomic_write_json(stage_dir / "manifest.json", manifest)


def read_manifest(stage_dir: Path) -> dict[str, Any]:
    return read_json(stage_dir / "manifest.json")


def is_complete(stage_dir: Path) -> bool:
    """Whether the stage is finished. Raises UserError if it was, and an output has been lost or changed since."""
    if not (stage_dir / "manifest.json").exists():
        return False
    for name, output in read_manifest(stage_dir)["outputs"].items():
        path = stage_dir / output["path"]
        for record in output["files"]:
            file = path / record["path"]
            fault = _fault(file, record)
            if fault:
                raise UserError(
                    f"{file} {fault} since the stage wrote it as part of its {name}; restore it, or delete "
                    f"the folder {stage_dir}, those of the stages after it and final/ to run them again"
                )
    return True


def _fault(file: Path, record: Mapping[str, Any]) -> str:
    if not file.is_file():
        return "has gone missing"
    if file.stat().st_size != record["bytes"]:
        return f"has changed ({record['bytes']} bytes then, {file.stat().st_size} now)"
    if "sha256" in record and _sha256(file) != record["sha256"]:
        return "has changed (its checksum differs)"
    return ""


def file_records(path: Path) -> list[dict[str, Any]]:
    """Every file in a folder, or the file itself, which has the relative path "."; empty for a hub id."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    records = []
    for file in files:
        record: dict[str, Any] = {"path": file.relative_to(path).as_posix(), "bytes": file.stat().st_size}
        if record["bytes"] <= CHECKSUM_LIMIT_BYTES:
            record["sha256"] = _sha256(file)
        records.append(record)
    return records


def keep_inputs(directory: Path, inputs: Mapping[str, Sequence[Path]]) -> None:
    """Remember the files and folders behind some settings by size and checksum, in inputs.json.

    Raises UserError if those of an earlier call differ.
    """
    path = directory / "inputs.json"
    earlier = read_json(path) if path.exists() else {}
    found = {name: {file.name: file_records(file) for file in files} for name, files in inputs.items()}
    for name, files in inputs.items():
        if earlier.get(name, found[name]) != found[name]:
            raise UserError(
                f"{name}={', '.join(map(str, files))} has changed since {directory} began, so what is there and what "
                "would come now do not belong together; restore it, or give another run.out (eval: --out)"
            )
    if inputs:
        atomic_write_json(path, {**earlier, **found})


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_summary(directory: Path) -> Summary:
    """summary.json of a run; no stages if none is finished."""
    path = directory / "summary.json"
    if not path.exists():
        return Summary(stages=(), final_model=None)
    summary = read_json(path)
    return Summary(stages=tuple(_stage_row(row) for row in summary["stages"]), final_model=summary["final_model"])


def _stage_row(row: dict[str, Any]) -> StageRow:
    greedy = row["em_greedy_interval"]
    intervals = {"em_interval": tuple(row["em_interval"]), "em_greedy_interval": greedy and tuple(greedy)}
    return StageRow(**{**row, **intervals})


def add_stage_row(run: Run, row: StageRow) -> Summary:
    """summary.json with one more row. A stage that ran again replaces its row and keeps its place."""
    summary = read_summary(run.directory)
    stages = {stage.name: stage for stage in summary.stages} | {row.name: row}
    return _write_summary(run, stages=tuple(stages.values()), final_model=summary.final_model)


def set_final_model(run: Run, folder: str | None = "final") -> Summary:
    """Names the folder of the finished model in summary.json; None while a run is not finished, or no longer."""
    return _write_summary(run, stages=read_summary(run.directory).stages, final_model=folder)


def _write_summary(run: Run, *, stages: Sequence[StageRow], final_model: str | None) -> Summary:
    summary = Summary(stages=tuple(stages), final_model=final_model)
    atomic_write_json(run.directory / "summary.json", dataclasses.asdict(summary))
    return summary
