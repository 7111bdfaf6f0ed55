"""SGLang, as a server process that starts and dies with us. Nothing else talks to it.

The same code runs on a GPU and on a CPU, where cpu_platform.py is SGLang's platform. Token ids go in and come out:
the ids that the engine sampled are the ids that are trained. Works with SGLang 0.5.17 to 0.5.23.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import errno
import importlib.util
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import aiohttp
import torch
import torch.multiprocessing  # registers how tensors travel between processes
from torch import Tensor

from searche1.ports import hold_port
from searche1.rollout.engine_process import engine_environment, start_process
from searche1.rollout.pending import NO_ANSWER, Answer, Pending
from searche1.types import Completion, UserError

CPU_MAX_TOTAL_TOKENS = 65536  # the cache is filled with zeros at the start, and SGLang's own choice is most of memory
LOG_TAIL_LINES = 20
STOP_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 30.0
READY_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 20.0  # a busy server answers in milliseconds
ENDING_TIMEOUT_S = 2.0
# Servers close a connection that rests for 5 s, and whoever asks on it in that moment gets no answer.
KEEP_ALIVE_S = 2.0
PROGRESS_EVERY_S = 10.0
WEIGHTS, CACHE = "weights", "kv_cache"  # SGLang's names of what an engine can put to sleep
# Loaders of weights beside SGLang's own: one that changes nothing, and one that takes over the memory they lie in.
COMPARE, ADOPT = (f"searche1.rollout.weight_loaders.{name}" for name in ("compare", "adopt"))


class EngineError(UserError):
    """An engine refused, failed or died. A trajectory it happens to is an error, never an empty completion."""


class EngineLost(EngineError):
    """An engine does not answer any more: whatever it was doing has to be done by another."""


def http_session() -> aiohttp.ClientSession:
    """For `Engine.generate`: a connection for every request under way. Call it inside an event loop."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S))


