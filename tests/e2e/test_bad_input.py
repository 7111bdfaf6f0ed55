"""Every mistake a user can make gets one message that says what, and no stack trace."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from command import POLICY, ROOT, searche1, settings

from searche1.cli import main
from searche1.config import load_config
from searche1.runs import only_run_in, open_run

FAST = str(ROOT / "configs" / "quickstart-fast.yaml")


def refused(*arguments: str) -> str:
    """What the command says when it refuses, run in a process of its own."""
    result = searche1(*arguments)
    return told(result.returncode, result.stdout, result.stderr)


def told(exit_code: int, out: str, error: str) -> str:
    assert exit_code == 2, out + error
    assert "Traceback" not in error + out, error
    messages = [line for line in error.splitlines() if line.startswith("searche1: error: ")]
    assert len(messages) == 1, error
    return error


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("grpo.clip_esp=0.3", "grpo.clip_eps"),
        ("grpo.steps=many", "grpo.steps"),
        ("grpo.steps", "key=value"),
        ("run.device=tpu", "auto, cpu or cuda"),
        ("retriever.corpus=nowhere.jsonl", "tools/build_index.py"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("data.validation=", "data.validation is not set"),
        ("model.path=no/such-model", "no/such-model"),
        ("parallel.tensor=3", "multiple of 3"),
        ("parallel.pipeline=2", "multiple of 2"),
        ("train.max_tokens=100", "memory budget"),
        ("engine.max_total_tokens=500", "cannot hold one sequence"),
        ("train.dtype=int8", "train.dtype"),
        ("grpo.prompts_per_step=9999", "grpo.prompts_per_step=9999 but data.train holds"),
        ("opsd.validate_every=0", "opsd.validate_every must be more than 0"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_starts(
    wrong: str, said: str, toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["cycle", "--config", FAST, *settings(toy_world, tmp_path / "run"), wrong])
    assert said in told(code, *capsys.readouterr())


def test_a_model_without_its_tokenizer_is_told_before_anything_starts(
    toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(POLICY, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    arguments = [*settings(toy_world, tmp_path / "run"), f"model.path={bare}"]
    code = main(["cycle", "--config", FAST, *arguments])
    message = told(code, *capsys.readouterr())
    assert f"{bare} holds no" in message and "tokenizer" in message
    assert not (tmp_path / "run").exists()


def test_a_cycle_without_distillation_needs_no_validation_questions(
    toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpus, which is looked at after the data files, is what it then misses."""
    arguments = [*settings(toy_world, tmp_path / "run"), "data.validation=", "retriever.corpus=nowhere.jsonl"]
    skipping, whole = (
        told(main(["cycle", "--config", FAST, *arguments, f"cycle.skip_opsd={skip}"]), *capsys.readouterr())
        for skip in ("true", "false")
    )
    assert "nowhere.jsonl" in skipping and "data.validation" not in skipping
    assert "data.validation is not set" in whole


def test_a_refused_setting_leaves_no_run_that_insists_on_it(
    toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["cycle", "--config", FAST, *settings(toy_world, tmp_path / "run")]
    told(main([*arguments, "grpo.lr=1e-3", "train.max_tokens=100"]), *capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_run_is_told(
    toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("")
    code = main(["cycle", "--config", FAST, *settings(toy_world, tmp_path / "run")])
    assert "is a file" in told(code, *capsys.readouterr())


def test_a_run_that_another_process_is_in_is_told(
    toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_run_in(tmp_path / "run"):
        code = main(["cycle", "--config", FAST, *settings(toy_world, tmp_path / "run")])
    assert "another process is running in" in told(code, *capsys.readouterr())
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_retriever_that_is_down_is_told(toy_world: Path, tmp_path: Path) -> None:
    arguments = [*settings(toy_world, tmp_path / "run"), "retriever.url=http://127.0.0.1:9/retrieve"]
    assert "127.0.0.1:9" in refused("cycle", "--config", FAST, *arguments)


def test_a_model_of_another_architecture_is_refused_by_name(
    toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(POLICY, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    arguments = [*settings(toy_world, tmp_path / "run"), f"model.path={other}"]
    message = told(main(["cycle", "--config", FAST, *arguments]), *capsys.readouterr())
    assert "GPT2LMHeadModel" in message and "Qwen2ForCausalLM" in message


def test_a_taken_port_is_told(toy_world: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = [*settings(toy_world, tmp_path / "run"), f"engine.port={port}"]
        assert f"engine.port: cannot listen on 127.0.0.1:{port}" in refused("cycle", "--config", FAST, *arguments)


def test_continuing_a_run_with_other_settings_is_refused(
    toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["cycle", "--config", FAST, *settings(toy_world, tmp_path / "run")]
    open_run(tmp_path / "run", load_config(FAST, arguments[3:]))
    assert "grpo.lr" in told(main([*arguments, "grpo.lr=1.0"]), *capsys.readouterr())


@pytest.mark.slow
def test_engine_and_trainer_that_disagree_stop_the_run(toy_world: Path, tmp_path: Path) -> None:
    arguments = [*settings(toy_world, tmp_path / "run"), "train.sync_tolerance=1e-12"]
    message = refused("grpo", "--config", FAST, *arguments)
    assert "after the weight sync engine 0 and the trainer differ" in message and "train.sync_tolerance" in message


def test_a_run_folder_without_a_summary_has_no_report(tmp_path: Path) -> None:
    assert "summary.json" in refused("report", str(tmp_path))
