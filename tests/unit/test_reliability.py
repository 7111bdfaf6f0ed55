"""What a run does when it is asked to stop, when the disk is full, and when clocks jump."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import searche1
from megatron_ext.hf_io import HFReader
from searche1.cli import STOPPED, _guarded
from searche1.config import load_config
from searche1.cycle import is_finished, is_last, stage_names
from searche1.rollout.journal import Entry, Journal, read_journal
from searche1.rollout.sampler import Rollouts, Start
from searche1.runs import SELECTION_FILE, atomic_write_json, open_run, set_final_model, write_manifest
from searche1.session import kept_in
from searche1.stopping import StopRequest
from searche1.types import Question, SharedError, Span, Stopped, Trajectory, UserError

SOURCES = Path(searche1.__file__).parent


def test_nothing_waits_by_the_wall_clock():
    """It may jump. Seconds of it are only shown, and written into records."""
    shown = {"screen.py", "metrics.py"}
    files = [*SOURCES.rglob("*.py"), *SOURCES.parent.glob("megatron_ext/**/*.py")]
    users = {path.name for path in files if re.search(r"\btime\.time\(", path.read_text())}
    assert users == shown


def test_sigterm_is_a_request_while_somebody_listens():
    request = StopRequest()
    with request.listening():
        assert not request.is_made
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert request.is_made
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Stopped("stopped at step 3"), STOPPED, "searche1: stopped at step 3"),
        (UserError("no such file"), 2, "searche1: error: no such file"),
        (OSError(28, "No space left on device", "runs/x"), 2, "runs/x could not be written: No space left on device"),
        (KeyboardInterrupt(), 130, "the same command continues"),
    ],
)
def test_every_way_to_end_has_its_exit_code_and_one_message(error, code, said, capsys):
    assert _guarded(raising(error)) == code
    assert said in capsys.readouterr().err


def test_any_other_fault_of_a_file_is_a_bug_and_is_shown_as_one():
    with pytest.raises(PermissionError):
        _guarded(raising(PermissionError(13, "Permission denied", "x")))


@pytest.mark.parametrize(
    ("rank", "world", "error", "code", "written"),
    [
        ("0", "2", Stopped("x"), 0, "75"),
        ("0", "2", SharedError("x"), 0, "2"),
        ("0", "1", UserError("x"), 0, "2"),
        ("0", "2", UserError("x"), 2, "2"),  # the others wait for it: torchrun has to end them
        ("0", "2", OSError(28, "No space left on device", "x"), 2, "2"),
        ("1", "2", SharedError("x"), 0, ""),  # rank 0 says the same
        ("1", "2", UserError("x"), 2, "2"),  # the same, and it says so itself
    ],
)
def test_under_launch_sh_an_end_in_order_is_no_reason_to_start_ranks_again(
    rank, world, error, code, written, tmp_path, monkeypatch
):
    status = tmp_path / "status"
    status.touch()
    monkeypatch.setenv("SEARCHE1_STATUS", str(status))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert _guarded(raising(error)) == code
    assert status.read_text() == written
    if written:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert _guarded(raising(AssertionError("started although the run has ended"))) == 0


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path):
    """A limit on file sizes stands in for the disk: the kernel refuses the write just as well."""
    program = f"""
