"""A run that watches itself: alarms from what its steps measured, and what is done about them.

GRPO on this recipe is known to collapse: reward falls within tens of steps after hours of training, and a run that
nobody looks at hands the ruins on. Every rule here reads rows of metrics.jsonl and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from searche1.config import HealthConfig

HEALTH_FILE = "health.jsonl"
LEAST_BEST = 0.02  # average EM that a round must have reached before losing it counts

Values = Mapping[str, float]


@dataclass(frozen=True)
class Alarm:
    """What a rule saw at a step."""

    name: str
    value: float
    limit: float
    meaning: str

    @property
    def text(self) -> str:
        return f"{self.name}: {self.value:.3g}, limit {self.limit:.3g}; {self.meaning}"


COLLAPSE = "reward collapse"

# name, metric, setting, whether the limit is the largest allowed, what it means and where to look
_RULES = (
    ("KL", "kl", "max_kl", True, "the policy is far from the start of the round: lower grpo.lr or raise grpo.kl_coef"),
    ("entropy", "entropy", "min_entropy", False, "the policy hardly samples any more; reward usually falls next"),
    ("ratio", "ratio_max", "max_ratio", True, "an update moved some token too far: lower grpo.lr"),
    ("gradient norm", "grad_norm", "max_grad_norm", True, "see which step it began with; lower grpo.lr"),
    (
        "engine gap",
        "engine_gap",
        "max_engine_gap",
        True,
        "engine and trainer disagree about logprobs: docs/debugging.md",
    ),
    ("invalid actions", "invalid_action_share", "max_invalid_share", True, "turns lose their tags: read some of them"),
    ("answered", "answered_share", "min_answered_share", False, "few trajectories end in an answer"),
    ("truncated", "truncated_share", "max_truncated_share", True, "texts run into rollout.max_*_tokens"),
    ("environment errors", "error_share", "max_error_share", True, "engine or retriever faults: see logs/"),
    ("equal rewards", "same_reward_share", "max_same_reward_share", True, "hardly any group gives a gradient"),
)


def average(rows: Sequence[Values], name: str, *, window: int) -> float | None:
    """The mean of a metric over the last `window` rows; None while there are fewer that have it."""
    values = [row[name] for row in rows[-window:] if row.get(name) is not None]
    return fmean(values) if len(values) == window else None


def find_alarms(rows: Sequence[Values], settings: HealthConfig) -> list[Alarm]:
    """What is wrong at the last of a stage's rows, which are in step order."""
    window = settings.window
    alarms = []
    for name, metric, key, is_most, meaning in _RULES:
        limit = getattr(settings, key)
        value = average(rows, metric, window=window)
        if limit and value is not None and (value > limit if is_most else value < limit):
            alarms.append(Alarm(name, value, limit, meaning))
    for name, metric, factor, is_most, meaning in (
        ("length", "mean_response_tokens", settings.max_length_growth, True, "responses grow without end"),
        ("searches", "mean_searches", settings.min_searches_kept, False, "the policy gives searching up"),
    ):
        first, last = average(rows[:window], metric, window=window), average(rows, metric, window=window)
        if factor and first and last is not None and (last > factor * first if is_most else last < factor * first):
            alarms.append(Alarm(name, last, factor * first, meaning))
    if collapse := find_collapse(rows, settings):
        alarms.append(collapse)
    return alarms


def find_collapse(rows: Sequence[Values], settings: HealthConfig) -> Alarm | None:
    """Average EM has fallen below a share of the best average of the round."""
    window = settings.window
    averages = [average(rows[: end + 1], "em", window=window) for end in range(len(rows))]
    known = [value for value in averages if value is not None]
    if not settings.reward_drop or not known or max(known) < LEAST_BEST:
        return None
    limit = (1 - settings.reward_drop) * max(known)
    if known[-1] >= limit:
        return None
    meaning = f"its best average over {window} steps was {max(known):.3g}"
    return Alarm(COLLAPSE, known[-1], limit, meaning)


class Watch:
    """The record of a stage's health on rank 0, in RUN/health.jsonl."""

    def __init__(self, path: Path, stage: str, settings: HealthConfig, tell: Callable[[str], None]) -> None:
        self._path = path
        self.stage = stage
        self._settings = settings
        self._tell = tell
        self._before: set[str] = set()
        self.rows: list[Values] = []

    def start(self, rows: Sequence[Values]) -> None:
        """Go on behind these rows of the stage: after a restart, or after a step back.

        A collapse is acted on again where `on_collapse` says how: it may say so only since the restart.
        """
        self.rows = list(rows)
        self._before = {alarm.name for alarm in find_alarms(self.rows, self._settings)}
        if self._settings.on_collapse in ("end_round", "roll_back"):
            self._before.discard(COLLAPSE)

    def step(self, step: int, values: Values) -> str:
        """Take a step's values; returns what is to be done: "", or what `on_collapse` or `on_alarm` says."""
        self.rows.append(values)
        alarms = find_alarms(self.rows, self._settings)
        new = [alarm for alarm in alarms if alarm.name not in self._before]
        self._before = {alarm.name for alarm in alarms}
        actions = set()
        for alarm in new:
            action = self._settings.on_collapse if alarm.name == COLLAPSE else self._settings.on_alarm
            self._tell(f"  ALARM {alarm.text}")
            self.record(step, alarm=asdict(alarm), action=action)
            actions.add(action)
        return next((action for action in ("stop", "end_round", "roll_back") if action in actions), "")

    def average_em(self) -> float | None:
        """Of the last steps, as many as there are up to the window."""
        window = min(self._settings.window, len(self.rows))
        return average(self.rows, "em", window=window) if window else None

    def record(self, step: int, **what: object) -> None:
        """A line of health.jsonl."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time, "stage": self.stage, "step": step, **what}) + "\n")

    def num_roll_backs(self) -> int:
        """How often this stage has gone back to a checkpoint, also before a restart."""
        return sum(row["stage"] == self.stage and "rolled_back_to" in row for row in read_health(self._path))


def read_health(path: Path) -> list[dict[str, Any]]:
    """The lines of health.jsonl; one that is being written is left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
