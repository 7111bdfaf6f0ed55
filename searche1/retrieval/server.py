"""`searche1 retriever`: serves a corpus, or a web search, over Search-R1's HTTP interface."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from searche1.ports import hold_port
from searche1.retrieval.app import MAX_TOPK, Limits, create_app
from searche1.retrieval.backend import Backend
from searche1.retrieval.listen import address, is_loopback
from searche1.retrieval.local import LocalSettings, open_local
from searche1.retrieval.monitor import Monitor
from searche1.retrieval.reranking import RerankSettings, open_reranked
from searche1.retrieval.token import make_token, read_token
from searche1.retrieval.web import WebSettings, open_web
from searche1.retrieval.workers import Pool, end_with_parent
from searche1.types import UserError

BACKLOG = 2048  # connections that wait to be accepted
LOCAL_OPTIONS = ("corpus", "index", "encoder", "style", "encoders", "shards", "replicas", "index_device", "effort")
SHUTDOWN_S = 30  # answers under way when it is asked to stop


@dataclass(frozen=True)
class Settings:
    """What is served, and how."""

    source: LocalSettings | WebSettings
    limits: Limits
    rerank: RerankSettings | None
    token: str


def serve(settings: Settings, bound: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C; requests under way are answered first. Raises UserError if it cannot start."""
    config = uvicorn.Config("", log_level="warning")
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(settings, bound))


async def _serve(settings: Settings, bound: socket.socket) -> None:
    monitor = Monitor()
    async with _open(settings, monitor) as (backend, pools):
        app = create_app(backend, settings.limits, monitor=monitor, pools=pools, token=settings.token)
        for wanted in (signal.SIGTERM, signal.SIGINT):
            # Uvicorn stops serving, then sends itself the signal again: it must not end us before the processes have.
            asyncio.get_running_loop().add_signal_handler(wanted, lambda: None)
        bound.listen(BACKLOG)  # whoever reads the next line may connect
        print(f"retriever: {backend.description}; serving {address(bound)}", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, backlog=BACKLOG, timeout_graceful_shutdown=SHUTDOWN_S
        )
        await uvicorn.Server(config).serve(sockets=[bound])
    print("retriever: stopped", flush=True)


