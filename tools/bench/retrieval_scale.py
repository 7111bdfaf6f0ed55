"""A build that is killed again and again, and a server's memory, at a million passages.

    python tools/bench/retrieval_scale.py [--rows 1000000] [--kills 5] [--out FILE]

Builds an index twice with tools/build_index.py, once undisturbed and once with all its processes killed at random
moments, and compares the bytes. Then serves corpora of rising size and reports the memory of the server's processes,
with and without the index, after queries have touched all of it. Passages are short and synthetic, the encoder is a
tiny random BERT: what is shown does not depend on them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PORT = 8471
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te", "so", "va") for b in ("dan", "rel", "mos", "tin", "bar")]


def make_encoder(folder: Path) -> Path:
    """A tiny random BERT, as a HuggingFace folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS) + 5, **sizes)).save_pretrained(folder)
    return folder


def make_corpus(path: Path, rows: int) -> Path:
    """Passages of eight random words."""
    dice = random.Random(0)
    with path.open("w") as file:
        for row in range(rows):
            file.write(json.dumps({"id": str(row), "contents": " ".join(dice.choices(WORDS, k=8))}) + "\n")
    return path


def start_build(corpus: Path, out: Path, encoder: Path) -> subprocess.Popen[bytes]:
    """The tool, in a process group of its own."""
    command = [sys.executable, str(ROOT / "tools" / "build_index.py"), f"--corpus={corpus}", f"--out={out}"]
    command += [f"--encoder={encoder}", "--style=e5", "--device=cpu"]
    return subprocess.Popen(command, start_new_session=True)


def build_undisturbed(corpus: Path, out: Path, encoder: Path) -> float:
    """Seconds."""
    started = time.monotonic()
    if start_build(corpus, out, encoder).wait():
        raise SystemExit("the build failed")
    return time.monotonic() - started


def build_with_kills(corpus: Path, out: Path, encoder: Path, *, kills: int, whole_s: float) -> int:
    """Kills the tool and all its processes at random moments, then lets it end. Returns the kills that hit."""
    dice = random.Random(1)
    hits = 0
    for _ in range(kills):
        process = start_build(corpus, out, encoder)
        time.sleep(dice.uniform(0.15, 0.35) * whole_s)
        hits += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed; {len(list(out.parent.glob(out.name + '.vectors/*.npy')))} parts are done", flush=True)
    build_undisturbed(corpus, out, encoder)
    return hits


def checksum(folder: Path) -> str:
    """Of all files of an index folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def measure_memory(corpus: Path, index: Path) -> dict[str, Any]:
    """Resident memory of a server's processes, in MB, once queries have read the whole index."""
    command = [sys.executable, "-m", "searche1", "retriever", f"--corpus={corpus}", f"--index={index}"]
    server = subprocess.Popen([*command, f"--port={PORT}", "--device=cpu", "--threads=1", "--cache-size=1000"])
    try:
        dice = random.Random(2)
        asked = 0
        while asked < 200:
            body = {"queries": [" ".join(dice.choices(WORDS, k=8)) for _ in range(20)], "topk": 10}
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{PORT}/retrieve", json.dumps(body).encode())
                urllib.request.urlopen(request, timeout=60).read()
                asked += 1
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("the server ended") from None
                time.sleep(0.2)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        resident = sum(resident_mb(int(pid)) for pid in [server.pid, *children])
    finally:
        server.terminate()
        server.wait()
    size = (index / "index.faiss").stat().st_size / 1e6
    return {
        "index_mb": round(size, 1),
        "resident_mb": round(resident, 1),
        "without_index_mb": round(resident - size, 1),
    }


def resident_mb(pid: int) -> float:
    """What a process holds; memory that it shares with others counts in each."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="passages (default 1,000,000)")
    parser.add_argument("--kills", type=int, default=5, help="of the disturbed build (default 5)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "searche1-bench-scale")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    encoder = make_encoder(folder / "encoder")
    corpus = make_corpus(folder / "corpus.jsonl", arguments.rows)
    whole_s = build_undisturbed(corpus, folder / "whole", encoder)
    hits = build_with_kills(corpus, folder / "broken", encoder, kills=arguments.kills, whole_s=whole_s)
    is_same = checksum(folder / "whole") == checksum(folder / "broken")
    print(f"undisturbed {whole_s:.0f} s; after {hits} kills the bytes are {'the same' if is_same else 'DIFFERENT'}")
    memory = []
    for rows in sorted({arguments.rows // 100, arguments.rows // 10, arguments.rows}):
        part, index = folder / f"corpus-{rows}.jsonl", folder / f"index-{rows}"
        if rows == arguments.rows:
            part, index = corpus, folder / "whole"
        else:
            build_undisturbed(make_corpus(part, rows), index, encoder)
        memory.append({"rows": rows, **measure_memory(part, index)})
        print(json.dumps(memory[-1]), flush=True)
    result = {"rows": arguments.rows, "kills": hits, "same_bytes": is_same, "seconds": round(whole_s), "memory": memory}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    shutil.rmtree(folder)
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
