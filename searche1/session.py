"""What lives through a run on this rank: process groups, engines, retriever, sampler, metrics.

Engines and the retriever are servers that rank 0 starts and drives; every method marked "collective" runs on all
ranks, and what rank 0 found out is the same on all of them afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from megatron_ext import blas
from megatron_ext.host import use_threads
from megatron_ext.lifetime import forks_die_with_us
from megatron_ext.lora import LoraSettings
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.parallel import Layout, close_parallel, init_parallel
from megatron_ext.vocab_parallel import native
from searche1.colocation import Phase
from searche1.config import Config
from searche1.data import load_questions, question_files, read_groups, write_groups
from searche1.engines import Engines, places_of
from searche1.health import HEALTH_FILE, Watch
from searche1.metrics import MetricsLog, Phases, Tracker, WandbTracker
from searche1.models import choose_device, choose_dtype, load_tokenizer, resolve_model
from searche1.packing import padded_length, sharing_of
from searche1.planner.fit import WITHOUT_GPU, fit_to_gpu, leaves_open, with_train
from searche1.planner.hardware import GPUS, Assumptions, Cluster
from searche1.policy import Policy, check_model, read_shape
from searche1.probe import PROBE_SEQUENCES, SyncProbe
from searche1.progress import progress_line
from searche1.ranks import Ranks
from searche1.rollout.fleet import NoEngineLeft
from searche1.rollout.journal import Entry, Journal, read_journal
from searche1.rollout.sampler import Place, Rollouts, Sampler, Start
from searche1.rollout.servers import longest_context
from searche1.runs import Run, only_run_in, open_run, share_of_cores
from searche1.screen import Screen
from searche1.stopping import StopRequest, end_on_interrupt
from searche1.timeline import Timeline
from searche1.types import Group, Question, SharedError, Stopped, Trajectory, UserError

T = TypeVar("T")

COLLECTIVE_TIMEOUT_S = 4 * 3600.0  # of one message: engines start and slow disks are written meanwhile
SHARE_OF_GPU = 0.93  # that a plan may fill: the rest is left to the allocator's gaps
MOST_OPEN_FILES = 65536  # rank 0 holds a connection for every trajectory under way
MAX_RESTARTS = 3  # of engines in one rollout: a fault that comes back is not mended by another start


def check_before_start(config: Config, model_path: Path, layout: Layout, needs: Sequence[str]) -> None:
    """Everything that can be found wrong in a second, before minutes of start-up. Raises UserError."""
    check_model(model_path, layout, config.train)
    load_tokenizer(model_path, config.prompt)
    for name in needs:
        path = getattr(config.data, name)
        if not path:
            raise UserError(f"data.{name} is not set; give a file of questions, .jsonl or Search-R1's .parquet")
        load_questions(path)
    if not config.retriever.url:
        for key, path in (("corpus", config.retriever.corpus), ("index", config.retriever.index)):
            if not Path(path).exists() or not path:
                raise UserError(
                    f"retriever.{key}={path!r} does not exist; give a corpus and an index made by "
                    "tools/build_index.py, or the address of a running retriever as retriever.url"
                )
    longest = config.rollout.max_start_tokens + config.rollout.max_context_tokens
    if padded_length(longest, sharing_of(layout)) > config.train.max_tokens:
        raise UserError(
            f"a trajectory may have {longest} tokens (rollout.max_start_tokens + rollout.max_context_tokens) but "
            f"train.max_tokens={config.train.max_tokens} is the memory budget of a micro-batch; raise it or lower them"
        )
    places_of(config, device=layout.device.type, world_size=layout.world_size)
    needed = longest_context(config) + config.rollout.max_response_tokens
    if 0 < config.engine.max_total_tokens < needed:
        raise UserError(
            f"engine.max_total_tokens={config.engine.max_total_tokens} cannot hold one sequence of {needed} tokens; "
            f"raise it, or lower rollout.max_context_tokens and opsd.max_teacher_tokens"
        )


class Session:
    """Open with `open_session`, which also closes what it started."""

    def __init__(
        self, config: Config, stack: contextlib.ExitStack, needs: Sequence[str], prepare: Callable[[], None]
    ) -> None:
        self.config = config
        self._stop = StopRequest()
        stack.enter_context(self._stop.listening())
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        forks_die_with_us()  # such as the writers of checkpoints, who would hold on to the run directory
        self.console = Console(stderr=False, highlight=False)
        device = choose_device(config.run.device)
        if device == "cpu":
            use_threads(config.train.threads or share_of_cores())
        parallel = config.parallel
        try:
            self.layout = init_parallel(
                tensor=parallel.tensor,
                pipeline=parallel.pipeline,
                sequence=parallel.sequence,
                expert=parallel.expert,
                context=parallel.context,
                device=device,
                timeout_s=max(COLLECTIVE_TIMEOUT_S, config.train.timeout_s),
            )
        except ValueError as error:
            raise SharedError(str(error)) from error
        stack.callback(close_parallel)
        self.ranks = Ranks(self.layout, timeout_s=config.train.timeout_s)
        allow_open_files(MOST_OPEN_FILES)
        self.ranks.from_writer(prepare, beats=True)
        self.model_path = self.ranks.from_writer(lambda: resolve_model(config.model.path), beats=True)
        settings = config  # as they are given, for the run directory
        if leaves_open(config):
            self.config = config = self._fitted(config)
        # Before the run directory holds these settings, which it would then insist on.
        self.from_writer(lambda: check_before_start(config, self.model_path, self.layout, needs))
        self.run: Run = self.from_writer(lambda: self._open_run(settings, stack, needs))
        self.metrics: MetricsLog | None = None  # on rank 0
        self.timeline = Timeline(self.run.directory, rank=self.ranks.rank)
        self.screen = Screen(self.console, self.run.directory)
        if self.layout.is_writer:
            log = MetricsLog(
                self.run.metrics_path,
                console=self.console,
                memory=lambda: peak_memory_gb(self.layout.device),
                on_step=self.screen.step,
                tracker=self._tracker(),
            )
            self.metrics = stack.enter_context(contextlib.closing(log))
            stack.enter_context(self.screen)
        started = time.monotonic()
        number = len(config.engine.urls) or len(places_of(config, device=device, world_size=self.ranks.world_size))
        self.tell(f"starting {number} SGLang engine(s) and the retriever, logs in {self.run.directory / 'logs'}")
        self.engines = Engines(
            config,
            self.ranks,
            model_path=self.model_path,
            device=self.layout.device,
            dtype=str(choose_dtype(config.train.dtype, self.layout.device.type)).removeprefix("torch."),
            directory=self.run.directory,
            stack=stack,
            tell=self.tell,
        )
        self.tell(f"retriever and {number} SGLang engine(s) ready ({time.monotonic() - started:.0f} s)")
        self.servers = self.engines.servers  # on rank 0
        self._synced: tuple[Policy, str] | None = None  # whose weights the engines have, and for which stage
        # Prompts, until there are trajectories.
        probe_file = getattr(config.data, needs[0])
        engines = self.servers.fleet.engines if self.servers else ()
        self.probe = SyncProbe(config, self.layout, self.ranks, engines)
        self.probe.token_ids = self.from_writer(lambda: self._prompts(probe_file))
        stack.callback(end_on_interrupt)  # servers are being stopped then: a second Ctrl-C means it
        gc.freeze()  # what is here stays: a full collection, which every checkpoint asks for, need not look at it

    def _fitted(self, config: Config) -> Config:
        """With what the config leaves to this GPU's memory, or to a CPU that has enough."""
        if self.layout.device.type == "cuda":
            memory = SHARE_OF_GPU * torch.cuda.get_device_properties(self.layout.device).total_memory
            gpu = dataclasses.replace(GPUS["h100"], name="this GPU", memory=memory)
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            cluster = Cluster(gpu, self.layout.world_size // per_node, per_node)
            config = self.from_writer(lambda: fit_to_gpu(config, read_shape(self.model_path), cluster, Assumptions()))
        else:
            recompute, max_tokens = WITHOUT_GPU
            recompute = recompute if config.train.recompute == "auto" else config.train.recompute
            config = with_train(config, recompute=recompute, max_tokens=config.train.max_tokens or max_tokens)
        self.tell(f"chosen: train.recompute={config.train.recompute} train.max_tokens={config.train.max_tokens}")
        return config

    def _open_run(self, settings: Config, stack: contextlib.ExitStack, needs: Sequence[str]) -> Run:
        stack.enter_context(only_run_in(Path(settings.run.out)))
        inputs = {f"data.{name}": question_files(Path(getattr(settings.data, name))) for name in needs}
        return open_run(settings.run.out, settings, inputs=inputs)

    def _tracker(self) -> Tracker | None:
        project, directory = self.config.run.wandb, self.run.directory
        settings = dataclasses.asdict(self.config)
        return WandbTracker(project=project, directory=directory, config=settings) if project else None

    def _prompts(self, file: str) -> list[tuple[int, ...]]:
        assert self.servers is not None
        return [self.servers.student_prompt(question) for question in load_questions(file)[:PROBE_SEQUENCES]]

    # -- talking ----------------------------------------------------------------------------------

    def tell(self, message: str) -> None:
        """One line to the person watching, from rank 0."""
        if self.layout.is_writer:
            self.console.print(message, markup=False, soft_wrap=True)

    def from_writer(self, function: Callable[[], T]) -> T:
        """The result of `function` on rank 0, on every rank; see `Ranks.from_writer`. Collective."""
        return self.ranks.from_writer(function)

    # -- policies and engines ---------------------------------------------------------------------

    def policy(
        self, model_path: Path, *, optimizer: OptimizerSettings | None, lora: LoraSettings | None = None
    ) -> Policy:
        """A policy from a HuggingFace folder in this run's layout. Collective."""
        colocation = self.engines.colocation
        if colocation.phase is Phase.ROLLOUT and self._synced is not None:
            self.engines.mend(self._synced[0])  # one that hangs would not give its memory
        self._synced = None
        colocation.to(Phase.TRAIN, None)
        gc.collect()  # the model of the stage before is cyclic garbage, and its memory is needed now
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()
            if hasattr(torch.accelerator, "empty_host_cache"):  # page-locked memory of its offloading
                torch.accelerator.empty_host_cache()
        else:
            remedy = "(searche1 doctor has the remedy)"
            if reason := native.why_absent():
                self.tell(f"  losses run in plain torch, several times slower: {reason} {remedy}")
            if reason := blas.missing():
                self.tell(f"  products of matrices are PyTorch's, which may be slower: {reason} {remedy}")
        return Policy(
            model_path=model_path, layout=self.layout, train=self.config.train, optimizer=optimizer, lora=lora
        )

    def to_trainer(self, policy: Policy) -> None:
        """The GPUs belong to the policy until the next sync. Collective."""
        colocation = self.engines.colocation
        # One that does not answer would not give its memory either, and one that is started anew needs all weights.
        if colocation.phase is Phase.ROLLOUT and self.engines.mend(policy):
            self._synced = None
        colocation.to(Phase.TRAIN, policy)

    def end_rollouts(self, policy: Policy) -> None:
        """The same for a run that stops: its engines, well or not, end instead of giving way. Collective."""
        self._synced = None
        self.engines.end()
        self.engines.colocation.to(Phase.TRAIN, policy)

    def sync(self, policy: Policy, *, stage: str) -> None:
        """Put the policy's merged weights into every engine and prove it; the GPUs are the engines' then. Collective.

        Engines that have died, also on the way, are started again. Raises UserError if engine and trainer logprobs
        then differ beyond tolerance.
        """
        for attempt in range(1 + MAX_RESTARTS):
            if self.engines.mend(policy):
                self._synced = None
            try:
                self._sync(policy, stage=stage)
                break
            except SharedError:  # what a single rank has met, the others do not wait for
                self.engines.find_hanging()
                if attempt == MAX_RESTARTS or not self.engines.broken():
                    raise

    def _sync(self, policy: Policy, *, stage: str) -> None:
        colocation = self.engines.colocation
        if colocation.phase is Phase.ROLLOUT:
            colocation.to(Phase.TRAIN, policy)  # weights that are loaded beside a cache might not fit
        has_base = colocation.keeps_engine_weights and self._synced is not None and self._synced[0] is policy
        colocation.to(Phase.SYNC, policy)
        self.engines.load(policy, version=f"{stage}:{policy.version}", only_adapted=has_base and policy.has_adapters)
        self.probe.prove(policy, colocation)
        self._synced = policy, stage

    # -- rollouts ---------------------------------------------------------------------------------

    def rollout(
        self,
        questions: Sequence[Question],
        *,
        samples: int,
        temperature: float,
        seed: int,
        title: str,
        file: Path,
    ) -> list[Group]:
        """`samples` scored trajectories per question, from the weights of the last sync. Collective.

        They are kept in `file`, and come from it if it is there. A run that was stopped on the way goes on with what
        it had finished. Raises Stopped when the run is asked to stop.
        """
        if self.from_writer(file.is_file):
            return self.from_writer(lambda: read_groups(file))

        def begin() -> tuple[Sampler, Rollouts]:
            assert self.servers is not None
            sampler = self.servers.student
            return sampler, Rollouts(sampler.starts(questions), samples)

        unfinished = file.with_name(f"{file.name}.unfinished")
        groups = self._sample(begin, temperature=temperature, seed=seed, title=title, unfinished=unfinished)

        def keep() -> None:
            write_groups(file, groups)
            unfinished.unlink()

        self.from_writer(keep)
        self.probe.remember(groups)
        return groups

    def continue_trajectories(
        self, starts: Sequence[Start], *, samples: int, temperature: float, seed: int, title: str
    ) -> list[Group]:
        """Trajectories continued from given prompts and spans, which may hold a reference. Collective."""

        def begin() -> tuple[Sampler, Rollouts]:
            assert self.servers is not None
            return self.servers.teacher, Rollouts(starts, samples)

        return self._sample(begin, temperature=temperature, seed=seed, title=title)

    def _sample(
        self,
        begin: Callable[[], tuple[Sampler, Rollouts]],
        *,
        temperature: float,
        seed: int,
        title: str,
        unfinished: Path | None = None,
    ) -> list[Group]:
        """Sample to the end, also when no engine is left on the way: they are started again. Collective.

        What is done is written to `unfinished` as it finishes, and taken from there first.
        """
        assert self._synced is not None, "engines have weights after a sync"
        policy, stage = self._synced
        work = begin() if self.layout.is_writer else None

        def run() -> list[Group] | None:
            assert work is not None
            sampler, rollouts = work
            show = self.screen.status if self.screen.is_on else None
            keeping = contextlib.nullcontext() if unfinished is None else kept_in(unfinished, rollouts)
            with keeping as journal, progress_line(self.console, title, self.ranks.beat, show=show) as progress:

                def tick() -> None:
                    if journal is not None:
                        journal.poll()
                    if self._stop.is_made:
                        raise Stopped(f"stopped during {title}; the same command continues from there")

                try:
                    return sampler.sample(rollouts, temperature=temperature, seed=seed, progress=progress, tick=tick)
                except (NoEngineLeft, UserError) as error:
                    tick()  # who asks us to stop may have asked engines and retriever too
                    if isinstance(error, UserError):
                        raise
                    attempts.append(str(error))
                    if len(attempts) > MAX_RESTARTS:
                        raise UserError(
                            f"engines have died {len(attempts)} times during {title}; the last fault: {error}"
                        ) from error
                    return None

        attempts: list[str] = []
        with self.timeline(title):
            while (groups := self.from_writer(run)) is None:
                self.sync(policy, stage=stage)
        return groups

    def watch(self, stage: str) -> Watch:
        """The record of a stage's health; it is kept on rank 0."""
        return Watch(self.run.directory / HEALTH_FILE, stage, self.config.health, self.tell)

    def continue_behind(self, watch: Watch, step: int) -> int:
        """Metrics and health go on behind a step; returns how often the stage has been rolled back. Collective."""

        def go_on() -> int:
            assert self.metrics is not None
            stage = watch.stage
            if any(row["stage"] == stage and row["step"] > step for row in self.metrics.rows()):
                self.metrics.rewind(stage=stage, step=step)
            watch.start([row["values"] for row in self.metrics.rows() if row["stage"] == stage])
            return watch.num_roll_backs()

        return self.from_writer(go_on)

    def average_em(self, watch: Watch) -> float | None:
        """Of the stage's last rollouts. Collective."""
        return self.from_writer(watch.average_em)

    def is_asked_to_stop(self) -> bool:
        """Whether any rank has got SIGTERM. Collective."""
        return any(self.ranks.everywhere(lambda: self._stop.is_made))

    def phases(self, stage: str, step: int) -> Phases:
        """A step's stopwatch, whose parts are on this rank's timeline too."""
        return Phases(timeline=self.timeline, stage=stage, step=step)


@contextlib.contextmanager
def kept_in(path: Path, rollouts: Rollouts) -> Iterator[Journal]:
    """Rollouts that begin with what `path` holds and add to it as they finish. What failed is tried again."""
    places = {start.question.key: i for i, start in enumerate(rollouts.starts)}
    with Journal(path) as journal:
        for entry in read_journal(path):
            if entry.question.key not in places:
                raise UserError(
                    f"{path} holds a trajectory of {entry.question.key}, which is not asked here now; restore the "
                    "questions that this run began with, or delete the file to sample anew"
                )
            place = (places[entry.question.key], entry.sample)
            if entry.trajectory.status != "error" and place not in rollouts.rewards:
                rollouts.finish(place, entry.trajectory)

        def note(place: Place, trajectory: Trajectory) -> None:
            journal.add(Entry(rollouts.starts[place[0]].question, place[1], trajectory))

        rollouts.note = note
        try:
            yield journal
        finally:
            rollouts.note = None


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held: of GPU memory by torch, or of the machine's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def allow_open_files(wanted: int) -> None:
    """Raise this process's own limit towards what it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


@contextlib.contextmanager
def open_session(
    config: Config, *, needs: Sequence[str], prepare: Callable[[], None] = lambda: None
) -> Iterator[Session]:
    """Start everything a run needs; stop all of it on the way out, also on Ctrl-C. Collective.

    `needs` names the data files that the run will read: a missing one is told before anything starts. `prepare` makes
    them on rank 0 where that is the run's own work.
    """
    with contextlib.ExitStack() as stack:
        yield Session(config, stack, needs, prepare)


def is_first_process() -> bool:
    """Rank 0, before process groups exist."""
    return os.environ.get("RANK", "0") == "0"
