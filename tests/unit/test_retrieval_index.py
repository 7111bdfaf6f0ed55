"""Index folders: what is built is found again, in every kind; a stopped build goes on to the same bytes."""

import asyncio
import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from searche1.retrieval.build import Encoding, build_index
from searche1.retrieval.index import VectorIndex, exact_neighbours, factory_string, make_index, write_index
from searche1.retrieval.local import LocalSettings, open_local
from searche1.retrieval.ranking import merge
from searche1.retrieval.recipe import choose_recipe
from searche1.types import UserError

PASSAGES = (
    '"Marie Curie"\nMarie Curie was a physicist who discovered polonium and radium.',
    '"Nile"\nThe Nile is a river in Africa that flows into the Mediterranean Sea.',
    '"Johann Wolfgang von Goethe"\nGoethe was a German poet who wrote Faust.',
    '"Mount Everest"\nMount Everest is the highest mountain on Earth, in the Himalayas.',
    '"Saturn"\nSaturn is a gas giant, a planet with prominent rings.',
)
QUESTIONS = ["Who discovered radium?", "Which planet has rings?", "Who wrote Faust?"]
MINILM = Encoding(choose_recipe("minilm"))


def write_corpus(path: Path, passages=PASSAGES) -> Path:
    path.write_text("".join(json.dumps({"id": f"p{i}", "contents": text}) + "\n" for i, text in enumerate(passages)))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A corpus and its index folder."""
    folder = tmp_path_factory.mktemp("built")
    corpus = write_corpus(folder / "corpus.jsonl")
    build_index(corpus, folder / "index", MINILM)
    return corpus, folder / "index"


def search(corpus: Path, index: Path, queries, *, topk: int = 3, **settings):
    """The answers of a `LocalSearch`, or the UserError of opening it."""

    async def story():
        local = await open_local(LocalSettings(corpus, index, device="cpu", **settings), observe=lambda *_: None)
        try:
            return await local.search(queries, topk=topk)
        finally:
            await local.close()

    return asyncio.run(story())


def test_a_question_finds_its_passage_with_id_contents_and_falling_scores(built):
    answers = search(*built, QUESTIONS)
    assert [answer[0].id for answer in answers] == ["p0", "p4", "p2"]
    assert answers[0][0].contents == PASSAGES[0]
    for answer in answers:
        assert [p.score for p in answer] == sorted((p.score for p in answer), reverse=True)


def test_missing_neighbours_are_left_out_and_never_the_last_row(built):
    answers = search(*built, ["Who wrote Faust?", "rings"], topk=9)
    assert [sorted(p.id for p in answer) for answer in answers] == [["p0", "p1", "p2", "p3", "p4"]] * 2


def test_shards_replicas_and_several_encoders_find_what_one_process_finds(built):
    whole = search(*built, QUESTIONS)
    split = search(*built, QUESTIONS, shards=2, replicas=2, encoders=2)
    assert [[p.id for p in answer] for answer in split] == [[p.id for p in answer] for answer in whole]
    np.testing.assert_allclose(
        [p.score for answer in split for p in answer], [p.score for answer in whole for p in answer], rtol=1e-5
    )


def test_the_manifest_decides_the_recipe_of_the_search(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    build_index(corpus, tmp_path / "index", Encoding(choose_recipe("minilm", "e5")))
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["recipe"]["query_prefix"] == "query: " and manifest["recipe"]["pooling"] == "mean"
    assert (manifest["kind"], manifest["dim"], manifest["num_rows"]) == ("Flat", 384, 5)
    assert manifest["versions"]["faiss-cpu"] == faiss.__version__
    with pytest.raises(UserError, match="records the encoder's style"):
        search(corpus, tmp_path / "index", QUESTIONS, style="plain")
    # The right recipe with another model, and a probe that another recipe has made.
    manifest["recipe"]["passage_prefix"] = ""
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not reproduce"):
        search(corpus, tmp_path / "index", QUESTIONS)


def test_an_index_without_its_corpus_is_refused(built, tmp_path):
    corpus, folder = built
    for passages in (PASSAGES[:4], PASSAGES[::-1]):
        with pytest.raises(UserError, match="does not match the corpus"):
            search(write_corpus(tmp_path / "other.jsonl", passages), folder, QUESTIONS)
    with pytest.raises(UserError, match="corpus not found"):
        search(tmp_path / "nowhere.jsonl", folder, QUESTIONS)
    with pytest.raises(UserError, match="index not found"):
        search(corpus, tmp_path / "nowhere", QUESTIONS)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        search(corpus, tmp_path, QUESTIONS)


def test_a_manifest_that_contradicts_its_vectors_is_refused(built, tmp_path):
    corpus, folder = built
    manifest = json.loads((folder / "manifest.json").read_text())
    fewer = faiss.IndexFlatIP(384)
    fewer.add(np.zeros((4, 384), dtype=np.float32))
    faiss.write_index(fewer, str(tmp_path / "index.faiss"))
    for changes, reason in (({}, "4 vectors but .* 5 rows"), ({"format": 0}, "format 0"), ({"x": 1}, "'x'")):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(UserError, match=reason):
            search(corpus, tmp_path, QUESTIONS)


def test_a_bare_faiss_file_needs_its_encoder_and_is_checked_against_it(built, tmp_path):
    corpus, bare = built[0], built[1] / "index.faiss"
    with pytest.raises(UserError, match="say which encoder"):
        search(corpus, bare, QUESTIONS)
    assert search(corpus, bare, QUESTIONS, encoder="minilm")[2][0].id == "p2"
    with pytest.raises(UserError, match="does not reproduce"):
        search(corpus, bare, QUESTIONS, encoder="minilm", style="e5")
    with pytest.raises(UserError, match="cannot read the FAISS index"):
        search(corpus, corpus, QUESTIONS, encoder="minilm")
    with pytest.raises(UserError, match=r"5 vectors but .* has 4 rows"):
        search(write_corpus(tmp_path / "c.jsonl", PASSAGES[:4]), bare, QUESTIONS, encoder="minilm")
    half = tmp_path / "half.index"
    half.write_bytes(bare.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot read the FAISS index"):
        search(corpus, half, QUESTIONS, encoder="minilm")


def test_an_index_of_distances_is_refused(tmp_path):
    distances = faiss.IndexFlatL2(4)
    distances.add(np.zeros((5, 4), dtype=np.float32))
    faiss.write_index(distances, str(tmp_path / "l2.index"))
    with pytest.raises(UserError, match="inner product"):
        VectorIndex(tmp_path / "l2.index", shard=(0, 1), device="cpu", effort=0)


def unit_vectors(count: int, *, dim: int = 32, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def neighbours():
    """Vectors, queries near some of them, and the exact rows."""
    vectors = unit_vectors(12_000)
    queries = vectors[:64] + 0.1 * unit_vectors(64, seed=1)
    return vectors, queries, exact_neighbours(queries, np.array_split(vectors, 7), topk=3)


def test_the_exact_neighbours_are_those_of_one_matrix_product(neighbours):
    vectors, queries, rows = neighbours
    assert (rows == np.argsort(-queries @ vectors.T, axis=1)[:, :3]).all()


@pytest.mark.parametrize(("kind", "least"), [("Flat", 1.0), ("SQfp16", 0.99), ("HNSW32", 0.95), ("IVF-PQ", 0.3)])
def test_every_kind_finds_neighbours_and_opens_mapped(neighbours, tmp_path, kind, least):
    vectors, queries, rows = neighbours
    factory = factory_string(kind, num_rows=len(vectors), dim=32)
    index = make_index(factory, dim=32, training=vectors[:10_000], use_gpu=False)
    index.add(vectors)
    write_index(index, tmp_path / "index.faiss")
    opened = VectorIndex(tmp_path / "index.faiss", shard=(0, 1), device="cpu", effort=0)
    assert opened.describe() == (12_000, 32)
    found = opened.search(queries, 3)[1]
    assert np.mean([len(set(a) & set(b)) / 3 for a, b in zip(rows, found, strict=True)]) >= least
    assert (opened.search(queries[:1], 5)[1][0, :3] == found[0]).all()


def test_effort_widens_the_search(neighbours, tmp_path):
    vectors, queries, rows = neighbours
    index = make_index(factory_string("IVF-PQ", num_rows=12_000, dim=32), dim=32, training=vectors, use_gpu=False)
    index.add(vectors)
    write_index(index, tmp_path / "ivf")

    def recall(effort: int) -> float:
        found = VectorIndex(tmp_path / "ivf", shard=(0, 1), device="cpu", effort=effort).search(queries, 3)[1]
        return float(np.mean([len(set(a) & set(b)) / 3 for a, b in zip(rows, found, strict=True)]))

    assert recall(1) < recall(128)
    write_index(make_index("Flat", dim=32, training=vectors[:0], use_gpu=False), tmp_path / "flat")
    with pytest.raises(UserError, match="searched exhaustively"):
        VectorIndex(tmp_path / "flat", shard=(0, 1), device="cpu", effort=5)


@pytest.mark.parametrize("kind", ["Flat", "SQfp16"])
def test_shards_merge_to_the_whole(neighbours, tmp_path, kind):
    vectors, queries, _ = neighbours
    index = make_index(kind, dim=32, training=vectors[:0], use_gpu=False)
    index.add(vectors)
    write_index(index, tmp_path / "index")
    whole = VectorIndex(tmp_path / "index", shard=(0, 1), device="cpu", effort=0).search(queries, 5)
    shards = [VectorIndex(tmp_path / "index", shard=(i, 5), device="cpu", effort=0) for i in range(5)]
    scores, rows = merge([shard.search(queries, 5) for shard in shards], topk=5)
    assert (rows == whole[1]).all()
    np.testing.assert_allclose(scores, whole[0], rtol=1e-5)


def test_a_kind_that_cannot_be_is_refused_with_what_can(tmp_path):
    for kind, rows, dim, reason in (
        ("IVF4,Flat", 5, 8, "choose Flat"),
        ("IVF-PQ", 9_999, 8, "10,000 passages"),
        ("IVF-PQ", 20_000, 12, "multiple of 8"),
    ):
        with pytest.raises(UserError, match=reason):
            factory_string(kind, num_rows=rows, dim=dim)
    assert factory_string("IVF-PQ", num_rows=21_015_324, dim=768) == "IVF16384,PQ96"
    with pytest.raises(UserError, match="sees no GPU"):
        VectorIndex(_write_tiny(tmp_path / "tiny"), shard=(0, 1), device="cuda", effort=0)


def _write_tiny(path: Path) -> Path:
    index = make_index("HNSW8", dim=8, training=np.empty((0, 8), np.float32), use_gpu=False)
    index.add(unit_vectors(20, dim=8))
    write_index(index, path)
    with pytest.raises(UserError, match="only Flat and SQfp16"):
        VectorIndex(path, shard=(0, 2), device="cpu", effort=0)
    return path
