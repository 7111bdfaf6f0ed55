"""Saves and loads model and optimizer with Megatron's dist_checkpointing, in any layout from any layout.

A checkpoint is a folder that appears when it is whole, with the size and SHA-256 of every file in `checkpoint.json`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import pickle
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

RECORD = "checkpoint.json"
# Stored per parameter in a canonical shape, so that any tensor, pipeline and data layout can read it.
# Gathered parameter by parameter: all at once is three float32 copies of the model in every rank's host memory.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


class CheckpointWriter:
    """Writes one checkpoint at a time beside the training. Every method is collective.

    What is saved is copied to the host when `begin` returns; a process forked from each rank writes it to the disk.
    """

    def __init__(self) -> None:
        self._calls = AsyncCallsQueue()

    def begin(
        self,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        folder: Path,
        *,
        state: dict[str, Any],
        only_trained: bool = False,
    ) -> None:
        """Start to write; `folder` appears in the `poll` or `finish` that finds it whole.

        Args:
            state: small plain values that return from `load_checkpoint` and `read_state`, such as the step.
            only_trained: leave out weights without a gradient, such as those under an adapter.

        Raises ValueError if an earlier one could not be written, OSError on the rank that met a fault of the disk.
        """
        self.finish()
        _use_own_results_queue()
        partial = folder.with_name(f"{folder.name}.{_agreed_token()}.partial")
        if dist.get_rank() == 0:
            partial.mkdir(parents=True)
        dist.barrier()
        sharded = _sharded(model, optimizer, is_loading=False, only_trained=only_trained)
        try:
            request = dist_checkpointing.save({**sharded, "state": state}, str(partial), async_sharded_save=True)
        except RuntimeError as error:  # the first rank writes plain values at once, and torch tells no OSError
            if not any(words in str(error) for words in ("iostream error", "inline_container")):
                raise
            raise OSError(
                errno.EIO, f"the disk is full or broken ({str(error).splitlines()[0]})", str(partial)
            ) from error
        assert request is not None
        request.add_finalize_fn(functools.partial(_publish, partial, folder, state))
        self._calls.schedule_async_request(request._replace(async_fn=functools.partial(_write, request.async_fn)))

    def poll(self) -> None:
        """Publishes the checkpoint under way if it is on the disk. Raises ValueError if it could not be written."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits for the checkpoint under way and publishes it. Raises ValueError if it could not be written."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        try:
            self._calls.maybe_finalize_async_calls(blocking=blocking)
        except CheckpointException as error:  # on the first rank with what happened, on the others without
            reasons = [f"rank {rank}: {_reason(failure[0])}" for rank, failure in error.failures.items()]
            raise ValueError(
                f"a checkpoint could not be written ({'; '.join(reasons) or 'rank 0 says why'}); make room or mend the "
                "disk and run the same command again: it continues from the last whole one"
            ) from error


def _write(write: Callable[..., None], *arguments: Any, **named: Any) -> None:
    """The forked process of a rank. Megatron's waits for its children for ever, also for one that was killed."""
    threading.Thread(target=_end_with_a_killed_child, daemon=True).start()
    write(*arguments, **named)


def _end_with_a_killed_child() -> None:
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(ChildProcessError):  # it was joined just now
                ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None and ended.si_status:
                    os._exit(1)  # without results, which is an error where they are awaited
        time.sleep(0.2)


def _reason(error: BaseException) -> str:
    if "results_queue should not be empty" in str(error):
        return "the process that wrote it ended before it was done; if the system killed it, memory ran out"
    return str(error)


def _agreed_token() -> str:
    """A name that no writer of an earlier process uses, who may still be at work. Collective."""
    token = [secrets.token_hex(4)]
    dist.broadcast_object_list(token, src=0)
    return token[0]


