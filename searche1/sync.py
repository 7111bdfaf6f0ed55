"""A weight sync: the trainer's ranks hand buckets of whole tensors to the engines on their GPUs.

    ranks of one engine                                   engine
    gather bucket 1 from all shards
    handles -> lead   ------- update_weights_from_tensor --->  opens them, loads
    gather bucket 2                     (meanwhile)
    lead has its answer: bucket 1 may go
    handles -> lead   ------------------------------------->   ...

On GPUs each engine rank reads the memory of the trainer's rank on its own GPU. On CPUs the lead hands everything over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from megatron_ext.buckets import Bucket
from searche1.rollout.engine import COMPARE, Engine, EngineError, shared
from searche1.rollout.places import EnginePlace


class Link:
    """This rank's part in feeding one engine. Make it on every rank, for every place, in the same order."""

    def __init__(self, place: EnginePlace, engine: Engine | None) -> None:
        """`engine` on the lead only. Collective."""
        ranks = sorted(set(place.sources))
        self.place = place
        self.engine = engine
        self.problem: EngineError | None = None  # on the lead
        self._group = dist.new_group(ranks, backend="gloo") if len(ranks) > 1 else None
        self._has_failed = False  # known to all ranks of the engine
        self._thread = ThreadPoolExecutor(max_workers=1) if engine else None
        self._loading: Future[None] | None = None
        self._bucket: Bucket | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this rank is one of the engine's."""
        return self.engine is not None or dist.get_rank() in self.place.sources

    def begin(self) -> None:
        """Forgets the last sync."""
        self.problem, self._has_failed = None, False
        self._start(lambda engine: engine.begin_update())
        self.settle()

    def feed(self, bucket: Bucket, *, is_exact: bool) -> None:
        """Hands a bucket over and returns while the engine loads it; `settle` must come before the next."""
        if self._has_failed:
            return
        own = [shared(bucket) for _ in range(2 if is_exact else 1) for source in self._own_parts()]
        gathered: list[Any] = [own]
        if self._group is not None:
            gathered = [None] * dist.get_world_size(self._group)
            dist.gather_object(own, gathered if self.engine else None, dst=self.place.lead, group=self._group)
        self._bucket = bucket  # its memory stays until the engine has answered
        parts = len(self._own_parts())
        payloads = [handle for handles in gathered if handles for handle in handles[:parts]]
        again = [handle for handles in gathered if handles for handle in handles[parts:]]

        def load(engine: Engine) -> None:
            engine.load_bucket(payloads)
            if is_exact:
                engine.load_bucket(again, load_format=COMPARE)

        self._start(load)

    def settle(self) -> None:
        """Waits for the engine's answer; afterwards each of its ranks knows whether it goes on. Collective."""
        if self._loading is not None:
            try:
                self._loading.result()
            except EngineError as error:
                self.problem = self.problem or error
            self._loading = None
        failed = [self.problem is not None]
        if self._group is not None:
            dist.broadcast_object_list(failed, src=self.place.lead, group=self._group)
        self._has_failed = failed[0]
        self._bucket = None

    def end(self, *, version: str) -> None:
        """After the last bucket."""
        self._start(lambda engine: engine.end_update(version=version))
        self.settle()

    def _own_parts(self) -> Sequence[int]:
        """The ranks of the engine that this rank has to give a handle."""
        return [k for k, source in enumerate(self.place.sources) if source == dist.get_rank()]

    def _start(self, work: Any) -> None:
        if self.engine is not None and self.problem is None:
            assert self._thread is not None and self._loading is None
            self._loading = self._thread.submit(work, self.engine)


def send_weights(buckets: Iterable[Bucket], links: Iterable[Link], *, version: str, is_exact: bool) -> None:
    """Puts the tensors of all buckets into all engines; `is_exact` has each compare what it then holds.

    Collective. Raises EngineError on the leads of engines that failed, after all ranks are through.
    """
    mine = [link for link in links if link.is_mine]
    for link in mine:
        link.begin()
    for bucket in buckets:  # gathering the next overlaps with the engines loading the last
        for link in mine:
            link.settle()
        for link in mine:
            link.feed(bucket, is_exact=is_exact)
    for link in mine:
        link.settle()
    for link in mine:
        link.end(version=version)
    for link in mine:
        if link.problem is not None:
            raise link.problem
