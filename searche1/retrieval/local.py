"""Searching a corpus of our own: encoder processes, index processes, and passages read from disk. Imports no torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from searche1.progress import Report
from searche1.retrieval.backend import Answer, SearchFault, in_halves
from searche1.retrieval.client import Passage
from searche1.retrieval.corpus import Corpus
from searche1.retrieval.manifest import INDEX_FILE, KEYWORD_FOLDER, PROBE_FILE, check_corpus, read_manifest
from searche1.retrieval.ranking import merge
from searche1.retrieval.recipe import Recipe, choose_recipe
from searche1.retrieval.workers import Pool
from searche1.types import UserError

PROBE_ROWS = 8
MIN_PROBE_SIMILARITY = 0.999  # float16 stays above it; a missing prefix or another pooling does not

Observe = Callable[[str, float], None]  # told the seconds that a stage of a search took


@dataclass(frozen=True)
class LocalSettings:
    """What is searched, and by how many processes.

    `index` is a folder of tools/build_index.py, which carries its recipe: `encoder` then only says where the same
    encoder lies now. A bare FAISS file, such as Search-R1's e5_Flat.index, carries none: `encoder` and `style` must
    tell it. `encoders` processes encode queries, on the GPUs in turn if there are any. The index is split over
    `shards`, each of them in `replicas` processes.
    """

    corpus: Path
    index: Path
    encoder: str = ""
    style: str = ""
    device: str = "auto"
    dtype: str = "auto"
    encoders: int = 1
    shards: int = 1
    replicas: int = 1
    index_device: str = "cpu"  # "cpu", or "cuda": all GPUs, in float16
    effort: int = 0  # HNSW's efSearch or IVF's nprobe; 0 keeps the index's own
    timeout_s: float = 300.0  # a process that computes longer is ended and started again


async def open_local(settings: LocalSettings, *, observe: Observe) -> LocalSearch:
    """Opens corpus, index and encoder side by side; call it from the main thread, whose end ends the processes.

    Raises UserError if one of them cannot be opened, or they do not belong together.
    """
    recipe, kind = _recipe_and_kind(settings)
    encoders = None if recipe is None else _encoder_pool(settings, recipe)
    shards = _keyword_pools(settings) if recipe is None else _vector_pools(settings)
    pools = [*([encoders] if encoders else []), *shards]
    reading = asyncio.to_thread(Corpus, settings.corpus, progress=Report("reading the corpus", unit="bytes"))
    try:
        corpus, *_ = await together(reading, *(pool.start() for pool in pools))
        if recipe is None or encoders is None:
            await _check_rows(settings, corpus, shards[0])
        else:
            await _check_vectors(settings, corpus, shards[0], encoders, recipe)
    except BaseException as error:
        await asyncio.gather(*(pool.close() for pool in pools))
        if isinstance(error, SearchFault):
            raise UserError(str(error)) from error
        raise
    description = f"{kind} index of {len(corpus):,} passages from {settings.corpus}"
    return LocalSearch(corpus, encoders, shards, description=description, observe=observe)


class LocalSearch:
    """A `Backend` over one corpus."""

    def __init__(
        self, corpus: Corpus, encoders: Pool | None, shards: Sequence[Pool], *, description: str, observe: Observe
    ) -> None:
        """A keyword index has no `encoders`; everything is started already."""
        self.description = description
        self.pools = [*([encoders] if encoders else []), *shards]
        self._corpus = corpus
        self._encoders = encoders
        self._shards = shards
        self._observe = observe

    async def search(self, queries: Sequence[str], *, topk: int) -> list[Answer]:
        """See `Backend`."""
        return await in_halves(lambda asked: self._search(asked, topk), queries)

    def fault(self) -> str:
        """See `Backend`."""
        return next((pool.fault() for pool in self.pools if pool.fault()), "")

    async def close(self) -> None:
        """Ends the processes and closes the corpus."""
        await asyncio.gather(*(pool.close() for pool in self.pools))
        self._corpus.close()

    async def _search(self, queries: Sequence[str], topk: int) -> list[tuple[Passage, ...]]:
        asked: Any = list(queries)
        if self._encoders is not None:
            asked = await self._timed("encode", self._encoders.call("encode", asked, kind="query"))
        parts = await self._timed(
            "search", asyncio.gather(*(pool.call("search", asked, topk) for pool in self._shards))
        )
        scores, rows = parts[0] if len(parts) == 1 else merge(parts, topk=topk)
        return await self._timed("read", asyncio.to_thread(self._read, scores, rows))

    def _read(self, scores: np.ndarray, rows: np.ndarray) -> list[tuple[Passage, ...]]:
        """Passages of scores and rows [n, topk]. FAISS fills what it does not find with -1: the corpus's last row."""
        try:
            texts = {row: self._corpus[row] for row in np.unique(rows).tolist() if row >= 0}
        except UserError as error:
            raise SearchFault(str(error), is_passing=False) from error
        return [
            tuple(Passage(*texts[row], score=score) for score, row in zip(*found, strict=True) if row >= 0)
            for found in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    async def _timed(self, stage: str, work: Any) -> Any:
        started = time.perf_counter()
        result = await work
        self._observe(stage, time.perf_counter() - started)
        return result


async def _check_rows(settings: LocalSettings, corpus: Corpus, index: Pool) -> int:
    """Raises UserError unless the index is of this corpus, as far as numbers tell. Returns its dimensions."""
    if settings.index.is_dir():
        check_corpus(read_manifest(settings.index), settings.index, corpus)
    num_rows, dim = await index.call("describe")
    if num_rows != len(corpus):
        raise UserError(
            f"the index {settings.index} has {num_rows} vectors but {settings.corpus} has {len(corpus)} rows; "
            "give the corpus it was built from, or build it again with tools/build_index.py"
        )
    return int(dim)


async def _check_vectors(settings: LocalSettings, corpus: Corpus, index: Pool, encoders: Pool, recipe: Recipe) -> None:
    """Encodes a few passages again: another model, prefix, pooling or row order gives other vectors."""
    dim = await _check_rows(settings, corpus, index)
    probe = settings.index / PROBE_FILE
    if probe.is_file():  # of a compressed index, which would not give its vectors back as they were
        rows, stored = probe_rows(len(corpus)), np.load(probe)
    else:
        rows = list(range(min(PROBE_ROWS, len(corpus) // settings.shards)))
        stored = await index.call("vectors", rows)
    again = await encoders.call("encode", [corpus[row][1] for row in rows], kind="passage")
    if again.shape[1] != dim:
        raise UserError(
            f"the encoder {recipe.encoder!r} makes {again.shape[1]} dimensions but the index has {dim}; "
            "give the encoder that built the index"
        )
    similarity = float((stored * again).sum(axis=1).min())
    if similarity < MIN_PROBE_SIMILARITY:
        raise UserError(
            f"the encoder {recipe.encoder!r} does not reproduce the index's vectors of {len(rows)} passages "
            f"(cosine {similarity:.4f}, needed {MIN_PROBE_SIMILARITY}); give the encoder, style and corpus of the build"
        )


async def together(*work: Awaitable[Any]) -> list[Any]:
    """The results of all; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def probe_rows(num_rows: int) -> list[int]:
    """Rows, spread over the corpus, whose vectors show that encoder, corpus and index belong together."""
    return sorted({round(row) for row in np.linspace(0, num_rows - 1, PROBE_ROWS)})


def _recipe_and_kind(settings: LocalSettings) -> tuple[Recipe | None, str]:
    """How queries are encoded (None: not at all), and the kind of the index. Raises UserError."""
    index, encoder = settings.index, settings.encoder
    if index.is_dir():
        if settings.style:
            raise UserError(f"{index}/manifest.json records the encoder's style; give one for bare FAISS files only")
        manifest = read_manifest(index)
        recipe = manifest.recipe
        if recipe is not None and encoder:
            recipe = replace(recipe, encoder=encoder)
        return recipe, manifest.kind
    if not index.is_file():
        raise UserError(f"index not found: {index}; build one with tools/build_index.py")
    if not encoder:
        raise UserError(
            f"{index} is a bare FAISS file; say which encoder it was built with, and that one's style, for example e5"
        )
    return choose_recipe(encoder, settings.style), "prebuilt"


def _encoder_pool(settings: LocalSettings, recipe: Recipe) -> Pool:
    def make(number: int) -> Callable[[], Any]:
        return partial(load_encoder, recipe, settings.device, settings.dtype, number)

    return Pool("encoder", make, size=settings.encoders, timeout_s=settings.timeout_s)


def _vector_pools(settings: LocalSettings) -> list[Pool]:
    if settings.index_device == "cuda" and settings.shards * settings.replicas > 1:
        raise UserError("an index on the GPUs is spread over all of them by one process; use one shard and one replica")
    path = settings.index / INDEX_FILE if settings.index.is_dir() else settings.index

    def pool(number: int) -> Pool:
        make = partial(load_vectors, path, (number, settings.shards), settings.index_device, settings.effort)
        return Pool("index", lambda _: make, size=settings.replicas, timeout_s=settings.timeout_s)

    return [pool(number) for number in range(settings.shards)]


def _keyword_pools(settings: LocalSettings) -> list[Pool]:
    for name, value in (("encoder", settings.encoder), ("effort", settings.effort), ("shards", settings.shards - 1)):
        if value:
            raise UserError(f"{name} is set, but {settings.index} is a BM25 index, which has none; leave it out")
    make = partial(load_keywords, settings.index)
    return [Pool("index", lambda _: make, size=settings.replicas, timeout_s=settings.timeout_s)]


def load_encoder(recipe: Recipe, device: str, dtype: str, number: int = 0) -> Any:
    """What an encoder process serves."""
    from searche1.retrieval.encoder import Encoder

    return Encoder(recipe, device, dtype, number=number)


def load_vectors(path: Path, shard: tuple[int, int], device: str, effort: int) -> Any:
    """What an index process serves."""
    from searche1.retrieval.index import VectorIndex

    return VectorIndex(path, shard=shard, device=device, effort=effort)


def load_keywords(folder: Path) -> Any:
    """What the process of a keyword index serves."""
    from searche1.retrieval.bm25 import KeywordIndex

    return KeywordIndex(folder / KEYWORD_FOLDER)