import resource, signal, sys
from pathlib import Path
from searche1.cli import _guarded
from searche1.runs import atomic_write_text
path = Path({str(tmp_path / "summary.json")!r})
atomic_write_text(path, "whole")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.exit(_guarded(lambda: atomic_write_text(path, "x" * 100_000)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "could not be written: File too large; make room" in result.stderr
    assert (tmp_path / "summary.json").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_a_second_ctrl_c_ends_a_process_that_is_cleaning_up(tmp_path):
    program = """
import time
from searche1.stopping import end_on_interrupt
end_on_interrupt()
print("cleaning", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"cleaning\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == b"\nsearche1: stopped at once; the same command continues\n"


def question(number: int) -> Question:
    return Question(str(number), "who?", ("ann",), "nq")


def trajectory(text: str, *, status: str = "answered") -> Trajectory:
    span = Span(author="policy", kind="answer", token_ids=(5,), logprobs=(-0.1234567890123,), text=text)
    return Trajectory((1, 2), (span,), status)


def test_rollouts_go_on_with_what_was_finished_and_try_again_what_failed(tmp_path):
    path = tmp_path / "step_00001.jsonl.gz.unfinished"
    right, wrong = trajectory("<answer>ann</answer>"), trajectory("<answer>bob</answer>")
    with Journal(path) as journal:
        journal.add(Entry(question(0), 1, right))
        journal.add(Entry(question(1), 0, trajectory("", status="error")))
    rollouts = Rollouts([Start(question(0), (1, 2)), Start(question(1), (1, 2))], 2)
    with kept_in(path, rollouts):
        assert rollouts.rewards == {(0, 1): 1.0}
        assert rollouts.trajectories[0, 1] == right  # to the last bit of its logprob
        assert rollouts.left() == [(0, 0), (1, 0), (1, 1)]
        for place in rollouts.left():
            rollouts.finish(place, wrong)
    assert len(list(read_journal(path))) == 5
    assert [group.rewards for group in rollouts.groups()] == [(0.0, 1.0), (0.0, 0.0)]


def test_rollouts_of_questions_that_are_gone_are_told(tmp_path):
    path = tmp_path / "step_00001.jsonl.gz.unfinished"
    with Journal(path) as journal:
        journal.add(Entry(question(5), 0, trajectory("<answer>ann</answer>")))
    rollouts = Rollouts([Start(question(0), (1, 2))], 1)
    with pytest.raises(UserError, match="holds a trajectory of nq:5, which is not asked"), kept_in(path, rollouts):
        pass


@pytest.mark.parametrize(
    ("stage", "before", "now", "is_the_last"),
    [
        ("cycle0/opsd", 0.5, 0.1, False),  # nothing to compare with
        ("cycle1/grpo", 0.5, 0.1, False),
        ("cycle1/opsd", 0.5, 0.6, False),
        ("cycle1/opsd", 0.5, 0.5, True),
        ("cycle1/opsd", 0.5, 0.4, True),
    ],
)
def test_a_cycle_that_gained_nothing_is_the_last(tmp_path, stage, before, now, is_the_last):
    for number, em in enumerate((before, now)):
        atomic_write_json(tmp_path / f"cycle{number}/opsd" / SELECTION_FILE, {"best_em": em})
    given = [f"run.out={tmp_path}"]
    assert is_last(load_config(None, given), stage) is is_the_last
    assert not is_last(load_config(None, [*given, "cycle.until_no_gain=false"]), stage)


def test_a_finished_run_goes_on_when_more_cycles_are_asked_for(tmp_path):
    """Two cycles, of which the second gained nothing."""
    settings = [f"run.out={tmp_path / 'run'}", "cycle.evaluate_stages=false"]

    def is_done(*more: str) -> bool:
        return is_finished(load_config(None, [*settings, *more]))

    config = load_config(None, settings)
    run = open_run(config.run.out, config)
    for name in stage_names(config):
        assert not is_done()
        folder = run.stage_dir(name)
        if name.endswith("opsd"):
            atomic_write_json(folder / SELECTION_FILE, {"best_em": 0.5})
        write_manifest(folder, stage=name, inputs={}, outputs={}, config=config, metrics={})
    assert not is_done()
    set_final_model(run)
    assert not is_done()  # it was killed before the model had its place
    run.final_dir.mkdir()
    assert is_done() and is_done("cycle.cycles=3") and is_done("cycle.cycles=1")
    assert not is_done("cycle.cycles=3", "cycle.until_no_gain=false")
    set_final_model(run, None)  # as such a run has it until it is at its end
    assert not is_done()
    set_final_model(run)
    with pytest.raises(UserError, match="other settings"):
        is_done("grpo.lr=1")


def test_a_checkpoint_cannot_name_files_outside_its_folder(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match=r"names \.\./secret\.safetensors, which is no file of that folder"):
        HFReader(folder)
