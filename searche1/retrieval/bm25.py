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
STOP_WORDS, STEMMER = "english", "porter"
CHUNK = 10_000  # passages tokenized at once


def build_bm25(texts: Iterable[str], folder: Path, *, progress: Callable[[int], None]) -> None:
    """Writes the index of `texts` into `folder`; `progress` is told how many are read. Raises UserError."""
    tokenizer = Tokenizer(lower=True, stopwords=STOP_WORDS, stemmer=Stemmer.Stemmer(STEMMER))
    token_ids = list(chain.from_iterable(_tokenize_in_chunks(tokenizer, iter(texts), progress)))
    if not any(token_ids):
        raise UserError("no passage of the corpus has a word to index; BM25 needs text in words of two letters or more")
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index((token_ids, tokenizer.get_vocab_dict()), show_progress=False)
    index.save(folder, show_progress=False)


def _tokenize_in_chunks(tokenizer: Tokenizer, texts: Iterator[str], progress: Callable[[int], None]) -> Iterator[Any]:
    done = 0
    while chunk := list(islice(texts, CHUNK)):
        yield tokenizer.tokenize(chunk, update_vocab=True, show_progress=False, allow_empty=False)
        done += len(chunk)
        progress(done)


def _stems(queries: Sequence[str]) -> list[list[str]]:
    """What `build_bm25` makes of a text: words of two letters or more, lower case, no stop words, stemmed.

    Not by bm25s's Tokenizer, which remembers every word it is ever asked for.
    """
    stemmer = Stemmer.Stemmer(STEMMER)
    stems: list[list[str]] = bm25s.tokenize(
        list(queries), lower=True, stopwords=STOP_WORDS, stemmer=stemmer, return_ids=False, show_progress=False
    )
    return stems


class KeywordIndex:
    """A loaded index, mapped: processes share it."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder holds no index."""
        try:
            self._index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
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
        for number, stems in enumerate(_stems(queries)):
            if known := self._index.get_tokens_ids(stems):
                of_all = self._index.get_scores_from_ids(known)  # [rows of the index]
                best = _best(of_all, topk)
                rows[number, : len(best)], scores[number, : len(best)] = best, of_all[best]
        return scores, rows


def _best(scores: np.ndarray, topk: int) -> np.ndarray:
    """The rows with a score, best first, equal scores in the corpus's order as in Lucene.

    bm25s leaves the order of equal scores to `argpartition`: another processor or `topk` gives other passages.
    """
    rows = np.flatnonzero(scores > 0)
    if len(rows) > topk:
        least = np.partition(scores[rows], -topk)[-topk]
        rows = rows[scores[rows] >= least]
    return rows[np.argsort(-scores[rows], kind="stable")][:topk]
