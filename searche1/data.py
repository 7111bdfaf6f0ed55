"""Questions from files, questions in batches, and groups to and from files."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from searche1.runs import atomic_path
from searche1.types import Group, Question, UserError, group_from_json

JSONL_KEYS = ("id", "question", "golden_answers", "data_source")
PARQUET_COLUMNS = ("data_source", "question", "reward_model", "extra_info")


def load_questions(path: str | Path) -> list[Question]:
    """The questions of a .jsonl or Search-R1 .parquet file, in its order; of a folder's files, in order of name.

    Raises UserError, naming line or row, on anything that is missing, empty or there twice.
    """
    path = Path(path)
    first_place: dict[str, str] = {}
    questions = []
    for place, question in itertools.chain.from_iterable(map(_placed_questions, question_files(path))):
        if question.key in first_place:
            raise UserError(
                f"{place}: the question {question.key!r} is already at {first_place[question.key]}; "
                f"give every question of a source its own id"
            )
        first_place[question.key] = place
        questions.append(question)
    if not questions:
        raise UserError(f"{path} holds no questions; give a file with at least one")
    return questions


def question_files(path: Path) -> list[Path]:
    """The file itself, or the question files in a folder. Raises UserError if there is none."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
        if not files:
            raise UserError(f"{path} holds no .jsonl and no .parquet file; give a question file or a folder of them")
        return files
    if not path.is_file():
        raise UserError(
            f"question file not found: {path}; give an existing .jsonl or .parquet file "
            "(Search-R1's parquet files are read as they are)"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"question file {path} may not be read by this user; chmod it, or give another")
    return [path]


def _placed_questions(path: Path) -> Iterator[tuple[str, Question]]:
    """(where it stands, the question) of each in a file."""
    if path.suffix == ".jsonl":
        return _jsonl_questions(path)
    if path.suffix == ".parquet":
        return _parquet_questions(path)
    raise UserError(f"{path} ends in {path.suffix!r}; questions are read from .jsonl or Search-R1 .parquet files")


def _jsonl_questions(path: Path) -> Iterator[tuple[str, Question]]:
    for place, row in read_jsonl(path):
        missing = [key for key in JSONL_KEYS if key not in row]
        if missing:
            raise UserError(
                f"{place}: missing {', '.join(missing)}; a question needs {', '.join(JSONL_KEYS)} "
                f"and this one has {', '.join(row)}"
            )
        question = make_question(row["id"], row["question"], row["golden_answers"], row["data_source"], place=place)
        yield place, question


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the object) of each line that is not blank. Raises UserError."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode())
            except RecursionError as error:
                raise UserError(f"{place}: nested too deeply; every line must be one JSON object") from error
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{place}: not valid JSON at column {error.colno} ({error.msg}); every line must be one JSON object"
                ) from error
            except ValueError as error:  # a number of thousands of digits
                raise UserError(f"{place}: not readable JSON ({error}); every line must be one JSON object") from error
            if not isinstance(row, dict):
                raise UserError(f"{place}: expected a JSON object, got {type(row).__name__}")
            yield place, row


def _parquet_questions(path: Path) -> Iterator[tuple[str, Question]]:
    """Search-R1's files: the id is `extra_info.index`, the answers are those its reward function reads."""
    for place, row in read_parquet(path, columns=PARQUET_COLUMNS):
        index = _field(row, "extra_info", "index", place=place)
        answers = _field(row, "reward_model", "ground_truth", "target", place=place)
        yield place, make_question(index, row["question"], answers, row["data_source"], place=place)


def read_parquet(path: Path, *, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the row) of each; of some columns, which must be there, or of all. Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_schema(path).names
        missing = [name for name in columns if name not in found]
        if missing:
            raise UserError(
                f"{path}: missing the columns {', '.join(missing)}; Search-R1's files have "
                f"{', '.join(columns)} and this one has {', '.join(found)}"
            )
        rows = pyarrow.parquet.read_table(path, columns=list(columns) or None).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:  # the second is Arrow's too, of a damaged page
        raise UserError(f"{path} is not a readable parquet file: {error}; download or write it again") from error
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _field(row: dict[str, Any], *names: str, place: str) -> Any:
    value: Any = row
    for name in names:
        if not isinstance(value, dict) or value.get(name) is None:
            raise UserError(f"{place}: missing {'.'.join(names)}; Search-R1's files have it in every row")
        value = value[name]
    return value


