"""The vectors of a corpus on disk, made in parts: a part is there complete or not at all, so a kill loses little."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from searche1.progress import Report
from searche1.retrieval.corpus import Corpus
from searche1.retrieval.recipe import Recipe
from searche1.retrieval.workers import Worker, WorkerDied, WorkerFailed
from searche1.types import UserError

MAX_PART_ROWS = 4096
MIN_PART_ROWS = 256
NUM_PARTS = 256  # of a small corpus, so that there is progress to see
JOB_FILE = "job.json"


@dataclass(frozen=True)
class Job:
    """What decides the vectors: only a build that asks for the same may go on with them."""

    recipe: Recipe
    dtype: str
    corpus_sha256: str
    num_rows: int


class VectorFiles:
    """float32 [num_rows, dim] in files of some rows each, read through memory maps."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self.num_rows = job.num_rows
        size = min(MAX_PART_ROWS, max(MIN_PART_ROWS, job.num_rows // NUM_PARTS))
        self._parts = [range(start, min(start + size, job.num_rows)) for start in range(0, job.num_rows, size)]

    def missing(self) -> list[range]:
        """Rows that have no vectors yet."""
        return [part for part in self._parts if not self._path(part).exists()]

    def save(self, part: range, vectors: np.ndarray) -> None:
        """Stores the vectors of a part, float32 [rows, dim]. Atomic."""
        assert len(vectors) == len(part)
        path = self._path(part)
        temporary = path.with_suffix(".part")
        try:
            with temporary.open("wb") as file:
                np.save(file, vectors)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; make room, then run the same command") from error
        os.replace(temporary, path)

    def blocks(self) -> Iterator[np.ndarray]:
        """All vectors, part by part."""
        return (np.load(self._path(part), mmap_mode="r") for part in self._parts)

    def rows(self, wanted: Sequence[int]) -> np.ndarray:
        """The vectors of some rows, float32 [n, dim]; `wanted` rises."""
        wanted_rows = np.asarray(wanted, dtype=np.int64)
        found = []
        for part, block in zip(self._parts, self.blocks(), strict=True):
            here = wanted_rows[(wanted_rows >= part.start) & (wanted_rows < part.stop)]
            if len(here):
                found.append(np.asarray(block[here - part.start]))
        return np.concatenate(found)

    def sample(self, count: int) -> np.ndarray:
        """Vectors of `count` rows that are spread over the corpus, float32 [count, dim]."""
        return self.rows(np.linspace(0, self.num_rows - 1, count).astype(np.int64).tolist())

    def _path(self, part: range) -> Path:
        return self.folder / f"{part.start:010d}.npy"


@contextlib.contextmanager
def open_vectors(folder: Path, job: Job) -> Iterator[VectorFiles]:
    """The files of a job, for this process alone. Raises UserError if the folder holds those of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another build is at work in {folder}; wait for it, or choose another folder") from error
        path, wanted = folder / JOB_FILE, json.loads(json.dumps(asdict(job)))  # as it reads back
        if path.exists():
            begun = json.loads(path.read_text())
            different = [key for key in wanted if begun.get(key) != wanted[key]]
            if different:
                changes = ", ".join(f"{key} was {begun.get(key)!r}, is {wanted[key]!r}" for key in different)
                raise UserError(
                    f"{folder} holds vectors of another build ({changes}); remove it, or give another --vectors"
                )
        else:
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(wanted, indent=2) + "\n")
            os.replace(temporary, path)
        yield VectorFiles(folder, job)


def encode_missing(files: VectorFiles, corpus: Corpus, encoders: Sequence[Worker]) -> None:
    """Encodes what has no vectors yet, one part at a time in each process; ends the processes if one fails.

    Raises UserError; the parts that are done stay.
    """
    missing = files.missing()
    done = files.num_rows - sum(map(len, missing))
    report = Report("encoding", unit="passages")
    report(done, files.num_rows)
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for encoder in encoders:
        free.put(encoder)

    def encode(part: range) -> int:
        texts = list(corpus.contents(part))
        encoder = free.get()
        try:
            vectors = encoder.call("encode", (texts,), {"kind": "passage"}, timeout_s=None)
        finally:
            free.put(encoder)
        files.save(part, vectors)
        return len(part)

    with ThreadPoolExecutor(len(encoders)) as threads:
        encodings = [threads.submit(encode, part) for part in missing]
        try:
            for encoding in as_completed(encodings):
                done += encoding.result()
                report(done, files.num_rows)
        except BaseException as error:  # Ctrl-C too
            for encoding in encodings:
                encoding.cancel()
            for encoder in encoders:
                encoder.stop()  # ends what it computes, for which its thread would wait
            if isinstance(error, WorkerDied | WorkerFailed):
                raise UserError(f"encoding stopped: {error}; the same command goes on where it is") from error
            raise
