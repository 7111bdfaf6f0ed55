"""Corpus, encoder and index: what is built is found again, and what does not belong together is refused."""

import gzip
import json
import runpy
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from searche1.retrieval.encoder import Encoder, choose_recipe, load_encoder
from searche1.retrieval.index import Corpus, build_index, check_encoder, load_index, search_passages
from searche1.types import UserError

PASSAGES = (
    '"Marie Curie"\nMarie Curie was a physicist who discovered polonium and radium.',
    '"Nile"\nThe Nile is a river in Africa that flows into the Mediterranean Sea.',
    '"Johann Wolfgang von Goethe"\nGoethe was a German poet who wrote Faust.',
    '"Mount Everest"\nMount Everest is the highest mountain on Earth, in the Himalayas.',
    '"Saturn"\nSaturn is a gas giant, a planet with prominent rings.',
)
BUILD_INDEX = Path(__file__).parents[2] / "tools" / "build_index.py"


def write_corpus(path: Path, passages=PASSAGES) -> Path:
    rows = "".join(json.dumps({"id": f"p{i}", "contents": text}) + "\n" for i, text in enumerate(passages))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(rows.encode()))
    else:
        path.write_text(rows)
    return path


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_encoder("minilm", "cpu")


@pytest.fixture(scope="module")
def built(minilm, tmp_path_factory) -> tuple[Path, Path]:
    """An index folder and its corpus."""
    folder = tmp_path_factory.mktemp("built")
    corpus = write_corpus(folder / "corpus.jsonl")
    build_index(corpus=corpus, out=folder / "index", encoder=minilm)
    return folder / "index", corpus


def test_a_question_finds_its_passage_with_id_contents_and_falling_scores(built, minilm):
    index = load_index(*built)
    questions = ["Who discovered radium?", "Which planet has rings?", "Who wrote Faust?"]
    answers = search_passages(index, minilm, questions, topk=3)
    assert [answer[0].id for answer in answers] == ["p0", "p4", "p2"]
    assert answers[0][0].contents == PASSAGES[0]
    for answer in answers:
        assert [p.score for p in answer] == sorted((p.score for p in answer), reverse=True)


