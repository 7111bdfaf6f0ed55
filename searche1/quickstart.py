"""The quickstart: a toy world, its index, and the whole cycle on it, from the policy that ships with the package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from searche1.config import load_config
from searche1.rollout.engine_process import importing_sglang
from searche1.types import UserError

ASSETS = Path(__file__).parent / "assets"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def run_quickstart(*, seed: int, out: str, is_fast: bool, is_new: bool, device: str, overrides: Sequence[str]) -> None:
    """Make what is missing, then run the cycle; a finished piece is never made twice."""
    name = f"quickstart{'-fast' if is_fast else ''}-seed{seed}"
    directory = Path(out) if out else Path("runs") / name
    if is_new and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--new picks a folder, which several processes cannot agree on; give each run its own --out")
    if is_new:
        directory = next_free(directory)
    world = directory / "world"
    config_file = CONFIGS / ("quickstart-fast.yaml" if is_fast else "quickstart.yaml")
    config = load_config(
        config_file,
        [
            f"run.out={directory}",
            f"run.seed={seed}",
            f"run.device={device}",
            f"model.path={ASSETS / 'toy_policy'}",
            f"retriever.corpus={world / 'corpus.jsonl'}",
            f"retriever.index={world / 'index'}",
            f"data.train={world / 'train.jsonl'}",
            f"data.validation={world / 'validation.jsonl'}",
            f"data.test={world / 'test.jsonl'}",
            *overrides,
        ],
    )
    with importing_sglang(config):
        from searche1.cycle import run_cycle
        from searche1.session import is_first_process

        if is_first_process():
            print(f"run directory {directory}", flush=True)
        run_cycle(config, prepare=lambda: make_world(world, seed=seed))


def next_free(directory: Path) -> Path:
    """The directory, or its first numbered sibling that does not exist."""
    if not directory.exists():
        return directory
    number = 2
    while (sibling := directory.with_name(f"{directory.name}-{number}")).exists():
        number += 1
    return sibling


def make_world(folder: Path, *, seed: int) -> None:
    """Corpus, questions and FAISS index of the toy world, unless they are there. Atomic."""
    if (folder / "index").is_dir():
        return
    from searche1.retrieval.build import Encoding, build_index
    from searche1.retrieval.recipe import choose_recipe
    from searche1.world import build_world, write_world

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file where the toy world belongs; give another --out")
    partial = folder.with_name("world.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_world(build_world(seed), partial)

    print("toy world: encoding its passages", flush=True)
    build_index(partial / "corpus.jsonl", partial / "index", Encoding(choose_recipe("minilm")))
    partial.rename(folder)