@asynccontextmanager
async def _open(settings: Settings, monitor: Monitor) -> AsyncIterator[tuple[Backend, Sequence[Pool]]]:
    """The backend, and the processes behind it."""
    pools: list[Pool] = []
    backend: Backend
    if isinstance(settings.source, LocalSettings):
        backend = local = await open_local(settings.source, observe=monitor.stage)
        pools += local.pools
    else:
        backend = await open_web(settings.source)
    try:
        if settings.rerank is not None:
            backend = reranked = await open_reranked(backend, settings.rerank, observe=monitor.stage)
            pools.append(reranked.pool)
        yield backend, pools
    finally:
        await backend.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the options of `searche1 retriever` and serves. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.parent != -1:
        end_with_parent(arguments.parent)
    # For the processes that compute, which read it once when they start; a launcher's 1 is meant for its own ranks.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads or len(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # they take turns on the same cores
    try:
        settings = _settings(arguments)
        if arguments.fd != -1:
            bound = socket.socket(fileno=arguments.fd)
        else:
            bound = hold_port(arguments.host, arguments.port, setting="--port")
        serve(settings, bound)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """What the options ask for. Raises UserError if they do not go together."""
    limits = Limits(
        topk=arguments.topk,
        max_batch=arguments.max_batch,
        max_wait_s=arguments.max_wait_ms / 1000,
        max_pending=arguments.max_pending,
        cache_size=arguments.cache_size,
        timeout_s=arguments.timeout_s,
    )
    if not 1 <= limits.topk <= MAX_TOPK:
        raise UserError(f"retriever topk is {limits.topk}; it must be between 1 and {MAX_TOPK}")
    for name in ("max_batch", "max_pending", "timeout_s", "encoders", "shards", "replicas"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be more than 0")
    rerank = None
    if arguments.reranker:
        rerank = RerankSettings(
            arguments.reranker, candidates=arguments.candidates, device=arguments.device, dtype=arguments.dtype
        )
    return Settings(_source(arguments), limits, rerank, _token(arguments))


def _source(arguments: argparse.Namespace) -> LocalSettings | WebSettings:
    if arguments.searxng:
        defaults = _parser()
        for name in LOCAL_OPTIONS:
            if getattr(arguments, name) != defaults.get_default(name):
                raise UserError(f"--searxng searches the web, not a corpus; leave out --{name.replace('_', '-')}")
        return WebSettings(url=arguments.searxng)
    for name in ("corpus", "index"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name} is missing; give --corpus and --index, or --searxng to search the web")
    return LocalSettings(
        corpus=arguments.corpus,
        index=arguments.index,
        encoder=arguments.encoder,
        style=arguments.style,
        device=arguments.device,
        dtype=arguments.dtype,
        encoders=arguments.encoders,
        shards=arguments.shards,
        replicas=arguments.replicas,
        index_device=arguments.index_device,
        effort=arguments.effort,
    )


def _token(arguments: argparse.Namespace) -> str:
    """The bearer token, "" for none: only this machine, or whoever is told to be trusted, does without."""
    if arguments.token_file is not None:
        if arguments.open:
            raise UserError("--open lets everybody in and --token-file does not; give one of them")
        if make_token(arguments.token_file):
            print(f"retriever: wrote a new token to {arguments.token_file}", flush=True)
        return read_token(arguments.token_file)
    if arguments.fd == -1 and not is_loopback(arguments.host) and not arguments.open:
        raise UserError(
            f"--host {arguments.host} is reached from other machines; give --token-file FILE (made if it is not there) "
            "and the same file to the runs as retriever.token_file, or --open for a network that you trust"
        )
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searche1 retriever",
        description="Serve a corpus over Search-R1's HTTP interface: POST /retrieve, GET /health, GET /metrics.",
        epilog="docs/retrieval.md goes from nothing to Wikipedia served.",
    )
    group = parser.add_argument_group("what is searched")
    group.add_argument("--corpus", type=Path, help='.jsonl or .jsonl.gz of {"id", "contents"} rows')
    group.add_argument("--index", type=Path, help="folder of tools/build_index.py, or a bare FAISS file")
    group.add_argument("--encoder", default="", help="encoder of a bare FAISS file, or where the index's lies now")
    group.add_argument("--style", default="", help="style of a bare FAISS file's encoder: e5, bge, plain, ...")
    group.add_argument("--searxng", default="", metavar="URL", help="search the web through this SearxNG instead")
    group.add_argument("--topk", type=int, default=3, help="passages per query unless a request says (default 3)")
    group.add_argument("--reranker", default="", help="cross-encoder that judges what is found: folder or hub id")
    group.add_argument("--candidates", type=int, default=10, help="passages per query that it judges (default 10)")

    group = parser.add_argument_group("where it is computed")
    group.add_argument("--device", default="auto", help="of encoder and reranker: auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", help="auto (float16 on a GPU, else float32), bfloat16, ...")
    group.add_argument("--encoders", type=int, default=1, help="encoder processes, on the GPUs in turn (default 1)")
    group.add_argument(
        "--index-device", default="cpu", choices=("cpu", "cuda"), help="cuda: float16, over all GPUs (faiss-gpu)"
    )
    group.add_argument("--shards", type=int, default=1, help="processes that the index is split over (Flat, SQfp16)")
    group.add_argument("--replicas", type=int, default=1, help="processes for each shard; they share its memory")
    group.add_argument("--threads", type=int, default=0, help="CPU threads of every process (default: all cores)")
    group.add_argument("--effort", type=int, default=0, help="HNSW's efSearch or IVF's nprobe (default: the index's)")

    group = parser.add_argument_group("how it is served")
    group.add_argument("--host", default="127.0.0.1", help="interface to serve on (default: this machine only)")
    group.add_argument("--port", type=int, default=8000, help="port to serve on, 0 for a free one (default 8000)")
    group.add_argument("--token-file", type=Path, help="clients must send the token in it; made if it is not there")
    group.add_argument("--open", action="store_true", help="serve other machines without a token")
    group.add_argument("--max-batch", type=int, default=512, help="queries searched together (default 512)")
    group.add_argument("--max-wait-ms", type=float, default=10, help="longest wait for others to join (default 10)")
    group.add_argument("--max-pending", type=int, default=20_000, help="queries waiting before 503 (default 20,000)")
    group.add_argument("--cache-size", type=int, default=100_000, help="answers remembered (default 100,000)")
    group.add_argument("--timeout-s", type=float, default=120, help="longest time for a request (default 120)")
    group.add_argument("--fd", type=int, default=-1, help=argparse.SUPPRESS)  # both set by launch_retriever
    group.add_argument("--parent", type=int, default=-1, help=argparse.SUPPRESS)
    return parser
