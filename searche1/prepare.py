"""The training and evaluation files of the paper (4.1) from FlashRAG's data sets, in Search-R1's parquet schema.

Training is NQ's and HotpotQA's train sets in that order; a hold-out of them chooses adapters; seven sets evaluate, each
by its test set where there is one, else by its dev set.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from searche1.benchmarks import BENCHMARKS
from searche1.config import PromptConfig
from searche1.data import load_questions, make_question, read_jsonl, read_parquet
from searche1.prompts import student_prompt
from searche1.rewards import normalize_answer
from searche1.runs import atomic_path, atomic_write_json
from searche1.types import Question, UserError

TRAIN_SIZES = {"nq": 79_168, "hotpotqa": 90_447}
TEST_SIZES = {benchmark.name: benchmark.num_questions for benchmark in BENCHMARKS}
EVALUATION_SPLITS = ("test", "dev")  # the first that a data set has
SUFFIXES = (".jsonl", ".parquet")
REPORT_FILE = "data_report.json"


@dataclass(frozen=True)
class Row:
    """A question with where it comes from."""

    question: Question  # its id is the row in its split, as in Search-R1's files
    original_id: str
    split: str


@dataclass(frozen=True)
class Report:
    """What was written, and what to know about it. Questions are compared in the normalization of answers."""

    train: dict[str, int]  # questions by source
    validation: dict[str, int]
    test: dict[str, int]
    repeated_in_train: int  # beyond the first of each
    dropped_from_train: int  # the same question as one in validation
    train_also_in_test: dict[str, int]  # train questions that a test set asks too, by the test set
    warnings: tuple[str, ...]


def prepare(source: str, out: Path, *, hold_out: int, seed: int, any_size: bool, drop_leaks: bool) -> Report:
    """Writes train, validation and test.parquet and data_report.json into `out`. Raises UserError.

    `source` is a folder NAME/{train,dev,test}.{jsonl,parquet}, a folder with Search-R1's train and test.parquet, or the
    hub id of a data set of the first form. The same source and seed give the same files.
    """
    folder = find_source(source)
    if all((folder / f"{name}.parquet").is_file() for name in ("train", "test")):
        train, test = _prepared(folder / "train.parquet", "train"), _prepared(folder / "test.parquet", "test")
    else:
        train = [row for name in TRAIN_SIZES for row in read_split(folder, name, ("train",))]
        test = [row for name in TEST_SIZES for row in read_split(folder, name, EVALUATION_SPLITS)]
    warnings = check_sizes(train, TRAIN_SIZES, what="training", any_size=any_size)
    warnings += check_sizes(test, TEST_SIZES, what="evaluation", any_size=any_size)

    asked_by: dict[str, str] = {_sameness(row): row.question.source for row in test}
    leaks = Counter(asked_by[_sameness(row)] for row in train if _sameness(row) in asked_by)
    texts = Counter(map(_sameness, train))
    if drop_leaks:
        train = [row for row in train if _sameness(row) not in asked_by]
    validation = choose_hold_out(train, hold_out, forbidden=set(asked_by), seed=seed)
    held = set(map(_sameness, validation))
    kept = [row for row in train if _sameness(row) not in held]

    for name, rows in (("train", kept), ("validation", validation), ("test", test)):
        write_rows(out / f"{name}.parquet", rows)
    report = Report(
        train=_by_source(kept),
        validation=_by_source(validation),
        test=_by_source(test),
        repeated_in_train=sum(count - 1 for count in texts.values()),
        dropped_from_train=len(train) - len(kept) - len(validation),
        train_also_in_test=dict(leaks),
        warnings=tuple(warnings),
    )
    atomic_write_json(out / REPORT_FILE, {"source": source, "seed": seed, "dropped_leaks": drop_leaks, **vars(report)})
    return report


def find_source(source: str) -> Path:
    """The folder itself, or a data set of the hub, downloaded on first use. Raises UserError."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [f"{name}/*" for name in TEST_SIZES] + ["train.parquet", "test.parquet"]
    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"--source {source!r} is neither a folder nor a data set that can be downloaded ({type(error).__name__}); "
            "give a folder with nq/train.jsonl and so on, or RUC-NLPIR/FlashRAG_datasets with a network"
        ) from error


def read_split(folder: Path, name: str, splits: Sequence[str]) -> list[Row]:
    """The rows of the first of `splits` that the data set has. Raises UserError."""
    for split in splits:
        for suffix in SUFFIXES:
            path = folder / name / f"{split}{suffix}"
            if path.is_file():
                return list(_read_rows(path, name, split))
    wanted = " or ".join(f"{split}.jsonl" for split in splits)
    raise UserError(
        f"{folder / name} holds no {wanted} (or .parquet); needed are {', '.join(TEST_SIZES)}, as FlashRAG has them"
    )


def _read_rows(path: Path, name: str, split: str) -> Iterator[Row]:
    rows = read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path)
    for number, (place, row) in enumerate(rows):
        missing = [key for key in ("question", "golden_answers") if row.get(key) is None]
        if missing:
            raise UserError(f"{place}: missing {', '.join(missing)}; this row has {', '.join(row)}")
        question = make_question(number, row["question"], row["golden_answers"], name, place=place)
        yield Row(question, str(row.get("id", f"{split}_{number}")), split)


def _prepared(path: Path, split: str) -> list[Row]:
    """Rows of a file that is prepared already."""
    return [Row(question, question.id, split) for question in load_questions(path)]


def check_sizes(rows: Sequence[Row], expected: dict[str, int], *, what: str, any_size: bool) -> list[str]:
    """What differs from the sizes of the paper's data. Raises UserError unless `any_size`."""
    found = _by_source(rows)
    wrong = [
        f"{name}: {found.get(name, 0):,} {what} questions, {expected.get(name, 0):,} in the paper's data"
        for name in dict.fromkeys([*expected, *found])
        if found.get(name, 0) != expected.get(name, 0)
    ]
    if wrong and not any_size:
        raise UserError(
            "the data are not the paper's:\n  " + "\n  ".join(wrong) + "\nDownload what is incomplete again, or give "
            "--any-size for other data, whose numbers compare with no published ones"
        )
    return wrong


def choose_hold_out(train: Sequence[Row], count: int, *, forbidden: set[str], seed: int) -> list[Row]:
    """`count` different questions, of every source alike, that no test set asks. Raises UserError if too few."""
    sources = list(_by_source(train))
    chosen: list[Row] = []
    taken = set(forbidden)
    for number, source in enumerate(sources):
        wanted = (count - len(chosen)) // (len(sources) - number)
        candidates = [row for row in train if row.question.source == source]
        random.Random(f"{seed}/{source}").shuffle(candidates)
        for row in candidates:
            if wanted == 0:
                break
            if _sameness(row) not in taken:
                taken.add(_sameness(row))
                chosen.append(row)
                wanted -= 1
        if wanted:
            raise UserError(f"--hold-out {count} leaves {source} {wanted} questions short; give a smaller number")
    return chosen


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A parquet file as Search-R1's scripts write it, with the original id beside it. Appears whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    prompt = PromptConfig()
    as_index = int if all(row.question.id.isdecimal() for row in rows) else str  # numbers, in Search-R1's files
    table = pyarrow.Table.from_pylist(
        [
            {
                "id": row.original_id,
                "question": row.question.text,
                "golden_answers": list(row.question.answers),
                "data_source": row.question.source,
                "prompt": [{"role": "user", "content": student_prompt(row.question.text, prompt)}],
                "ability": "fact-reasoning",
                "reward_model": {"style": "rule", "ground_truth": {"target": list(row.question.answers)}},
                "extra_info": {"split": row.split, "index": as_index(row.question.id)},
            }
            for row in rows
        ]
    )
    with atomic_path(path) as unfinished:
        pyarrow.parquet.write_table(table, unfinished)


def _sameness(row: Row) -> str:
    return normalize_answer(row.question.text)


def _by_source(rows: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(row.question.source for row in rows))
