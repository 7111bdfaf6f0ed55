import json
from pathlib import Path

import pytest

from searche1.cli import main
from searche1.config import load_config
from searche1.evaluation.run import choose_questions, default_out, prepare
from searche1.retrieval.client import Passage
from searche1.types import Question, UserError

POLICY = Path(__file__).parents[2] / "searche1" / "assets" / "toy_policy"


def questions(**counts):
    return [Question(str(i), "q?", ("x",), source) for source, count in counts.items() for i in range(count)]


def question_file(path, *, source="nq", number=2):
    rows = [{"id": i, "question": "q", "golden_answers": ["x"], "data_source": source} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sources_and_a_limit_choose_in_file_order():
    chosen = choose_questions(questions(nq=3, popqa=2, musique=4), ["musique", "nq"], limit=2)
    assert [q.key for q in chosen] == ["nq:0", "nq:1", "musique:0", "musique:1"]
    assert len(choose_questions(questions(nq=3, popqa=2), [], limit=0)) == 5


def test_a_source_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(UserError, match="no question of source trivia; the data has nq, popqa"):
        choose_questions(questions(nq=1, popqa=1), ["nq", "trivia"], limit=0)


def test_results_that_nobody_named_a_folder_for_are_named_after_model_and_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine/cycle0/grpo/hf").mkdir(parents=True)
    assert (
        default_out(load_config(None, ["model.path=runs/mine/cycle0/grpo/hf"]))
        == "runs/eval/mine-cycle0-grpo-hf-search"
    )
    hub = load_config(None, ["model.path=Qwen/Qwen2.5-3B-Instruct", "eval.method=rag"])
    assert default_out(hub) == "runs/eval/Qwen2.5-3B-Instruct-rag"


def test_greedy_decoding_asks_each_question_once(tmp_path):
    data = question_file(tmp_path / "test.jsonl")
    given = [f"model.path={POLICY}", f"data.test={data}", "eval.samples=3"]
    assert prepare(load_config(None, given)).samples == 1
    assert prepare(load_config(None, [*given, "eval.temperature=0.5"])).samples == 3


def test_the_baselines_do_not_search_and_the_question_stays_behind_long_passages(tmp_path):
    data = question_file(tmp_path / "test.jsonl")
    given = [f"model.path={POLICY}", f"data.test={data}", "eval.method=rag", "rollout.max_observation_tokens=3"]
    exam = prepare(load_config(None, [*given, "prompt.rag='{documents} <q> {question}</q>'"]))
    assert exam.rollout.max_searches == 0
    (question, *_) = exam.questions
    passages = [Passage("0", '"t"\nof the of the of the of the', 0.9)]
    prompt = exam.prompt(question, passages)
    assert prompt.endswith("<q> q?</q>")
    assert len(exam.tokenizer.encode(prompt.split("<q>")[0])) <= 4


# -- mistakes -------------------------------------------------------------------------------------


def told(capsys, *arguments):
    assert main(["eval", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


def test_mistakes_are_told_before_an_engine_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = question_file(tmp_path / "test.jsonl")
    good = ("--model", POLICY, "--data", data)
    assert "no questions: give --data" in told(capsys, "--model", POLICY)
    assert "question file not found" in told(capsys, "--model", POLICY, "--data", "nowhere.jsonl")
    assert "neither a folder nor a model" in told(capsys, "--model", "no/such-model", "--data", data)
    assert "holds no config.json" in told(capsys, "--model", tmp_path, "--data", data)
    assert "the data has nq" in told(capsys, *good, "--sources", "nq,popqa")
    assert "eval.limit must be 0 or more" in told(capsys, *good, "--limit", "-1")
    assert "greedy trajectories" in told(capsys, *good, "--samples", "2")
    assert "drop one" in told(capsys, *good, "--like-search-r1", "--temperature", "0.5")
    assert "prompt.rag needs {question} and {documents}" in told(capsys, *good, "prompt.rag=hello")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run it without torchrun" in told(capsys, *good)
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_question_files_is_read_and_an_empty_one_told(tmp_path, capsys):
    folder = tmp_path / "questions"
    folder.mkdir()
    assert "holds no .jsonl and no .parquet file" in told(capsys, "--model", POLICY, "--data", folder)
    question_file(folder / "b.jsonl", source="b")
    question_file(folder / "a.jsonl", source="a")
    exam = prepare(load_config(None, [f"model.path={POLICY}", f"data.test={folder}"]))
    assert [question.key for question in exam.questions] == ["a:0", "a:1", "b:0", "b:1"]
