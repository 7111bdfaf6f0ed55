"""Finished trajectories in one growing file, so that a kill costs seconds and memory holds few.

The file is a row of gzip members, each with whole JSON lines: it unpacks with zcat, and a member that a kill cut is
dropped when the evaluation goes on.
"""

from __future__ import annotations

import gzip
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from searche1.types import Question, Trajectory, UserError, question_from_json, trajectory_from_json

MEMBER_TRAJECTORIES = 64
MEMBER_AGE_S = 10.0  # no finished trajectory stays in memory alone for longer, if somebody polls
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One finished trajectory of a question."""

    question: Question
    sample: int
    trajectory: Trajectory


class Journal:
    """Open to append; use it as a context, which writes what is waiting on the way out, also on Ctrl-C."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._waiting: list[bytes] = []
        self._written_at = clock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.num_dropped_bytes = drop_cut_member(path)
        self._file = open(path, "ab")  # noqa: SIM115

    def add(self, entry: Entry) -> None:
        """Takes a finished trajectory. Raises UserError when the disk does not."""
        self._waiting.append((json.dumps(entry, default=vars) + "\n").encode())
        if len(self._waiting) >= MEMBER_TRAJECTORIES:
            self.flush()
        self.poll()

    def poll(self) -> None:
        """Writes what has been waiting for long."""
        if self._clock() - self._written_at >= MEMBER_AGE_S:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting as one member."""
        if self._waiting:
            member = gzip.compress(b"".join(self._waiting), compresslevel=5, mtime=0)
            try:
                self._file.write(member)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise UserError(
                    f"{self._path} cannot be written: {error.strerror}; make room and run the same command again: "
                    "what is in the file is kept"
                ) from error
            self._waiting.clear()
        self._written_at = self._clock()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def drop_cut_member(path: Path) -> int:
    """Cuts the file behind its last whole member; returns how many bytes that took."""
    if not path.exists():
        return 0
    size = path.stat().st_size
    end = 0
    for end, _ in _members(path):  # noqa: B007
        pass
    if end < size:
        os.truncate(path, end)
    return size - end


def read_journal(path: Path) -> Iterator[Entry]:
    """Every trajectory in the file, in the order in which they finished; a cut last member is left out.

    Raises UserError if the file is damaged before its end.
    """
    number = 0
    for _, text in _members(path):
        for line in text.splitlines():
            number += 1
            try:
                row = json.loads(line)
                yield Entry(question_from_json(row["question"]), row["sample"], trajectory_from_json(row["trajectory"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, trajectory {number}: not a trajectory ({error!r}); delete the file to sample them anew"
                ) from error


def _members(path: Path) -> Iterator[tuple[int, bytes]]:
    """(where it ends, its text) of each whole gzip member."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, pending = 0, b""
        while True:
            unpacker = zlib.decompressobj(wbits=31)
            parts, read = [], 0
            while not unpacker.eof:
                chunk = pending or file.read(READ_BYTES)
                pending = b""
                if not chunk:
                    return  # the end, or a member that was cut
                try:
                    parts.append(unpacker.decompress(chunk))
                except zlib.error as error:
                    raise UserError(
                        f"{path} is damaged near byte {start} of {size} ({error}); restore it, or delete it to "
                        "sample anew"
                    ) from error
                read += len(chunk)
            pending = unpacker.unused_data
            start += read - len(pending)
            yield start, b"".join(parts)
