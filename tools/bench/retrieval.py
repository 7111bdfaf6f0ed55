"""The retriever under load, against a plain server that searches one request at a time.

    python tools/bench/retrieval.py [--rows 200000] [--clients 1,8,64,256] [--seconds 8] [--out FILE]
    python tools/bench/retrieval.py --check 100000    # answers compared one by one, while processes are killed

Both servers have the same corpus, exact index, encoder, CPU threads and HTTP library. The plain one follows the server
that Search-R1 ships: a synchronous FastAPI route, in which a request is encoded and searched by itself, and a corpus
in memory. Clients are closed loops: each sends its next query, never one that was sent before, when it has its answer.
The servers take turns at each number of clients, `--rounds` times, the median round counts. Ours runs without its
cache, as queries do not repeat; the ratios say what batching across requests is worth.

The vectors of the index are random, but for the few that a server compares with its encoder: making real ones would
take hours, and an exact search takes as long whatever they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
from pydantic import BaseModel

TOPK = 3
WORDS_PER_PASSAGE = 100
POOL_SIZE = 2000  # queries with known answers
CHECKING_CLIENTS = 64
BLOCK = 10_000


# --- the plain server ------------------------------------------------------------------------------------------------


class QueryRequest(BaseModel):
    """What a client asks."""

    queries: list[str]
    topk: int = TOPK
    return_scores: bool = False


def serve_plainly(corpus: Path, index: Path, port: int) -> None:
    """One request, one search, in FastAPI's threads; never returns."""
    import faiss
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoModel, AutoTokenizer

    from searche1.retrieval.encoder import minilm_path

    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    model = AutoModel.from_pretrained(minilm_path()).eval()
    searcher = faiss.read_index(str(index / "index.faiss"))
    with corpus.open() as file:
        documents = [json.loads(line) for line in file]
    app = FastAPI()

    @torch.no_grad()
    def encode(queries: list[str]) -> np.ndarray:
        inputs = tokenizer(queries, max_length=256, padding=True, truncation=True, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()

    @app.post("/retrieve")
    def retrieve(request: QueryRequest) -> dict[str, Any]:
        scores, rows = searcher.search(encode(request.queries), request.topk)
        return {
            "result": [
                [{"document": documents[row], "score": float(score)} for score, row in zip(*found, strict=True)]
                for found in zip(scores, rows, strict=True)
            ]
        }

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


# --- what both serve -------------------------------------------------------------------------------------------------


def make_index(folder: Path, rows: int) -> tuple[Path, Path]:
    """A corpus of random words and its index folder, kept for the next time."""
    from searche1.retrieval.corpus import Corpus
    from searche1.retrieval.encoder import load_encoder
    from searche1.retrieval.index import make_index as new_index
    from searche1.retrieval.index import write_index
    from searche1.retrieval.local import probe_rows
    from searche1.retrieval.manifest import INDEX_FILE, MANIFEST_FORMAT, PROBE_FILE, Manifest, write_manifest

    corpus, index = folder / f"corpus-{rows}.jsonl", folder / f"index-{rows}"
    if index.exists():
        return corpus, index
    print(f"making {rows:,} passages and their index in {folder}", flush=True)
    dice = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te", "so", "va") for b in ("dan", "rel", "mos", "tin", "bar")]
    with corpus.open("w") as file:
        for row in range(rows):
            text = " ".join(dice.choices(words, k=WORDS_PER_PASSAGE))
            file.write(json.dumps({"id": str(row), "contents": f'"Title {row}"\n{text}'}) + "\n")
    encoder = load_encoder("minilm", "cpu")
    passages = Corpus(corpus)
    probes = probe_rows(rows)
    real = encoder.encode([passages[row][1] for row in probes], kind="passage")
    draw = np.random.default_rng(0)
    searcher = new_index("Flat", dim=encoder.dim, training=np.empty((0, encoder.dim), np.float32), use_gpu=False)
    for start in range(0, rows, BLOCK):
        block = draw.standard_normal((min(BLOCK, rows - start), encoder.dim), dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        for row, vector in zip(probes, real, strict=True):
            if start <= row < start + len(block):
                block[row - start] = vector
        searcher.add(block)
    index.mkdir()
    write_index(searcher, index / INDEX_FILE)
    np.save(index / PROBE_FILE, real)
    write_manifest(
        Manifest(
            format=MANIFEST_FORMAT,
            recipe=encoder.recipe,
            metric="inner_product",
            kind="Flat",
            dim=encoder.dim,
            num_rows=rows,
            corpus=corpus.name,
            corpus_sha256=passages.sha256,
            versions={},
        ),
        index,
    )
    return corpus, index


@contextmanager
def running(command: list[str], port: int, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers on this port."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, *command], env=environment)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"a server ended with exit code {process.returncode}") from None
                time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait()


# --- load ------------------------------------------------------------------------------------------------------------


def query_of(number: int) -> str:
    """A question that no other number has."""
    subject = ("the river", "a king", "the second album", "which city", "the physicist")[number % 5]
    return f"who was the founder of {subject} number {number}"


async def load(port: int, *, clients: int, seconds: float, numbers: Iterator[int]) -> dict[str, float]:
    """Throughput in requests a second, and latencies in milliseconds, of closed loops."""
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while (started := loop.time()) < end:
            asked = {"queries": [query_of(next(numbers))], "topk": TOPK, "return_scores": True}
            async with session.post(f"http://127.0.0.1:{port}/retrieve", json=asked) as response:
                body = await response.read()
                assert response.status == 200, body
            latencies.append(loop.time() - started)

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
    ) as session:
        began = loop.time()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        took = loop.time() - began
    found = np.array(latencies) * 1000
    return {
        "per_s": len(found) / took,
        "p50_ms": float(np.percentile(found, 50)),
        "p99_ms": float(np.percentile(found, 99)),
    }


def compare(arguments: argparse.Namespace, ours: int, plain: int) -> list[dict[str, Any]]:
    """The servers in turns at each number of clients; the median of the rounds."""
    numbers = count()
    rows = []
    print(
        f"{'clients':>7} {'ours /s':>8} {'plain /s':>8} {'ratio':>6} {'ours p50, p99 ms':>18} {'plain p50, p99 ms':>18}"
    )
    for clients in arguments.clients:
        rounds: dict[int, list[dict[str, float]]] = {ours: [], plain: []}
        for number in range(arguments.rounds):
            for port in (ours, plain) if number % 2 == 0 else (plain, ours):
                measured = load(port, clients=clients, seconds=arguments.seconds, numbers=numbers)
                rounds[port].append(asyncio.run(measured))
        middle = {
            port: {name: median(one[name] for one in found) for name in found[0]} for port, found in rounds.items()
        }
        a, b = middle[ours], middle[plain]
        row = {
            "clients": clients,
            "throughput_ratio": a["per_s"] / b["per_s"],
            "p50_ratio": a["p50_ms"] / b["p50_ms"],
            "p99_ratio": a["p99_ms"] / b["p99_ms"],
            "ours": a,
            "plain": b,
        }
        rows.append(row)
        print(
            f"{clients:7d} {a['per_s']:8.1f} {b['per_s']:8.1f} {row['throughput_ratio']:6.2f} "
            f"{a['p50_ms']:8.1f}, {a['p99_ms']:8.1f} {b['p50_ms']:8.1f}, {b['p99_ms']:8.1f}",
            flush=True,
        )
    return rows


# --- answers under load ----------------------------------------------------------------------------------------------


async def check_answers(port: int, server: int, *, requests: int, kills: int) -> dict[str, Any]:
    """Requests of one to three queries with known answers, while encoder and index processes are killed."""
    dice = random.Random(0)
    url = f"http://127.0.0.1:{port}/retrieve"
    done = mismatches = refused = 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(numbers: list[int]) -> Any:
            nonlocal refused
            asked = {"queries": [query_of(number) for number in numbers], "topk": TOPK, "return_scores": True}
            while True:
                async with session.post(url, json=asked) as response:
                    if response.status == 200:
                        return (await response.json())["result"]
                    refused += 1
                    assert response.status == 503, await response.text()
                    await asyncio.sleep(float(response.headers["Retry-After"]))

        known = [[hit["document"] for hit in (await ask([number]))[0]] for number in range(POOL_SIZE)]
        print(f"{POOL_SIZE} answers known; now {requests:,} requests of {CHECKING_CLIENTS} clients", flush=True)
        left = iter(range(requests))

        async def client() -> None:
            nonlocal done, mismatches
            for _ in left:
                numbers = [dice.randrange(POOL_SIZE) for _ in range(dice.randint(1, 3))]
                found = [[hit["document"] for hit in hits] for hits in await ask(numbers)]
                mismatches += found != [known[number] for number in numbers]
                done += 1
                if done % (requests // 10) == 0:
                    print(f"{done:,} requests, {mismatches} wrong answers, {refused} asked to come again", flush=True)

        async def kill() -> None:
            for number in range(1, kills + 1):
                while done < requests * number / (kills + 1):
                    await asyncio.sleep(0.05)
                os.kill(dice.choice(workers(server)), signal.SIGKILL)

        await asyncio.gather(kill(), *(client() for _ in range(CHECKING_CLIENTS)))
    return {"requests": requests, "mismatches": mismatches, "kills": kills, "asked_to_come_again": refused}


def workers(server: int) -> list[int]:
    """The processes that compute for a server (not the one that only watches over shared memory)."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="passages in the index (default 200,000)")
    parser.add_argument("--clients", default="1,8,64,256", help="numbers of closed loops (default 1,8,64,256)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a round (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of each server at each number (default 3)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: cores)"
    )
    parser.add_argument("--check", type=int, default=0, metavar="N", help="compare the answers of N requests instead")
    parser.add_argument("--kills", type=int, default=4, help="processes killed during --check (default 4)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "searche1-bench-retrieval")
    parser.add_argument("--port", type=int, default=8461, help="this port and the next are taken")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--serve-plainly", nargs=2, type=Path, help=argparse.SUPPRESS)  # how it starts the other server
    arguments = parser.parse_args()
    if arguments.serve_plainly:
        serve_plainly(*arguments.serve_plainly, arguments.port)
    arguments.clients = [int(number) for number in arguments.clients.split(",")]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    corpus, index = make_index(arguments.folder, arguments.rows)
    ours, plain = arguments.port, arguments.port + 1
    command = ["-m", "searche1", "retriever", f"--corpus={corpus}", f"--index={index}", f"--port={ours}"]
    command += ["--device=cpu", f"--threads={arguments.threads}"]
    about = {"rows": arguments.rows, "encoder": "minilm", "index": "Flat", "threads": arguments.threads}
    result: dict[str, Any]
    if arguments.check:
        with running([*command, f"--cache-size={POOL_SIZE // 2}"], ours, arguments.threads) as server:
            checked = asyncio.run(check_answers(ours, server.pid, requests=arguments.check, kills=arguments.kills))
        result = {**about, **checked}
    else:
        other = [__file__, "--serve-plainly", str(corpus), str(index), f"--port={plain}"]
        with (
            running([*command, "--cache-size=0"], ours, arguments.threads),
            running(other, plain, arguments.threads),
        ):
            result = {**about, "rounds": arguments.rounds, "seconds": arguments.seconds}
            result["rows_by_clients"] = compare(arguments, ours, plain)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if not result.get("mismatches") else 1


if __name__ == "__main__":
    sys.exit(main())
