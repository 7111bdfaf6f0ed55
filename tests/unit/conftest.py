"""What several files of unit tests start from. Megatron is imported where it is needed: that takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from checkout import Checkout

if TYPE_CHECKING:
    from megatron_ext.parallel import Layout
    from searche1.policy import Policy


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """This process alone."""
    from megatron_ext.parallel import close_parallel, init_parallel

    yield init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
    close_parallel()


@pytest.fixture
def make_policy(tiny_qwen2: Path, layout: Layout) -> Callable[..., Policy]:
    """Makes a policy of the tiny model, or of `folder`, to train."""
    from one_policy import ADAM, TRAIN

    from searche1.policy import Policy

    def run(*, folder=tiny_qwen2, train=TRAIN, optimizer=ADAM, lora=None):
        return Policy(model_path=folder, layout=layout, train=train, optimizer=optimizer, lora=lora)

    return run


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)
