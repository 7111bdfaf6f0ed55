"""Whose turn it is on a shared GPU: the order of hand-overs, and what is noticed when memory does not come free."""

import re

import pytest

from searche1.colocation import GIB, Colocation, Phase
from searche1.rollout.engine import CACHE, WEIGHTS
from searche1.types import UserError

ENGINE = {CACHE: 20 * GIB, WEIGHTS: 6 * GIB}
TRAINER = {"optimizer": 17 * GIB, "weights": 7 * GIB}
KEPT = 3 * GIB  # what an engine's process holds asleep


class Gpu:
    """A GPU of 80 GiB, what is on it, and all that happened, in order."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}
        self.events: list[str] = []

    def free(self) -> int:
        return 80 * GIB - sum(self.used.values())


class FakeEngine:
    def __init__(self, gpu: Gpu, *, keeps: str = "") -> None:
        self.gpu = gpu
        self.keeps = keeps  # a part whose memory does not come free
        self.is_dead = False
        gpu.used |= {**ENGINE, "process": KEPT}

    def has_stopped(self) -> bool:
        return self.is_dead

    def sleep(self, part: str) -> None:
        self.gpu.events.append(f"engine {part} asleep")
        if part != self.keeps:
            self.gpu.used[part] = 0

    def wake(self, part: str) -> None:
        self.gpu.events.append(f"engine {part} awake")
        self.gpu.used[part] = ENGINE[part]


class FakeTrainer:
    def __init__(self, gpu: Gpu, *, keeps: str = "") -> None:
        self.gpu = gpu
        self.keeps = keeps
        gpu.used |= {f"trainer {part}": size for part, size in TRAINER.items()}

    def _to_host(self, part: str) -> int:
        self.gpu.events.append(f"trainer {part} on host")
        if part != self.keeps:
            self.gpu.used[f"trainer {part}"] = 0
        return TRAINER[part]

    def optimizer_to_host(self) -> int:
        return self._to_host("optimizer")

    def weights_to_host(self) -> int:
        return self._to_host("weights")

    def to_device(self) -> None:
        self.gpu.events.append("trainer back")
        self.gpu.used |= {f"trainer {part}": size for part, size in TRAINER.items()}


def colocation_on(gpu: Gpu, engine: FakeEngine, *, is_on: bool = True) -> Colocation:
    return Colocation(
        is_on=is_on,
        engines={0: engine},
        free_bytes=gpu.free,
        free_before_engines=80 * GIB,
        together=lambda work: work(),
    )


def test_the_order_of_a_step():
    gpu = Gpu()
    colocation = colocation_on(gpu, FakeEngine(gpu))
    colocation.to(Phase.TRAIN, None)  # before there is a trainer
    trainer = FakeTrainer(gpu)
    for phase in (Phase.SYNC, Phase.ROLLOUT, Phase.TRAIN):
        gpu.events.append(f"-> {phase.value}")
        colocation.to(phase, trainer)
        colocation.to(phase, trainer)  # once more changes nothing
    assert gpu.events == [
        "engine kv_cache asleep",
        "engine weights asleep",
        "-> sync",
        "trainer optimizer on host",
        "engine weights awake",
        "-> rollout",
        "trainer weights on host",
        "engine kv_cache awake",
        "-> train",
        "engine kv_cache asleep",
        "engine weights asleep",
        "trainer back",
    ]


def test_engine_weights_are_never_used_without_a_sync():
    gpu = Gpu()
    colocation = colocation_on(gpu, FakeEngine(gpu))
    colocation.to(Phase.TRAIN, None)
    with pytest.raises(AssertionError):
        colocation.to(Phase.ROLLOUT, FakeTrainer(gpu))


@pytest.mark.parametrize("part", [CACHE, WEIGHTS])
def test_an_engine_that_keeps_its_memory_asleep_is_noticed(part):
    gpu = Gpu()
    colocation = colocation_on(gpu, FakeEngine(gpu, keeps=part))
    freed = (26 * GIB - ENGINE[part]) / GIB
    with pytest.raises(UserError, match=re.escape(f"only {freed:.1f} GiB of the 29.0 GiB that they had taken")):
        colocation.to(Phase.TRAIN, None)


@pytest.mark.parametrize(
    ("part", "phase", "message"),
    [
        ("optimizer", Phase.SYNC, "moved 17.0 GiB of optimizer state and gradients to the host, but only 0.0 GiB"),
        ("weights", Phase.ROLLOUT, "moved 7.0 GiB of weights to the host, but only 0.0 GiB"),
    ],
)
def test_a_trainer_that_keeps_its_memory_is_noticed(part, phase, message):
    gpu = Gpu()
    colocation = colocation_on(gpu, FakeEngine(gpu))
    colocation.to(Phase.TRAIN, None)
    trainer = FakeTrainer(gpu, keeps=part)
    with pytest.raises(UserError, match=message):
        for step in (Phase.SYNC, Phase.ROLLOUT):
            colocation.to(step, trainer)
    assert colocation.phase is not phase


def test_an_engine_is_not_woken_where_its_memory_is_taken():
    gpu = Gpu()
    colocation = colocation_on(gpu, FakeEngine(gpu))
    colocation.to(Phase.TRAIN, None)
    trainer = FakeTrainer(gpu)
    colocation.to(Phase.SYNC, trainer)
    gpu.used["a neighbour"] = 60 * GIB
    with pytest.raises(UserError, match=r"engines need 20.0 GiB for their kv_cache again, but 11.0 GiB are free"):
        colocation.to(Phase.ROLLOUT, trainer)
    assert gpu.events[-1] == "trainer weights on host"


def test_nothing_moves_when_it_is_off():
    gpu = Gpu()
    colocation = colocation_on(gpu, FakeEngine(gpu), is_on=False)
    for phase in (Phase.TRAIN, Phase.SYNC, Phase.ROLLOUT):
        colocation.to(phase, FakeTrainer(gpu))
    with colocation.room_for_start(FakeTrainer(gpu), [0]):
        pass
    assert gpu.events == [] and colocation.keeps_engine_weights


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.SYNC])
def test_an_engine_that_died_gets_room_to_start_and_sleeps_as_the_others_do(phase):
    gpu = Gpu()
    engine = FakeEngine(gpu)
    colocation = colocation_on(gpu, engine)
    colocation.to(Phase.TRAIN, None)
    trainer = FakeTrainer(gpu)
    colocation.to(phase, trainer)
    engine.is_dead = True
    gpu.used |= dict.fromkeys(ENGINE, 0)
    with colocation.room_for_start(trainer, [0]):
        assert gpu.free() > 70 * GIB
        engine.is_dead = False
        gpu.used |= ENGINE
    assert gpu.used[WEIGHTS] == gpu.used[CACHE] == 0
    assert gpu.used["trainer optimizer"] == TRAINER["optimizer"] and colocation.phase is Phase.TRAIN
