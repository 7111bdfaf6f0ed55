"""Vectors in FAISS: making an index of any kind, and searching a whole one or a shard of it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from searche1.retrieval.ranking import merge
from searche1.types import UserError

KINDS = "Flat (exact, the protocol), SQfp16, HNSW64 or IVF-PQ"
HNSW_EF_SEARCH = 128  # candidates per query; FAISS's 16 loses too much of a top 3
HNSW_EF_CONSTRUCTION = 128
IVF_MIN_NPROBE = 32  # lists that a query searches
IVF_NPROBE_SHARE = 128  # or one in so many, if that is more
IVF_MAX_LISTS = 65536
POINTS_PER_LIST = 64  # vectors that train a list's centre; FAISS warns below 39
MIN_IVF_ROWS = 10_000  # product quantization trains 256 centres with 39 vectors each
SLICE_ROWS = 1 << 16  # rows copied at once

# From this many queries on, an exact search is one matrix product: several times faster than query by query, which
# FAISS 1.15 by itself does up to 128,000 of them.
faiss.cvar.distance_compute_blas_threshold = 4


def factory_string(kind: str, *, num_rows: int, dim: int) -> str:
    """FAISS's name of an index kind: "IVF-PQ" becomes lists and codes that fit the corpus. Raises UserError."""
    if re.fullmatch(r"Flat|SQfp16|HNSW[1-9]\d*", kind):
        return kind
    if kind != "IVF-PQ":
        raise UserError(f"index kind is {kind!r}; choose {KINDS}")
    if num_rows < MIN_IVF_ROWS:
        raise UserError(
            f"IVF-PQ needs at least {MIN_IVF_ROWS:,} passages to learn its codes, got {num_rows:,}; use Flat"
        )
    if dim % 8:
        raise UserError(f"IVF-PQ needs vectors of a multiple of 8 dimensions, got {dim}; use HNSW64 or SQfp16")
    wanted = 4 * num_rows**0.5
    most = min(IVF_MAX_LISTS, num_rows // POINTS_PER_LIST)
    num_lists = 1 << int(np.log2(min(wanted, most)))
    return f"IVF{num_lists},PQ{dim // 8}"


def num_training_rows(factory: str, *, num_rows: int) -> int:
    """Vectors that `make_index` wants to learn from; 0 if its kind learns nothing."""
    lists = re.match(r"IVF(\d+),", factory)
    return min(num_rows, max(MIN_IVF_ROWS, int(lists[1]) * POINTS_PER_LIST)) if lists else 0


def make_index(factory: str, *, dim: int, training: np.ndarray, use_gpu: bool) -> Any:
    """An empty inner-product index. `training` is float32 [n, dim] and only read where the kind learns from data.

    `use_gpu` learns on all GPUs. Raises UserError if there is none, or nothing to learn.
    """
    if use_gpu and not factory.startswith("IVF"):
        raise UserError(f"only IVF-PQ has something to learn on a GPU, {factory} has not; leave the index on the CPU")
    index: Any = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if factory.startswith("HNSW"):
        index.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
        index.hnsw.efSearch = HNSW_EF_SEARCH
    if factory.startswith("IVF"):
        index.nprobe = max(IVF_MIN_NPROBE, index.nlist // IVF_NPROBE_SHARE)
        if use_gpu:
            require_gpu()
            index.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dim))
    if len(training):
        index.train(training)
    return index


def set_threads(count: int) -> None:
    """CPU threads of building and searching in this process. An HNSW index is the same every time with one only."""
    faiss.omp_set_num_threads(count)


