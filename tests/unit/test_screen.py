import io
import json
import re
import threading
import time

import pytest
from rich.console import Console

from searche1.cli import main
from searche1.config import Config
from searche1.metrics import MetricsLog
from searche1.runs import open_run, set_final_model
from searche1.screen import Screen, read_view, render, sparkline, watch
from searche1.types import UserError


@pytest.fixture
def run(tmp_path):
    return open_run(tmp_path / "my-run", Config())


def log_steps(run, steps, *, stage="cycle0/grpo", num_steps=8):
    log = MetricsLog(run.metrics_path, console=Console(file=io.StringIO()))
    for step in steps:
        seconds = {"rollout": 3.0, "train": 1.0}
        log.log(stage=stage, step=step, num_steps=num_steps, values={"em": 0.1 * step, "kl": 0.01}, seconds=seconds)
    log.close()


def drawn(view, now=None, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(render(view, now=time.time() if now is None else now))
    return console.file.getvalue()


def test_a_sparkline_runs_from_the_smallest_to_the_largest_value():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▄▄" and sparkline([]) == ""


def test_the_screen_says_where_the_run_is_and_where_its_time_goes(run):
    log_steps(run, range(1, 7))
    text = drawn(read_view(run.directory))
    assert "my-run  running" in text and "6/8" in text and "8 s left in this stage" in text
    assert re.search(r"EM +0\.600 +▁\S+█", text)
    assert "4.0 s a step: rollout 75%   train 25%" in text


def test_a_run_that_has_gone_silent_is_told_apart_from_one_that_runs(run):
    log_steps(run, [1])
    later = time.time() + 600
    assert "last step 10 min ago" in drawn(read_view(run.directory), now=later)
    set_final_model(run)
    assert "my-run  finished" in drawn(read_view(run.directory), now=later)


def test_a_run_without_a_step_and_an_unfinished_line_can_be_drawn(run):
    assert "no step yet" in drawn(read_view(run.directory))
    log_steps(run, [1])
    with open(run.metrics_path, "a") as file:
        file.write('{"stage": "cyc')
    assert "1/8" in drawn(read_view(run.directory))


def test_a_narrow_terminal_cuts_what_is_under_way(run):
    text = drawn(read_view(run.directory, status="held-out questions " * 10), width=40)
    assert all(len(line) <= 40 for line in text.splitlines()) and "…" in text


def test_the_screen_of_a_run_stands_below_its_lines_on_a_terminal_only(run):
    quiet = Console(file=io.StringIO())
    with Screen(quiet, run.directory) as screen:
        screen.step()
        screen.status("busy")
    assert not screen.is_on and quiet.file.getvalue() == ""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Screen(terminal, run.directory) as screen:
        log_steps(run, [1, 2])
        screen.step()
        terminal.print("a line of the run")
        screen.status("rollout 5/10")
    text = terminal.file.getvalue()
    assert "2/8" in text and "a line of the run" in text and "rollout 5/10" in text


def test_watching_ends_when_the_run_does(run):
    log_steps(run, [1])
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    watcher = threading.Thread(target=watch, args=(run.directory, console), kwargs={"every_s": 0.05})
    watcher.start()
    log_steps(run, [2])
    set_final_model(run)
    watcher.join(timeout=20)
    assert not watcher.is_alive() and "2/8" in console.file.getvalue()


def test_a_folder_that_is_no_run_is_told(tmp_path, run, capsys):
    with pytest.raises(UserError, match="holds no run"):
        read_view(tmp_path)
    assert main(["watch", str(tmp_path)]) == 2
    assert "give a run directory" in capsys.readouterr().err
    assert main(["watch", str(run.directory), "--once"]) == 0
    assert "no step yet" in capsys.readouterr().out


def test_peak_memory_and_trackers_get_every_step(run):
    class Kept:
        rows, is_closed = [], False

        def log(self, stage, step, values):
            self.rows.append((stage, step, values))

        def close(self):
            self.is_closed = True

    kept = Kept()
    log = MetricsLog(run.metrics_path, console=Console(file=io.StringIO()), memory=lambda: 7.5, tracker=kept)
    log.log(stage="cycle0/opsd", step=1, num_steps=2, values={"kl": 0.5}, seconds={"train": 2.0})
    log.close()
    assert kept.is_closed
    assert kept.rows == [("cycle0/opsd", 1, {"kl": 0.5, "peak_memory_gb": 7.5, "seconds/train": 2.0})]
    assert json.loads(run.metrics_path.read_text())["values"]["peak_memory_gb"] == 7.5
