"""The keyword index: scores by the formula, what it leaves out, and a folder that is built, served and refused."""

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from searche1.retrieval.bm25 import KeywordIndex, build_bm25
from searche1.retrieval.build import build_keyword_index
from searche1.retrieval.local import LocalSettings, open_local
from searche1.types import UserError

TEXTS = (
    "Goethe wrote Faust, a tragedy. Faust is long.",
    "The Nile is a river in Africa.",
    "Rivers of Africa: the Nile and the Congo.",
    "Saturn has rings.",
    "the of and",
    "",
)
BUILD_INDEX = Path(__file__).parents[2] / "tools" / "build_index.py"


def write_corpus(path: Path) -> Path:
    path.write_text("".join(json.dumps({"id": f"p{i}", "contents": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> KeywordIndex:
    folder = tmp_path_factory.mktemp("bm25")
    build_bm25(TEXTS, folder, progress=lambda _: None)
    return KeywordIndex(folder)


def test_scores_are_lucenes_bm25_with_pyserinis_constants(index):
    """One word: idf * tf / (tf + k1 * (1 - b + b * length / mean length)), lengths without stop words."""
    lengths = [6, 3, 4, 3, 0, 0]  # "has" counts: Lucene's list of stop words is short
    idf = math.log(1 + (6 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 2 / (2 + 0.9 * (1 - 0.4 + 0.4 * lengths[0] / (sum(lengths) / 6)))
    scores, rows = index.search(["faust"], 3)
    assert rows.tolist() == [[0, -1, -1]]
    assert scores[0, 0] == pytest.approx(expected, rel=1e-5)


def test_words_are_stemmed_and_more_shared_words_rank_higher(index):
    _, rows = index.search(["the rivers of africa and the congo", "who was writing about a RIVER"], 3)
    assert rows.tolist() == [[2, 1, -1], [1, 2, -1]]


def test_a_query_without_a_known_word_finds_nothing(index):
    scores, rows = index.search(["the", "", "unheard"], 2)
    assert (rows == -1).all() and (scores == 0).all()
    assert index.search([], 2)[1].shape == (0, 2)
    assert index.search(["nile"], 50)[1].shape == (1, 50)


def test_equal_passages_come_in_the_corpuss_order_however_many_are_asked_for(tmp_path):
    build_bm25(["a red boat", "the blue boat", "a red car"] * 500, tmp_path, progress=lambda _: None)
    red = [row for row in range(1500) if row % 3 != 1]
    for topk in (1, 3, 10, 400):
        assert KeywordIndex(tmp_path).search(["RED"], topk)[1].tolist() == [red[:topk]]


def test_a_passage_is_what_a_query_of_its_own_words_finds(index):
    _, rows = index.search(TEXTS[:4], 1)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]


def test_the_same_corpus_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        build_bm25(iter(TEXTS), tmp_path / name, progress=lambda _: None)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_corpus_without_words_and_a_folder_without_an_index_are_refused(tmp_path):
    with pytest.raises(UserError, match="no passage of the corpus has a word"):
        build_bm25(["", "the"], tmp_path / "index", progress=lambda _: None)
    with pytest.raises(UserError, match="cannot read the BM25 index"):
        KeywordIndex(tmp_path)


def test_the_tool_builds_a_folder_that_is_searched_without_an_encoder(tmp_path):
    corpus, folder = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "index"
    command = [sys.executable, str(BUILD_INDEX), f"--corpus={corpus}", f"--out={folder}", "--kind=BM25"]
    assert "wrote" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["recipe"], manifest["num_rows"]) == ("BM25", None, 6)

    async def story(**settings):
        local = await open_local(LocalSettings(corpus, folder, **settings), observe=lambda *_: None)
        try:
            return local.description, await local.search(["rivers of the congo", "the"], topk=3)
        finally:
            await local.close()

    description, (rivers, nothing) = asyncio.run(story(replicas=2))
    assert description == f"BM25 index of 6 passages from {corpus}"
    assert [p.id for p in rivers] == ["p2", "p1"] and rivers[0].contents == TEXTS[2]
    assert np.isfinite(rivers[0].score) and nothing == ()
    with pytest.raises(UserError, match="is a BM25 index, which has none"):
        asyncio.run(story(effort=3))
    corpus.write_text(corpus.read_text().replace("Nile", "Rhine"))
    with pytest.raises(UserError, match="does not match the corpus"):
        asyncio.run(story())
    with pytest.raises(UserError, match="already there"):
        build_keyword_index(corpus, folder)
