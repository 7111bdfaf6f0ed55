"""A cross-encoder: reads a query and a passage together and says how well they fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_ext.blas import multiply_by_openblas
from searche1.retrieval.encoder import choose_device, choose_dtype
from searche1.types import UserError

MAX_TOKENS = 512
BATCH_SIZE = 32  # pairs (Search-R1)


class Reranker:
    """A sequence classifier with one label, such as cross-encoder/ms-marco-MiniLM-L12-v2."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        """`model` is a HuggingFace folder or hub id; device and dtype are as an encoder's. Raises UserError."""
        self._device = choose_device(device)
        if self._device == "cpu":
            multiply_by_openblas()
        transformers.utils.logging.disable_progress_bar()  # loading takes a second
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=choose_dtype(dtype, self._device))
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the reranker {model!r}: {str(error).splitlines()[0]}; give a HuggingFace folder with "
                "config, tokenizer and weights, or a hub id"
            ) from error
        if loaded.config.num_labels != 1:
            raise UserError(f"the reranker {model!r} has {loaded.config.num_labels} labels; give one that has a score")
        self._model = loaded.to(self._device).eval()

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """How well each (query, passage contents) fits, float32 [n], in order."""
        scores = np.empty(len(pairs), dtype=np.float32)
        texts = [(query, titled(contents)) for query, contents in pairs]
        by_length = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))  # little padding within a batch
        for start in range(0, len(texts), BATCH_SIZE):
            rows = by_length[start : start + BATCH_SIZE]
            batch = self._tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(self._device)
            scores[rows] = self._model(**batch).logits[:, 0].float().cpu().numpy()  # [batch]
        return scores


def titled(contents: str) -> str:
    """A quoted title line and a text, as Search-R1 shows them to a cross-encoder."""
    title, _, text = contents.partition("\n")
    return f"(Title: {title}) {text}"
