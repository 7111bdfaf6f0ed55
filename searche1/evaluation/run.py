"""`searche1 eval`: any HuggingFace model on question files, from its engines alone; no trainer, no Megatron.

What is finished is in the run directory at once, so the same command continues after a kill:

    OUT/ config.yaml provenance.json inputs.json logs/
         answers.jsonl.gz   every trajectory, as it finished
         scores.jsonl.gz    a line for each: grades, searches, lengths, prediction
         results.json results.csv results.md results.tex
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from searche1.config import SEARCH_R1_USER, Config, RolloutConfig
from searche1.console import open_console
from searche1.data import load_questions, question_files
from searche1.evaluation.results import Provenance, write_results
from searche1.evaluation.scores import ANSWERS_FILE, SCORES_FILE, Score, score, write_scores
from searche1.evaluation.summary import summarize
from searche1.models import choose_device, choose_dtype, load_tokenizer, resolve_model
from searche1.progress import progress_line
from searche1.prompts import Tokenizer, encode_prompt, fill, format_documents, normalize_question, student_prompt
from searche1.retrieval.client import Passage, RetrieverClient, RetrieverError
from searche1.rollout import protocol
from searche1.rollout.engine import Engine
from searche1.rollout.fleet import Fleet, NoEngineLeft
from searche1.rollout.journal import Entry, Journal, read_journal
from searche1.rollout.places import engine_places
from searche1.rollout.sampler import Place, Rollouts, Sampler, Start, run_all
from searche1.rollout.servers import engine_key, make_retriever_client, start_engine_at, start_retriever
from searche1.runs import only_run_in, open_run
from searche1.types import Question, Trajectory, UserError

MAX_RESTARTS = 3  # of engines: a fault that comes back is not mended by another start
LOOKUPS_AT_ONCE = 256


@dataclass(frozen=True)
class Exam:
    """What is asked of whom, all checked."""

    config: Config
    questions: list[Question]
    model_path: Path
    tokenizer: Tokenizer
    device: str
    samples: int

    @property
    def rollout(self) -> RolloutConfig:
        """The baselines' only turn is the final one: a search in it is not executed."""
        rollout = self.config.rollout
        return rollout if self.config.eval.method == "search" else replace(rollout, max_searches=0)

    @property
    def needs_retriever(self) -> bool:
        return self.config.eval.method != "direct"

    def prompt(self, question: Question, passages: Sequence[Passage] = ()) -> str:
        """The user message that this method begins with."""
        prompt = self.config.prompt
        match self.config.eval.method:
            case "search":
                return student_prompt(question.text, prompt)
            case "direct":
                return fill(prompt.direct, question=normalize_question(question.text))
            case _:
                documents = self._cut(format_documents(passages, prompt))
                return fill(prompt.rag, documents=documents, question=normalize_question(question.text))

    def start(self, question: Question, passages: Sequence[Passage] = ()) -> Start:
        return Start(question, encode_prompt(self.prompt(question, passages), self.tokenizer))

    def score(self, question: Question, trajectory: Trajectory, *, sample: int) -> Score:
        # Search-R1's rule reads its own prompt as well, and means nothing with another.
        is_search_r1 = self.config.eval.method == "search" and self.config.prompt.user == SEARCH_R1_USER
        text = self.prompt(question) if is_search_r1 else None
        return score(question, trajectory, sample=sample, prompt_text=text)

    def _cut(self, documents: str) -> str:
        """As an observation is cut, so that the question behind the documents stays in the prompt."""
        limit = self.config.rollout.max_observation_tokens
        token_ids = self.tokenizer.encode(documents, add_special_tokens=False)
        return (
            documents
            if len(token_ids) <= limit
            else self.tokenizer.decode(token_ids[:limit], skip_special_tokens=False)
        )


