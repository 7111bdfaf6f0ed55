"""Encoders: prefixes, pooling, length and norm, against a hand-made forward pass and against sentence-transformers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from searche1.retrieval.encoder import Encoder, load_encoder
from searche1.retrieval.recipe import Recipe, choose_recipe
from searche1.types import UserError

DATA = Path(__file__).parents[1] / "data"
WORDS = ["query", "passage", ":", "who", "was", "the", "king", "of", "a", "big", "river", "mountain"]
TEXTS = ["who was the king", "a river", "", "the king of a big river was the mountain of the king", "unknown words"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny random BERT, as a HuggingFace folder."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(WORDS) + 5, **sizes)).save_pretrained(folder)
    return folder


def by_hand(folder: Path, text: str, pooling: str, *, max_tokens: int = 256) -> np.ndarray:
    """One text, alone and without padding: tokens, forward pass, pooling, norm."""
    ids = BertTokenizerFast.from_pretrained(folder)(text)["input_ids"]
    if len(ids) > max_tokens:
        ids = [*ids[: max_tokens - 1], ids[-1]]
    with torch.no_grad():
        hidden = BertModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0]
    pooled = {
        "mean": hidden.mean(dim=0),
        "cls": hidden[0],
        "max": hidden.max(dim=0).values,
        "mean_sqrt_len_tokens": hidden.sum(dim=0) / len(ids) ** 0.5,
        "lasttoken": hidden[-1],
    }[pooling]
    return (pooled / pooled.norm()).numpy()


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_e5_is_prefix_masked_mean_and_norm(bert, kind):
    encoder = load_encoder(str(bert), "cpu", style="e5")
    expected = np.stack([by_hand(bert, f"{kind}: {text}", "mean") for text in TEXTS])
    vectors = encoder.encode(TEXTS, kind=kind)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_bge_instructs_queries_only_and_takes_the_first_token(bert):
    encoder = load_encoder(str(bert), "cpu", style="bge")
    instruction = "Represent this sentence for searching relevant passages: "
    np.testing.assert_allclose(
        encoder.encode(TEXTS, kind="query"),
        np.stack([by_hand(bert, instruction + text, "cls") for text in TEXTS]),
        atol=2e-6,
    )
    np.testing.assert_allclose(
        encoder.encode(TEXTS, kind="passage"), np.stack([by_hand(bert, text, "cls") for text in TEXTS]), atol=2e-6
    )


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "mean_sqrt_len_tokens", "lasttoken"])
def test_padding_changes_no_pooling(bert, pooling):
    encoder = Encoder(Recipe(str(bert), pooling, query_prefix="", passage_prefix=""), "cpu")
    expected = np.stack([by_hand(bert, text, pooling) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS, kind="query"), expected, atol=2e-6)


def test_only_the_first_256_tokens_count(bert):
    encoder = load_encoder(str(bert), "cpu", style="plain")
    long = "king river " * 200
    np.testing.assert_allclose(encoder.encode([long], kind="passage")[0], by_hand(bert, long, "mean"), atol=2e-6)
    other_end = encoder.encode(["king river " * 127 + "mountain " * 50], kind="passage")
    np.testing.assert_allclose(other_end, encoder.encode([long], kind="passage"), atol=2e-6)


def test_vectors_have_length_one_and_keep_the_order_of_any_number_of_texts(bert):
    encoder = load_encoder(str(bert), "cpu", style="plain")
    many = [" ".join(WORDS[i % 7 : i % 7 + i % 5]) for i in range(1500)]
    together = encoder.encode(many, kind="passage")
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    alone = np.concatenate([encoder.encode([text], kind="passage") for text in many[:40]])
    np.testing.assert_allclose(together[:40], alone, atol=2e-6)
    assert (encoder.encode(many, kind="passage") == together).all()
    assert encoder.encode([], kind="query").shape == (0, 32)


def test_minilm_equals_sentence_transformers():
    recorded = np.load(DATA / "sentence_vectors.npz")
    vectors = load_encoder("minilm", "cpu").encode(recorded["texts"].tolist(), kind="passage")
    np.testing.assert_allclose(vectors, recorded["minilm"], atol=1e-5)


def test_a_sentence_transformers_folder_is_followed_with_its_prompts_pooling_and_dense_layer():
    folder = DATA / "tiny_sentence_encoder"
    encoder = load_encoder(str(folder), "cpu", style="sentence-transformers")
    recipe = encoder.recipe
    assert (recipe.query_prefix, recipe.passage_prefix, recipe.pooling) == ("who wrote ", "the ", "cls")
    assert (recipe.max_tokens, recipe.dense) == (24, ("2_Dense",))
    texts = np.load(DATA / "sentence_vectors.npz")["texts"].tolist()
    recorded = np.load(folder / "vectors.npz")
    for kind in ("query", "passage"):
        np.testing.assert_allclose(encoder.encode(texts, kind=kind), recorded[kind], atol=1e-5)
    assert encoder.encode([], kind="query").shape == (0, 20)


def test_the_older_form_of_a_sentence_transformers_folder_is_read(bert, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(bert, folder)
    types = {"": "models.Transformer", "1_Pooling": "models.Pooling", "2_Normalize": "models.Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.{name}"} for path, name in types.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 7, "do_lower_case": true}')
    recipe = choose_recipe(str(folder), "sentence-transformers")
    assert recipe == Recipe(str(folder), "mean", "", "", max_tokens=7, lower_case=True)
    text = "WHO was the king of a big river"
    vector = Encoder(recipe, "cpu").encode([text], kind="query")[0]
    np.testing.assert_allclose(vector, by_hand(bert, text.lower(), "mean", max_tokens=7), atol=2e-6)

    pooling["pooling_mode_max_tokens"] = True
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(UserError, match="which cannot be done"):
        choose_recipe(str(folder), "sentence-transformers")
    modules[1]["type"] = "sentence_transformers.models.LSTM"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="which cannot be run"):
        choose_recipe(str(folder), "sentence-transformers")


def test_prefixes_are_not_guessed_from_an_encoders_name():
    with pytest.raises(UserError, match=r"needs a style.*E5's own folders do not tell their prefixes"):
        choose_recipe("intfloat/e5-base-v2")
    assert choose_recipe("intfloat/e5-base-v2", "e5").passage_prefix == "passage: "
    with pytest.raises(UserError, match="encoder style is 'e6'; choose e5"):
        choose_recipe("minilm", "e6")
    with pytest.raises(UserError, match=r"has no modules\.json"):
        choose_recipe("nowhere", "sentence-transformers")


def test_a_folder_without_an_encoder_and_settings_that_cannot_work_are_refused(bert, tmp_path):
    with pytest.raises(UserError, match="cannot load the encoder"):
        load_encoder(str(tmp_path), "cpu", style="plain")
    recipe = choose_recipe(str(bert), "plain")
    with pytest.raises(UserError, match="choose float32 or bfloat16"):
        Encoder(recipe, "cpu", "float16")
    with pytest.raises(UserError, match="dtype is 'half'"):
        Encoder(recipe, "cpu", "half")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU"):
            Encoder(recipe, "cuda:0")


def test_bfloat16_is_near_enough_for_an_index_of_float32(bert):
    recipe = choose_recipe(str(bert), "e5")
    exact = Encoder(recipe, "cpu").encode(TEXTS, kind="passage")
    rounded = Encoder(recipe, "cpu", "bfloat16").encode(TEXTS, kind="passage")
    assert 0.999 < (exact * rounded).sum(axis=1).min() < 1.0


def test_a_batch_that_does_not_fit_is_split_and_a_text_that_does_not_is_told(bert, monkeypatch):
    encoder = Encoder(replace(choose_recipe(str(bert), "plain"), max_tokens=64), "cpu")
    expected = encoder.encode(TEXTS, kind="query")
    forward, room = encoder._model.forward, 20

    def small_memory(input_ids, attention_mask):
        if input_ids.numel() > room:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(encoder._model, "forward", small_memory)
    np.testing.assert_allclose(encoder.encode(TEXTS, kind="query"), expected, atol=2e-6)
    room = 4
    with pytest.raises(UserError, match="does not suffice to encode a single text"):
        encoder.encode(TEXTS, kind="query")
