"""Building an index folder: vectors of a corpus and FAISS's index of them, or an index of its words."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from searche1.progress import Report, duration
from searche1.retrieval.corpus import Corpus
from searche1.retrieval.local import load_encoder, probe_rows
from searche1.retrieval.manifest import (
    INDEX_FILE,
    KEYWORD_FOLDER,
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    PROBE_FILE,
    Manifest,
    write_manifest,
)
from searche1.retrieval.recipe import Recipe
from searche1.retrieval.vectors import Job, VectorFiles, encode_missing, open_vectors
from searche1.retrieval.workers import Worker, WorkerDied
from searche1.types import UserError

RECALL_QUERIES = 256
RECALL_WORDS = 10  # words from the middle of a passage make a query
RECALL_AT = (1, 3, 10)
PACKAGES = ("faiss-cpu", "faiss-gpu", "torch", "transformers", "bm25s")


@dataclass(frozen=True)
class Encoding:
    """How passages become vectors: one process on each of `devices`.

    The vectors stay in `vectors`, for other kinds of index; None removes them when the index is done.
    """

    recipe: Recipe
    devices: Sequence[str] = ("cpu",)
    dtype: str = "auto"
    vectors: Path | None = None


def build_index(corpus: Path, out: Path, encoding: Encoding, *, kind: str = "Flat", use_gpu: bool = False) -> None:
    """Writes the folder `out`, complete or not at all; a build that was stopped goes on where it was.

    `kind` is "Flat" (exact, the protocol), "SQfp16", "HNSW<neighbours>" or "IVF-PQ", whose training `use_gpu` moves
    to GPUs. Takes the threads that OMP_NUM_THREADS allows. Raises UserError.
    """
    from searche1.retrieval import index as vector_index

    _refuse_taken(out)
    passages = _open_corpus(corpus)
    job = Job(encoding.recipe, encoding.dtype, passages.sha256, len(passages))
    folder = encoding.vectors or out.with_name(out.name + ".vectors")
    with _encoders(encoding) as encoders:
        dim = encoders[0].call("encode", ([],), {"kind": "passage"}, timeout_s=None).shape[1]
        factory = vector_index.factory_string(kind, num_rows=len(passages), dim=dim)
        with open_vectors(folder, job) as vectors, _writing(out) as part:
            encode_missing(vectors, passages, encoders)
            index = _make_index(factory, vectors, dim=dim, use_gpu=use_gpu)
            recall = {} if kind == "Flat" else _recall(index, passages, vectors, encoders[0])
            vector_index.write_index(index, part / INDEX_FILE)
            np.save(part / PROBE_FILE, vectors.rows(probe_rows(len(passages))))
            manifest = _manifest(corpus, passages, kind=factory, recipe=encoding.recipe, dim=dim, recall=recall)
            write_manifest(manifest, part)
    if encoding.vectors is None:
        shutil.rmtree(folder)


def build_keyword_index(corpus: Path, out: Path) -> None:
    """Writes the folder `out` with a BM25 index, complete or not at all. Raises UserError."""
    from searche1.retrieval.bm25 import build_bm25

    _refuse_taken(out)
    passages = _open_corpus(corpus)
    report = Report("reading words", unit="passages")
    with _writing(out) as part:
        texts = passages.contents(range(len(passages)))
        build_bm25(texts, part / KEYWORD_FOLDER, progress=lambda done: report(done, len(passages)))
        write_manifest(_manifest(corpus, passages, kind="BM25", recipe=None, dim=0, recall={}), part)


def _open_corpus(path: Path) -> Corpus:
    """Every row is looked at first: a bad one that is found after hours, and mended, makes another corpus."""
    passages = Corpus(path, progress=Report("reading the corpus", unit="bytes"))
    passages.check(progress=Report("checking the corpus", unit="passages"))
    return passages


def _make_index(factory: str, vectors: VectorFiles, *, dim: int, use_gpu: bool) -> Any:
    from searche1.retrieval import index as vector_index

    started = time.monotonic()
    num_training = vector_index.num_training_rows(factory, num_rows=vectors.num_rows)
    if num_training:
        _tell(f"training {factory} with {num_training:,} vectors")
    training = vectors.sample(num_training) if num_training else np.empty((0, dim), dtype=np.float32)
    index = vector_index.make_index(factory, dim=dim, training=training, use_gpu=use_gpu)
    report = Report("indexing", unit="vectors")
    for block in vectors.blocks():
        index.add(np.ascontiguousarray(block))
        report(index.ntotal, vectors.num_rows)
    _tell(f"made a {factory} index of {index.ntotal:,} vectors in {duration(time.monotonic() - started)}, writing it")
    return index


def _recall(index: Any, passages: Corpus, vectors: VectorFiles, encoder: Worker) -> dict[str, float]:
    """The share of an exact search's passages that the index finds, for queries cut from passages."""
    from searche1.retrieval.index import exact_neighbours

    count = min(RECALL_QUERIES, len(passages))
    rows = np.linspace(0, len(passages) - 1, count).astype(int).tolist()
    texts = [_middle_words(passages[row][1]) for row in rows]
    queries = encoder.call("encode", (texts,), {"kind": "query"}, timeout_s=None)
    most = min(max(RECALL_AT), len(passages))
    exact = exact_neighbours(queries, vectors.blocks(), topk=most)
    _, found = index.search(queries, most)
    recall = {
        f"recall@{k}": float(np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(exact, found, strict=True)]))
        for k in RECALL_AT
        if k <= most
    }
    told = ", ".join(f"{name} {value:.3f}" for name, value in recall.items())
    _tell(f"against an exact search, for {count} queries of {RECALL_WORDS} words cut from passages: {told}")
    return recall


def _middle_words(text: str) -> str:
    words = text.split()
    start = max(0, (len(words) - RECALL_WORDS) // 2)
    return " ".join(words[start : start + RECALL_WORDS])


@contextlib.contextmanager
def _encoders(encoding: Encoding) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for device in encoding.devices:
            workers.append(Worker("encoder", partial(load_encoder, encoding.recipe, device, encoding.dtype)))
        for worker in workers:
            worker.wait_ready()
        yield workers
    except WorkerDied as error:
        raise UserError(f"encoding stopped: {error}; the same command goes on where it is") from error
    finally:
        for worker in workers:
            worker.stop()


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already there; remove it or choose another folder for the index")


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end, unless something is raised."""
    part = out.with_name(out.name + ".part")
    if part.exists():  # of a build that was killed while it wrote
        strange = {path.name for path in part.iterdir()} - {INDEX_FILE, PROBE_FILE, MANIFEST_FILE, KEYWORD_FOLDER}
        if strange:
            raise UserError(f"{part} is in the way and no rest of a build; move it, or choose another --out")
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; make room or choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _manifest(
    corpus: Path, passages: Corpus, *, kind: str, recipe: Recipe | None, dim: int, recall: dict[str, float]
) -> Manifest:
    return Manifest(
        format=MANIFEST_FORMAT,
        recipe=recipe,
        metric="inner_product" if recipe else "bm25",
        kind=kind,
        dim=dim,
        num_rows=len(passages),
        corpus=corpus.name,
        corpus_sha256=passages.sha256,
        versions=_versions(),
        recall=recall,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # one of the two FAISS is there
            found[package] = version(package)
    return found


def _tell(line: str) -> None:
    print(line, flush=True)
