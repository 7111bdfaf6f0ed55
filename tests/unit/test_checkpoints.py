"""Which checkpoints of a round are kept, and what a round does about damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.checkpoint import RECORD, _record, find_damage
from megatron_ext.parallel import close_parallel, init_parallel
from searche1.checkpoints import Checkpoints
from searche1.config import Config, TrainConfig
from searche1.types import Stopped


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    yield init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
    close_parallel()


class FakePolicy:
    """Writes folders in the form of a checkpoint, and remembers what it was asked to load."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def save_checkpoint(self, folder: Path, *, step: int, state: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(bytes([step]) * 1000)
        files = {"__0_0.distcp": _record(folder / "__0_0.distcp")}
        (folder / RECORD).write_text(json.dumps({"state": {**state, "step": step}, "files": files}))

    def poll_checkpoint(self) -> None: ...

    def finish_checkpoint(self) -> None: ...

    def load_checkpoint(self, folder: Path) -> int:
        self.loaded.append(folder.name)
        return 0


@pytest.fixture
def made(tmp_path):
    def make(**train: int) -> Checkpoints:
        session = SimpleNamespace(
            config=Config(train=TrainConfig(**train)),
            from_writer=lambda function: function(),
            tell=said.append,
            end_rollouts=lambda policy: None,
        )
        return Checkpoints(session, FakePolicy(), tmp_path / "checkpoints")

    said: list[str] = []
    return SimpleNamespace(make=make, said=said)


def kept(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_a_round_without_checkpoints_starts_at_its_beginning(made):
    assert made.make().resume() == {}


def test_the_last_ones_the_best_and_every_kth_are_kept(made):
    checkpoints = made.make(keep_last=2, keep_every=30)
    for step, score in ((10, 0.2), (20, 0.9), (30, 0.3), (40, 0.4), (50, 0.9), (60, 0.1), (70, None)):
        checkpoints.save(step, score=score)
    assert kept(checkpoints) == ["step_20", "step_30", "step_60", "step_70"]  # of equals, 20 is the earlier
    assert checkpoints.best() == 20


def test_a_stopped_round_continues_behind_the_newest_and_gets_its_state(made):
    checkpoints = made.make()
    checkpoints.save(50, state={"best_em": 0.5})
    checkpoints.save(100, score=0.25, state={"best_em": 0.75})
    (checkpoints.folder / "step_150.1a2b3c4d.partial").mkdir()
    state = checkpoints.resume()
    assert state == {"best_em": 0.75, "score": 0.25, "step": 100}
    assert checkpoints._policy.loaded == ["step_100"] and made.said == ["continuing from step_100"]
    assert kept(checkpoints) == ["step_100", "step_50"]


@pytest.mark.parametrize("how", ["a bit turned", "cut", "a file gone", "no record"])
def test_a_damaged_checkpoint_is_set_aside_and_told_and_the_one_before_it_taken(made, how):
    checkpoints = made.make()
    checkpoints.save(50)
    checkpoints.save(100)
    data = checkpoints.folder / "step_100" / "__0_0.distcp"
    match how:
        case "a bit turned":
            data.write_bytes(data.read_bytes()[:-1] + b"\xff")
        case "cut":
            data.write_bytes(data.read_bytes()[:10])
        case "a file gone":
            data.unlink()
        case _:
            (checkpoints.folder / "step_100" / RECORD).write_text("{")
    assert find_damage(checkpoints.folder / "step_50") == ""
    assert checkpoints.resume()["step"] == 50
    assert checkpoints._policy.loaded == ["step_50"]
    assert made.said[0].startswith("checkpoint step_100 is damaged (") and "trying the one before it" in made.said[0]
    assert kept(checkpoints) == ["damaged_step_100", "step_50"]


def test_stopping_writes_the_step_at_hand_and_says_where_it_goes_on(made):
    checkpoints = made.make()
    with pytest.raises(Stopped, match=r"stopped at step 7 .* continues from there"):
        checkpoints.stop(7)
    assert kept(checkpoints) == ["step_7"]


def test_stopping_at_a_step_that_is_being_written_writes_it_once(made):
    checkpoints = made.make()
    policy = checkpoints._policy
    folder = checkpoints.folder / "step_7"

    def publish() -> None:
        if not folder.exists():
            FakePolicy.save_checkpoint(policy, folder, step=7, state={"score": 0.5})

    policy.finish_checkpoint = publish
    policy.save_checkpoint = lambda *_, **__: pytest.fail("a checkpoint that is under way was begun again")
    with pytest.raises(Stopped):
        checkpoints.stop(7)
    assert kept(checkpoints) == ["step_7"]


def test_a_round_that_goes_back_forgets_what_came_after(made):
    checkpoints = made.make(keep_last=5)
    for step in (10, 20, 30):
        checkpoints.save(step)
    checkpoints.drop_after(10)
    assert kept(checkpoints) == ["step_10"]
