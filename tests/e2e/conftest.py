"""A toy world with its index, made once."""

from pathlib import Path

import pytest

from searche1.quickstart import make_world


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "world"
    make_world(folder, seed=0)
    return folder