def run_eval(config: Config) -> None:
    """Ask every question, judge, and write the results; continues what an earlier call began. Raises UserError."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "searche1 eval is one process that drives engines on all GPUs of this machine; run it without torchrun, "
            "or name engines of other machines as engine.urls"
        )
    console = open_console()
    exam = prepare(config)
    directory = Path(config.run.out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run_in(directory))
        inputs = {"model.path": [exam.model_path], "data.test": question_files(Path(config.data.test))}
        run = open_run(directory, config, inputs=inputs)
        scores = finished_scores(exam, directory / ANSWERS_FILE)
        total = len(exam.questions) * exam.samples
        if scores:
            console.print(f"{len(scores):,} of {total:,} trajectories are in {directory}; going on", soft_wrap=True)
        began, num_before = time.monotonic(), len(scores)
        if len(scores) < total:
            engines = start_servers(exam, run.directory, stack, console)
            began = time.monotonic()
            sample_rest(exam, engines, directory / ANSWERS_FILE, scores, console)
        seconds = time.monotonic() - began
    ordered = [scores[question.key, k] for question in exam.questions for k in range(exam.samples)]
    write_scores(directory / SCORES_FILE, ordered)
    provenance = Provenance(
        model=config.model.path,
        method=config.eval.method,
        temperature=config.eval.temperature,
        top_p=config.rollout.top_p,
        samples=exam.samples,
        data=config.data.test,
        seed=config.run.seed,
        last_call_trajectories=len(ordered) - num_before,
        last_call_seconds=seconds,
    )
    write_results(directory, summarize(ordered), ordered, provenance, console)


def default_out(config: Config) -> str:
    """The folder for results that nobody named: after the model and the method."""
    path = Path(config.model.path)
    parts = [part for part in path.parts[-4:] if part not in ("/", "..", "runs")] if path.is_dir() else [path.name]
    return str(Path("runs", "eval", "-".join([*parts, config.eval.method])))


def prepare(config: Config) -> Exam:
    """Everything that can be found wrong before engines start. Raises UserError."""
    if not config.data.test:
        raise UserError("no questions: give --data FILE (.jsonl or Search-R1's .parquet, or a folder of them)")
    if "{documents}" not in config.prompt.rag or "{question}" not in config.prompt.rag:
        raise UserError(f"prompt.rag needs {{question}} and {{documents}}, got {config.prompt.rag!r}")
    questions = choose_questions(load_questions(config.data.test), config.eval.sources, limit=config.eval.limit)
    model_path = resolve_model(config.model.path)
    if not (model_path / "config.json").is_file():
        raise UserError(f"{model_path} holds no config.json; give a HuggingFace model folder or hub id as --model")
    tokenizer = load_tokenizer(model_path, config.prompt)
    device = choose_device(config.run.device)
    samples = config.eval.samples if config.eval.temperature > 0 else 1  # greedy ones would be the same
    return Exam(config, questions, model_path, tokenizer, device, samples)


def choose_questions(questions: Sequence[Question], sources: Sequence[str], *, limit: int) -> list[Question]:
    """Those of the named sources, the first `limit` of each (0: all), in file order. Raises UserError."""
    present = dict.fromkeys(question.source for question in questions)
    if unknown := [source for source in sources if source not in present]:
        raise UserError(f"no question of source {', '.join(unknown)}; the data has {', '.join(present)}")
    taken = dict.fromkeys(sources or present, 0)
    chosen = []
    for question in questions:
        if question.source in taken and (not limit or taken[question.source] < limit):
            taken[question.source] += 1
            chosen.append(question)
    return chosen


def finished_scores(exam: Exam, path: Path) -> dict[tuple[str, int], Score]:
    """(question key, sample) -> score of what an earlier call finished; faulty trajectories are asked again."""
    if not path.exists():
        return {}
    by_key = {question.key: question for question in exam.questions}
    found = {}
    for answer in read_journal(path):
        question = by_key[answer.question.key]
        if answer.trajectory.status != "error":
            found[question.key, answer.sample] = exam.score(question, answer.trajectory, sample=answer.sample)
    return found


# -- servers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExamServers:
    engines: list[Engine]
    retriever: RetrieverClient | None
    are_ours: bool  # started here, so we may start them again


def start_servers(exam: Exam, directory: Path, stack: contextlib.ExitStack, console: Console) -> ExamServers:
    """Engines and the retriever, when they are ready; `stack` stops those that were started. Raises UserError."""
    began = time.monotonic()
    engines = start_engines(exam, directory, stack, console, is_ready=False)
    retriever = start_exam_retriever(exam, directory, stack)  # it starts while the engines load
    wait_for_engines(engines, exam)
    console.print(f"ready ({time.monotonic() - began:.0f} s)")
    return ExamServers(engines, retriever, are_ours=not exam.config.engine.urls)


def start_engines(
    exam: Exam, directory: Path, stack: contextlib.ExitStack, console: Console, *, is_ready: bool = True
) -> list[Engine]:
    """Engines with the model on every GPU of this machine, or those of engine.urls. Raises UserError."""
    config, rollout = exam.config, exam.rollout
    if config.engine.urls:
        timeout_s, key = config.engine.request_timeout_s, engine_key(config)
        engines = [Engine(url=url, request_timeout_s=timeout_s, key=key) for url in config.engine.urls]
    else:
        num_gpus = torch.cuda.device_count() if exam.device == "cuda" else 1
        places = engine_places(
            count=config.engine.count,
            tensor=config.engine.tensor,
            device=exam.device,
            world_size=num_gpus,
            ranks_per_node=num_gpus,
        )
        console.print(f"starting {len(places)} SGLang engine(s), logs in {directory / 'logs'}", soft_wrap=True)
        engines = [
            start_engine_at(
                place,
                config,
                model_path=exam.model_path,
                dtype=str(choose_dtype(config.train.dtype, exam.device)).removeprefix("torch."),
                context_length=rollout.max_start_tokens + rollout.max_context_tokens + rollout.max_response_tokens,
                log_dir=directory / "logs",
                host="127.0.0.1",
                can_sleep=False,
            )
            for place in places
        ]
        for engine in engines:
            stack.callback(engine.stop)
    if is_ready:
        wait_for_engines(engines, exam)
    return engines


def wait_for_engines(engines: Sequence[Engine], exam: Exam) -> None:
    """Until all answer; engines elsewhere load the model then. Raises UserError."""
    settings = exam.config.engine
    for engine in engines:
        engine.wait_until_ready(timeout_s=10.0 if settings.urls else settings.start_timeout_s)
        if settings.urls:
            engine.check_key()
            engine.load_folder(exam.model_path.resolve(), version="eval")


def start_exam_retriever(exam: Exam, directory: Path, stack: contextlib.ExitStack) -> RetrieverClient | None:
    """A client of the retriever, which is started unless it runs elsewhere; None if no method asks it."""
    if not exam.needs_retriever:
        return None
    url = start_retriever(exam.config, log_dir=directory / "logs", stack=stack)
    return make_retriever_client(exam.config, url)


class NoRetriever:
    """For a method that never searches."""

    async def search(self, query: str) -> Sequence[Passage]:
        raise AssertionError("a final turn does not search")

    async def close(self) -> None:
        pass


# -- asking ---------------------------------------------------------------------------------------


def sample_rest(
    exam: Exam, servers: ExamServers, path: Path, scores: dict[tuple[str, int], Score], console: Console
) -> None:
    """Sample what has no score yet; every trajectory is written and scored as it finishes."""
    settings = exam.config.eval
    fleet = Fleet(servers.engines)
    sampler = Sampler(
        fleet=fleet,
        retriever=servers.retriever or NoRetriever(),
        tokenizer=exam.tokenizer,
        rollout=exam.rollout,
        prompt=exam.config.prompt,
    )
    with Journal(path) as answers:

        def take(place: Place, trajectory: Trajectory) -> None:
            question = exam.questions[place[0]]
            answers.add(Entry(question, place[1], trajectory))
            scores[question.key, place[1]] = exam.score(question, trajectory, sample=place[1])

        rewards: dict[Place, float | None] = {
            (i, k): scores[question.key, k].em
            for i, question in enumerate(exam.questions)
            for k in range(exam.samples)
            if (question.key, k) in scores
        }
        rollouts = Rollouts([], exam.samples, take=take, rewards=rewards)
        rollouts.starts = make_starts(exam, servers, rollouts, console)
        for attempt in range(1 + MAX_RESTARTS):
            try:
                with progress_line(console, exam.config.eval.method) as progress:
                    sampler.sample(
                        rollouts,
                        temperature=settings.temperature,
                        seed=exam.config.run.seed,
                        progress=progress,
                        tick=answers.poll,
                    )
                return
            except NoEngineLeft as error:
                if attempt == MAX_RESTARTS or not servers.are_ours:
                    raise UserError(
                        f"no engine is left ({error}); what is finished is kept: run the same command again"
                    ) from error
                console.print("  starting the engines again", markup=False)
                answers.flush()
                restart(fleet, exam.config)


def restart(fleet: Fleet[Engine], config: Config) -> None:
    for number in fleet.lost:
        fleet.engines[number].restart()
    for number in fleet.lost:
        fleet.engines[number].wait_until_ready(timeout_s=config.engine.start_timeout_s)
    fleet.lost.clear()


def make_starts(exam: Exam, servers: ExamServers, rollouts: Rollouts, console: Console) -> list[Start]:
    """The prompt of every question; for retrieval-augmented generation its passages are looked up first."""
    if exam.config.eval.method != "rag":
        return [exam.start(question) for question in exam.questions]
    starts = [Start(question, ()) for question in exam.questions]
    wanted = dict.fromkeys(i for i in range(len(starts)) for k in range(exam.samples) if (i, k) not in rollouts.rewards)
    faults: dict[int, str] = {}
    retriever = servers.retriever
    assert retriever is not None

    async def look_up(progress: Any, i: int) -> None:
        question = exam.questions[i]
        try:
            starts[i] = exam.start(question, await retriever.search(question.text))
        except RetrieverError as error:
            faults[i] = str(error)
        counted.append(i)
        progress(len(counted), len(wanted), 0.0)

    async def look_up_all(progress: Any) -> None:
        try:
            await run_all(partial(look_up, progress), iter(wanted), at_once=min(LOOKUPS_AT_ONCE, len(wanted)))
        finally:
            await retriever.close()

    counted: list[int] = []
    with progress_line(console, "passages") as progress:
        asyncio.run(look_up_all(progress))
    rollouts.starts = starts
    for i, error in faults.items():
        for k in range(exam.samples):
            if (i, k) not in rollouts.rewards:
                rollouts.finish((i, k), protocol.fail(protocol.start((), rollout=exam.rollout), error))
    return starts
