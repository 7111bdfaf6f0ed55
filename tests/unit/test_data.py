import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from searche1.data import load_questions, question_batches, read_groups, write_groups
from searche1.types import Group, Question, Span, Trajectory, UserError

GOOD = {"id": 3, "question": "who wrote Hamlet", "golden_answers": ["Shakespeare"], "data_source": "nq"}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def search_r1_row(index, source="nq", target=("Paris", "paris")):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": "..."}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(target)}},
        "extra_info": {"split": "train", "index": index},
        "id": f"train_{index}",
        "question": f"question {index}?",
        "golden_answers": list(target),
    }


def some_groups(num=3):
    spans = (
        Span("policy", "search", (1, 2), (-0.1, -1 / 3), "<search>\u00e9</search>"),
        Span("environment", "information", (7,), (), "\n\n<information>x</information>\n\n", is_truncated=True),
        Span("policy", "answer", (5,), (-2.5e-7,), "<answer>a\u2028b</answer>"),
    )
    trajectory = Trajectory((9, 8), spans, "answered", weight_version="4")
    failed = Trajectory((9, 8), (), "error", error="the engine is gone")
    return [Group(Question(str(i), "q?", ("a", "b"), "nq"), (trajectory, failed), (1.0, 0.0)) for i in range(num)]


def test_a_jsonl_question_keeps_its_fields_and_has_its_id_as_text(tmp_path):
    assert load_questions(jsonl(tmp_path / "q.jsonl", GOOD)) == [
        Question(id="3", text="who wrote Hamlet", answers=("Shakespeare",), source="nq")
    ]


def test_a_single_answer_may_be_a_bare_string(tmp_path):
    (question,) = load_questions(jsonl(tmp_path / "q.jsonl", GOOD | {"golden_answers": "Shakespeare"}))
    assert question.answers == ("Shakespeare",)


def test_the_same_id_in_two_sources_names_two_questions(tmp_path):
    questions = load_questions(jsonl(tmp_path / "q.jsonl", GOOD, GOOD | {"data_source": "hotpotqa"}))
    assert [q.key for q in questions] == ["nq:3", "hotpotqa:3"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"id": 4, "question": "q"}, "line 2: missing golden_answers, data_source"),
        (GOOD | {"id": 4, "question": "  "}, "line 2: the question is empty"),
        (GOOD | {"id": 4, "golden_answers": []}, "line 2: the question has no answers"),
        (GOOD | {"id": 4, "golden_answers": [1]}, "line 2: the answers must be a list of strings"),
        (GOOD | {"id": None}, "line 2: the id must be"),
        (GOOD, "line 2: the question 'nq:3' is already at .*line 1"),
        ([1], "line 2: expected a JSON object, got list"),
    ],
)
def test_a_bad_jsonl_line_is_refused_with_its_number(tmp_path, row, complaint):
    with pytest.raises(UserError, match=complaint):
        load_questions(jsonl(tmp_path / "q.jsonl", GOOD, row))


def test_broken_json_is_refused_with_line_and_column(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"id": 4,, }\n')
    with pytest.raises(UserError, match="line 2: not valid JSON at column 10"):
        load_questions(path)


def test_a_number_too_long_to_read_is_refused_with_its_line(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"id": ' + 5000 * "7" + "}\n")
    with pytest.raises(UserError, match=r"q\.jsonl, line 1: not readable JSON"):
        load_questions(tmp_path / "q.jsonl")


def test_a_missing_an_empty_and_a_foreign_file_are_each_refused_with_a_way_out(tmp_path):
    with pytest.raises(UserError, match=r"not found.*give an existing"):
        load_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="holds no questions"):
        load_questions(jsonl(tmp_path / "empty.jsonl"))
    (tmp_path / "q.csv").write_text("id,question\n")
    with pytest.raises(UserError, match=r"'.csv'; questions are read from .jsonl or Search-R1 .parquet"):
        load_questions(tmp_path / "q.csv")


def test_a_search_r1_parquet_file_gives_indices_as_ids_and_targets_as_answers(tmp_path):
    path = parquet(tmp_path / "train.parquet", search_r1_row(0), search_r1_row(0, source="hotpotqa", target=("x",)))
    assert load_questions(path) == [
        Question(id="0", text="question 0?", answers=("Paris", "paris"), source="nq"),
        Question(id="0", text="question 0?", answers=("x",), source="hotpotqa"),
    ]


