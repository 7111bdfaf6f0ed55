"""One calm screen of a run: stages, the step, a few curves, where the time goes. Drawn from the run directory alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from searche1.console import plain_table
from searche1.evaluation.stages import table_cells
from searche1.health import HEALTH_FILE, Alarm, read_health
from searche1.metrics import read_metrics
from searche1.progress import duration
from searche1.runs import Summary, read_summary
from searche1.types import UserError

BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = (
    ("em", "EM", ".3f"),
    ("mean_searches", "searches", ".2f"),
    ("loss", "loss", ".4f"),
    ("kl", "KL", ".3g"),
    ("entropy", "entropy", ".3f"),
    ("grad_norm", "grad norm", ".3g"),
    ("validation_em", "validation EM", ".3f"),
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("peak_memory_gb", "memory GB", ".1f"),
)
CURVE_STEPS = 48
RECENT_STEPS = 10  # whose mean times tell how long the stage still takes
SILENT_S = 120.0  # without a step, after which the screen says for how long


@dataclass(frozen=True)
class View:
    """What there is to see of a run."""

    name: str
    summary: Summary
    metrics: Sequence[Mapping[str, Any]]  # rows of metrics.jsonl
    health: Sequence[Mapping[str, Any]] = ()  # rows of health.jsonl
    status: str = ""  # of a rollout under way, as the run itself knows it


def read_view(directory: Path, *, status: str = "") -> View:
    """Raises UserError if the folder is no run's."""
    if not (directory / "config.yaml").is_file():
        raise UserError(
            f"{directory} holds no run (no config.yaml); give a run directory, such as runs/quickstart-seed0"
        )
    path = directory / "metrics.jsonl"
    return View(
        directory.name,
        read_summary(directory),
        read_metrics(path) if path.exists() else [],
        read_health(directory / HEALTH_FILE),
        status,
    )


def sparkline(values: Sequence[float]) -> str:
    """Eight heights of a block between the smallest and the largest value; of equal values, the middle one."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return BLOCKS[3] * len(values)
    return "".join(BLOCKS[min(7, int(8 * (value - low) / (high - low)))] for value in values)


def render(view: View, *, now: float) -> RenderableType:
    """The screen at `now`, seconds of the wall clock."""
    parts: list[RenderableType] = [_title(view, now)]
    if view.summary.stages:
        parts.append(plain_table(table_cells(view.summary.stages)))
    if view.metrics:
        stage = view.metrics[-1]["stage"]
        rows = [row for row in view.metrics if row["stage"] == stage]
        parts += [_progress(rows), _curves(rows), _times(rows)]
        alarms = [row for row in view.health if row["stage"] == stage and "alarm" in row]
        for row in alarms[-3:]:
            parts.append(Text(f"ALARM at step {row['step']}: {Alarm(**row['alarm']).text}", style="red"))
    if view.status:
        parts.append(Text(view.status, style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def _title(view: View, now: float) -> Text:
    text = Text(view.name, style="bold")
    if view.summary.final_model is not None:
        return text.append("  finished", style="green")
    if not view.metrics:
        return text.append("  no step yet", style="dim")
    silence = now - view.metrics[-1]["time"]
    if silence > SILENT_S:
        return text.append(f"  last step {duration(silence)} ago", style="yellow")
    return text.append("  running", style="green")


def _progress(rows: Sequence[Mapping[str, Any]]) -> Table:
    last = rows[-1]
    total = last.get("num_steps") or last["step"]
    recent = [sum(row["seconds"].values()) for row in rows[-RECENT_STEPS:]]
    left = (total - last["step"]) * sum(recent) / len(recent)
    table = Table.grid(padding=(0, 2, 0, 0))
    told = f"{last['step']}/{total}" + (f"  {duration(left)} left in this stage" if left else "")
    table.add_row(Text(last["stage"], style="bold"), ProgressBar(total=total, completed=last["step"], width=30), told)
    return table


def _curves(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for key, label, style in CURVES:
        values = [row["values"][key] for row in rows if row["values"].get(key) is not None][-CURVE_STEPS:]
        if values:
            table.add_row(
                Text(label, style="dim"), Text(format(values[-1], style)), Text(sparkline(values), style="cyan")
            )
    return table


def _times(rows: Sequence[Mapping[str, Any]]) -> Text:
    """How the last steps' time was spent."""
    recent = rows[-RECENT_STEPS:]
    spent: dict[str, float] = {}
    for row in recent:
        for phase, seconds in row["seconds"].items():
            spent[phase] = spent.get(phase, 0.0) + seconds
    whole = sum(spent.values()) or 1.0
    shares = "   ".join(f"{phase} {seconds / whole:.0%}" for phase, seconds in spent.items())
    return Text(f"{whole / len(recent):.1f} s a step: {shares}", style="dim")


class Screen:
    """The screen below a run's own lines, on a terminal; elsewhere it shows nothing and costs nothing."""

    def __init__(self, console: Console, directory: Path) -> None:
        self._directory = directory
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._view: View | None = None

    @property
    def is_on(self) -> bool:
        return self._live is not None

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self) -> None:
        """Read what is new in the run directory."""
        if self._live is not None:
            self._view = read_view(self._directory)
            self._show()

    def status(self, text: str) -> None:
        """What is under way, "" for nothing."""
        if self._live is not None:
            view = self._view or read_view(self._directory)
            self._view = replace(view, status=text)
            self._show()

    def _show(self) -> None:
        assert self._live is not None and self._view is not None
        self._live.update(render(self._view, now=time.time()), refresh=True)


def watch(directory: Path, console: Console, *, every_s: float = 1.0, is_once: bool = False) -> None:
    """Draws the run until it is finished or Ctrl-C; once, where there is no terminal. Raises UserError."""
    view = read_view(directory)
    if is_once or not console.is_terminal:
        console.print(render(view, now=time.time()))
        return
    with Live(render(view, now=time.time()), console=console, auto_refresh=False) as live:
        while view.summary.final_model is None:
            time.sleep(every_s)
            view = read_view(directory)
            live.update(render(view, now=time.time()), refresh=True)
