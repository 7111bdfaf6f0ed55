"""The cross-encoder, and a search that goes through it."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from searche1.retrieval.backend import SearchFault
from searche1.retrieval.client import Passage
from searche1.retrieval.ranking import rerank
from searche1.retrieval.reranker import Reranker, titled
from searche1.retrieval.reranking import RerankSettings, open_reranked
from searche1.types import UserError

WORDS = ["title", "(", ")", ":", '"', "who", "wrote", "faust", "goethe", "was", "a", "poet", "river", "planet"]


def make_model(folder: Path, *, labels: int = 1) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(WORDS) + 5, num_labels=labels, initializer_range=0.5, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("reranker") / "model")


PASSAGES = tuple(
    Passage(f"p{i}", f'"Title {i}"\n' + text, 1.0 - i / 10)
    for i, text in enumerate(["goethe was a poet", "a river", "a planet " * 90, "who wrote faust", "was"])
)


def by_hand(folder: Path, query: str, contents: str) -> float:
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    batch = tokenizer(query, titled(contents), truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        return float(BertForSequenceClassification.from_pretrained(folder).eval()(**batch).logits[0, 0])


def test_the_cross_encoder_sees_a_title_as_search_r1_writes_it():
    assert titled('"Goethe"\nwas a poet.\nHe wrote.') == '(Title: "Goethe") was a poet.\nHe wrote.'
    assert titled("no title") == "(Title: no title) "


def test_a_batch_of_pairs_has_the_scores_of_each_pair_alone(model):
    pairs = [("who wrote faust", p.contents) for p in PASSAGES] + [("river " * 600, PASSAGES[0].contents)]
    scores = Reranker(str(model), "cpu", "auto").score(pairs)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [by_hand(model, *pair) for pair in pairs], atol=1e-5)
    assert np.ptp(scores) > 0.01


def test_ranking_is_stable_and_carries_the_new_scores():
    ranked = rerank(PASSAGES, [0.0, 2.0, 2.0, -1.0, 3.0], topk=4)
    assert [(p.id, p.score) for p in ranked] == [("p4", 3.0), ("p1", 2.0), ("p2", 2.0), ("p0", 0.0)]
    assert rerank((), [], topk=3) == ()


def test_what_has_no_single_score_is_refused(tmp_path):
    with pytest.raises(UserError, match="has 2 labels"):
        Reranker(str(make_model(tmp_path / "two", labels=2)), "cpu", "auto")
    with pytest.raises(UserError, match="cannot load the reranker"):
        Reranker(str(tmp_path), "cpu", "auto")


class Shelf:
    """A backend with five passages, nothing, or a fault."""

    description = "a shelf"
    asked: list[int]

    def __init__(self) -> None:
        self.asked = []

    async def search(self, queries, *, topk):
        self.asked.append(topk)
        special = {"nothing": (), "broken": SearchFault("broken!", is_passing=False)}
        return [special.get(query, PASSAGES[:topk]) for query in queries]

    def fault(self) -> str:
        return ""

    async def close(self) -> None:
        pass


def test_a_search_gives_the_best_candidates_and_leaves_faults_and_nothing_as_they_are(model):
    async def story():
        shelf = Shelf()
        settings = RerankSettings(str(model), candidates=5, device="cpu")
        search = await open_reranked(shelf, settings, observe=lambda *_: None)
        assert "reranked by" in search.description
        try:
            return shelf.asked, await search.search(["who wrote faust", "nothing", "broken", "a river"], topk=2)
        finally:
            await search.close()

    asked, (faust, nothing, broken, river) = asyncio.run(story())
    assert asked == [5]
    for query, answer in (("who wrote faust", faust), ("a river", river)):
        expected = sorted(PASSAGES, key=lambda p: -by_hand(model, query, p.contents))[:2]
        assert [p.id for p in answer] == [p.id for p in expected]
        assert answer[0].score == pytest.approx(by_hand(model, query, answer[0].contents), abs=1e-5)
    assert nothing == () and str(broken) == "broken!"
