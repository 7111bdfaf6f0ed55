"""An index of words: BM25 as Lucene computes it, through bm25s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer
from bm25s.tokenization import Tokenizer

from searche1.types import UserError

K1, B = 0.9, 0.4  # Pyserini's defaults, which Search-R1's BM25 server runs with
CHUNK = 10_000  # passages tokenized at once


def build_bm25(texts: Iterable[str], folder: Path, *, progress: Callable[[int], None]) -> None:
    """Writes the index of `texts` into `folder`; `progress` is told how many are read. Raises UserError."""
    tokenizer = _make_tokenizer()
    token_ids = list(chain.from_iterable(_tokenize_in_chunks(tokenizer, iter(texts), progress)))
    if not any(token_ids):
        raise UserError("no passage of the corpus has a word to index; BM25 needs text in words of two letters or more")
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index((token_ids, tokenizer.get_vocab_dict()), show_progress=False)
    index.save(folder, show_progress=False)
    tokenizer.save_vocab(folder)


def _tokenize_in_chunks(tokenizer: Tokenizer, texts: Iterator[str], progress: Callable[[int], None]) -> Iterator[Any]:
    done = 0
    while chunk := list(islice(texts, CHUNK)):
        yield tokenizer.tokenize(chunk, update_vocab=True, show_progress=False, allow_empty=False)
        done += len(chunk)
        progress(done)


def _make_tokenizer() -> Tokenizer:
    """Words of two letters or more, lower case, without English stop words, stemmed by Porter."""
    return Tokenizer(lower=True, stopwords="english", stemmer=Stemmer.Stemmer("porter"))


class KeywordIndex:
    """A loaded index, mapped: processes share it."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder holds no index."""
        self._tokenizer = _make_tokenizer()
        try:
            self._index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
            self._tokenizer.load_vocab(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"cannot read the BM25 index {folder}: {error}; build it with tools/build_index.py"
            ) from error
        self._num_rows = int(self._index.scores["num_docs"])

    def describe(self) -> tuple[int, int]:
        """Rows, and no dimensions."""
        return self._num_rows, 0

    def search(self, queries: Sequence[str], topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and rows int64, both [n, topk], best first; row -1 where no more passages share a word."""
        scores = np.zeros((len(queries), topk), dtype=np.float32)
        rows = np.full((len(queries), topk), -1, dtype=np.int64)
        tokens = self._tokenizer.tokenize(list(queries), update_vocab=False, show_progress=False, allow_empty=False)
        asked = [number for number, ids in enumerate(tokens) if ids]
        if asked:
            most = min(topk, self._num_rows)
            found, their_scores = self._index.retrieve([tokens[i] for i in asked], k=most, show_progress=False)
            rows[asked, :most], scores[asked, :most] = found, their_scores
        rows[scores <= 0] = -1
        return scores, rows
