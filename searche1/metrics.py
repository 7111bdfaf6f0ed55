"""What a step measured: written to metrics.jsonl and TensorBoard, and told in one line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console

from searche1.types import Group

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

    CUDA work is counted where the host waits for it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - began


class MetricsLog:
    """Appends steps to metrics.jsonl and to TensorBoard beside it (tb/<stage>/), and prints a line for each.

    A run that goes on after a kill repeats the steps since its last checkpoint: `read_metrics` keeps
    the later ones, and TensorBoard hides the earlier.
    """

    def __init__(self, path: Path, *, console: Console | None = None) -> None:
        self._path = path
        self._console = console or Console(highlight=False)
        self._writers: dict[str, SummaryWriter] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path, self._console)

    def log(
        self, *, stage: str, step: int, num_steps: int, values: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        """Records step `step` (from 1) of `num_steps`. A value that is not finite is null in the file."""
        row = {
            "stage": stage,
            "step": step,
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
        line = step_line(stage=stage, step=step, num_steps=num_steps, values=values, seconds=seconds)
        self._console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

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
    """The rows of metrics.jsonl in order; of steps that were run twice, the later."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return list({(row["stage"], row["step"]): row for row in rows}.values())


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
    for source in sorted({source for source, _, _ in scored}):
        metrics[f"em/{source}"] = fmean(reward for name, _, reward in scored if name == source)
    return metrics


def _has_one_reward(group: Group) -> bool:
    valid = zip(group.trajectories, group.rewards, strict=True)
    return len({reward for trajectory, reward in valid if trajectory.status != "error"}) <= 1
