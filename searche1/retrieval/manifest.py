"""What an index was built from: `manifest.json` beside it ties it to its corpus and its encoder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from searche1.retrieval.corpus import Corpus
from searche1.retrieval.recipe import Recipe
from searche1.types import UserError

MANIFEST_FORMAT = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.faiss"
KEYWORD_FOLDER = "bm25"
PROBE_FILE = "probe.npy"  # vectors of a few rows, float32 [n, dim]: another encoder makes others
REBUILD = "rebuild it with tools/build_index.py"


@dataclass(frozen=True)
class Manifest:
    """`recipe` is None for a keyword index, whose `dim` is 0."""

    format: int
    recipe: Recipe | None
    metric: str
    kind: str  # FAISS's factory string, or "BM25"
    dim: int
    num_rows: int
    corpus: str  # name of the file
    corpus_sha256: str  # of its uncompressed text
    versions: dict[str, str]
    recall: dict[str, float] = field(default_factory=dict)  # "recall@3": share of an exact search's passages found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index folder. Raises UserError if there is none, or none of ours."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {MANIFEST_FILE}; give a folder built by tools/build_index.py")
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        manifest = Manifest(**{**fields, "recipe": _read_recipe(fields["recipe"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an index manifest ({error}); {REBUILD}") from error
    if manifest.format != MANIFEST_FORMAT:
        raise UserError(f"{path} has format {manifest.format}, needed {MANIFEST_FORMAT}; {REBUILD}")
    return manifest


def _read_recipe(fields: dict[str, Any] | None) -> Recipe | None:
    return None if fields is None else Recipe(**{**fields, "dense": tuple(fields.get("dense", ()))})


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes `manifest.json` into an index folder."""
    (folder / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def check_corpus(manifest: Manifest, folder: Path, corpus: Corpus) -> None:
    """Raises UserError unless the index was built from exactly this text."""
    if (len(corpus), corpus.sha256) != (manifest.num_rows, manifest.corpus_sha256):
        raise UserError(
            f"the index {folder} does not match the corpus {corpus.path}: it was built from {manifest.num_rows} rows "
            f"with sha256 {manifest.corpus_sha256[:12]}, this corpus has {len(corpus)} rows with {corpus.sha256[:12]}; "
            f"{REBUILD}, or give the corpus it was built from ({manifest.corpus})"
        )
