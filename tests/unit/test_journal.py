import gzip
import os
import signal
import subprocess
import sys

import pytest

from searche1.rollout import journal
from searche1.rollout.journal import Entry, Journal, drop_cut_member, read_journal
from searche1.types import Question, Span, Trajectory, UserError


def answer(number):
    spans = (Span("policy", "answer", (number, 2), (-0.5, -0.25), f"<answer>{number}</answer>"),)
    return Entry(Question(str(number), "q?", ("x",), "nq"), 0, Trajectory((1, 2), spans, "answered"))


def write(path, numbers):
    with Journal(path) as file:
        for number in numbers:
            file.add(answer(number))


def numbers_in(path):
    return [int(found.question.id) for found in read_journal(path)]


def test_what_is_written_is_read_and_unpacks_with_gzip(tmp_path):
    path = tmp_path / "journal.jsonl.gz"
    write(path, range(150))
    write(path, range(150, 160))
    assert [*read_journal(path)] == [answer(number) for number in range(160)]
    assert gzip.decompress(path.read_bytes()).count(b"\n") == 160


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_member_cut_by_a_kill_is_dropped_and_the_rest_goes_on(tmp_path, share):
    path = tmp_path / "journal.jsonl.gz"
    write(path, range(64))
    whole = path.stat().st_size
    write(path, range(64, 128))
    os.truncate(path, whole + int(share * (path.stat().st_size - whole)))
    assert numbers_in(path) == list(range(64))
    write(path, [200])
    assert numbers_in(path) == [*range(64), 200]


def test_a_whole_file_loses_nothing(tmp_path):
    path = tmp_path / "journal.jsonl.gz"
    write(path, range(70))
    size = path.stat().st_size
    assert drop_cut_member(path) == 0 and path.stat().st_size == size


def test_what_has_waited_long_is_written_when_somebody_polls(tmp_path):
    now = [0.0]
    with Journal(tmp_path / "journal.jsonl.gz", clock=lambda: now[0]) as file:
        file.add(answer(0))
        for now[0], written in ((journal.MEMBER_AGE_S - 1, []), (journal.MEMBER_AGE_S, [0])):
            file.poll()
            assert numbers_in(tmp_path / "journal.jsonl.gz") == written


def test_damage_in_the_middle_is_told(tmp_path):
    path = tmp_path / "journal.jsonl.gz"
    write(path, range(64))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged near byte"):
        numbers_in(path)


def test_another_kind_of_file_is_told(tmp_path):
    path = tmp_path / "journal.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": 1}\n'))
    with pytest.raises(UserError, match="trajectory 1: not a trajectory"):
        numbers_in(path)


def test_trajectories_do_not_wait_long_for_a_full_member(tmp_path):
    now = [0.0]
    file = Journal(tmp_path / "journal.jsonl.gz", clock=lambda: now[0])
    file.add(answer(0))
    assert numbers_in(tmp_path / "journal.jsonl.gz") == []
    now[0] = journal.MEMBER_AGE_S
    file.add(answer(1))
    assert numbers_in(tmp_path / "journal.jsonl.gz") == [0, 1]


def test_a_killed_writer_leaves_a_file_that_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl.gz"
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        f"from pathlib import Path; import test_journal as t\n"
        f"file = t.Journal(Path({str(path)!r}))\n"
        "number = 0\n"
        "while True:\n"
        "    file.add(t.answer(number)); number += 1\n"
        "    if number == 200: print('far', flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    before = numbers_in(path)
    assert before == list(range(len(before))) and len(before) >= 192
    write(path, [len(before)])
    assert numbers_in(path) == [*before, len(before)]


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    file = Journal(tmp_path / "journal.jsonl.gz")
    file.add(answer(0))
    monkeypatch.setattr(journal.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*run the same command again"):
        file.flush()