def test_a_parquet_file_that_pandas_wrote_with_array_answers_is_read_too(tmp_path):
    import numpy
    import pandas

    row = search_r1_row(5)
    row["reward_model"]["ground_truth"]["target"] = numpy.array(["Paris", "paris"], dtype=object)
    pandas.DataFrame([row]).to_parquet(tmp_path / "train.parquet")
    assert load_questions(tmp_path / "train.parquet")[0].answers == ("Paris", "paris")


def test_a_parquet_file_without_a_needed_column_or_value_is_refused(tmp_path):
    row = search_r1_row(0)
    del row["reward_model"]
    with pytest.raises(UserError, match="missing the columns reward_model"):
        load_questions(parquet(tmp_path / "a.parquet", row))
    with pytest.raises(UserError, match="row 1: the question has no answers"):
        load_questions(parquet(tmp_path / "b.parquet", search_r1_row(0), search_r1_row(1, target=())))
    nameless = search_r1_row(1) | {"extra_info": {"split": "train", "index": None}}
    with pytest.raises(UserError, match=r"row 1: missing extra_info.index"):
        load_questions(parquet(tmp_path / "c.parquet", search_r1_row(0), nameless))
    (tmp_path / "d.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        load_questions(tmp_path / "d.parquet")
    damaged = parquet(tmp_path / "e.parquet", *(search_r1_row(k) for k in range(500)))
    content = bytearray(damaged.read_bytes())
    content[40:400] = bytes(360)  # of the first column's values
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet file"):
        load_questions(damaged)


QUESTIONS = [Question(str(i), "q?", ("a",), "nq") for i in range(10)]


def take(batches, num):
    return [[int(question.id) for question in next(batches)] for _ in range(num)]


def batches(**changes):
    return question_batches(QUESTIONS, **({"batch_size": 3, "seed": 1, "round_index": 0} | changes))


def test_an_epoch_visits_no_question_twice_and_no_batch_is_short():
    for epoch in range(3):
        ids = [id for batch in take(batches(start=3 * epoch), 3) for id in batch]
        assert len(ids) == 9 and len(set(ids)) == 9


def test_every_epoch_every_round_and_every_seed_has_its_own_order():
    orders = [take(batches(), 3), take(batches(start=3), 3), take(batches(round_index=1), 3), take(batches(seed=2), 3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_batches_that_start_at_a_step_are_those_of_an_unbroken_round():
    whole = take(batches(), 11)
    for start in range(11):
        assert take(batches(start=start), 11 - start) == whole[start:]


def test_a_batch_larger_than_the_data_is_refused_at_once():
    with pytest.raises(UserError, match="a batch needs 11 questions but there are only 10"):
        batches(batch_size=11)


@pytest.mark.parametrize("name", ["groups.jsonl", "groups.jsonl.gz"])
def test_groups_come_back_from_a_file_exactly_as_they_were(tmp_path, name):
    write_groups(tmp_path / name, some_groups())
    assert read_groups(tmp_path / name) == some_groups()


def test_equal_groups_make_equal_compressed_files(tmp_path):
    write_groups(tmp_path / "a.jsonl.gz", some_groups())
    write_groups(tmp_path / "b.jsonl.gz", some_groups())
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).count(b"\n") == 3


@pytest.mark.parametrize("name", ["groups.jsonl", "groups.jsonl.gz"])
@pytest.mark.parametrize("num_lost", [1, 40])
def test_a_cut_groups_file_is_refused_and_not_read_in_part(tmp_path, name, num_lost):
    write_groups(tmp_path / name, some_groups())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-num_lost])
    with pytest.raises(UserError, match=r"cut or damaged.*delete it so that its stage writes it again"):
        read_groups(tmp_path / name)


def test_a_line_that_is_not_a_group_is_refused_with_its_number(tmp_path):
    write_groups(tmp_path / "groups.jsonl", some_groups(1))
    with open(tmp_path / "groups.jsonl", "a") as file:
        file.write('{"question": {}}\n')
    with pytest.raises(UserError, match="line 2: not a group"):
        read_groups(tmp_path / "groups.jsonl")


def test_writing_that_fails_half_way_leaves_the_earlier_groups(tmp_path):
    path = tmp_path / "groups.jsonl.gz"
    write_groups(path, some_groups(2))

    def failing():
        yield from some_groups(1)
        raise RuntimeError("the engine is gone")

    with pytest.raises(RuntimeError):
        write_groups(path, failing())
    assert read_groups(path) == some_groups(2)
    assert [p.name for p in tmp_path.iterdir()] == ["groups.jsonl.gz"]
