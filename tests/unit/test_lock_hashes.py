"""tools/lock_hashes.py against an index on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "some-name": [
        "some_name-1.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "some_name-1.0-cp39-abi3-manylinux2014_x86_64.whl",
        "some_name-1.0-cp312-cp312-manylinux_2_28_x86_64.whl",
        "some_name-1.0-cp311-cp311-macosx_11_0_arm64.whl",
        "some_name-2.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "some_name-1.0.tar.gz",
    ],
    "source": ["source-1.0.tar.gz", "source-9.tar.gz"],
}


def digest(filename: str) -> str:
    return f"{hash(filename) % 16**64:064x}"


class Index(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        files = FILES.get(self.path.strip("/"))
        self.send_response(404 if files is None else 200)
        self.end_headers()
        answer = {"files": [{"filename": name, "hashes": {"sha256": digest(name)}} for name in files or []]}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def hashed(lock: Path, index: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "lock_hashes.py"), str(lock), "--index", index]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_lock_gets_the_hashes_of_the_files_its_machine_can_take(tmp_path: Path, index: str):
    lock = tmp_path / "lock.txt"
    own = "a" * 64
    lock.write_text(
        f"# CPython 3.11\nSome_Name==1.0\nsource==1.0 --hash=sha256:{own}\nelsewhere==1+cpu --hash=sha256:{own}\n"
    )
    result = hashed(lock, index)
    assert result.returncode == 0, result.stderr
    wheels = sorted(map(digest, FILES["some-name"][:2]))
    assert lock.read_text() == (
        f"# CPython 3.11\nSome_Name==1.0 \\\n    --hash=sha256:{wheels[0]} \\\n    --hash=sha256:{wheels[1]}\n"
        f"source==1.0 \\\n    --hash=sha256:{digest('source-1.0.tar.gz')}\n"
        f"elsewhere==1+cpu \\\n    --hash=sha256:{own}\n"
    )
    assert "kept the hashes of elsewhere==1+cpu" in result.stdout
    before = lock.read_text()
    assert hashed(lock, index).returncode == 0 and lock.read_text() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("some-name==1.0\n", "for which Python"),
        ("# CPython 3.11\nsome-name>=1.0\n", "'some-name>=1.0'"),
        ("# CPython 3.11\nsome-name==3.0\n", "no file of some-name==3.0"),
        ("# CPython 3.11\nelsewhere==1\n", "by hand"),
    ],
)
def test_a_lock_that_cannot_be_completed_is_left_alone(text: str, said: str, tmp_path: Path, index: str):
    lock = tmp_path / "lock.txt"
    lock.write_text(text)
    result = hashed(lock, index)
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr
    assert lock.read_text() == text