class Engine:
    """One SGLang server, as its client sees it, and its process where we started it.

    `start_engine` makes a process; `with` or `stop()` ends it, and so does our own end.
    """

    def __init__(
        self,
        *,
        url: str,
        log_path: Path | None = None,
        request_timeout_s: float = 600.0,
        launch: Callable[[], subprocess.Popen[bytes]] | None = None,
        key: str = "",
        ports: Sequence[socket.socket] = (),
    ) -> None:
        """A client of the server at `url` that knows its API key; with `launch`, which starts it, its owner too.

        `ports` are held for it until `stop`.
        """
        self.url = url.rstrip("/")
        self.key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.log_path = log_path
        self._ports = ports
        self._launch = launch
        self._process = launch() if launch else None
        self.starts = 1  # a new process has forgotten what an earlier one was told
        self._request_timeout_s = request_timeout_s
        self._is_announced = self._has_sessions = False  # of a weight update
        if launch:
            atexit.register(self.stop)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, *, timeout_s: float) -> None:
        """Returns when the server has generated a first token; meanwhile says now and then that it waits.

        A process that is killed meanwhile is started once more: whoever killed it may have had another reason.
        """
        start = time.monotonic()
        next_report_s = PROGRESS_EVERY_S
        may_restart = self._launch is not None
        seen = "nothing was asked"
        while (waited := time.monotonic() - start) < timeout_s:
            if self.has_stopped():
                if may_restart and self._process is not None and self._process.returncode == -signal.SIGKILL:
                    may_restart = False
                    self.restart()
                    continue
                raise EngineError(f"the engine stopped while starting\n{self._last_words()}")
            try:
                status = self._ask("GET", "/health", timeout_s=READY_TIMEOUT_S).answer().status
                if status == 200:
                    return  # SGLang's warm-up is over
                seen = f"/health answered HTTP status {status}"
            except NO_ANSWER as error:  # not listening yet
                seen = f"{type(error).__name__}: {error}"
            if waited > next_report_s:
                where = f" (log: {self.log_path})" if self.log_path else ""
                print(f"waiting for the engine at {self.url}, {waited:.0f} s{where}", file=sys.stderr, flush=True)
                next_report_s += PROGRESS_EVERY_S
            time.sleep(0.1)
        self.stop()
        way_out = (
            "raise engine.start_timeout_s if it was still loading"
            if self._launch
            else "start it, or correct engine.urls, and run the same command again"
        )
        raise EngineError(
            f"the engine at {self.url} was not ready within {timeout_s:g} s ({seen}); {way_out}\n{self._last_words()}"
        )

    def check_key(self) -> None:
        """Raises EngineError if a server elsewhere, which is up, does not take our key."""
        if self._ask("GET", "/get_model_info", timeout_s=READY_TIMEOUT_S).answer().status == 401:
            raise EngineError(
                f"{self.url} answers HTTP status 401: it wants an API key; give a file with it as engine.token_file"
            )

    async def generate(
        self,
        session: aiohttp.ClientSession,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
        seed: int,
    ) -> Completion:
        """One completion of `token_ids`; temperature 0 is greedy. A stop string stays in the completion.

        `seed` (below 2**31) and a token's position decide its draw where SGLang samples deterministically: always on
        a CPU. Raises EngineError.
        """
        request = {
            "input_ids": list(token_ids),
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "stop": list(stop),
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "sampling_seed": seed,
            },
        }
        timeout = aiohttp.ClientTimeout(total=self._request_timeout_s)
        try:
            async with session.post(
                f"{self.url}/generate", json=request, timeout=timeout, headers=self._headers
            ) as response:
                status, body = response.status, await response.text(errors="replace")
        except TimeoutError as error:
            raise EngineLost(f"{self.url} did not complete a turn within {self._request_timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise UserError(
                    "this process may not open more connections to engines; raise `ulimit -n` (65536 is enough), or "
                    "lower rollout.max_in_flight"
                ) from error
            raise EngineLost(f"{self.url} failed: {type(error).__name__}: {error}\n{self._last_words()}") from error
        if status != 200:
            raise EngineError(f"{self.url} refused a completion with HTTP status {status}: {body[:500]}")
        return parse_completion(body)

    def logprobs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Logprobs of every id but the first, given the ids before it; one list a sequence."""
        return self.begin_logprobs(token_ids)()

    def begin_logprobs(self, token_ids: Sequence[Sequence[int]]) -> Callable[[], list[list[float]]]:
        """Has the engine compute them and returns; what it returns waits for them, once."""
        request = {
            "input_ids": [list(ids) for ids in token_ids],
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        }
        answer = self._begin_post("/generate", request)
        return lambda: [[entry[0] for entry in one["meta_info"]["input_token_logprobs"][1:]] for one in answer().json()]

    def begin_update(self) -> None:
        """New weights follow, in buckets or in memory that it has adopted. No request may be under way."""
        if self._has_sessions:  # an update that failed on the way left it open
            self._post("/end_weight_update", {}, accept=(200, 400))
        self._is_announced = self._has_sessions = False

    def load_bucket(self, payloads: Sequence[str], *, load_format: str | None = None) -> None:
        """Replaces some weights by HuggingFace-named tensors; as format, `COMPARE` compares and `ADOPT` takes over.

        `payloads` holds a `shared(tensors)` for each of the engine's ranks, from the GPU it runs on. Its memory must
        stay untouched until this returns; adopted memory may be written while no request is under way.
        """
        if not self._is_announced:  # servers before 0.5.21 load at once and have no sessions
            self._has_sessions = self._post("/begin_weight_update", {}, accept=(200, 404)).status == 200
            self._is_announced = True
        request = {"serialized_named_tensors": list(payloads), "flush_cache": False, "load_format": load_format}
        answer = self._post("/update_weights_from_tensor", request).json()
        if not answer["success"]:
            raise EngineError(f"{self.url} did not load weights: {answer['message']}")

    def end_update(self, *, version: str) -> None:
        """Later completions carry `version`."""
        if self._has_sessions:
            self._post("/end_weight_update", {})
        self._is_announced = self._has_sessions = False
        self._tell_version(version)

    def load_folder(self, folder: Path, *, version: str) -> None:
        """Replaces the weights by those of a HuggingFace folder that the server's machine sees too."""
        request = {"model_path": str(folder), "flush_cache": False}
        answer = self._post("/update_weights_from_disk", request, accept=(200, 400)).json()
        if not answer["success"]:
            raise EngineError(
                f"{self.url} did not load {folder}: {answer['message']}; "
                "the run directory must be on a filesystem that the server's machine sees under the same path"
            )
        self._tell_version(version)

    def _tell_version(self, version: str) -> None:
        """The weights are new: completions carry `version`, and what is cached of the old ones is forgotten."""
        request = {"new_version": version, "abort_all_requests": False}
        is_known = self._begin_post("/update_weight_version", request)
        try:
            self.flush_cache()  # meanwhile
        finally:
            is_known()

    def flush_cache(self) -> None:
        """Forgets all cached prefixes. Waits for requests that a cancelled client has left behind."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while self._post("/flush_cache", None, accept=(200, 400)).status != 200:
            if time.monotonic() > deadline:
                raise EngineError(f"{self.url} still has requests under way after {FLUSH_TIMEOUT_S:g} s")
            time.sleep(0.1)

    def sleep(self, part: str) -> None:
        """Gives the GPU memory of `WEIGHTS` or `CACHE` to the trainer. On a CPU nothing moves."""
        self.flush_cache()  # SGLang refuses while requests are under way
        self._post("/release_memory_occupation", {"tags": [part]})

    def wake(self, part: str) -> None:
        """Takes the memory back, without its contents: weights have to be loaded again."""
        self._post("/resume_memory_occupation", {"tags": [part]})

    def has_stopped(self) -> bool:
        """Whether the process that we started has ended."""
        return self._process is not None and self._process.poll() is not None

    def answers(self) -> bool:
        """Whether the scheduler behind the server says anything, soon.

        What it is asked must not need weights or cache: while they sleep, a forward pass would be its end, and SGLang's
        own /health_generate makes one.
        """
        try:
            answer = self._ask("POST", "/flush_cache", timeout_s=HEALTH_TIMEOUT_S).answer()
            return answer.status in (200, 400)  # the second while requests are under way
        except NO_ANSWER:
            return False

    def restart(self) -> None:
        """Ends what is left of the process and starts it anew, with the weights it first had."""
        assert self._launch is not None, "only the rank that started an engine can start it again"
        self._end_process()
        self._process = self._launch()
        self.starts += 1
        self._is_announced = self._has_sessions = False

    def stop(self) -> None:
        """Ends the server and its children. May be called again."""
        atexit.unregister(self.stop)
        self._end_process()
        for port in self._ports:
            port.close()

    def _end_process(self) -> None:
        if self._process is None:
            return
        # A polite SIGTERM takes SGLang 8 s. Its workers die with their parent; the resource tracker that it leaves
        # behind then removes the shared memory and ends.
        self._process.kill()
        self._process.wait()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _group_exists(self._process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        if _group_exists(self._process.pid):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _post(self, route: str, request: Any, *, accept: Sequence[int] = (200,)) -> Answer:
        return self._begin_post(route, request, accept=accept)()

    def _begin_post(self, route: str, request: Any, *, accept: Sequence[int] = (200,)) -> Callable[[], Answer]:
        """Sends a request; what it returns waits for the answer, once. Both raise EngineError."""
        with self._lost_without_answer(route):
            pending = self._ask("POST", route, request, timeout_s=self._request_timeout_s)

        def answer() -> Answer:
            with self._lost_without_answer(route):
                found = pending.answer()
            if found.status not in accept:
                raise EngineError(
                    f"{self.url}{route} answered HTTP status {found.status}: {found.text[:1000]}\n{self._last_words()}"
                )
            return found

        return answer

    def _ask(self, method: str, route: str, request: Any = None, *, timeout_s: float) -> Pending:
        return Pending(method, self.url + route, headers=self._headers, request=request, timeout_s=timeout_s)

    @contextlib.contextmanager
    def _lost_without_answer(self, route: str) -> Iterator[None]:
        try:
            yield
        except NO_ANSWER as error:
            if self._process is not None:  # a process that is ending has closed its connections already
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=ENDING_TIMEOUT_S)
            reason = f"{type(error).__name__}: {error}"
            raise EngineLost(f"{self.url}{route} failed: {reason}\n{self._last_words()}") from error

    def _last_words(self) -> str:
        if self.log_path is None:
            return "(look into the log of that server)"
        code = self._process.poll() if self._process else None
        state = "the end of" if self._process is None else "still running;" if code is None else f"exit code {code};"
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"({state} {self.log_path}:)", *(f"  {line}" for line in lines)])


def start_engine(
    *,
    model_path: str | Path,
    device: str,
    dtype: str,
    tensor: int,
    port: int,
    seed: int,
    mem_fraction: float,
    max_total_tokens: int,
    max_running: int,
    context_length: int,
    attention_backend: str,
    log_path: str | Path,
    request_timeout_s: float = 600.0,
    sampling_backend: str = "",
    cuda_graph: bool = True,
    host: str = "127.0.0.1",
    can_sleep: bool = False,
) -> Engine:
    """Starts a server and returns at once; `Engine.wait_until_ready` comes next.

    Call it from the main thread: the server dies with the thread that started it.
    device is "cpu", "cuda" or "cuda:3" (the first of `tensor` GPUs). port 0 picks a free one; context_length 0 is the
    model's, max_total_tokens 0 is SGLang's choice (on a CPU 65536), an empty attention_backend is the device's best.
    host is the address it listens at. `can_sleep` on a GPU needs the package torch_memory_saver.
    """
    assert threading.current_thread() is threading.main_thread()
    kind, _, index = device.partition(":")
    # For HTTP, and for where the engine's own ranks meet.
    ports = (hold_port(host, port, setting="engine.port"), hold_port("", 0, setting="engine.port"))
    port, meeting_port = (held.getsockname()[1] for held in ports)
    key = secrets.token_hex(32)  # who may ask it may also give it weights, which are pickles
    command = ["--model-path", str(model_path)]
    command += ["--host", host, "--port", str(port), "--nccl-port", str(meeting_port), "--log-level", "warning"]
    command += ["--dtype", dtype, "--tp-size", str(tensor), "--random-seed", str(seed)]
    command += ["--mem-fraction-static", str(mem_fraction), "--max-running-requests", str(max_running)]
    command += ["--grammar-backend", "none", "--custom-weight-loader", COMPARE, ADOPT]
    if context_length:
        command += ["--context-length", str(context_length)]
    if kind == "cpu":
        command += ["--device", "cpu", "--disable-cuda-graph"]
        command += ["--attention-backend", attention_backend or "torch_native"]
        command += ["--max-total-tokens", str(max_total_tokens or CPU_MAX_TOTAL_TOKENS)]
        # The scheduler spins while it waits, which starves a trainer on the same cores.
        command += ["--sleep-on-idle"]
        command += ["--enable-deterministic-inference"]  # a request's own seed counts
    else:
        command += ["--device", "cuda", "--base-gpu-id", index or "0"]
        if sampling_backend:
            command += ["--sampling-backend", sampling_backend]
        if not cuda_graph:
            command += ["--disable-cuda-graph"]
        if attention_backend:
            command += ["--attention-backend", attention_backend]
        if max_total_tokens:
            command += ["--max-total-tokens", str(max_total_tokens)]
        if can_sleep:
            if importlib.util.find_spec("torch_memory_saver") is None:
                raise UserError(
                    "engines that share GPUs with the trainer need the package torch_memory_saver, which is not "
                    "installed; install it (it is in requirements/), or set train.offload=never"
                )
            command += ["--enable-memory-saver"]

    log_path = Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.write_bytes(b"")

    def launch() -> subprocess.Popen[bytes]:
        environment = engine_environment(kind, host=host, tensor=tensor)
        return start_process(command, environment=environment, key=key, log_path=log_path)

    url = f"http://{host}:{port}"
    return Engine(url=url, log_path=log_path, request_timeout_s=request_timeout_s, launch=launch, key=key, ports=ports)


def parse_completion(body: str) -> Completion:
    """SGLang's answer to /generate. Raises EngineError if the request was aborted, or the answer is none."""
    try:
        answer = json.loads(body)
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] == "abort":
            raise EngineError(f"the engine aborted a completion: {reason.get('message', 'no reason given')}")
        sampled = meta["output_token_logprobs"]  # [logprob, id, text] each
        return Completion(
            token_ids=tuple(int(entry[1]) for entry in sampled),
            logprobs=tuple(float(entry[0]) for entry in sampled),
            text=str(answer["text"]),
            finish_reason=str(reason["type"]),
            weight_version=str(meta["weight_version"]),
        )
    except EngineError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(f"the engine answered what is no completion of SGLang's: {body[:300]!r}") from error


def shared(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A handle of named tensors' memory for one process, which SGLang's MultiprocessingSerializer opens.

    On a GPU the memory stays where it is and may be freed once the reader has let go; on a CPU it moves to /dev/shm.
    """
    sharing = torch.multiprocessing.get_sharing_strategy()
    # By name: with file descriptors, the default, the server would have to be our child by fork.
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(list(tensors))
    finally:
        torch.multiprocessing.set_sharing_strategy(sharing)
    return base64.b64encode(buffer.getvalue()).decode()


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
