"""The pipeline of paper 3.3: GRPO and OPSD rounds in turn, each judged on held-out questions.

Stages meet in directories only. A stage whose manifest is there is skipped; one whose weights are there is only
evaluated again; so a killed run continues where it was.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from searche1.checkpoints import CHECKPOINTS
from searche1.config import Config
from searche1.data import load_questions
from searche1.evaluation.scores import GREEDY_GROUPS_FILE, GROUPS_FILE, scores_of
from searche1.evaluation.stages import format_table, stage_row
from searche1.evaluation.summary import EvalResult, summarize
from searche1.grpo import run_grpo_round
from searche1.opsd import run_opsd_round
from searche1.report.page import write_report
from searche1.runs import (
    PAIR_KL_FILE,
    SELECTION_FILE,
    StageRow,
    add_stage_row,
    atomic_write_json,
    is_complete,
    open_run,
    read_json,
    read_summary,
    set_final_model,
    write_manifest,
)
from searche1.session import Session, is_first_process, open_session
from searche1.timeline import merge_traces
from searche1.types import Group, UserError


@dataclass(frozen=True)
class Stage:
    """A named step of the cycle. `train` takes the incoming model and the stage's name and returns a folder."""

    name: str
    train: Callable[[Path, str], Path] | None  # None: judge the incoming model as it is


def run_cycle(config: Config, *, prepare: Callable[[], None] = lambda: None) -> None:
    """The whole self-evolution run. Collective; under torchrun or as a single process.

    `prepare` runs on rank 0 before the data files are looked at.
    """
    if is_finished(config):
        if is_first_process():
            show_table(Path(config.run.out))
            print(
                f"\n{config.run.out} is finished; give a larger cycle.cycles to go on, or another run.out (quickstart: "
                "--new) for a new run"
            )
        return
    check_batch_size(config)
    needs = ["train"]
    needs += [] if config.cycle.skip_opsd else ["validation"]
    needs += ["test"] if config.cycle.evaluate_stages else []
    with open_session(config, needs=needs, prepare=prepare) as session:
        model = session.model_path
        # What is finished goes on with more cycles: until their end it has no final model.
        session.from_writer(lambda: set_final_model(session.run, None))
        for stage in stages(session):
            model = run_stage(session, stage, model)
            if session.from_writer(partial(is_last, config, stage.name)):
                session.tell(
                    f"{stage.name} gained nothing: its best validation EM is not above the cycle before's; "
                    "no more cycles (cycle.until_no_gain)"
                )
                break
        session.ranks.from_writer(lambda: finish(session, model), beats=True)


def is_last(config: Config, stage: str) -> bool:
    """Whether a finished stage ends the run before its time: its adapter is no better than the cycle before's."""
    found = re.fullmatch(r"cycle(\d+)/opsd", stage)
    if found is None or found[1] == "0" or not config.cycle.until_no_gain:
        return False
    before, now = (
        read_json(Path(config.run.out) / f"cycle{number}/opsd" / SELECTION_FILE)["best_em"]
        for number in (int(found[1]) - 1, int(found[1]))
    )
    return bool(now <= before)


def check_batch_size(config: Config) -> None:
    """Raises UserError if the training questions do not fill one rollout batch."""
    if not Path(config.data.train).is_file():
        return  # told by the session, with the other files
    num_questions = len(load_questions(config.data.train))
    if num_questions < config.grpo.prompts_per_step:
        raise UserError(
            f"grpo.prompts_per_step={config.grpo.prompts_per_step} but data.train holds {num_questions} questions; "
            "lower it or give more questions"
        )


def is_finished(config: Config) -> bool:
    """Whether the run directory holds this very run, done to its end: then nothing needs to be started."""
    directory = Path(config.run.out)
    final = read_summary(directory).final_model
    if final is None or not (directory / final).is_dir():
        return False
    for name in stage_names(config):
        if not is_complete(directory / name):
            return False  # a run goes on there, also one that had ended before more cycles were asked for
        if is_last(config, name):
            break
    if is_first_process():
        open_run(directory, config)  # refuses other settings
    return True


def run_single_stage(config: Config, kind: str) -> None:
    """One "grpo" or "opsd" round from model.path. Collective."""
    if kind == "grpo":
        check_batch_size(config)
    needs = {"grpo": ["train"], "opsd": ["train", "validation"]}[kind]
    if config.cycle.evaluate_stages:
        needs.append("test")
    with open_session(config, needs=needs) as session:
        train = {"grpo": _grpo(session, 0), "opsd": _opsd(session, 0)}[kind]
        run_stage(session, Stage(kind, train), session.model_path)
        session.from_writer(lambda: show_table(session.run.directory))


def stage_names(config: Config) -> list[str]:
    """start, cycle0/grpo, cycle0/opsd, cycle1/grpo, ..."""
    kinds = ["grpo"] if config.cycle.skip_opsd else ["grpo", "opsd"]
    start = ["start"] if config.cycle.evaluate_stages else []
    return start + [f"cycle{number}/{kind}" for number in range(config.cycle.cycles) for kind in kinds]


