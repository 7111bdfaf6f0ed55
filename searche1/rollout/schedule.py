"""Which engine samples which trajectory next, and which engines are left."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

E = TypeVar("E", covariant=True)
Place = tuple[int, int]  # number of the group, number of the sample in it


class Fleet(Generic[E]):
    """The engines of a run. One that stopped answering gets no more work until it has been started again."""

    def __init__(self, engines: Sequence[E]) -> None:
        assert engines
        self.engines = tuple(engines)
        self.lost: dict[int, str] = {}  # number of the engine -> what was seen

    @property
    def alive(self) -> list[int]:
        return [number for number in range(len(self.engines)) if number not in self.lost]


class Schedule:
    """One queue for all engines. A group stays on one engine for its prefix cache, until others would idle for it."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._waiting: dict[int, deque[int]] = {}  # group -> its samples that nobody has begun
        for group, sample in places:
            self._waiting.setdefault(group, deque()).append(sample)
        self._fresh = deque(self._waiting)  # groups that no engine has begun
        self._begun: dict[int, list[int]] = {}  # engine -> its groups
        self._num_waiting = sum(map(len, self._waiting.values()))
        self._num_running = 0

    @property
    def num_left(self) -> int:
        """Trajectories that are not finished."""
        return self._num_running + self._num_waiting

    @property
    def has_waiting(self) -> bool:
        """Whether `take` would give something."""
        return self._num_waiting > 0

    def take(self, engine: int) -> Place | None:
        """The next trajectory for this engine: of a group it has, of a fresh one, or of the one with most to do."""
        own = self._begun.setdefault(engine, [])
        while own and not self._waiting[own[0]]:
            own.pop(0)
        if own:
            group = own[0]
        elif self._fresh:
            group = self._fresh.popleft()
            own.append(group)
        else:
            if not self._num_waiting:
                return None
            group = max(self._waiting, key=lambda g: len(self._waiting[g]))
        self._num_waiting -= 1
        self._num_running += 1
        return group, self._waiting[group].popleft()

    def finish(self) -> None:
        """A trajectory is done."""
        self._num_running -= 1

    def give_back(self, place: Place) -> None:
        """A trajectory whose engine was lost; another engine goes on with it."""
        group, sample = place
        self._waiting[group].appendleft(sample)
        self._num_waiting += 1
        self._num_running -= 1
