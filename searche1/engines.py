"""All engines of the job, as each rank sees them: it may lead some, feed one, and rank 0 drives all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ext.shared_weights import SharedWeights, shared_weights
from searche1.colocation import Colocation
from searche1.config import Config
from searche1.policy import Policy
from searche1.ranks import Ranks
from searche1.rollout.engine import Engine
from searche1.rollout.places import EnginePlace, engine_places, own_address
from searche1.rollout.servers import (
    Servers,
    engine_key,
    longest_context,
    make_servers,
    start_engine_at,
    start_retriever,
)
from searche1.sync import Link, sync_weights


def places_of(config: Config, *, device: str, world_size: int) -> tuple[EnginePlace, ...]:
    """Where this job's engines run; nowhere if they run elsewhere. Raises UserError if they do not fit."""
    if config.engine.urls:
        return ()
    return engine_places(
        count=config.engine.count,
        tensor=config.engine.tensor,
        device=device,
        world_size=world_size,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


class Engines:
    """Started with the session, and stopped with it. Every method is collective."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        *,
        model_path: Path,
        device: torch.device,
        dtype: str,
        directory: Path,
        stack: contextlib.ExitStack,
        tell: Callable[[str], None],
    ) -> None:
        """Start engines on all nodes, and the retriever, and wait for them; `stack` stops them. Raises UserError."""
        self._config = config
        self._ranks = ranks
        self._tell = tell
        self._directory = directory
        is_gpu = device.type == "cuda"
        is_shared = {"auto": is_gpu, "always": True, "never": False}[config.train.offload] and not config.engine.urls
        free_bytes = free_gpu_bytes if is_gpu and is_shared else None
        # Together, because a lead starts its engine on the GPUs of other ranks too.
        free_before = ranks.everywhere(lambda: free_bytes() if free_bytes else 0)[ranks.rank]
        places = places_of(config, device=device.type, world_size=ranks.world_size)
        self._led: dict[int, Engine] = {}
        host = own_address()

        def start() -> None:
            for place in places:
                if place.lead == ranks.rank:
                    engine = start_engine_at(
                        place,
                        config,
                        model_path=model_path,
                        dtype=dtype,
                        context_length=longest_context(config) + config.rollout.max_response_tokens,
                        log_dir=directory / "logs",
                        host=host,
                        can_sleep=is_shared,
                    )
                    stack.callback(engine.stop)
                    self._led[place.number] = engine

        ranks.everywhere(start)
        is_whole = config.engine.tensor == 1  # else each of an engine's ranks holds parts
        self._shares_weights = not is_gpu and bool(self._led) and is_whole and config.engine.share_weights == "auto"
        self._memory: SharedWeights | None = None
        # It starts while the engines load.
        url = ranks.from_writer(lambda: start_retriever(config, log_dir=directory / "logs", stack=stack), beats=True)
        self._wait(list(self._led))
        addresses = ranks.everywhere(lambda: {n: (e.url, e.log_path, e.key) for n, e in self._led.items()})
        self._links = [Link(place, self._led.get(place.number)) for place in places]
        self.servers: Servers | None = None  # on rank 0
        self._elsewhere: list[Engine] = []  # on rank 0: engines that are not ours to start
        if ranks.is_writer:
            timeout_s = config.engine.request_timeout_s
            key = engine_key(config)
            self._elsewhere = [Engine(url=url, request_timeout_s=timeout_s, key=key) for url in config.engine.urls]
            found = {n: address for of_rank in addresses for n, address in of_rank.items()}
            clients = [
                self._led.get(n) or Engine(url=url, log_path=log_path, request_timeout_s=timeout_s, key=key)
                for n, (url, log_path, key) in sorted(found.items())
            ]
            self.servers = make_servers(config, clients + self._elsewhere, retriever_url=url, model_path=model_path)
        ranks.from_writer(self._check_elsewhere)
        self.colocation = Colocation(
            is_on=is_shared,
            engines=self._led,
            free_bytes=free_bytes,
            free_before_engines=free_before,
            together=ranks.everywhere,
        )

    def _wait(self, numbers: list[int]) -> None:
        def wait() -> None:
            for number in numbers:
                self._led[number].wait_until_ready(timeout_s=self._config.engine.start_timeout_s)

        self._ranks.everywhere(wait)

    def _check_elsewhere(self) -> None:
        for engine in self._elsewhere:
            engine.wait_until_ready(timeout_s=10.0)
            engine.check_key()

    # -- weights ----------------------------------------------------------------------------------

    def load(self, policy: Policy, *, version: str, only_adapted: bool) -> None:
        """The policy's merged weights into every engine. Raises UserError if one does not take them."""
        if self._config.engine.urls:
            self._load_through_folder(policy, version=version)
            return
        memory = self._shared_weights(policy)
        is_new = self._ranks.everywhere(lambda: memory is not None and not all(x.reads(memory) for x in self._links))
        self._ranks.everywhere(
            lambda: sync_weights(
                policy,
                self._links,
                version=version,
                bucket_bytes=self._config.engine.sync_bucket_mb << 20,
                memory=memory,
                only_adapted=only_adapted and not any(is_new),
                is_exact=self._config.engine.verify_sync == "exact",
            )
        )

    def _shared_weights(self, policy: Policy) -> SharedWeights | None:
        """What the engines that this rank leads shall compute with, if they can and there is room."""
        if self._shares_weights and self._memory is None:
            found = shared_weights(policy.shape, policy.dtype)
            if isinstance(found, str):
                self._shares_weights = False
                self._tell(f"  engines copy weights: {found}")
            else:
                self._memory = found
        return self._memory

    def _load_through_folder(self, policy: Policy, *, version: str) -> None:
        folder = self._directory / "sync"
        policy.save_hf(folder)

        def load() -> None:
            for engine in self._elsewhere:
                engine.load_folder(folder.resolve(), version=version)
                self._ranks.beat()

        self._ranks.from_writer(load)

    def end(self) -> None:
        """Ends those that were started here, for good."""

        def stop() -> None:
            for engine in self._led.values():
                engine.stop()

        self._ranks.everywhere(stop)

    # -- faults -----------------------------------------------------------------------------------

    def find_hanging(self) -> None:
        """Ask all engines whether they are well; those that do not answer are broken from now on."""
        silent = self._ranks.everywhere(lambda: [n for n, engine in self._led.items() if not engine.answers()])
        if self.servers is not None:
            for number in (n for of_rank in silent for n in of_rank):
                self.servers.fleet.lost.setdefault(number, "it does not answer")

    def broken(self) -> dict[int, str]:
        """Engines that have died or stopped answering, and what was seen of it."""
        lost = self._ranks.from_writer(lambda: dict(self.servers.fleet.lost) if self.servers else {})
        stopped = self._ranks.everywhere(lambda: [n for n, engine in self._led.items() if engine.has_stopped()])
        ended = "its process has ended"
        return dict.fromkeys((n for of_rank in stopped for n in of_rank), ended) | lost

    def mend(self, policy: Policy) -> bool:
        """Start engines again that are broken; whether there were any. They need a sync then."""
        broken = self.broken()
        if not broken:
            return False
        if self._config.engine.urls:
            self._ranks.from_writer(self._check_elsewhere)  # whoever runs them has to start them again
        else:
            reason = next(iter(broken.values())).splitlines()[0]
            self._tell(f"  starting engine {', '.join(map(str, sorted(broken)))} again: {reason}")
            mine = [number for number in broken if number in self._led]

            def restart() -> None:
                for number in mine:
                    self._led[number].restart()

            with self.colocation.room_for_start(policy, mine):
                self._ranks.everywhere(restart)
                self._wait(mine)
        if self.servers is not None:
            self.servers.fleet.lost.clear()
        return True


def free_gpu_bytes() -> int:
    """Memory of this rank's GPU that any process could take."""
    torch.cuda.ipc_collect()  # buckets that engines have let go of
    torch.cuda.empty_cache()  # what the allocator keeps for itself is free to others only then
    return torch.cuda.mem_get_info()[0]
