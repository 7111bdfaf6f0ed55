"""Putting the results of several searches together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from searche1.retrieval.client import Passage


def merge(parts: list[tuple[np.ndarray, np.ndarray]], *, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """The best of several searches of the same queries: scores and rows [n, <= topk], ties to the lower row."""
    scores = np.concatenate([part[0] for part in parts], axis=1)
    rows = np.concatenate([part[1] for part in parts], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :topk]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def rerank(passages: Sequence[Passage], scores: Sequence[float], *, topk: int) -> tuple[Passage, ...]:
    """The `topk` passages with the best new scores, best first; equal ones keep their order."""
    ranked = sorted(zip(passages, scores, strict=True), key=lambda pair: -pair[1])
    return tuple(replace(passage, score=score) for passage, score in ranked[:topk])
