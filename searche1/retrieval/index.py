"""A corpus and its FAISS index: built once with a manifest, refused when the two do not belong together."""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import transformers

from searche1.retrieval.client import Passage
from searche1.retrieval.encoder import Encoder, Recipe, choose_recipe
from searche1.types import UserError

MANIFEST_FORMAT = 1
BUILD_ROWS = 1024  # passages encoded between two reports of progress
SCAN_BYTES = 1 << 26
HNSW_EF_SEARCH = 128  # candidates per query; FAISS's 16 loses too much of a top 3
PROBE_ROWS = 8
MIN_PROBE_SIMILARITY = 0.999  # float16 stays above it; a missing prefix or another pooling does not


class Corpus:
    """Passages in file order: the row is the FAISS id. The file is mapped, a row is parsed when it is read.

    `path` is .jsonl or .jsonl.gz of {"id", "contents"}. `sha256` is that of the uncompressed text.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f'corpus not found: {path}; give a .jsonl or .jsonl.gz file of {{"id", "contents"}} rows')
        if path.stat().st_size == 0:
            raise UserError(f'the corpus {path} is empty; it needs one {{"id", "contents"}} object per line')
        self.path = path
        self._data = _read_bytes(path)
        self._bounds, self.sha256 = _scan(self._data)  # row i is data[bounds[i]:bounds[i + 1]]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, row: int) -> tuple[str, str]:
        """Id and contents of one row. Raises UserError with the line number if it is not such a row."""
        # A negative row would quietly be somebody else's passage.
        assert 0 <= row < len(self)
        line = self._data[self._bounds[row] : self._bounds[row + 1]]
        try:
            passage = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path}, line {row + 1} is not valid JSON: {error}") from error
        if not isinstance(passage, dict):
            raise UserError(f'{self.path}, line {row + 1}: needed an object {{"id", "contents"}}, got {passage!r}')
        for key in ("id", "contents"):
            if key not in passage:
                raise UserError(f"{self.path}, line {row + 1}: the key {key!r} is missing; it has {sorted(passage)}")
        return str(passage["id"]), str(passage["contents"])


def _read_bytes(path: Path) -> bytes | mmap.mmap:
    if path.suffix == ".gz":
        try:
            return gzip.decompress(path.read_bytes())
        except (OSError, EOFError) as error:
            raise UserError(f"{path} is not a complete gzip file: {error}") from error
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _scan(data: bytes | mmap.mmap) -> tuple[np.ndarray, str]:
    """Line bounds, int64 [rows + 1], and the checksum."""
    digest = hashlib.sha256()
    bounds = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(data), SCAN_BYTES):
        piece = data[start : start + SCAN_BYTES]
        digest.update(piece)
        bounds.append(np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == ord("\n")) + (start + 1))
    if data[-1:] != b"\n":
        bounds.append(np.array([len(data)], dtype=np.int64))
    return np.concatenate(bounds), digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What an index was built from: `manifest.json` beside `index.faiss`."""

    format: int
    recipe: Recipe
    metric: str
    kind: str
    dim: int
    num_rows: int
    corpus: str
    corpus_sha256: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Index:
    """A loaded index, the corpus it belongs to, and the recipe that queries must be encoded with."""

    corpus: Corpus
    recipe: Recipe
    kind: str
    faiss_index: Any

    def search(self, vectors: np.ndarray, *, topk: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows of each vector, best first; fewer than `topk` where FAISS finds no more.

        FAISS fills what it did not find with the id -1, which would read as the corpus's last row.
        """
        scores, rows = self.faiss_index.search(np.ascontiguousarray(vectors, dtype=np.float32), topk)  # [n, topk]
        return [(s[r >= 0], r[r >= 0]) for s, r in zip(scores, rows, strict=True)]


def build_index(
    *,
    corpus: Path,
    out: Path,
    encoder: Encoder,
    kind: str = "Flat",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `out` with `index.faiss` and `manifest.json`, complete or not at all.

    `kind` is "Flat" (exact, the protocol) or "HNSW<neighbours>". `progress` is told rows done and total.
    """
    if not re.fullmatch(r"Flat|HNSW[1-9]\d*", kind):
        raise UserError(f"index kind is {kind!r}; choose Flat (exact) or HNSW64 (approximate)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already there; remove it or choose another folder for the index")
    passages = Corpus(corpus)
    index: Any = faiss.index_factory(encoder.dim, kind, faiss.METRIC_INNER_PRODUCT)
    if kind.startswith("HNSW"):
        index.hnsw.efSearch = HNSW_EF_SEARCH
    for start in range(0, len(passages), BUILD_ROWS):
        rows = range(start, min(start + BUILD_ROWS, len(passages)))
        index.add(encoder.encode([passages[row][1] for row in rows], kind="passage"))
        progress(rows.stop, len(passages))
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        recipe=encoder.recipe,
        metric="inner_product",
        kind=kind,
        dim=encoder.dim,
        num_rows=len(passages),
        corpus=corpus.name,
        corpus_sha256=passages.sha256,
        versions={"faiss": faiss.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temp:
        folder = Path(temp) / "index"
        folder.mkdir()
        faiss.write_index(index, str(folder / "index.faiss"))
        (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        os.replace(folder, out)


def load_index(path: Path, corpus: Path, *, encoder: str = "", style: str = "") -> Index:
    """The index at `path` with its corpus. Raises UserError with the reason if they do not belong together.

    A folder of `build_index` carries its recipe; `encoder` then only says where the same encoder lies now.
    A bare FAISS file, such as Search-R1's e5_Flat.index, carries none: `encoder` and `style` must tell it.
    """
    if path.is_dir():
        if style:
            raise UserError(f"{path}/manifest.json records the encoder's style; give one for bare FAISS files only")
        return _load_folder(path, Corpus(corpus), encoder)
    if not path.is_file():
        raise UserError(f"index not found: {path}; build one with tools/build_index.py")
    if not encoder:
        raise UserError(f"{path} is a bare FAISS file; say which encoder (and style) it was built with, for example e5")
    recipe = choose_recipe(encoder, style)
    faiss_index = _read_faiss(path)
    passages = Corpus(corpus)
    if faiss_index.ntotal != len(passages):
        raise UserError(f"the index {path} has {faiss_index.ntotal} vectors but {corpus} has {len(passages)} rows")
    return Index(passages, recipe, "prebuilt", faiss_index)


def _load_folder(folder: Path, corpus: Corpus, encoder: str) -> Index:
    manifest = _read_manifest(folder / "manifest.json")
    rebuild = f"rebuild it with tools/build_index.py, or give the corpus it was built from ({manifest.corpus})"
    if (len(corpus), corpus.sha256) != (manifest.num_rows, manifest.corpus_sha256):
        raise UserError(
            f"the index {folder} does not match the corpus {corpus.path}: it was built from {manifest.num_rows} rows "
            f"with sha256 {manifest.corpus_sha256[:12]}, this corpus has {len(corpus)} rows with {corpus.sha256[:12]}; "
            + rebuild
        )
    faiss_index = _read_faiss(folder / "index.faiss")
    if (faiss_index.ntotal, faiss_index.d) != (manifest.num_rows, manifest.dim):
        raise UserError(
            f"{folder}/index.faiss has {faiss_index.ntotal} vectors of {faiss_index.d} dimensions but its manifest "
            f"says {manifest.num_rows} of {manifest.dim}; {rebuild}"
        )
    recipe = replace(manifest.recipe, encoder=encoder) if encoder else manifest.recipe
    return Index(corpus, recipe, manifest.kind, faiss_index)


def _read_manifest(path: Path) -> Manifest:
    if not path.is_file():
        raise UserError(f"{path.parent} has no manifest.json; give a folder built by tools/build_index.py")
    try:
        fields = json.loads(path.read_text())
        manifest = Manifest(**{**fields, "recipe": Recipe(**fields["recipe"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an index manifest ({error}); rebuild it with tools/build_index.py") from error
    if manifest.format != MANIFEST_FORMAT:
        raise UserError(f"{path} has format {manifest.format}, needed {MANIFEST_FORMAT}; rebuild the index")
    return manifest


def _read_faiss(path: Path) -> Any:
    try:
        faiss_index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(f"cannot read the FAISS index {path}: {str(error).splitlines()[-1]}") from error
    if faiss_index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(f"the FAISS index {path} does not use the inner product; rebuild it with tools/build_index.py")
    return faiss_index


def check_encoder(index: Index, encoder: Encoder) -> None:
    """Encodes the first passages again: another model, prefix, pooling or row order gives other vectors."""
    if encoder.dim != index.faiss_index.d:
        raise UserError(
            f"the encoder {encoder.recipe.encoder!r} makes {encoder.dim} dimensions but the index has "
            f"{index.faiss_index.d}; give the encoder that built the index"
        )
    rows = range(min(PROBE_ROWS, len(index.corpus)))
    stored = np.stack([index.faiss_index.reconstruct(row) for row in rows])  # [rows, dim]
    again = encoder.encode([index.corpus[row][1] for row in rows], kind="passage")  # [rows, dim]
    similarity = float((stored * again).sum(axis=1).min())
    if similarity < MIN_PROBE_SIMILARITY:
        raise UserError(
            f"the encoder {encoder.recipe.encoder!r} does not reproduce the index's vectors of the first passages "
            f"(cosine {similarity:.4f}, needed {MIN_PROBE_SIMILARITY}); give the encoder, style and corpus of the build"
        )


def search_passages(index: Index, encoder: Encoder, queries: Sequence[str], *, topk: int) -> list[tuple[Passage, ...]]:
    """The best passages of each query, best first."""
    answers = []
    for scores, rows in index.search(encoder.encode(queries, kind="query"), topk=topk):
        hits = zip(scores.tolist(), rows.tolist(), strict=True)
        answers.append(tuple(Passage(*index.corpus[row], score=score) for score, row in hits))
    return answers