def test_vectors_have_length_one_and_keep_the_order_of_the_texts(minilm):
    texts = [*PASSAGES, "x", "word " * 1000]
    together = minilm.encode(texts, kind="passage")
    assert together.dtype == np.float32 and together.shape == (7, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    alone = np.concatenate([minilm.encode([text], kind="passage") for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert minilm.encode([], kind="query").shape == (0, 384)


def test_only_the_first_256_tokens_count(minilm):
    a, b = minilm.encode(["river " * 254 + "mountain " * 50, "river " * 254 + "planet " * 50], kind="passage")
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_prefixes_are_applied_by_kind(minilm):
    e5 = load_encoder("minilm", "cpu", style="e5")
    for kind in ("query", "passage"):
        plain = minilm.encode([f"{kind}: {PASSAGES[0]}"], kind=kind)
        np.testing.assert_allclose(e5.encode([PASSAGES[0]], kind=kind), plain, atol=1e-5)


def test_cls_pooling_takes_the_first_token(minilm):
    cls = Encoder(replace(minilm.recipe, pooling="cls"), "cpu")
    batch = cls._tokenizer([PASSAGES[1]], return_tensors="pt")
    first = cls._model(**batch).last_hidden_state[0, 0].detach().numpy()
    np.testing.assert_allclose(cls.encode([PASSAGES[1]], kind="passage")[0], first / np.linalg.norm(first), atol=1e-5)


def test_prefixes_are_not_guessed_from_an_encoders_name():
    with pytest.raises(UserError, match="needs a style"):
        choose_recipe("intfloat/e5-base-v2")
    assert choose_recipe("intfloat/e5-base-v2", "e5").passage_prefix == "passage: "
    with pytest.raises(UserError, match="choose e5, bge or plain"):
        choose_recipe("minilm", "e6")


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot load the encoder"):
        load_encoder(str(tmp_path), "cpu", style="plain")


def test_the_manifest_decides_the_recipe_of_the_search(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    build_index(corpus=corpus, out=tmp_path / "index", encoder=load_encoder("minilm", "cpu", style="e5"))
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["recipe"]["query_prefix"] == "query: " and manifest["recipe"]["pooling"] == "mean"
    assert (manifest["kind"], manifest["dim"], manifest["num_rows"]) == ("Flat", 384, 5)
    assert load_index(tmp_path / "index", corpus).recipe.passage_prefix == "passage: "
    with pytest.raises(UserError, match="records the encoder's style"):
        load_index(tmp_path / "index", corpus, style="plain")


def test_an_index_without_its_corpus_is_refused(built, tmp_path):
    folder, corpus = built
    with pytest.raises(UserError, match="does not match the corpus"):
        load_index(folder, write_corpus(tmp_path / "fewer.jsonl", PASSAGES[:4]))
    with pytest.raises(UserError, match="does not match the corpus"):
        load_index(folder, write_corpus(tmp_path / "swapped.jsonl", PASSAGES[::-1]))
    with pytest.raises(UserError, match="corpus not found"):
        load_index(folder, tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="index not found"):
        load_index(tmp_path / "nowhere", corpus)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        load_index(tmp_path, corpus)


def test_a_manifest_that_contradicts_its_vectors_is_refused(built, tmp_path):
    folder, corpus = built
    (tmp_path / "index.faiss").write_bytes((folder / "index.faiss").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    for changes, reason in (({"dim": 768}, "its manifest says 5 of 768"), ({"format": 0}, "format 0"), ({"x": 1}, "x")):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(UserError, match=reason):
            load_index(tmp_path, corpus)


def test_a_bare_faiss_file_needs_its_encoder_and_is_checked_against_it(built, minilm):
    folder, corpus = built
    bare = folder / "index.faiss"
    with pytest.raises(UserError, match="say which encoder"):
        load_index(bare, corpus)
    index = load_index(bare, corpus, encoder="minilm")
    check_encoder(index, minilm)
    assert search_passages(index, minilm, ["Who wrote Faust?"], topk=1)[0][0].id == "p2"
    with pytest.raises(UserError, match="does not reproduce"):
        check_encoder(index, load_encoder("minilm", "cpu", style="e5"))
    with pytest.raises(UserError, match="cannot read the FAISS index"):
        load_index(corpus, corpus, encoder="minilm")


def test_a_bare_faiss_file_of_another_corpus_is_refused(built, tmp_path):
    with pytest.raises(UserError, match=r"5 vectors but .* has 4 rows"):
        load_index(built[0] / "index.faiss", write_corpus(tmp_path / "c.jsonl", PASSAGES[:4]), encoder="minilm")


def test_an_index_of_distances_is_refused(built, tmp_path):
    distances = faiss.IndexFlatL2(384)
    distances.add(np.zeros((5, 384), dtype=np.float32))
    faiss.write_index(distances, str(tmp_path / "l2.index"))
    with pytest.raises(UserError, match="inner product"):
        load_index(tmp_path / "l2.index", built[1], encoder="minilm")


def test_missing_neighbours_are_left_out_and_never_the_last_row(built, minilm):
    index = load_index(*built)
    raw = index.faiss_index.search(minilm.encode(["a"], kind="query"), 9)[1]
    assert (raw[0, 5:] == -1).all()
    answers = search_passages(index, minilm, ["Who wrote Faust?", "rings"], topk=9)
    assert [sorted(p.id for p in answer) for answer in answers] == [["p0", "p1", "p2", "p3", "p4"]] * 2


def test_an_hnsw_index_finds_what_the_exact_one_finds(built, minilm, tmp_path):
    folder, corpus = built
    build_index(corpus=corpus, out=tmp_path / "hnsw", encoder=minilm, kind="HNSW64")
    approximate = load_index(tmp_path / "hnsw", corpus)
    check_encoder(approximate, minilm)
    assert approximate.faiss_index.hnsw.efSearch == 128
    queries = ["Who discovered radium?", "the highest mountain"]
    exact = search_passages(load_index(folder, corpus), minilm, queries, topk=3)
    found = search_passages(approximate, minilm, queries, topk=3)
    assert [[p.id for p in a] for a in found] == [[p.id for p in a] for a in exact]


def test_a_compressed_corpus_is_the_same_corpus(built, tmp_path):
    compressed = Corpus(write_corpus(tmp_path / "corpus.jsonl.gz"))
    plain = Corpus(built[1])
    assert [compressed[i] for i in range(len(compressed))] == [plain[i] for i in range(len(plain))]
    assert len(load_index(built[0], compressed.path).corpus) == 5


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
        ('["p1", "x"]', "line 2: needed an object"),
        ('{"id": "p1", "text": "x"}', "line 2: the key 'contents' is missing; it has"),
        ('{"contents": "x"}', "line 2: the key 'id' is missing"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_leaves_no_index(tmp_path, minilm, second_line, reason):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "p0", "contents": "x"}\n' + second_line + "\n")
    with pytest.raises(UserError, match=reason):
        build_index(corpus=corpus, out=tmp_path / "index", encoder=minilm)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_an_empty_corpus_a_taken_folder_and_an_unknown_kind_are_refused(built, minilm, tmp_path):
    folder, corpus = built
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is empty"):
        build_index(corpus=tmp_path / "empty.jsonl", out=tmp_path / "index", encoder=minilm)
    with pytest.raises(UserError, match="is already there"):
        build_index(corpus=corpus, out=folder, encoder=minilm)
    with pytest.raises(UserError, match="choose Flat"):
        build_index(corpus=corpus, out=tmp_path / "index", encoder=minilm, kind="IVF4,Flat")


def test_the_tool_builds_an_index_and_reports_progress_and_errors(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build_index", f"--corpus={built[1]}", f"--out={tmp_path / 'index'}"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(BUILD_INDEX), run_name="__main__")
    assert "5 / 5 passages" in capsys.readouterr().out
    assert (tmp_path / "index" / "manifest.json").read_text() == (built[0] / "manifest.json").read_text()
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(BUILD_INDEX), run_name="__main__")
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
