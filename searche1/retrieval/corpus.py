"""A corpus of passages on disk, read row by row: memory does not grow with the number of passages."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from searche1.types import UserError

SCAN_BYTES = 1 << 20
OFFSET_BYTES = 8
CHECK_ROWS = 1 << 14  # rows between two reports

Progress = Callable[[int, int], None]  # told how much is done, of how much


def _silent(done: int, total: int) -> None:
    pass


class Corpus:
    """Passages in file order: the row is the id in the index. `sha256` is that of the uncompressed text.

    Opening it reads the file once. Rows are then read by offset, not from a memory map: a mapped file that shrinks
    ends the process, a short read is an error that can be told. Several threads may read.
    """

    def __init__(self, path: Path, *, progress: Progress = _silent) -> None:
        """`path` is .jsonl or .jsonl.gz of {"id", "contents"}; `progress` is told bytes. Raises UserError."""
        if not path.is_file():
            raise UserError(f'corpus not found: {path}; give a .jsonl or .jsonl.gz file of {{"id", "contents"}} rows')
        if path.stat().st_size == 0:
            raise UserError(f'the corpus {path} is empty; it needs one {{"id", "contents"}} object per line')
        self.path = _unpacked(path, progress) if path.suffix == ".gz" else path
        self._file = self.path.open("rb")
        self._as_opened = _identity(self._file)
        self._offsets: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        # int64; row i is the bytes [offsets[i], offsets[i + 1])
        self._num_rows, self.sha256 = _scan(self._file, self._offsets, progress)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> tuple[str, str]:
        """Id and contents of a row. Raises UserError with the line number if it is no such row, or was changed."""
        # A negative row would quietly be somebody else's passage.
        assert 0 <= row < self._num_rows
        if _identity(self._file) != self._as_opened:
            raise UserError(
                f"the corpus {self.path} was changed while it is in use; put the old file back, or start again"
            )
        start, end = array("q", os.pread(self._offsets.fileno(), 2 * OFFSET_BYTES, row * OFFSET_BYTES))
        line = os.pread(self._file.fileno(), end - start, start)
        if len(line) < end - start:
            raise UserError(f"{self.path}, line {row + 1} cannot be read: the file ends before it")
        return self._parse(row, line)

    def check(self, *, progress: Progress = _silent) -> None:
        """Reads every row; `progress` is told rows. Raises UserError for the first that is none."""
        for row in range(self._num_rows):
            self[row]
            if row % CHECK_ROWS == 0:
                progress(row, self._num_rows)

    def contents(self, rows: range) -> Iterator[str]:
        """The texts of some rows. Raises UserError as for a single row."""
        return (self[row][1] for row in rows)

    def close(self) -> None:
        """Closes the file; no row can be read any more."""
        self._file.close()
        self._offsets.close()

    def _parse(self, row: int, line: bytes) -> tuple[str, str]:
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


def _identity(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _scan(file: IO[bytes], offsets: IO[bytes], progress: Progress) -> tuple[int, str]:
    """Writes the offset of every row and of the end, int64 [rows + 1]. Returns the number of rows and the checksum."""
    digest = hashlib.sha256()
    total = os.fstat(file.fileno()).st_size
    offsets.write(array("q", [0]).tobytes())
    num_rows = position = 0
    ends_with_newline = False
    while piece := file.read(SCAN_BYTES):
        digest.update(piece)
        ends = np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == ord("\n")) + (position + 1)
        offsets.write(ends.astype(np.int64).tobytes())
        num_rows += len(ends)
        position += len(piece)
        ends_with_newline = piece.endswith(b"\n")
        progress(position, total)
    if not ends_with_newline:
        offsets.write(array("q", [position]).tobytes())
        num_rows += 1
    offsets.flush()
    return num_rows, digest.hexdigest()


def _unpacked(path: Path, progress: Progress) -> Path:
    """The .jsonl beside a .jsonl.gz, made if it is not there: rows cannot be read by offset from a compressed file."""
    plain = path.with_suffix("")
    if plain.exists():
        if plain.stat().st_mtime < path.stat().st_mtime:
            raise UserError(f"{plain} is older than {path}; remove the one that is wrong, or give the .jsonl itself")
        return plain
    part = plain.with_name(f"{plain.name}.{os.getpid()}.part")
    total = path.stat().st_size
    try:
        with path.open("rb") as packed, gzip.open(packed) as source, part.open("wb") as target:
            while piece := source.read(SCAN_BYTES):
                target.write(piece)
                progress(packed.tell(), total)
        shutil.copystat(path, part)
        os.replace(part, plain)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}") from error
    except OSError as error:
        raise UserError(
            f"cannot unpack {path} beside itself ({error.strerror or error}); "
            "unpack it where there is room, and give the .jsonl file"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return plain