def write_index(index: Any, path: Path) -> None:
    """Writes FAISS's own file. Raises UserError if the disk does not take it."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise UserError(
            f"cannot write {path}: {str(error).splitlines()[-1]}; make room, then run the same command"
        ) from error


def exact_neighbours(queries: np.ndarray, blocks: Iterable[np.ndarray], *, topk: int) -> np.ndarray:
    """Rows of the `topk` largest inner products, int64 [n, topk], from blocks of float32 [m, dim] in row order."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    start = 0
    for block in blocks:
        block = np.ascontiguousarray(block, dtype=np.float32)
        scores, rows = faiss.knn(queries, block, min(topk, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        found.append((scores, rows + start))
        if len(found) > 1:
            found = [merge(found, topk=topk)]
        start += len(block)
    return merge(found, topk=topk)[1]


class VectorIndex:
    """A loaded FAISS index, or one shard of it: rows keep their numbers in the whole.

    A whole index on a CPU is mapped: it opens at once, processes share it, and memory that runs short makes it slow
    instead of ending it. A shard, and an index on GPUs (float16, spread over all of them), is copied.
    """

    def __init__(self, path: Path, *, shard: tuple[int, int], device: str, effort: int) -> None:
        """Shard (i, n) is the i-th part of n; `effort` is HNSW's efSearch or IVF's nprobe, 0 keeps the file's.

        Raises UserError.
        """
        index = _read(path)
        self.num_rows = int(index.ntotal)
        self.dim = int(index.d)
        self._first = 0
        if effort:
            _set_effort(index, effort)
        if shard[1] > 1:
            index, self._first = _take_shard(index, shard)
        self._host_index = index
        self._index = _to_gpus(index) if device == "cuda" else index

    def describe(self) -> tuple[int, int]:
        """Rows and dimensions of the whole index."""
        return self.num_rows, self.dim

    def search(self, vectors: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and rows int64, both [n, topk], best first; row -1 where nothing more is found."""
        scores, rows = self._index.search(np.ascontiguousarray(vectors, dtype=np.float32), topk)
        return scores, np.where(rows < 0, -1, rows + self._first)

    def vectors(self, rows: list[int]) -> np.ndarray:
        """The stored vectors of rows of this shard, float32 [n, dim]; what is left of them in a compressed kind."""
        try:
            return np.stack([self._host_index.reconstruct(row - self._first) for row in rows])
        except RuntimeError as error:
            raise UserError(
                "this kind of index does not give its vectors back, so nothing shows that encoder and corpus belong to "
                f"it ({str(error).splitlines()[-1]}); build one with tools/build_index.py, whose manifest shows it"
            ) from error


def require_gpu() -> None:
    """Raises UserError unless this FAISS sees a GPU."""
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise UserError(
            f"FAISS {faiss.__version__} sees no GPU here; install faiss-gpu in place of faiss-cpu on a machine that "
            "has one, or keep the index on the CPU"
        )


def _read(path: Path) -> Any:
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise UserError(f"cannot read the FAISS index {path}: {str(error).splitlines()[-1]}") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(f"the FAISS index {path} does not use the inner product; rebuild it with tools/build_index.py")
    return index


def _set_effort(index: Any, effort: int) -> None:
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = effort
    elif hasattr(index, "nprobe"):
        index.nprobe = effort
    else:
        raise UserError(f"effort is {effort}, but this index is searched exhaustively; leave it out")


def _take_shard(index: Any, shard: tuple[int, int]) -> tuple[Any, int]:
    """A copy of the rows of one shard, and the first of them."""
    if isinstance(index, faiss.IndexFlat):
        part: Any = faiss.IndexFlatIP(index.d)
    elif isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        part = faiss.IndexScalarQuantizer(index.d, index.sq.qtype, index.metric_type)
    else:
        raise UserError("only Flat and SQfp16 indexes can be split into shards; use one shard, and replicas")
    number, count = shard
    if index.ntotal < count:
        raise UserError(f"an index of {index.ntotal} passages cannot be split into {count} shards; use fewer")
    first, end = index.ntotal * number // count, index.ntotal * (number + 1) // count
    codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size).reshape(index.ntotal, -1)
    for start in range(first, end, SLICE_ROWS):
        part.add_sa_codes(codes[start : min(start + SLICE_ROWS, end)])
    return part, first


def _to_gpus(index: Any) -> Any:
    require_gpu()
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        raise UserError(
            f"the index cannot go to the GPUs: {str(error).splitlines()[-1]}; Flat, SQfp16 and IVF-PQ can, in float16 "
            "and spread over all of them, if their memory holds it; otherwise keep it on the CPU"
        ) from error