def _publish(partial: Path, folder: Path, state: dict[str, Any]) -> None:
    """Record every file and give the folder its name. Collective."""
    rank = dist.get_rank()
    own = sorted(partial.glob(f"__{rank}_*"))
    if rank == 0:
        own += sorted(path for path in partial.iterdir() if not path.name.startswith("__"))
    records: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(records, {path.name: _record(path) for path in own})
    if rank == 0:
        files = {name: record for of_rank in records for name, record in of_rank.items()}
        with open(partial / RECORD, "w", encoding="utf-8") as file:
            json.dump({"state": state, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def _record(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` of a whole checkpoint."""
    state: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["state"]
    return state


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, "" if every file is as it was written. Collective: each rank reads a share."""
    try:
        recorded: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{RECORD} is missing or damaged"
    fault = ""
    for number, (name, record) in enumerate(sorted(recorded.items())):
        if number % dist.get_world_size() != dist.get_rank():
            continue
        if not (folder / name).is_file():
            fault = fault or f"{name} is missing"
        elif _record(folder / name) != record:
            fault = fault or f"{name} is not what was written"
    faults = [fault] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next(filter(None, faults), "")


class _Results:
    """What the forked process of a rank reports, in memory that both have open; Megatron asks for a queue.

    Its own is in a manager's process, which imports torch to read the first report and outlives a rank that is killed.
    """

    def __init__(self) -> None:
        self._file = open(os.memfd_create("results"), "w+b", buffering=0)  # noqa: SIM115

    def put(self, results: Any) -> None:
        self._file.seek(0)
        self._file.write(pickle.dumps(results))

    def get_nowait(self) -> Any:
        self._file.seek(0)
        report = self._file.read()
        self._file.truncate(0)
        try:
            return pickle.loads(report)
        except (EOFError, pickle.UnpicklingError):  # none, or cut
            raise queue.Empty from None


def _use_own_results_queue() -> None:
    module: Any = filesystem_async
    if not isinstance(module._results_queue, _Results):
        module._results_queue = _Results()


def load_checkpoint(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, folder: Path, *, only_trained: bool = False
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint of any layout; returns its `state`. Collective.

    `only_trained` as it was saved with.
    """
    inner = [o.optimizer for o in getattr(optimizer, "chained_optimizers", [optimizer])]
    # What follows is about torch's Adam; Transformer Engine's keeps its step elsewhere.
    inner = [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]
    for adam in inner:
        _allocate_adam_state(adam)
    with _step_survives_resharding():
        sharded = _sharded(model, optimizer, is_loading=True, only_trained=only_trained)
        wanted = {**sharded, "state": {}}
        loaded = dist_checkpointing.load(wanted, str(folder))
        optimizer.load_state_dict(loaded.pop("optimizer"))
    for adam in inner:
        for parameter_state in adam.state.values():
            # Loading shares one tensor between parameters; each would advance it in every step.
            parameter_state["step"] = parameter_state["step"].clone()
    state: dict[str, Any] = loaded.pop("state")
    model.module.load_state_dict(loaded["model"], strict=False)
    return state


def _sharded(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, *, is_loading: bool, only_trained: bool
) -> dict[str, Any]:
    weights = model.module.sharded_state_dict()  # named as Megatron-LM names them, so that tools read them
    if only_trained:
        trained = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
        weights = {name: tensor for name, tensor in weights.items() if name in trained}
    return {
        "model": dict(weights),
        "optimizer": optimizer.sharded_state_dict(dict(weights), is_loading=is_loading, metadata=_SHARDING),
    }


def _allocate_adam_state(adam: torch.optim.Optimizer) -> None:
    """Give torch's Adam the state that it would make in its first step: loading fills what exists."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state.get(parameter):
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextlib.contextmanager
def _step_survives_resharding() -> Iterator[None]:
    """Torch's Adam keeps a 0-dimensional `step` per parameter, which Megatron's reshard would slice like a moment."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def keep_step(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        own = self._get_main_param_and_optimizer_states(model_param)
        if "step" in own and "step" not in tensors:
            tensors = {**tensors, "step": own["step"]}
        original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original
