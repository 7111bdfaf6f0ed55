"""Small real models that the tests share."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from tiny_models import make_qwen2

pytest.register_assert_rewrite("one_policy", "vocab_checks")
torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("patient")


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def tiny_qwen2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2") / "model", tied=request.param)
