"""The checkpoints of a round: which are kept, and which one a stopped round continues from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.checkpoint import find_damage, read_state
from searche1.policy import Policy
from searche1.session import Session
from searche1.types import Stopped

CHECKPOINTS = "checkpoints"  # a stage's folder, until its model is there


class Checkpoints:
    """The folder STAGE/checkpoints with its `step_N`. Every method is collective.

    Kept are the last few, every k-th step, and the one with the best score: what a round goes back to.
    """

    def __init__(self, session: Session, policy: Policy, folder: Path) -> None:
        self.folder = folder
        self._session = session
        self._policy = policy
        self._keep_last = max(1, session.config.train.keep_last)
        self._keep_every = session.config.train.keep_every

    def save(self, step: int, *, score: float | None = None, state: dict[str, Any] | None = None) -> None:
        """Begin to write the checkpoint of a step; training may go on. An earlier one is on the disk afterwards."""
        if self._session.from_writer(lambda: (self.folder / f"step_{step}").is_dir()):
            return
        self._policy.save_checkpoint(self.folder / f"step_{step}", step=step, state={**(state or {}), "score": score})
        self._thin_out()

    def poll(self) -> None:
        """Gives the one under way its name if it is whole."""
        self._policy.poll_checkpoint()
        self._thin_out()

    def finish(self) -> None:
        """Waits for the one under way."""
        self._policy.finish_checkpoint()
        self._thin_out()

    def stop(self, step: int, *, score: float | None = None, state: dict[str, Any] | None = None) -> NoReturn:
        """Write the checkpoint of this step, because somebody asked the run to stop, and raise Stopped."""
        self._session.end_rollouts(self._policy)
        self.finish()  # it may be of this very step
        if step:
            self.save(step, score=score, state=state)
        self.finish()
        raise Stopped(f"stopped at step {step} of {self.folder.parent}; the same command continues from there")

    def resume(self) -> dict[str, Any]:
        """Load the newest whole checkpoint; returns its state, {} if there is none. Damaged ones are set aside."""
        self._session.from_writer(self._remove_partial)
        while (newest := self._session.from_writer(lambda: max(self._steps(), default=0))) > 0:
            if damage := find_damage(self.folder / f"step_{newest}"):
                self._session.tell(f"checkpoint step_{newest} is damaged ({damage}); trying the one before it")
                self._session.from_writer(lambda: self._set_aside(newest))
                continue
            self.load(newest)
            self._session.tell(f"continuing from step_{newest}")
            return read_state(self.folder / f"step_{newest}")
        return {}

    def is_whole(self, step: int) -> bool:
        """Whether the checkpoint of a step is there, as it was written."""
        there = self._session.from_writer(lambda: (self.folder / f"step_{step}").is_dir())
        return there and not find_damage(self.folder / f"step_{step}")

    def load(self, step: int) -> None:
        self._policy.load_checkpoint(self.folder / f"step_{step}")

    def best(self) -> int:
        """The step with the best score, the earlier of equals; 0 if no checkpoint has one."""
        return self._session.from_writer(self._best)

    def drop_after(self, step: int) -> None:
        """Forget later checkpoints: the round goes another way."""
        self.finish()

        def drop() -> None:
            for later in self._steps():
                if later > step:
                    shutil.rmtree(self.folder / f"step_{later}")

        self._session.from_writer(drop)

    # -- on rank 0 --------------------------------------------------------------------------------

    def _steps(self) -> list[int]:
        names = (path.name for path in self.folder.glob("step_*"))
        return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))

    def _best(self) -> int:
        scores = {step: read_state(self.folder / f"step_{step}").get("score") for step in self._steps()}
        scored = {step: score for step, score in scores.items() if score is not None}
        return max(scored, key=lambda step: (scored[step], -step), default=0)

    def _thin_out(self) -> None:
        self._session.from_writer(self._remove_old)

    def _remove_old(self) -> None:
        steps = self._steps()
        kept = {*steps[-self._keep_last :], self._best()}
        kept |= {step for step in steps if self._keep_every and step % self._keep_every == 0}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.folder / f"step_{step}")

    def _remove_partial(self) -> None:
        for partial in self.folder.glob("*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def _set_aside(self, step: int) -> None:
        damaged = self.folder / f"damaged_step_{step}"
        shutil.rmtree(damaged, ignore_errors=True)
        (self.folder / f"step_{step}").rename(damaged)
