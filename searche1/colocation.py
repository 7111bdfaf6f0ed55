"""Whose turn it is on GPUs that the trainer and the engines share.

    ROLLOUT    engines have weights and cache; the trainer is on the host
    TRAIN      engines sleep; the trainer has everything
    SYNC       the trainer has its weights, optimizer state is on the host; engines have weights, and no cache

    ROLLOUT -> TRAIN: cache asleep, engine weights asleep, trainer back
    TRAIN -> SYNC: optimizer state and gradients to the host, engine weights awake
    SYNC -> ROLLOUT: trainer's weights to the host, cache awake

Somebody needs the memory next, so what engines and trainer give is measured, not believed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from searche1.policy import Policy
from searche1.rollout.engine import CACHE, WEIGHTS, Engine
from searche1.types import UserError

GIB = 1 << 30
KEPT_BY_A_SLEEPER = 6 * GIB  # CUDA context, kernels, graphs and communication buffers of an engine
MEASUREMENT_SLACK = GIB // 4  # the driver hands memory out in pieces, and other processes take some
SHARE_THAT_MUST_COME_FREE = 0.9
LOOK_EVERY_S, MOST_LOOKS = 0.1, 100
REMEDY = {
    CACHE: "lower engine.mem_fraction",
    WEIGHTS: "spread engines with engine.tensor or the trainer with parallel.tensor, or lower engine.sync_bucket_mb",
}


class Phase(Enum):
    ROLLOUT = "rollout"
    TRAIN = "train"
    SYNC = "sync"


class Colocation:
    """This rank's engines and its trainer in turn. Every rank makes the same changes at the same time."""

    def __init__(
        self,
        *,
        is_on: bool,
        engines: Mapping[int, Engine],
        free_bytes: Callable[[], int] | None,
        free_before_engines: int = 0,
        together: Callable[[Callable[[], None]], Any],
    ) -> None:
        """Engines are awake and the trainer has nothing yet.

        Args:
            is_on: otherwise nothing ever moves, and the phases are names.
            engines: those that this rank leads, by number.
            free_bytes: free memory of this rank's GPU; None where there is none to measure.
            free_before_engines: what that was before they started.
            together: runs this rank's part of a step and returns when all ranks have done theirs; raises on all of
                them if one failed.
        """
        self.phase = Phase.ROLLOUT
        self._is_on = is_on
        self._engines = engines
        self._free_bytes = free_bytes
        self._together = together
        self._taken_by_engines = free_before_engines - free_bytes() if free_bytes else 0
        self._freed: dict[str, int] = {}  # by the last sleep of each part

    def to(self, phase: Phase, policy: Policy | None) -> None:
        """Hand the GPUs over, in the one order that fits. Collective. Raises UserError if memory does not come free."""
        if not self._is_on:
            self.phase = phase
            return
        if phase is Phase.TRAIN and self.phase is not Phase.TRAIN:
            if self.phase is Phase.ROLLOUT:
                self._sleep(CACHE)
            self._sleep(WEIGHTS)
            self._check_engines_gave()
            if policy is not None:
                self._together(policy.to_device)
        elif phase is Phase.SYNC and self.phase is not Phase.SYNC:
            assert policy is not None
            self.to(Phase.TRAIN, policy)
            self._offload(policy.optimizer_to_host, "optimizer state and gradients")
            self._wake(WEIGHTS)
        elif phase is Phase.ROLLOUT and self.phase is not Phase.ROLLOUT:
            # Weights that slept are gone until a sync.
            assert policy is not None and self.phase is Phase.SYNC
            self._offload(policy.weights_to_host, "weights")
            self._wake(CACHE)
        self.phase = phase

    @contextlib.contextmanager
    def room_for_start(self, policy: Policy, numbers: Collection[int]) -> Iterator[None]:
        """Inside, engines `numbers` of this rank may be started anew, beside a trainer that is on the host.

        They end up as the others are. Collective.
        """
        if not self._is_on:
            yield
            return
        if self.phase is Phase.SYNC:  # the trainer comes back below, when the new engine sleeps too
            self._sleep(WEIGHTS)
            self.phase = Phase.TRAIN

        def trainer_to_host() -> None:
            policy.optimizer_to_host()
            policy.weights_to_host()
            self._free()  # to the driver too: torch would keep the memory for itself

        self._together(trainer_to_host)
        yield
        if self.phase is Phase.TRAIN:
            self._sleep(CACHE, numbers)
            self._sleep(WEIGHTS, numbers)
            self._together(policy.to_device)

    @property
    def keeps_engine_weights(self) -> bool:
        """Whether engines still have the weights of the last sync when the next one comes."""
        return not self._is_on

    # -- steps ------------------------------------------------------------------------------------

    def _sleep(self, part: str, numbers: Iterable[int] | None = None) -> None:
        before = self._measured()

        def sleep() -> None:
            for number in self._engines if numbers is None else numbers:
                if not self._engines[number].has_stopped():  # one that died has given everything back
                    self._engines[number].sleep(part)

        self._together(sleep)
        self._freed[part] = max(self._freed.get(part, 0), self._settled() - before)

    def _measured(self) -> int:
        """Free memory before anybody acts: an engine's lead acts on the GPUs of other ranks too."""
        found = 0

        def measure() -> None:
            nonlocal found
            found = self._free()

        self._together(measure)
        return found

    def _settled(self) -> int:
        """Free memory once it grows no more: the ranks of an engine give theirs back at their own pace."""
        free = self._free()
        for _ in range(MOST_LOOKS if self._free_bytes is not None else 0):
            time.sleep(LOOK_EVERY_S)
            last, free = free, self._free()
            if free <= last:
                break
        return free

    def _check_engines_gave(self) -> None:
        expected = self._taken_by_engines - KEPT_BY_A_SLEEPER
        freed = sum(self._freed.values())

        def check() -> None:
            if self._free_bytes is not None and freed < SHARE_THAT_MUST_COME_FREE * expected:
                raise UserError(
                    f"engines went to sleep, but only {freed / GIB:.1f} GiB of the {self._taken_by_engines / GIB:.1f} "
                    "GiB that they had taken of a GPU came free; see the logs of the engines. torch_memory_saver must "
                    "be of a version that this SGLang knows; train.offload=never keeps engines awake beside the trainer"
                )

        self._together(check)

    def _offload(self, to_host: Callable[[], int], what: str) -> None:
        before = self._free()
        moved = 0

        def offload() -> None:
            nonlocal moved
            moved = to_host()
            freed = self._free() - before
            if self._free_bytes is not None and freed < SHARE_THAT_MUST_COME_FREE * moved - MEASUREMENT_SLACK:
                raise UserError(
                    f"the trainer moved {moved / GIB:.1f} GiB of {what} to the host, but only {freed / GIB:.1f} GiB of "
                    "its GPU came free: something else still holds them. Please report this with the settings used; "
                    "train.offload=never avoids the move"
                )

        self._together(offload)

    def _wake(self, part: str) -> None:
        def check() -> None:
            needed, free = self._freed.get(part, 0), self._free()
            if self._free_bytes is not None and free + MEASUREMENT_SLACK < needed:
                raise UserError(
                    f"engines need {needed / GIB:.1f} GiB for their {part} again, but {free / GIB:.1f} GiB are free "
                    f"beside the trainer; {REMEDY[part]}"
                )

        def wake() -> None:
            for engine in self._engines.values():
                if not engine.has_stopped():
                    engine.wake(part)

        self._together(check)
        self._together(wake)

    def _free(self) -> int:
        return self._free_bytes() if self._free_bytes is not None else 0
