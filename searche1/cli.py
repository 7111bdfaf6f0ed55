"""The command line. Each subcommand parses its own arguments and calls one function; nothing heavy loads before."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from searche1.types import SharedError, Stopped, UserError, disk_fault

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, 2 for a mistake or fault that a person can mend, 75 for SIGTERM,
    130 for Ctrl-C, 1 when another rank has gone.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    if arguments[:1] == ["retriever"]:  # its server has a parser of its own
        from searche1.retrieval.server import main as retriever

        return _guarded(lambda: retriever(arguments[1:]))
    if arguments[:1] == ["plan"]:  # takes options between its settings, which a subcommand's parser cannot
        planned = plan_parser().parse_intermixed_args(arguments[1:])
        return _guarded(lambda: _plan(planned))
    parsed, rest = parser.parse_known_args(arguments)  # settings may stand between options
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in parsed]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; see `searche1 {' '.join(arguments[:1])} --help`")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    if parsed.run is None:
        parser.print_help()
        return 2
    return _guarded(lambda: parsed.run(parsed))


def _guarded(command: Callable[[], int | None]) -> int:
    status_file = os.environ.get("SEARCHE1_STATUS")
    if status_file is None:
        return _run(command)[0]
    # launch.sh started torchrun, which would start ranks again that end with anything but 0.
    status = Path(status_file)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and status.is_file() and status.read_text():
        return 0  # a rank that ended in order took others down with it, who were started again
    code, is_told, is_shared = _run(command)
    if is_told and (os.environ.get("LOCAL_RANK", "0") == "0" or not is_shared):
        status.write_text(str(code))
    # Ranks that do not end by themselves are ended by torchrun, which needs one to fail.
    return 0 if is_shared else code


def _run(command: Callable[[], int | None]) -> tuple[int, bool, bool]:
    """The exit code, whether it has been said why, and whether all ranks end alike."""
    is_speaker, is_alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"
    sys.unraisablehook = _keep_interrupt
    try:
        return command() or 0, True, True
    except Stopped as error:
        if is_speaker:
            print(f"searche1: {error}", file=sys.stderr)
        return STOPPED, True, True
    except UserError as error:
        is_shared = isinstance(error, SharedError)
        if is_speaker:
            print(f"searche1: error: {error}", file=sys.stderr)
        elif is_shared:
            time.sleep(2)  # torchrun ends all ranks when one ends: let rank 0 speak first
        else:
            print(f"searche1: error on rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2, True, is_alone or is_shared
    except OSError as error:
        if (told := disk_fault(error)) is None:
            raise
        print(f"searche1: error: {told}", file=sys.stderr)
        return 2, True, is_alone
    except RuntimeError as error:
        if not ("gloo" in str(error) and "by peer" in str(error)):
            raise
        # What gloo says when the process at the other end is gone; why it went, it has said itself.
        where = os.environ.get("RANK", "0")
        print(f"searche1: error on rank {where}: another rank has ended; see what it said", file=sys.stderr)
        return 1, False, False
    except KeyboardInterrupt:
        if is_speaker:
            print("\nsearche1: stopped; the same command continues from the last finished piece", file=sys.stderr)
        return 130, True, True


def _keep_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops a Ctrl-C that arrives inside a destructor, and freeing a model runs many: send it again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searche1", description="Train search agents with GRPO and on-policy self-distillation (Search-E1)."
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    quickstart = commands.add_parser("quickstart", help="two cycles on a toy world, on a laptop")
    quickstart.add_argument("--seed", type=int, default=0, help="world, data order and sampling (default 0)")
    quickstart.add_argument("--out", default="", help="run directory (default runs/quickstart-seed<N>)")
    quickstart.add_argument("--fast", action="store_true", help="one tiny cycle: a smoke run")
    quickstart.add_argument(
        "--new", action="store_true", help="start anew instead of continuing: takes the next free folder"
    )
    quickstart.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    quickstart.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in `searche1 config`")
    quickstart.set_defaults(run=_quickstart)

    for name, text in (
        ("cycle", "GRPO and OPSD rounds in turn, evaluated after each"),
        ("grpo", "one GRPO round"),
        ("opsd", "one OPSD round"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. Results are in the folder run.out; the same command continues "
            "a stopped run. As it stands it is one process; scripts/launch.sh starts it on several GPUs or nodes.",
        )
        command.add_argument("--config", help="YAML file, such as configs/quickstart.yaml")
        if name != "cycle":
            command.add_argument("--model", default="", help="HuggingFace folder to start from (default model.path)")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in `searche1 config`")
        command.set_defaults(run=_train, kind=name)

    evaluation = commands.add_parser(
        "eval",
        help="judge any HuggingFace model on question files",
        description="Ask a model every question and grade the answers: EM, F1 and sub-EM by source, with intervals, "
        "beside the paper's tables. One process, no torchrun; engines take all GPUs of this machine. The same command "
        "continues after a kill.",
    )
    evaluation.add_argument(
        "--model", default="", help="HuggingFace folder or hub id (default: model.path of --config)"
    )
    evaluation.add_argument(
        "--data", default="", help="question file or folder of them (default: data.test of --config)"
    )
    evaluation.add_argument("--config", help="YAML file with the retriever, prompts and limits to evaluate under")
    evaluation.add_argument("--out", default="", help="folder for the results (default runs/eval/<model>-<method>)")
    evaluation.add_argument(
        "--method",
        choices=("search", "direct", "rag"),
        help="search: as trained (default); direct: no retrieval; rag: the question's passages in the prompt",
    )
    evaluation.add_argument("--sources", default="", help="only these data sources, such as nq,bamboogle")
    evaluation.add_argument("--limit", type=int, help="only the first questions of each source")
    evaluation.add_argument("--temperature", type=float, help="0 is greedy")
    evaluation.add_argument("--samples", type=int, help="trajectories per question at a temperature over 0")
    evaluation.add_argument(
        "--like-search-r1",
        action="store_true",
        help="sample as Search-R1's evaluation does: temperature 1, top-p 0.95",
    )
    evaluation.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in `searche1 config`")
    evaluation.set_defaults(run=_eval)

    comparison = commands.add_parser("compare", help="paired test of two evaluations, or of two stages of runs")
    comparison.add_argument("a", type=Path, help="folder of an evaluation, or of a judged stage: runs/NAME/start")
    comparison.add_argument("b", type=Path, help="the other one")
    comparison.set_defaults(run=_compare)

    play = commands.add_parser(
        "play",
        help="ask a trained model in the terminal and see its searches, or write the policy's turns yourself",
        description="Ask a model and see what it thinks, searches and answers; or be the policy, against the same "
        "retriever and rules.",
    )
    play.add_argument("--model", default="", help="HuggingFace folder or hub id (default: model.path of --config)")
    play.add_argument(
        "--config", help="YAML file with the retriever, prompts and limits, such as runs/NAME/config.yaml"
    )
    play.add_argument("--data", default="", help="question file to draw from (default: data.test of --config)")
    play.add_argument("--question", default="", help="ask only this and end")
    play.add_argument("--as-policy", action="store_true", help="you write the turns; no engine is started")
    play.add_argument("--temperature", type=float, help="0 is greedy")
    play.add_argument("--out", default="runs/play", help="folder for the servers' logs (default runs/play)")
    play.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in `searche1 config`")
    play.set_defaults(run=_play)

    commands.add_parser("retriever", help="serve a corpus over HTTP (see `searche1 retriever --help`)")

    commands.add_parser("plan", help="does a config fit on GPUs, and how long is a step? (see `searche1 plan --help`)")

    report = commands.add_parser("report", help="one HTML file of a run or an evaluation: story and trajectories")
    report.add_argument("run_dir", type=Path, help="run directory, or folder of an evaluation")
    report.set_defaults(run=_report)

    watching = commands.add_parser("watch", help="a run's stages, curves and times, as they come")
    watching.add_argument("run_dir", type=Path, help="run directory; another process writes it")
    watching.add_argument("--once", action="store_true", help="draw once and end")
    watching.set_defaults(run=_watch)

    commands.add_parser("doctor", help="check this machine and say what to mend").set_defaults(run=_doctor)

    config = commands.add_parser("config", help="print every setting with its value and meaning")
    config.add_argument("--config", help="YAML file whose values to show")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.set_defaults(run=_config)
    return parser


def plan_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searche1 plan",
        description="Does a config fit on these GPUs, which layouts are legal, how long does a step take? Arithmetic: "
        "needs no GPU and no weights. Exit status: 0 it fits, 1 it does not, 2 a mistake.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG key=value", help="YAML file, and settings that differ from it"
    )
    parser.add_argument("--config", help="the YAML file, as other commands take it")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each (default 8)")
    parser.add_argument("--gpu", default="h800", help="h800 (default), h100, h200 or a100")
    parser.add_argument("--no-dry-build", action="store_true", help="only arithmetic; do not build any rank's model")
    parser.add_argument("--json", type=Path, help="also write the plan to this file")
    lengths = parser.add_argument_group("mean lengths of a trajectory, for the step time")
    lengths.add_argument("--mean-turns", type=float, default=3.0, help="generations (default 3)")
    lengths.add_argument("--mean-turn-tokens", type=float, default=120.0, help="tokens of one (default 120)")
    lengths.add_argument("--mean-observation-tokens", type=float, default=450.0, help="tokens of one (default 450)")
    lengths.add_argument("--mean-prompt-tokens", type=float, default=250.0, help="tokens (default 250)")
    return parser


def _quickstart(parsed: argparse.Namespace) -> None:
    from searche1.quickstart import run_quickstart

    run_quickstart(
        seed=parsed.seed,
        out=parsed.out,
        is_fast=parsed.fast,
        is_new=parsed.new,
        device=parsed.device,
        overrides=parsed.overrides,
    )


def _train(parsed: argparse.Namespace) -> None:
    from searche1.config import load_config
    from searche1.rollout.engine_process import importing_sglang

    # The model belongs to the run's settings: another one in the same run directory is refused, not mixed in.
    model = [f"model.path={parsed.model}"] if parsed.kind != "cycle" and parsed.model else []
    config = load_config(parsed.config, parsed.overrides + model)
    with importing_sglang(config):
        from searche1.cycle import run_cycle, run_single_stage

        if parsed.kind == "cycle":
            run_cycle(config)
        else:
            run_single_stage(config, parsed.kind)


def _eval(parsed: argparse.Namespace) -> None:
    from searche1.config import load_config
    from searche1.rollout.engine_process import importing_sglang

    flags = {
        "model.path": parsed.model,
        "data.test": parsed.data,
        "eval.method": parsed.method,
        "eval.sources": f"[{parsed.sources}]" if parsed.sources else None,
        "eval.limit": parsed.limit,
        "eval.temperature": parsed.temperature,
        "eval.samples": parsed.samples,
    }
    if parsed.like_search_r1:
        if parsed.temperature not in (None, 1.0):
            raise UserError(
                f"--like-search-r1 samples at temperature 1, got --temperature {parsed.temperature:g}; drop one"
            )
        flags |= {"eval.temperature": 1.0, "rollout.top_p": 0.95}
    given = [f"{key}={value}" for key, value in flags.items() if value not in (None, "")]
    config = load_config(parsed.config, given + parsed.overrides)
    if (parsed.samples or 0) > 1 and config.eval.temperature == 0:
        raise UserError(
            f"--samples {parsed.samples}: greedy trajectories of a question would all be the same; give --temperature "
            "too, such as 1.0, or leave out --samples"
        )
    with importing_sglang(config):
        from searche1.evaluation.run import default_out, run_eval

        out = parsed.out
        if not out and not any(override.startswith("run.out=") for override in parsed.overrides):
            out = default_out(config)
        run_eval(load_config(parsed.config, given + parsed.overrides + ([f"run.out={out}"] if out else [])))


def _play(parsed: argparse.Namespace) -> None:
    from searche1.config import load_config
    from searche1.console import open_console
    from searche1.rollout.engine_process import importing_sglang

    flags = {
        "run.out": parsed.out,
        "model.path": parsed.model,
        "data.test": parsed.data,
        "eval.temperature": parsed.temperature,
    }
    given = [f"{key}={value}" for key, value in flags.items() if value not in (None, "")]
    config = load_config(parsed.config, given + parsed.overrides)
    with contextlib.nullcontext() if parsed.as_policy else importing_sglang(config):
        from searche1.play import run_play

        run_play(config, open_console(), asked=parsed.question, as_policy=parsed.as_policy)


def _compare(parsed: argparse.Namespace) -> None:
    from searche1.console import open_console
    from searche1.evaluation.compare import print_comparison

    print_comparison(parsed.a, parsed.b, open_console())


def _watch(parsed: argparse.Namespace) -> None:
    from searche1.console import open_console
    from searche1.screen import watch

    watch(parsed.run_dir, open_console(), is_once=parsed.once)


def _report(parsed: argparse.Namespace) -> None:
    from searche1.report.page import write_report

    print(write_report(parsed.run_dir))


def _plan(parsed: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from searche1.config import load_config
    from searche1.planner.hardware import Lengths, cluster
    from searche1.planner.plan import make_plan, plan_to_json
    from searche1.planner.show import show_plan

    files = [word for word in parsed.words if "=" not in word] + ([parsed.config] if parsed.config else [])
    if len(files) != 1:
        raise UserError(f"give one config file to plan, such as configs/qwen2.5-3b.yaml, got {len(files)}")
    config = load_config(files[0], [word for word in parsed.words if "=" in word])
    lengths = Lengths(
        parsed.mean_turns, parsed.mean_turn_tokens, parsed.mean_observation_tokens, parsed.mean_prompt_tokens
    )
    machines = cluster(parsed.gpu, nodes=parsed.nodes, gpus_per_node=parsed.gpus_per_node)
    plan = make_plan(config, machines, lengths=lengths, builds=not parsed.no_dry_build)
    show_plan(plan, Console())
    if parsed.json:
        try:
            parsed.json.write_text(json.dumps(plan_to_json(plan), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {parsed.json} cannot be written: {error.strerror}; name another file") from error
    return 0 if plan.fits else 1


def _doctor(parsed: argparse.Namespace) -> int:
    from searche1.doctor import print_doctor, run_doctor

    return print_doctor(run_doctor())


def _config(parsed: argparse.Namespace) -> None:
    from searche1.config import describe, load_config

    print(describe(load_config(parsed.config, parsed.overrides)))


if __name__ == "__main__":
    sys.exit(main())
