"""A weight sync: the trainer's ranks hand buckets of whole tensors to the engines on their GPUs.

    ranks of one engine                                   engine
    gather bucket 1 from all shards
    handles -> lead   ------- update_weights_from_tensor --->  opens them, loads
    gather bucket 2                     (meanwhile)
    lead has its answer: bucket 1 may go
    handles -> lead   ------------------------------------->   ...

On GPUs each engine rank reads the memory of the trainer's rank on its own GPU. On CPUs the lead hands everything over,
or writes memory that the engine computes with (`SharedWeights`): then nothing but the first sync's handle is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from megatron_ext.buckets import Bucket, fill_buckets
from megatron_ext.shared_weights import SharedWeights
from searche1.policy import Policy
from searche1.rollout.engine import ADOPT, COMPARE, Engine, EngineError, shared
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
        self._read: tuple[SharedWeights, int] | None = None  # by which of the engine's processes

    @property
    def is_mine(self) -> bool:
        """Whether this rank is one of the engine's."""
        return self.engine is not None or dist.get_rank() in self.place.sources

    def begin(self) -> None:
        """Forgets the last sync."""
        self.problem, self._has_failed = None, False
        self._start(lambda engine: engine.begin_update())
        self.settle()

    def feed(self, bucket: Bucket, *, load_format: str | None = None) -> None:
        """Hands a bucket over and returns while the engine loads it; `settle` must come before the next."""
        if self._has_failed:
            return
        own = [shared(bucket.tensors()) for _ in self._own_parts()]
        gathered: list[Any] = [own]
        if self._group is not None:
            gathered = [None] * dist.get_world_size(self._group)
            dist.gather_object(own, gathered if self.engine else None, dst=self.place.lead, group=self._group)
        self._bucket = bucket  # its memory stays until the engine has answered
        payloads = [handle for handles in gathered if handles for handle in handles]
        self._start(lambda engine: engine.load_bucket(payloads, load_format=load_format))

    def reads(self, memory: SharedWeights) -> bool:
        """Whether the engine computes with this memory; true where no engine is led."""
        return self.engine is None or self._read == (memory, self.engine.starts)

    def hand_over(self, memory: SharedWeights) -> None:
        """Has the engine compute with this memory, all of which is written."""
        if self.engine is None or self.problem is not None or self.reads(memory):
            return
        starts = self.engine.starts
        self._start(lambda engine: engine.load_bucket([shared(memory.tensors())], load_format=ADOPT))
        self.settle()
        if self.problem is None:
            self._read = (memory, starts)

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


def sync_weights(
    policy: Policy,
    links: Iterable[Link],
    *,
    version: str,
    bucket_bytes: int,
    memory: SharedWeights | None = None,
    only_adapted: bool = False,
    is_exact: bool = False,
) -> None:
    """Puts the policy's merged weights into all engines; `is_exact` has each compare what it then holds.

    `memory` is what this rank's engines compute with from now on. `only_adapted` leaves out what no adapter changes,
    which they and the memory must hold already. Collective. Raises EngineError on the leads of engines that failed,
    after all ranks are through.
    """
    mine = [link for link in links if link.is_mine]
    for link in mine:
        link.begin()
    if memory is None:
        _feed(policy.hf_buckets(bucket_bytes=bucket_bytes, only_adapted=only_adapted), mine)
    else:
        tensors = policy.hf_tensors_everywhere(bucket_bytes=bucket_bytes, only_adapted=only_adapted)
        _feed(fill_buckets(memory.take(tensors), bucket_bytes=bucket_bytes, allocate=memory.for_the_rest), mine)
        for link in mine:
            link.hand_over(memory)
    if is_exact:
        _feed(policy.hf_buckets(bucket_bytes=bucket_bytes, only_adapted=only_adapted), mine, load_format=COMPARE)
    for link in mine:
        link.end(version=version)
    for link in mine:
        if link.problem is not None:
            raise link.problem


def _feed(buckets: Iterable[Bucket], links: Iterable[Link], *, load_format: str | None = None) -> None:
    for bucket in buckets:  # gathering the next overlaps with the engines loading the last
        for link in links:
            link.settle()
        for link in links:
            link.feed(bucket, load_format=load_format)
    for link in links:
        link.settle()
