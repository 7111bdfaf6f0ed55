"""The engines of a run: which are left, how busy each is, and which one a turn goes to."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

E = TypeVar("E", covariant=True)

FREE_IMBALANCE = 4  # requests that an engine may have more than the least busy one; beside a share of its own
IMBALANCE_SHARE = 0.25


class NoEngineLeft(Exception):
    """All engines are lost."""


class Fleet(Generic[E]):
    """One queue for all engines.

    What belongs together (a question's trajectories, a trajectory's turns) stays on one engine, whose cache has its
    beginning, until that one is much busier than another: reading a context again costs less than waiting.
    """

    def __init__(self, engines: Sequence[E]) -> None:
        assert engines
        self.engines = tuple(engines)
        self.lost: dict[int, str] = {}  # number of an engine that does not answer any more -> what was seen
        self._loads = [0] * len(engines)  # requests under way
        self._homes: dict[tuple[Hashable, Hashable], int] = {}

    @property
    def alive(self) -> list[int]:
        return [number for number in range(len(self.engines)) if number not in self.lost]

    @contextmanager
    def engine_for(self, group: Hashable, member: Hashable) -> Iterator[tuple[int, E]]:
        """An engine and its number for one request of a group's member, counted meanwhile. Raises NoEngineLeft."""
        number = self._choose(group, member)
        self._loads[number] += 1
        try:
            yield number, self.engines[number]
        finally:
            self._loads[number] -= 1

    def _choose(self, group: Hashable, member: Hashable) -> int:
        alive = self.alive
        if not alive:
            raise NoEngineLeft(next(reversed(self.lost.values())))
        least = min(alive, key=lambda number: self._loads[number])
        home = self._homes.get((group, member), self._homes.setdefault((group, None), least))
        if home in self.lost or self._is_much_busier(home, least):
            home = least
        self._homes[group, member] = home
        return home

    def _is_much_busier(self, one: int, other: int) -> bool:
        allowed = max(FREE_IMBALANCE, IMBALANCE_SHARE * self._loads[one])
        return self._loads[one] - self._loads[other] > allowed

    def forget(self) -> None:
        """Between rollouts: caches are empty then."""
        self._homes.clear()
