"""A retriever of our own as a child process: it starts with a run and lives no longer than it."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from searche1.ports import hold_port
from searche1.retrieval.listen import address
from searche1.types import UserError

PROGRESS_EVERY_S = 10.0
LOG_TAIL_LINES = 8
FIRST_PAUSE_S = 1.0  # before it is started again; grows
MAX_PAUSE_S = 60.0


class RetrieverServer:
    """A child process that serves. Stops on `stop`, at the end of `with`, and when this process ends in any way."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], bound: socket.socket, log_path: Path) -> None:
        self.url = address(bound)
        self.log_path = log_path
        self.process = start()
        self._start = start
        self._bound = bound
        self._is_stopping = threading.Event()
        self._changing = threading.Lock()
        atexit.register(self.stop)

    def keep_alive(self) -> None:
        """From now on, starts it again at the same address whenever it ends: requests wait in its socket meanwhile."""
        # The thread lasts as long as the server: Linux ends a child with the thread that started it.
        threading.Thread(target=self._watch, name="retriever", daemon=True).start()

    def restart(self) -> None:
        """Starts a child that has ended once more."""
        self.process = self._start()

    def stop(self) -> None:
        """Ends the child; may be called again."""
        atexit.unregister(self.stop)
        self._is_stopping.set()
        with self._changing:
            self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self._bound.close()

    def _watch(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            code = self.process.wait()
            if self._is_stopping.wait(pause_s):
                return
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
            with self._changing:
                if self._is_stopping.is_set():
                    return
                print(
                    f"the retriever ended with exit code {code} (log: {self.log_path}); starting it again",
                    file=sys.stderr,
                    flush=True,
                )
                self.process = self._start()

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
    """Starts a server on the loopback interface and returns when it answers; later it is kept alive.

    Port 0 picks a free one, 0 threads take all cores. Raises UserError that quotes the child's log.
    """
    log_path = Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    options = {"corpus": corpus, "index": index, "topk": topk, "encoder": encoder, "style": style, "device": device}
    options["threads"] = threads
    command = [sys.executable, "-m", "searche1", "retriever"]
    command += [f"--{name}={value}" for name, value in options.items()]
    bound = hold_port("127.0.0.1", port, setting="the retriever's port")
    log_start = log_path.stat().st_size if log_path.exists() else 0

    def start() -> subprocess.Popen[bytes]:
        # The child gets our bound socket: nobody can take the port in between. Its own session keeps a
        # Ctrl-C for us, who may still need it to finish.
        with log_path.open("ab") as log:
            return subprocess.Popen(
                [*command, f"--fd={bound.fileno()}", f"--parent={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[bound.fileno()],
                start_new_session=True,
            )

    server = RetrieverServer(start, bound, log_path)
    try:
        _wait_until_healthy(server, log_start=log_start, timeout_s=start_timeout_s)
    except BaseException:  # Ctrl-C too: nobody else holds the handle yet
        server.stop()
        raise
    server.keep_alive()
    return server


def _wait_until_healthy(server: RetrieverServer, *, log_start: int, timeout_s: float) -> None:
    # No proxy: a proxy of the environment does not know this machine's loopback interface.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    health_url = server.url.removesuffix("/retrieve") + "/health"
    start = time.monotonic()
    next_report_s = PROGRESS_EVERY_S
    may_restart = True
    while True:
        try:
            opener.open(health_url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            waited_s = time.monotonic() - start  # not listening yet
        code = server.process.poll()
        if code == -signal.SIGKILL and may_restart:  # whoever killed it may have had another reason
            may_restart = False
            server.restart()
            continue
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
