import json
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from searche1 import prepare as preparing
from searche1.benchmarks import BENCHMARKS
from searche1.data import load_questions
from searche1.prepare import TRAIN_SIZES, prepare
from searche1.types import UserError

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from prepare_data import main

SIZES = {"nq": 40, "hotpotqa": 60}


def write_set(folder, name, split, count, *, texts=None):
    path = folder / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = texts or [f"what is {name} {split} {i}?" for i in range(count)]
    rows = [
        {"id": f"{split}_{i}", "question": text, "golden_answers": [f"a{i}", "b"], "metadata": {"i": i}}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "flashrag"
    for name, count in SIZES.items():
        write_set(folder, name, "train", count)
    for benchmark in BENCHMARKS:
        write_set(folder, benchmark.name, benchmark.split, 5)
    write_set(folder, "nq", "dev", 9)  # unused: it has a test set
    return folder


def run(source, out, **options):
    given = {"hold_out": 10, "seed": 0, "any_size": True, "drop_leaks": False, **options}
    return prepare(str(source), out, **given)


def keys(path):
    return [question.key for question in load_questions(path)]


def texts(path):
    return [question.text for question in load_questions(path)]


def test_the_sizes_of_the_paper_are_what_is_checked():
    assert sum(TRAIN_SIZES.values()) == 169_615 and sum(b.num_questions for b in BENCHMARKS) == 51_713


def test_files_are_in_search_r1s_schema_and_order(source, tmp_path):
    report = run(source, tmp_path / "data")
    row = pyarrow.parquet.read_table(tmp_path / "data" / "test.parquet").to_pylist()[0]
    assert row["prompt"][0]["role"] == "user" and row["prompt"][0]["content"].endswith("Question: what is nq test 0?\n")
    assert row["reward_model"] == {"style": "rule", "ground_truth": {"target": ["a0", "b"]}}
    assert row["extra_info"] == {"split": "test", "index": 0} and row["ability"] == "fact-reasoning"
    assert row["id"] == "test_0"
    tested = load_questions(tmp_path / "data" / "test.parquet")
    assert list(dict.fromkeys(q.source for q in tested)) == [b.name for b in BENCHMARKS]
    assert report.test == {b.name: 5 for b in BENCHMARKS}


def test_the_hold_out_is_even_disjoint_and_the_same_for_a_seed(source, tmp_path):
    report = run(source, tmp_path / "a")
    assert report.validation == {"nq": 5, "hotpotqa": 5} and report.train == {"nq": 35, "hotpotqa": 55}
    train, validation = texts(tmp_path / "a" / "train.parquet"), texts(tmp_path / "a" / "validation.parquet")
    assert not set(train) & set(validation) and len(train) + len(validation) == 100
    run(source, tmp_path / "b")
    assert (tmp_path / "b/validation.parquet").read_bytes() == (tmp_path / "a/validation.parquet").read_bytes()
    run(source, tmp_path / "c", seed=1)
    assert texts(tmp_path / "c" / "validation.parquet") != validation


def test_repeated_and_leaked_questions_are_counted_and_never_validate(source, tmp_path):
    leaked = ["What is nq test 0", "what is popqa test 3?", "the WHAT is popqa test 4 ?"]
    once = [f"own {i}?" for i in range(8)]
    write_set(source, "nq", "train", 0, texts=[*leaked, *once, *(f"Own {i}" for i in range(8))])
    report = run(source, tmp_path / "data", hold_out=8)
    assert report.train_also_in_test == {"nq": 1, "popqa": 2} and report.repeated_in_train == 8
    held = texts(tmp_path / "data" / "validation.parquet")
    assert not set(held) & set(leaked)
    assert report.dropped_from_train == 4  # the twins of the four of nq that validate
    without = run(source, tmp_path / "other", hold_out=8, drop_leaks=True)
    assert without.train["nq"] == report.train["nq"] - 3


def test_other_sizes_are_refused_unless_asked_for(source, tmp_path):
    with pytest.raises(UserError, match=r"nq: 40 training questions, 79,168 in the paper's data"):
        run(source, tmp_path / "data", any_size=False)
    assert not (tmp_path / "data").exists()
    assert len(run(source, tmp_path / "data").warnings) == 2 + 7


def test_files_prepared_for_search_r1_are_read_as_they_are(source, tmp_path):
    run(source, tmp_path / "first")
    report = run(tmp_path / "first", tmp_path / "second")
    assert report.validation == {"nq": 5, "hotpotqa": 5} and sum(report.train.values()) == 80
    assert keys(tmp_path / "second" / "test.parquet") == keys(tmp_path / "first" / "test.parquet")
    assert set(keys(tmp_path / "second" / "train.parquet")) < set(keys(tmp_path / "first" / "train.parquet"))


def test_mistakes_are_told(source, tmp_path, monkeypatch, capsys):
    def told(*arguments):
        assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
        return capsys.readouterr().err

    assert "holds no train.jsonl" in told("--source", str(tmp_path))
    assert "neither a folder nor a data set" in told("--source", "no/such-data")
    assert "not the paper's" in told("--source", str(source))
    assert "nq 30 questions short" in told("--source", str(source), "--any-size", "--hold-out", "140")
    assert "--hold-out is 0" in told("--source", str(source), "--hold-out", "0")
    path = source / "nq" / "train.jsonl"
    path.write_text(path.read_text() + '{"question": "no answers?"}\n')
    assert "line 41: missing golden_answers" in told("--source", str(source), "--any-size")
    path.write_text('{"question"')
    assert "line 1: not valid JSON" in told("--source", str(source), "--any-size")
    path.write_bytes(b'{"question": "caf\xe9"}\n')
    assert "line 1: not UTF-8 at byte" in told("--source", str(source), "--any-size")
    assert not (tmp_path / "out").exists()


def test_the_tool_prints_sizes_and_what_to_know(source, tmp_path, capsys):
    assert main(["--source", str(source), "--out", str(tmp_path / "out"), "--any-size", "--hold-out", "10"]) == 0
    printed = capsys.readouterr().out
    assert "hotpotqa" in printed and "asks too: none" in printed and "not the paper's size: nq: 40" in printed
    report = json.loads((tmp_path / "out" / preparing.REPORT_FILE).read_text())
    assert report["validation"] == {"nq": 5, "hotpotqa": 5} and report["seed"] == 0
