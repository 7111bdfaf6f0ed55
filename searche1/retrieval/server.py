"""The search engine as a process: Search-R1's HTTP interface over an encoder and a FAISS index.

`run_retriever` serves in this process; `launch_retriever` starts a child that lives as long as we do.
FAISS and the encoder are loaded in the serving process only.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from searche1.retrieval.batching import Batcher, LRUCache
from searche1.retrieval.client import Passage
from searche1.types import UserError

MAX_BATCH = 512  # queries encoded together (Search-R1)
MAX_TOPK = 1000
BATCH_WINDOW_S = 0.002  # requests this close together share a batch; longer ones form while one is computed
PR_SET_PDEATHSIG = 1  # prctl(2)
PROGRESS_EVERY_S = 10.0
LOG_TAIL_LINES = 8

# Passages of each query, best first, at most `topk` each; called in a thread, one call at a time.
Search = Callable[[Sequence[str], int], list[tuple[Passage, ...]]]


class QueryRequest(BaseModel):
    """Search-R1's request. A topk of None or 0 is the server's default."""

    queries: list[str]
    topk: int | None = Field(default=None, ge=0, le=MAX_TOPK)
    return_scores: bool = False


def create_app(search: Search, *, topk: int, num_passages: int, cache_size: int = 10_000) -> FastAPI:
    """POST /retrieve and GET /health. Concurrent requests share batches, answers are remembered."""
    thread = ThreadPoolExecutor(max_workers=1)
    cache: LRUCache[tuple[str, int], tuple[Passage, ...]] = LRUCache(size=cache_size)

    def search_keys(keys: list[tuple[str, int]]) -> list[tuple[Passage, ...]]:
        found = search([query for query, _ in keys], max(k for _, k in keys))
        return [passages[:k] for passages, (_, k) in zip(found, keys, strict=True)]

    async def compute(keys: list[tuple[str, int]]) -> list[tuple[Passage, ...]]:
        return await asyncio.get_running_loop().run_in_executor(thread, search_keys, keys)

    batcher = Batcher(compute, cache=cache, window_s=BATCH_WINDOW_S, max_batch=MAX_BATCH, max_running=1)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await batcher.close()
        thread.shutdown()

    app = FastAPI(title="Search-E1 retriever", lifespan=lifespan)

    @app.post("/retrieve")
    async def retrieve(request: QueryRequest) -> JSONResponse:
        k = request.topk or topk
        answers = await asyncio.gather(*(batcher.get((query, k)) for query in request.queries))
        to_json = _scored if request.return_scores else _bare
        return JSONResponse({"result": [[to_json(passage) for passage in answer] for answer in answers]})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "num_passages": num_passages, "topk": topk}

    return app


def _bare(passage: Passage) -> dict[str, Any]:
    return {"id": passage.id, "contents": passage.contents}


def _scored(passage: Passage) -> dict[str, Any]:
    return {"document": _bare(passage), "score": passage.score}


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: the port is ours before the slow loading, and 0 is a free one."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UserError(
            f"cannot serve the retriever on {host}:{port}: {error.strerror}; choose another port, or 0 for a free one"
        ) from error
    return bound


def run_retriever(
    *,
    corpus: str | Path,
    index: str | Path,
    topk: int = 3,
    host: str = "127.0.0.1",
    port: int = 8000,
    encoder: str = "",
    style: str = "",
    device: str = "auto",
    bound: socket.socket | None = None,
) -> None:
    """Serves until it is stopped. `encoder` and `style` are as in `load_index`; `bound` replaces host and port."""
    if not 1 <= topk <= MAX_TOPK:
        raise UserError(f"retriever topk is {topk}; it must be between 1 and {MAX_TOPK}")
    bound = bound or bind(host, port)
    from searche1.retrieval.encoder import Encoder
    from searche1.retrieval.index import check_encoder, load_index, search_passages

    loaded = load_index(Path(index), Path(corpus), encoder=encoder, style=style)
    print(f"retriever: {loaded.kind} index of {len(loaded.corpus)} passages from {corpus}", flush=True)
    text_encoder = Encoder(loaded.recipe, device)
    check_encoder(loaded, text_encoder)
    print(f"retriever: encoder {loaded.recipe.encoder} on {text_encoder.device}; serving {_url(bound)}", flush=True)

    def search(queries: Sequence[str], k: int) -> list[tuple[Passage, ...]]:
        return search_passages(loaded, text_encoder, queries, topk=k)

    app = create_app(search, topk=topk, num_passages=len(loaded.corpus))
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[bound])


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{host}:{port}/retrieve"


class RetrieverServer:
    """A running child process. Stops on `stop`, at the end of `with`, and when this process ends in any way."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
        self.url = url
        self.log_path = log_path
        self.process = process
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the child; may be called again."""
        atexit.unregister(self.stop)
        self.process.terminate()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> RetrieverServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def launch_retriever(
    *,
    corpus: str | Path,
    index: str | Path,
    topk: int,
    port: int,
    log_path: str | Path,
    device: str,
    start_timeout_s: float,
    threads: int = 1,
    encoder: str = "",
    style: str = "",
) -> RetrieverServer:
    """Starts a server on the loopback interface and returns when it answers.

    Port 0 picks a free one, 0 threads take all cores. Raises UserError that quotes the child's log. Call it from a
    thread that lasts, such as the main one: Linux ends the child with the thread that started it.
    """
    log_path = Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    options = {"corpus": corpus, "index": index, "topk": topk, "encoder": encoder, "style": style, "device": device}
    options["threads"] = threads
    command = [sys.executable, "-m", "searche1.retrieval.server"]
    command += [f"--{name}={value}" for name, value in options.items()]
    # The child gets our bound socket: nobody can take the port in between. Its own session keeps a
    # Ctrl-C for us, who may still need it to finish.
    with bind("127.0.0.1", port) as bound, log_path.open("ab") as log:
        log_start = log.tell()
        url = _url(bound)
        process = subprocess.Popen(
            [*command, f"--fd={bound.fileno()}", f"--parent={os.getpid()}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[bound.fileno()],
            start_new_session=True,
        )
    server = RetrieverServer(process, url, log_path)
    try:
        _wait_until_healthy(server, log_start=log_start, timeout_s=start_timeout_s)
    except BaseException:  # Ctrl-C too: nobody else holds the handle yet
        server.stop()
        raise
    return server


def _wait_until_healthy(server: RetrieverServer, *, log_start: int, timeout_s: float) -> None:
    # No proxy: a proxy of the environment does not know this machine's loopback interface.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    health_url = server.url.removesuffix("/retrieve") + "/health"
    start = time.monotonic()
    next_report_s = PROGRESS_EVERY_S
    while True:
        try:
            opener.open(health_url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            waited_s = time.monotonic() - start  # not listening yet
        code = server.process.poll()
        if code is not None or waited_s > timeout_s:
            fault = f"did not answer within {timeout_s:g} s" if code is None else f"ended with exit code {code}"
            tail = _log_tail(server.log_path, log_start)
            raise UserError(f"the retriever {fault}; its log {server.log_path} ends with:\n{tail}")
        if waited_s > next_report_s:
            print(f"waiting for the retriever, {waited_s:.0f} s (log: {server.log_path})", file=sys.stderr, flush=True)
            next_report_s += PROGRESS_EVERY_S
        time.sleep(0.1)


def _log_tail(log_path: Path, log_start: int) -> str:
    lines = log_path.read_bytes()[log_start:].decode(errors="replace").splitlines()
    return "\n".join("  " + line for line in lines[-LOG_TAIL_LINES:])


def _end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, also of a crash or SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """`searche1 retriever`: parses the options and serves. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="searche1 retriever", description="Serve a corpus over HTTP.")
    parser.add_argument("--corpus", required=True, help='.jsonl or .jsonl.gz of {"id", "contents"} rows')
    parser.add_argument("--index", required=True, help="folder of tools/build_index.py, or a bare FAISS file")
    parser.add_argument("--topk", type=int, default=3, help="passages per query unless the request says (default 3)")
    parser.add_argument("--host", default="127.0.0.1", help="interface to serve on (default: loopback only)")
    parser.add_argument("--port", type=int, default=8000, help="port to serve on, 0 for a free one (default 8000)")
    parser.add_argument("--encoder", default="", help="encoder of a bare FAISS file, or where the index's encoder lies")
    parser.add_argument("--style", default="", help="encoder style of a bare FAISS file: e5, bge or plain")
    parser.add_argument("--device", default="auto", help="device of the encoder: auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of encoder and index (default: all cores)")
    parser.add_argument("--fd", type=int, default=-1, help=argparse.SUPPRESS)  # both set by launch_retriever
    parser.add_argument("--parent", type=int, default=-1, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.parent != -1:
        _end_with_parent(arguments.parent)
    # Before torch and FAISS load: they read it once, and a launcher's 1 is meant for its own ranks.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads or len(os.sched_getaffinity(0)))
    try:
        run_retriever(
            corpus=arguments.corpus,
            index=arguments.index,
            topk=arguments.topk,
            host=arguments.host,
            port=arguments.port,
            encoder=arguments.encoder,
            style=arguments.style,
            device=arguments.device,
            bound=socket.socket(fileno=arguments.fd) if arguments.fd != -1 else None,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
