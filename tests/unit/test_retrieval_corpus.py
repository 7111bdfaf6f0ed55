"""A corpus is read row by row, and what is no row, or no longer the same file, is told."""

import gzip
import json
import os
import resource
from pathlib import Path

import pytest

from searche1.retrieval.corpus import Corpus
from searche1.types import UserError


def write_rows(path: Path, count: int) -> Path:
    rows = "".join(json.dumps({"id": f"p{i}", "contents": f'"T{i}"\ntext \u00e9 {i}'}) + "\n" for i in range(count))
    path.write_bytes(gzip.compress(rows.encode()) if path.suffix == ".gz" else rows.encode())
    return path


def test_rows_are_read_in_any_order(tmp_path):
    corpus = Corpus(write_rows(tmp_path / "corpus.jsonl", 100))
    assert len(corpus) == 100
    assert corpus[99] == ("p99", '"T99"\ntext \u00e9 99') and corpus[0][0] == "p0"
    assert list(corpus.contents(range(3, 5))) == [corpus[3][1], corpus[4][1]]


def test_a_compressed_corpus_is_the_same_corpus_and_unpacked_once(tmp_path):
    plain = Corpus(write_rows(tmp_path / "plain.jsonl", 9))
    packed = write_rows(tmp_path / "corpus.jsonl.gz", 9)
    corpus = Corpus(packed)
    assert corpus.sha256 == plain.sha256 and corpus[8] == plain[8]
    assert corpus.path == tmp_path / "corpus.jsonl"
    written = corpus.path.stat().st_mtime_ns
    assert Corpus(packed).path.stat().st_mtime_ns == written
    os.utime(packed, ns=(written + 10**9, written + 10**9))
    with pytest.raises(UserError, match=r"corpus\.jsonl is older than"):
        Corpus(packed)


def test_half_a_compressed_corpus_is_refused_and_leaves_nothing(tmp_path):
    packed = write_rows(tmp_path / "corpus.jsonl.gz", 1000)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a complete gzip file"):
        Corpus(packed)
    packed.write_bytes(b"plain text")
    with pytest.raises(UserError, match="not a complete gzip file"):
        Corpus(packed)
    assert list(tmp_path.iterdir()) == [packed]


def test_a_last_line_without_newline_is_a_row(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": 1, "contents": "a"}\n{"id": 2, "contents": "b"}')
    corpus = Corpus(path)
    assert [corpus[i] for i in range(len(corpus))] == [("1", "a"), ("2", "b")]


@pytest.mark.parametrize(
    ("second_line", "reason"),
    [
        ("{oops", "line 2 is not valid JSON"),
        ("", "line 2 is not valid JSON"),
        ("\udcff", "line 2 is not valid JSON"),
        ('["p1", "x"]', "line 2: needed an object"),
        ('{"id": "p1", "text": "x"}', "line 2: the key 'contents' is missing; it has"),
        ('{"contents": "x"}', "line 2: the key 'id' is missing"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, second_line, reason):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "p0", "contents": "x"}\n' + second_line + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=reason):
        Corpus(path).check()


def test_a_missing_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="corpus not found"):
        Corpus(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is empty"):
        Corpus(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 100), lambda path: path.write_text("x" * 4000)])
def test_a_file_that_changes_in_use_gives_an_error_and_no_other_passage(tmp_path, change):
    path = write_rows(tmp_path / "corpus.jsonl", 100)
    corpus = Corpus(path)
    change(path)
    for row in (0, 99):
        with pytest.raises(UserError, match="was changed while it is in use"):
            corpus[row]


def test_a_file_that_is_replaced_stays_readable(tmp_path):
    path = write_rows(tmp_path / "corpus.jsonl", 10)
    corpus = Corpus(path)
    path.unlink()
    write_rows(path, 2)
    assert corpus[9][0] == "p9"


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def peak_kib(count: int) -> int:
        path = write_rows(tmp_path / f"{count}.jsonl", count)
        child = os.fork()
        if child == 0:
            corpus = Corpus(path)
            assert corpus[count - 1]
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        assert status == 0
        return usage.ru_maxrss

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_kib(400_000) - base < 60_000  # two pieces of the file; its offsets alone would be 3 MB, rows 20
