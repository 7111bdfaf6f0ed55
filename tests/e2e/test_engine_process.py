"""An engine's process that imports SGLang before anybody has arguments for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import POLICY, toy_engine

from megatron_ext.lifetime import has_ended
from searche1.config import Config, EngineConfig, RunConfig
from searche1.rollout import engine_process
from searche1.rollout.engine_process import engine_environment, importing_sglang, start_process
from searche1.rollout.engine_server import remember_stop_strings

pytestmark = pytest.mark.slow

ON_CPU = Config(run=RunConfig(device="cpu"))


@contextlib.contextmanager
def early_process() -> Iterator[subprocess.Popen[bytes]]:
    """In the test itself, as pytest changes the environment between a fixture and a test."""
    with importing_sglang(ON_CPU):
        assert engine_process._early is not None
        yield engine_process._early[0]


def started(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    process = start_process(["--version"], environment=environment, key="", log_path=folder / "log")
    process.kill()
    process.wait()
    return process


def test_the_first_engine_is_the_process_that_has_imported(tmp_path, monkeypatch):
    log = tmp_path / "engine.log"
    with early_process() as early:
        monkeypatch.setenv("SET_BY_A_LIBRARY", "since")
        with toy_engine(POLICY, log) as engine:
            assert engine._process is early
            engine.wait_until_ready(timeout_s=100)
            assert len(engine.logprobs([[1, 2, 3]])[0]) == 2
            assert started(tmp_path, dict(os.environ)) is not early
        assert early.poll() is not None


def test_what_was_said_while_importing_comes_first_in_the_log(tmp_path, monkeypatch):
    """With a package of SGLang's name that speaks."""
    package = tmp_path / "path" / "sglang"
    for folder in (package, package / "srt", package / "srt" / "entrypoints", package / "srt" / "sampling"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    params = "class SamplingParams:\n    def normalize(self, tokenizer): ...\n"
    (package / "srt" / "sampling" / "sampling_params.py").write_text(params)
    (package / "srt" / "entrypoints" / "http_server.py").write_text("print('importing', flush=True)\n")
    (package / "launch_server.py").write_text("import os, sys\nprint(sys.argv[1:], os.environ['ADDED'])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    log = tmp_path / "log"
    log.write_text("before\n")
    with early_process() as early:
        environment = engine_environment("cpu", host="127.0.0.1", tensor=1) | {"ADDED": "since"}
        assert start_process(["--port", "1"], environment=environment, key="secret", log_path=log) is early
        assert early.wait(timeout=60) == 0
    assert log.read_text() == "before\nimporting\n['--port', '1', '--api-key', 'secret'] since\n"


def test_another_environment_gets_a_process_of_its_own(tmp_path):
    environment = engine_environment("cpu", host="127.0.0.1", tensor=1) | {"OMP_NUM_THREADS": "7"}
    with early_process() as early:
        assert started(tmp_path, environment) is not early
        assert early.poll() is not None
    assert "the environment has changed" in (tmp_path / "log").read_text()


def test_an_early_process_that_was_killed_is_replaced(tmp_path):
    with early_process() as early:
        early.kill()
        early.wait()
        assert started(tmp_path, engine_environment("cpu", host="127.0.0.1", tensor=1)) is not early
    assert "it had ended" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("how", ["ends", "kill"])
def test_it_ends_with_a_command_that_needs_no_engine(how):
    script = (
        "import os, sys\n"
        "from searche1.config import Config, RunConfig\n"
        "from searche1.rollout import engine_process\n"
        "with engine_process.importing_sglang(Config(run=RunConfig(device='cpu'))):\n"
        "    print(engine_process._early[0].pid, flush=True)\n"
        "    if 'kill' in sys.argv: os.kill(os.getpid(), 9)\n"
    )
    pid = int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, timeout=60).stdout)
    deadline = time.monotonic() + 10
    while not has_ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("config", "variables"),
    [
        (Config(run=RunConfig(device="cuda")), {}),
        (Config(run=RunConfig(device="cpu"), engine=EngineConfig(urls=("http://elsewhere",))), {}),
        (ON_CPU, {"WORLD_SIZE": "2"}),
    ],
    ids=["GPU", "engines elsewhere", "several ranks"],
)
def test_no_process_is_started_where_it_could_not_be_used(config, variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with importing_sglang(config):
        assert engine_process._early is None


def test_stop_strings_are_tokenized_once(monkeypatch):
    from sglang.srt.sampling.sampling_params import SamplingParams

    asked = []

    class Tokenizer:
        def encode(self, text, add_special_tokens=True):
            asked.append(text)
            return [0] * len(text.split())

    monkeypatch.setattr(SamplingParams, "normalize", SamplingParams.normalize)  # put back in the end
    remember_stop_strings()
    tokenizer = Tokenizer()
    for _ in range(3):
        params = SamplingParams(stop=["a b", "c"])
        params.normalize(tokenizer)
        assert params.stop_str_max_len == 2 and params.stop_strs == ["a b", "c"]
    assert asked == ["a b", "c"]
    SamplingParams(stop=["c"]).normalize(Tokenizer())
    assert asked == ["a b", "c", "c"]  # another tokenizer may find another length
    without = SamplingParams()
    without.normalize(None)
    assert without.stop_str_max_len == 0
