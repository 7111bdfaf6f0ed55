"""Commands that use an engine and a retriever which are up already: evaluations, a person's questions, a round that
collapses.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import POLICY, ROOT, elsewhere, kill_rank, searche1, settings, torchrun, toy_engine

from searche1.retrieval.launch import launch_retriever
from searche1.rollout.journal import read_journal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Settings that name an engine and a retriever that are up, so that not every command waits for its own."""
    logs = tmp_path_factory.mktemp("servers")
    with toy_engine(POLICY, logs / "engine.log") as engine:
        retriever = launch_retriever(
            corpus=str(toy_world / "corpus.jsonl"),
            index=str(toy_world / "index"),
            topk=3,
            port=0,
            log_path=logs / "retriever.log",
            device="cpu",
            encoder="",
            style="",
            threads=1,
            start_timeout_s=120,
        )
        engine.wait_until_ready(timeout_s=300)
        yield [*elsewhere(engine, logs), f"retriever.url={retriever.url}"]
        retriever.stop()


def command(world: Path, out: Path, *arguments: str) -> list[str]:
    config = str(ROOT / "configs" / "quickstart.yaml")
    flags = ["--config", config, "--model", str(POLICY), "--data", str(world / "test.jsonl"), "--out", str(out)]
    return ["eval", *flags, *arguments]


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_a_killed_evaluation_goes_on_and_finds_what_an_unbroken_one_finds(
    toy_world: Path, servers: list[str], tmp_path: Path
) -> None:
    asked = [*servers, "--temperature", "1.0", "--samples", "3"]
    whole = searche1(*command(toy_world, tmp_path / "whole", *asked))
    assert whole.returncode == 0, whole.stdout + whole.stderr

    broken = tmp_path / "broken"
    file = broken / "answers.jsonl.gz"
    slow = [*command(toy_world, broken, *asked), "rollout.max_in_flight=8"]  # so that there is a middle to be killed in
    process = subprocess.Popen(
        [sys.executable, "-m", "searche1", *slow],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not file.exists() or file.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_before = len(list(read_journal(file)))
    assert 0 < num_before < 900

    again = searche1(*command(toy_world, broken, *asked))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{num_before:,} of 900 trajectories are in {broken}" in again.stdout
    answers = [(answer.question.key, answer.sample) for answer in read_journal(file)]
    assert len(answers) == len(set(answers)) == 900
    for key in ("average_em", "sources", "macro_em_by_sample"):
        assert results(broken)[key] == results(tmp_path / "whole")[key]
    assert 0 < results(broken)["average_em"] < 1

    done = searche1(*command(toy_world, broken, *asked))
    assert done.returncode == 0 and "ready" not in done.stdout  # only the table, from what is there

    compared = searche1("compare", str(tmp_path / "whole"), str(broken))
    assert compared.returncode == 0 and "+0.000" in compared.stdout and "do not tell" in compared.stdout


def test_retrieval_augmented_generation_reads_passages_and_never_searches(
    toy_world: Path, servers: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chosen = ["--method", "rag", "--temperature", "0", "--limit", "5", "--sources", "one_hop"]
    done = searche1(*command(toy_world, out, *servers, *chosen))
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(out)["overall"]["num_questions"] == 5 and results(out)["overall"]["mean_searches"] == 0
    assert min(len(answer.trajectory.prompt_ids) for answer in read_journal(out / "answers.jsonl.gz")) > 60


def test_direct_generation_starts_an_engine_of_its_own_and_no_retriever(toy_world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = searche1(*command(toy_world, out, "--method", "direct", "--temperature", "0", "--limit", "5"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(out)["overall"]["num_questions"] == 10
    assert [path.name for path in (out / "logs").iterdir()] == ["engine0.log"]


def play(world: Path, servers: list[str], out: Path, *arguments: str, typed: str) -> subprocess.CompletedProcess[str]:
    config = str(ROOT / "configs" / "quickstart.yaml")
    flags = ["--config", config, "--model", str(POLICY), "--data", str(world / "test.jsonl"), "--out", str(out)]
    command = [sys.executable, "-m", "searche1", "play", *flags, *servers, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=200, env=environment)


def test_a_person_asks_a_model_and_sees_it_search(toy_world: Path, servers: list[str], tmp_path: Path) -> None:
    question = json.loads((toy_world / "test.jsonl").read_text().splitlines()[0])
    done = play(toy_world, servers, tmp_path, "--temperature", "0", typed=f"{question['question']}\n\nq\n")
    assert done.returncode == 0, done.stderr
    assert f"accepted: {question['golden_answers'][0]}" in done.stdout and done.stdout.count("accepted:") == 2
    assert done.stdout.count("<search>") == done.stdout.count("<information>") >= 2


def test_a_person_is_the_policy_against_the_real_retriever(toy_world: Path, servers: list[str], tmp_path: Path) -> None:
    question = json.loads((toy_world / "test.jsonl").read_text().splitlines()[0])
    typed = f"? {question['question']}\n= {question['golden_answers'][0]}\n"
    chosen = ["--as-policy", "--question", question["question"]]
    done = play(toy_world, servers, tmp_path, *chosen, typed=typed)
    assert done.returncode == 0, done.stderr
    assert "<information>" in done.stdout and "-- right" in done.stdout and "1 search," in done.stdout
    assert not (tmp_path / "logs").exists()  # neither an engine nor a retriever was started


def grpo(world: Path, out: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """A round whose reward "collapses" with the first fall: averages of one step, none of which may be lost."""
    alarm = ["health.window=1", "health.reward_drop=0.01", "health.max_length_growth=0", "health.min_searches_kept=0"]
    sizes = ["grpo.steps=6", "grpo.prompts_per_step=8", "grpo.save_every=1", "cycle.evaluate_stages=false"]
    config = ["--config", str(ROOT / "configs" / "quickstart-fast.yaml")]
    return searche1("grpo", *config, *settings(world, out), *sizes, *alarm, *given)


def test_an_engine_that_wants_a_key_or_is_down_is_told(toy_world: Path, servers: list[str], tmp_path: Path) -> None:
    engine, _, retriever = servers
    config = ["--config", str(ROOT / "configs" / "quickstart-fast.yaml")]
    stranger = searche1("grpo", *config, *settings(toy_world, tmp_path / "no-key"), engine, retriever)
    assert stranger.returncode == 2 and "HTTP status 401" in stranger.stderr, stranger.stderr
    assert "engine.token_file" in stranger.stderr and "Traceback" not in stranger.stderr
    nowhere = ["engine.urls=[http://127.0.0.1:9]", retriever]
    down = searche1("grpo", *config, *settings(toy_world, tmp_path / "down"), *nowhere)
    assert down.returncode == 2 and "was not ready within 10 s" in down.stderr


def test_a_rank_that_is_killed_is_started_again_by_torchrun_and_the_round_goes_on(
    toy_world: Path, servers: list[str], tmp_path: Path
) -> None:
    """The engine takes weights from a folder. What comes out is what ranks that were left alone make."""
    sizes = ["grpo.steps=4", "grpo.prompts_per_step=8", "grpo.save_every=1", "cycle.evaluate_stages=false"]
    config = ["--config", str(ROOT / "configs" / "quickstart-fast.yaml")]
    killed = []

    def on_line(process: subprocess.Popen[str], line: str) -> None:
        if "grpo 3/4" in line and not killed:
            killed.append(line)
            kill_rank(process, 1)

    for name, watch in (("alone", lambda *_: None), ("killed", on_line)):
        given = [*config, *settings(toy_world, tmp_path / name), *sizes, *servers]
        result = torchrun(2, "grpo", *given, on_line=watch)
        assert result.returncode == 0, result.stdout[-5000:]
    assert killed and "continuing from step_" in result.stdout
    alone, again = (tmp_path / name / "grpo" / "hf" / "model.safetensors" for name in ("alone", "killed"))
    assert alone.read_bytes() == again.read_bytes()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_that_collapses_goes_back_once_and_then_ends_with_its_best_checkpoint(
    toy_world: Path, servers: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["health.on_collapse=roll_back", "health.max_roll_backs=1"]
    result = grpo(toy_world, out, *servers, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ALARM reward collapse") == 2, result.stdout
    recorded = rows(out / "health.jsonl")
    kinds = [next(key for key in ("alarm", "rolled_back_to", "ended_with") if key in row) for row in recorded]
    assert kinds == ["alarm", "rolled_back_to", "alarm", "ended_with"]
    back_to = recorded[1]["rolled_back_to"]
    assert 1 <= back_to < recorded[0]["step"]
    assert list((out / "grpo" / "rolled_back_1").glob("step_*.jsonl.gz"))
    lrs = {row["step"]: row["values"]["lr"] for row in rows(out / "metrics.jsonl") if "values" in row}
    first = next(row["values"]["lr"] for row in rows(out / "metrics.jsonl") if row.get("step") == back_to + 1)
    assert lrs[back_to + 1] == pytest.approx(first / 2)  # the same step once more, with half the learning rate
    assert (out / "grpo" / "hf" / "model.safetensors").is_file()
    page = searche1("report", str(out))
    assert page.returncode in (0, 2)  # without an evaluated stage there is no page


def test_a_run_that_is_told_to_stop_by_an_alarm_continues_when_told_to_go_on(
    toy_world: Path, servers: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stopped = grpo(toy_world, out, *servers, "health.on_collapse=stop")
    assert stopped.returncode == 2 and "stopped for the alarm above" in stopped.stderr
    assert list((out / "grpo" / "checkpoints").glob("step_*"))
    finished = grpo(toy_world, out, *servers, "health.on_collapse=warn")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "continuing from step_" in finished.stdout and "6/6" in finished.stdout
