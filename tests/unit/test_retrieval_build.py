"""tools/build_index.py: complete or not at all; what was stopped goes on to the same bytes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_retrieval_index import MINILM, PASSAGES, QUESTIONS, search, write_corpus

from searche1.retrieval.build import Encoding, build_index
from searche1.retrieval.recipe import choose_recipe
from searche1.types import UserError

BUILD_INDEX = Path(__file__).parents[2] / "tools" / "build_index.py"


def test_a_taken_folder_is_refused_and_a_bad_row_is_found_before_anything_is_encoded(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    with pytest.raises(UserError, match="is already there"):
        build_index(corpus, tmp_path, MINILM)
    corpus.write_text(corpus.read_text() + "{oops\n")
    with pytest.raises(UserError, match="line 6 is not valid JSON"):
        build_index(corpus, tmp_path / "index", MINILM)
    assert list(tmp_path.iterdir()) == [corpus]


def run_tool(*options: str, **popen) -> subprocess.Popen[str]:
    command = [sys.executable, str(BUILD_INDEX), "--device=cpu", "--threads=1", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)


def fingerprint(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_a_build_that_is_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(tmp_path):
    words = [f"w{i}" for i in range(500)]
    draw = random.Random(0)
    corpus = write_corpus(tmp_path / "corpus.jsonl", [" ".join(draw.choices(words, k=6)) for _ in range(1500)])
    options = [f"--corpus={corpus}", "--processes=2", "--kind=HNSW8"]
    whole = run_tool(*options, f"--out={tmp_path / 'whole'}")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    assert "recall@3" in output and "wrote" in output

    out = tmp_path / "broken"
    parts = out.with_name("broken.vectors")
    kills = 0
    for goal in (1, 3):  # parts that are done when it is killed
        process = run_tool(*options, f"--out={out}", start_new_session=True)
        while process.poll() is None and len(list(parts.glob("*.npy"))) < goal:
            time.sleep(0.01)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not out.exists()
    assert kills == 2
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    process = run_tool(*options, f"--out={out}")
    while process.poll() is None and len(list(parts.glob("*.npy"))) < 5:
        time.sleep(0.01)
    again = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert done.items() <= again.items()  # nothing is encoded twice
    assert fingerprint(out) == fingerprint(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "corpus.jsonl", "whole"]


def test_ctrl_c_stops_the_tool_with_the_way_to_go_on(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["many words " * 20] * 2000)
    process = run_tool(f"--corpus={corpus}", f"--out={tmp_path / 'index'}", start_new_session=True)
    while process.poll() is None and not list(tmp_path.glob("index.vectors/*.npy")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "stopped; the same command goes on where it is"
    assert "Traceback" not in output


def test_vectors_that_are_kept_make_other_kinds_without_encoding_and_never_another_corpus(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    kept = Encoding(choose_recipe("minilm"), vectors=tmp_path / "vectors")
    build_index(corpus, tmp_path / "flat", kept)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "vectors").glob("*.npy")}
    assert written
    build_index(corpus, tmp_path / "hnsw", kept, kind="HNSW32")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert [p.id for p in search(corpus, tmp_path / "hnsw", QUESTIONS[:1])[0]] == [
        p.id for p in search(corpus, tmp_path / "flat", QUESTIONS[:1])[0]
    ]
    assert json.loads((tmp_path / "hnsw" / "manifest.json").read_text())["recall"]["recall@3"] == 1.0
    write_corpus(corpus, PASSAGES[::-1])
    with pytest.raises(UserError, match=r"vectors of another build .*corpus_sha256"):
        build_index(corpus, tmp_path / "again", kept)


def test_the_tool_tells_wrong_options_in_one_line(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    for options, reason in (
        (["--encoder=e5", "--out=index"], "needs a style"),
        (["--kind=Fast", f"--out={tmp_path / 'index'}"], "choose Flat"),
        (["--processes=-1", "--out=index"], "--processes is -1"),
    ):
        process = run_tool(f"--corpus={corpus}", *options)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and reason in output.splitlines()[-1], output
        assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == [corpus]