def stages(session: Session) -> list[Stage]:
    """Those of `stage_names`."""

    def stage(name: str) -> Stage:
        cycle, _, kind = name.partition("/")
        make = {"grpo": _grpo, "opsd": _opsd}.get(kind)
        return Stage(name, make and make(session, int(cycle.removeprefix("cycle"))))

    return [stage(name) for name in stage_names(session.config)]


def _grpo(session: Session, number: int) -> Callable[[Path, str], Path]:
    return lambda model, name: run_grpo_round(session, model_path=model, stage=name, round_index=number)


def _opsd(session: Session, number: int) -> Callable[[Path, str], Path]:
    return lambda model, name: run_opsd_round(session, model_path=model, stage=name, round_index=number)


def run_stage(session: Session, stage: Stage, model: Path) -> Path:
    """Train unless the weights are there, judge, declare finished; returns the outgoing model. Collective."""
    folder = session.run.directory / stage.name
    trained = folder / "hf"
    if session.from_writer(lambda: is_complete(folder)):
        session.tell(f"{stage.name}: finished earlier, skipped")
        return trained if stage.train else model
    started = time.monotonic()
    outgoing = model
    if stage.train is not None:
        session.tell(f"\n== {stage.name} ==")
        if not session.from_writer(trained.is_dir):
            with session.timeline(stage.name):
                stage.train(model, stage.name)
        session.from_writer(lambda: shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True))  # nobody continues it
        outgoing = trained
    row = None
    if session.config.cycle.evaluate_stages:
        with session.timeline(f"{stage.name}: judge"):
            row = judge(session, outgoing, stage.name, started)

    def declare_finished() -> None:
        outputs = {"hf": trained} if stage.train else {}
        for name in (
            "eval.json",
            GROUPS_FILE,
            "pairs.jsonl",
            "adapter",
            "teacher_check.json",
            PAIR_KL_FILE,
            SELECTION_FILE,
        ):
            if (folder / name).exists():
                outputs[name] = folder / name
        metrics = {"em": row.em, "mean_searches": row.mean_searches} if row else {}
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(
            folder,
            stage=stage.name,
            inputs={"model": model, "train": session.config.data.train},
            outputs=outputs,
            config=session.config,
            metrics=metrics,
        )

    session.from_writer(declare_finished)
    return outgoing


def judge(session: Session, model: Path, name: str, started: float) -> StageRow:
    """EM of a saved model on the held-out questions, as `eval` asks; writes the row of summary.json. Collective."""
    settings = session.config.eval
    policy = session.policy(model, optimizer=None)
    session.sync(policy, stage=f"{name}/eval")
    questions = load_questions(session.config.data.test)

    def rollout(temperature: float, samples: int, file: str) -> list[Group]:
        return session.rollout(
            questions,
            samples=samples,
            temperature=temperature,
            seed=session.config.run.seed * 1_000_003 + 990_001,  # the same draws for every stage
            title=f"{name} held-out questions at T={temperature:g}",
            file=session.run.directory / name / file,
        )

    groups = rollout(settings.temperature, settings.samples if settings.temperature > 0 else 1, GROUPS_FILE)
    greedy = None
    if settings.greedy and settings.temperature > 0:
        greedy = summarize(scores_of(rollout(0.0, 1, GREEDY_GROUPS_FILE)))
    result = summarize(scores_of(groups))
    row = stage_row(name, result, temperature=settings.temperature, greedy=greedy, seconds=time.monotonic() - started)
    session.from_writer(lambda: _record(session, name, result, greedy, row))
    return row


def _record(session: Session, name: str, result: EvalResult, greedy: EvalResult | None, row: StageRow) -> None:
    folder = session.run.stage_dir(name)
    atomic_write_json(
        folder / "eval.json", {"sampled": result.to_json(), "greedy": greedy.to_json() if greedy else None}
    )
    add_stage_row(session.run, row)
    greedy_text = f", greedy {row.em_greedy:.3f}" if row.em_greedy is not None else ""
    session.tell(
        f"{name}: held-out EM {row.em:.3f} at T={row.temperature:g}{greedy_text}, "
        f"{row.mean_searches:.2f} searches, {row.answered_share:.0%} answered  ({row.seconds:.0f} s)"
    )


def finish(session: Session, model: Path) -> None:
    """Copy the last model to final/, draw the report, show the table. On rank 0."""
    final = session.run.final_dir
    unfinished = final.with_name("final.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(model, unfinished)
    shutil.rmtree(final, ignore_errors=True)  # of a run that went on behind its end
    unfinished.rename(final)
    set_final_model(session.run)
    merge_traces(session.run.directory)
    show_table(session.run.directory)


def show_table(directory: Path) -> None:
    """The stages so far, and where the report is. On rank 0."""
    summary = read_summary(directory)
    if not summary.stages:
        return
    page = write_report(directory)
    console = Console(highlight=False)
    console.print()
    console.print(format_table(summary.stages))
    console.print(f"\nplot          {directory / 'curve.png'}\nreport        {page}", soft_wrap=True)
    if summary.final_model is not None:
        console.print(f"final model   {directory / summary.final_model}  (a HuggingFace folder)", soft_wrap=True)