def make_question(id: Any, text: Any, answers: Any, source: Any, *, place: str) -> Question:
    """A question from what a file says, or a UserError that names its `place`."""
    if isinstance(id, bool) or not isinstance(id, int | str) or id == "":
        raise UserError(f"{place}: the id must be a string or a whole number, got {id!r}")
    if not isinstance(source, str) or not source.strip():
        raise UserError(f"{place}: the data_source must be a name such as 'nq', got {source!r}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: the question is empty; got {text!r}")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{place}: the answers must be a list of strings, got {answers!r}")
    if lone := next((name for name, string in (("question", text), *_named(answers)) if not _is_text(string)), ""):
        raise UserError(f"{place}: the {lone} holds half of a surrogate pair, which is no character; write it anew")
    if not answers:
        raise UserError(f"{place}: the question has no answers, so it cannot be scored; give one or drop it")
    return Question(id=str(id), text=text, answers=tuple(answers), source=source)


def _named(answers: Sequence[str]) -> list[tuple[str, str]]:
    return [("answer", answer) for answer in answers]


def _is_text(string: str) -> bool:
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def shuffled(questions: Sequence[Question], *, seed: int, round_index: int, epoch: int = 0) -> list[Question]:
    """All questions once, in an order that depends on the three numbers alone."""
    order = list(questions)
    random.Random(f"{seed}/{round_index}/{epoch}").shuffle(order)
    return order


def question_batches(
    questions: Sequence[Question], *, batch_size: int, seed: int, round_index: int, start: int = 0
) -> Iterator[list[Question]]:
    """Endless batches; the first is batch number `start`, so a resumed round goes on where it was.

    Each epoch is shuffled anew and visits a question at most once. What is left of an epoch when no
    full batch remains is dropped: a batch that straddled two epochs could hold a question twice.
    """
    per_epoch = len(questions) // batch_size
    if per_epoch == 0:
        raise UserError(
            f"a batch needs {batch_size} questions but there are only {len(questions)}; "
            f"lower the batch size or give more questions"
        )

    def batches() -> Iterator[list[Question]]:
        for number in itertools.count(start):
            epoch, index = divmod(number, per_epoch)
            if index == 0 or number == start:
                order = shuffled(questions, seed=seed, round_index=round_index, epoch=epoch)
            yield order[index * batch_size : (index + 1) * batch_size]

    return batches()


def write_groups(path: str | Path, groups: Iterable[Group]) -> None:
    """One JSON line a group, compressed if the name ends in .gz. The file appears whole or not at all."""
    with contextlib.ExitStack() as stack:
        unfinished = stack.enter_context(atomic_path(Path(path)))
        stream: IO[bytes] | gzip.GzipFile = stack.enter_context(open(unfinished, "wb"))
        if _is_gzip(path):  # no name and no time in the header: equal groups give equal checksums
            stream = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0))
        for group in groups:
            stream.write((json.dumps(group, default=vars) + "\n").encode())


def read_groups(path: str | Path) -> list[Group]:
    """The inverse of `write_groups`. Raises UserError if the file is missing, cut or damaged."""
    if not Path(path).is_file():
        raise UserError(f"groups file not found: {path}; give a file written by a rollout, pool or evaluation stage")
    groups: list[Group] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if _is_gzip(path) else open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    raise EOFError("the line has no end")
                groups.append(group_from_json(json.loads(line)))
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is cut or damaged near line {len(groups) + 1} ({error}); "
            f"delete it so that its stage writes it again, or copy it once more"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, line {len(groups) + 1}: not a group ({error!r}); give a file that a searche1 stage wrote"
        ) from error
    return groups


def _is_gzip(path: str | Path) -> bool:
    return Path(path).suffix == ".gz"
