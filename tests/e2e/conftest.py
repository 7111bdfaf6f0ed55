"""A toy world with its index, and one tiny cycle on it, each made once."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import kill_engine
from small_engine import END, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM

from searche1.quickstart import make_world

# Every hand-over between trainer and engines happens, every synced weight is compared, every update validated.
STRICT = ("train.offload=always", "engine.verify_sync=exact", "engine.sync_bucket_mb=1", "opsd.validate_every=1")


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "world"
    make_world(folder, seed=0)
    return folder


def quickstart(out: Path, on_line: Callable[[subprocess.Popen, str], None]) -> tuple[str, int]:
    """What the fast quickstart prints, and its exit code; `on_line` sees it line by line."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "searche1", "quickstart", "--fast", "--out", str(out), *STRICT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        on_line(process, line)
    return "".join(printed), process.wait(timeout=60)


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """A run that got Ctrl-C when its OPSD round began: its folder, what it printed, its exit code."""
    out = tmp_path_factory.mktemp("cycle") / "run"

    def on_line(process: subprocess.Popen, line: str) -> None:
        if "== cycle0/opsd ==" in line:
            process.send_signal(signal.SIGINT)

    return out, *quickstart(out, on_line)


@pytest.fixture(scope="session")
def stopped(interrupted: tuple[Path, str, int]) -> tuple[Path, str, int]:
    """The same command again. Its engine is killed when the pairs are there; SIGTERM comes after the first update."""
    out = interrupted[0]

    def on_line(process: subprocess.Popen, line: str) -> None:
        if "pairs from 32 questions" in line:
            kill_engine(out / "logs/engine0.log")
        if "cycle0/opsd step 1/" in line and "validation EM" in line:
            process.send_signal(signal.SIGTERM)

    return out, *quickstart(out, on_line)


@pytest.fixture(scope="session")
def finished(stopped: tuple[Path, str, int]) -> tuple[Path, str]:
    """The same command once more, to its end."""
    printed, code = quickstart(stopped[0], lambda process, line: None)
    assert code == 0, printed
    return stopped[0], printed


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and byte-level tokenizer; the last id ends a sequence."""
    folder = tmp_path_factory.mktemp("engine") / "model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)
    tokenizer.save_pretrained(folder)
    make_model(vocab_size=len(tokenizer), seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def reference(folder: Path) -> Qwen2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
