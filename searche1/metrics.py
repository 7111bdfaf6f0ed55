"""What a step measured: written to metrics.jsonl and TensorBoard, and told in one line."""

from __future__ import annotations

import functools
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from searche1.types import Group, UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# The values in a step's line: key, label, format. A stage that does not measure one leaves it out.
LINE = (
    ("em", "EM", ".3f"),
    ("mean_searches", "searches", ".2f"),
    ("loss", "loss", ".4f"),
    ("kl", "KL", ".2g"),
    ("grad_norm", "grad norm", ".3g"),
    ("tokens_per_s", "tokens/s", ",.0f"),
)


class Phases:
    """Seconds spent in named parts of a step: `with phases("rollout"): ...`. A name used twice adds up.

    CUDA work is counted where the host waits for it. `timeline` gets each part as an event with `details`.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        timeline: Callable[..., AbstractContextManager[None]] | None = None,
        **details: Any,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._event = functools.partial(timeline, **details) if timeline is not None else None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            with self._event(name) if self._event is not None else nullcontext():
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - began


class Tracker(Protocol):
    """A service that keeps curves, such as Weights & Biases."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases: one run for the whole cycle, metrics named after their stage, each stage with its own step.

    The run's id is kept in the run directory, so that a continued run goes on there. Raises UserError.
    """

    def __init__(self, *, project: str, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # in no lock: who wants it has it
        except ImportError as error:
            raise UserError(
                f"run.wandb={project!r} asks for Weights & Biases, which is not installed; "
                "`pip install wandb`, or leave run.wandb empty: TensorBoard files are written in any case"
            ) from error
        id_file = directory / "wandb_id"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=directory.name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=str(directory),
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases cannot be reached ({error}); log in with `wandb login`, or set WANDB_MODE=offline "
                "and send the files later with `wandb sync`"
            ) from error
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class MetricsLog:
    """Appends steps to metrics.jsonl and to TensorBoard beside it (tb/<stage>/), and prints a line for each.

    `memory` gives the peak in GB, `on_step` is called when a step is on disk, `tracker` gets every step as well.

    A run that goes on after a kill repeats the steps since its last checkpoint: `read_metrics` keeps
    the later ones, and TensorBoard hides the earlier.
    """

    def __init__(
        self,
        path: Path,
        *,
        console: Console | None = None,
        memory: Callable[[], float] | None = None,
        tracker: Tracker | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._memory = memory
        self._tracker = tracker
        self._on_step = on_step
        self._console = console or Console(highlight=False)
        self._writers: dict[str, SummaryWriter] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path, self._console)

    def log(
        self, *, stage: str, step: int, num_steps: int, values: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        """Records step `step` (from 1) of `num_steps`. A value that is not finite is null in the file."""
        if self._memory is not None:
            values = {**values, "peak_memory_gb": self._memory()}
        row = {
            "stage": stage,
            "step": step,
            "num_steps": num_steps,
            "time": time.time(),
            "values": {name: _finite(value) for name, value in values.items()},
            "seconds": dict(seconds),
        }
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        writer = self._writer(stage, first_step=step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        for name, value in seconds.items():
            writer.add_scalar(f"seconds/{name}", value, step)
        writer.flush()
        if self._tracker is not None:
            self._tracker.log(stage, step, {**values, **{f"seconds/{name}": spent for name, spent in seconds.items()}})
        line = step_line(stage=stage, step=step, num_steps=num_steps, values=values, seconds=seconds)
        self._console.print(line, markup=False, soft_wrap=True)
        self._on_step()

    def rows(self) -> list[dict[str, Any]]:
        """What `read_metrics` says of the file."""
        return read_metrics(self._path) if self._path.exists() else []

    def rewind(self, *, stage: str, step: int) -> None:
        """The stage goes on behind `step`: later rows of it count no more."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "rewound_to": step, "time": time.time()}) + "\n")
        writer = self._writers.pop(stage, None)
        if writer is not None:
            writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._tracker is not None:
            self._tracker.close()

    def _writer(self, stage: str, *, first_step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self._writers:
            self._writers[stage] = SummaryWriter(self._path.parent / "tb" / stage, purge_step=first_step)
        return self._writers[stage]


def _drop_cut_line(path: Path, console: Console) -> None:
    """A killed run may leave half a line, to which the next one would be glued."""
    if not path.exists():
        return
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        console.print(f"{path}: dropped a line that was cut when the run stopped", markup=False, soft_wrap=True)
        with open(path, "r+b") as file:
            file.truncate(whole)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def step_line(
    *, stage: str, step: int, num_steps: int, values: Mapping[str, float], seconds: Mapping[str, float]
) -> str:
    """e.g. "cycle0/grpo 12/200  EM 0.412  searches 1.83  41.2 s (rollout 30.1, train 11.1)"."""
    parts = [f"{stage} {step:>{len(str(num_steps))}}/{num_steps}"]
    parts += [f"{label} {values[key]:{style}}" for key, label, style in LINE if key in values]
    phases = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
    return "  ".join([*parts, f"{sum(seconds.values()):.1f} s ({phases})" if phases else ""]).rstrip()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in order; of steps that were run twice, the later. A line being written is left out."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in whole.splitlines():
        row = json.loads(line)
        if "rewound_to" in row:
            rows = {key: kept for key, kept in rows.items() if key[0] != row["stage"] or key[1] <= row["rewound_to"]}
        else:
            rows[row["stage"], row["step"]] = row
    return list(rows.values())


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What a batch of rollouts looked like. Trajectories with an engine or retriever fault enter error_share only.

    mean_response_tokens counts observations, policy_tokens is the sum over all trajectories.
    invalid_action_share is taken over policy turns, same_reward_share over groups: those give no gradient.
    """
    scored = [
        (group.question.source, trajectory, reward)
        for group in groups
        for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
        if trajectory.status != "error"
    ]
    num_trajectories = sum(len(group.trajectories) for group in groups)
    assert num_trajectories, "a batch of rollouts holds at least one trajectory"
    error_share = 1 - len(scored) / num_trajectories
    if not scored:
        return {"error_share": error_share}
    trajectories = [trajectory for _, trajectory, _ in scored]
    sources = sorted({source for source, _, _ in scored})
    turns = [span for t in trajectories for span in t.spans if span.author == "policy"]
    metrics = {
        "em": fmean(reward for _, _, reward in scored),
        "mean_searches": fmean(t.num_searches for t in trajectories),
        "mean_response_tokens": fmean(len(t.response_ids) for t in trajectories),
        "policy_tokens": float(sum(t.num_policy_tokens for t in trajectories)),
        "answered_share": fmean(t.status == "answered" for t in trajectories),
        "truncated_share": fmean(any(span.is_truncated for span in t.spans) for t in trajectories),
        "invalid_action_share": fmean(span.kind == "invalid" for span in turns) if turns else 0.0,
        "error_share": error_share,
        "same_reward_share": fmean(_has_one_reward(group) for group in groups),
    }
    for source in sources:  # one-hop and multi-hop questions are sources of their own
        metrics[f"em/{source}"] = fmean(reward for name, _, reward in scored if name == source)
        metrics[f"searches/{source}"] = fmean(t.num_searches for name, t, _ in scored if name == source)
    return metrics


def _has_one_reward(group: Group) -> bool:
    valid = zip(group.trajectories, group.rewards, strict=True)
    return len({reward for trajectory, reward in valid if trajectory.status != "error"}) <= 1
