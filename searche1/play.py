"""`searche1 play`: a question in the terminal, its turns written by a trained model or by a person."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from searche1.config import Config
from searche1.data import load_questions
from searche1.evaluation.run import Exam, start_engines, start_exam_retriever
from searche1.models import choose_device, load_tokenizer, resolve_model
from searche1.prompts import Tokenizer, encode_prompt, student_prompt
from searche1.retrieval.client import RetrieverClient, RetrieverError
from searche1.rewards import em_reward
from searche1.rollout import protocol
from searche1.rollout.engine import Engine, EngineError, http_session
from searche1.rollout.sampler import turn_seed
from searche1.tags import STOP_STRINGS, parse_action
from searche1.types import Completion, Question, Span, Trajectory, UserError

STYLES = {"search": "blue", "answer": "green", "information": "dim", "error": "yellow", "invalid": "yellow"}
ASKING = "question (enter: one of the data, q: quit)> "
HOW_TO_WRITE = (
    "You are the policy. Write your turn: it ends with </search> or </answer>, or with an empty line.\n"
    "Short forms: `? words` searches, `= words` answers."
)


class Writer(Protocol):
    """Whoever writes the policy's turns."""

    def write(self, context_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Completion:
        """Raises EngineError if it cannot."""
        ...


class ModelWriter:
    """A model in an engine."""

    def __init__(self, engine: Engine, loop: Loop, *, temperature: float, top_p: float) -> None:
        self._engine = engine
        self._loop = loop
        self._temperature = temperature
        self._top_p = top_p

    def write(self, context_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Completion:
        async def generate() -> Completion:
            async with http_session() as session:
                return await self._engine.generate(
                    session,
                    context_ids,
                    max_new_tokens=max_new_tokens,
                    temperature=self._temperature,
                    top_p=self._top_p,
                    stop=STOP_STRINGS,
                    seed=seed,
                )

        return self._loop(generate())


class PersonWriter:
    """A person at the keyboard. `read` gives a line without its end, and raises EOFError when there is none."""

    def __init__(self, tokenizer: Tokenizer, console: Console, *, read: Callable[[str], str] = input) -> None:
        self._tokenizer = tokenizer
        self._console = console
        self._read = read

    def write(self, context_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Completion:
        text = self._turn()
        token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        known = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        if known != text:
            self._console.print(f"(this model's tokenizer reads it as: {known})", style="yellow", markup=False)
        is_cut = len(token_ids) > max_new_tokens
        return Completion(
            token_ids=token_ids[:max_new_tokens],
            logprobs=(0.0,) * min(len(token_ids), max_new_tokens),
            text=known,
            finish_reason="length" if is_cut else "stop",
            weight_version="person",
        )

    def _turn(self) -> str:
        lines: list[str] = []
        while True:
            line = self._read("policy> " if not lines else "      > ")
            lines.append(_long_form(line))
            text = "\n".join(lines)
            if not line.strip() or parse_action(text).kind != "invalid":
                return text


def _long_form(line: str) -> str:
    for short, tag in (("? ", "search"), ("= ", "answer")):
        if line.startswith(short):
            return f"<{tag}> {line.removeprefix(short).strip()} </{tag}>"
    return line


class Loop:
    """Runs coroutines of clients whose connections live as long as the game."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def __call__(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        self._loop.close()


class Game:
    """One question after the other, each shown turn by turn."""

    def __init__(
        self,
        config: Config,
        *,
        tokenizer: Tokenizer,
        retriever: RetrieverClient,
        writer: Writer,
        loop: Loop,
        console: Console,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._retriever = retriever
        self._writer = writer
        self._loop = loop
        self._console = console

    def play(self, question: Question) -> Trajectory:
        """The whole trajectory of a question, by the rules of training."""
        rollout, prompt, tokenizer = self._config.rollout, self._config.prompt, self._tokenizer
        state = protocol.start(encode_prompt(student_prompt(question.text, prompt), tokenizer), rollout=rollout)
        try:
            while True:
                match protocol.next_step(state, rollout=rollout, tokenizer=tokenizer):
                    case Trajectory() as trajectory:
                        self._judge(question, trajectory)
                        return trajectory
                    case protocol.Search(query):
                        passages = self._loop(self._retriever.search(query))
                        state = protocol.add_passages(
                            state, passages, rollout=rollout, prompt=prompt, tokenizer=tokenizer
                        )
                        self._show(state.spans[-1:])
                    case protocol.Generate(context_ids, max_new_tokens):
                        seed = turn_seed(self._config.run.seed, question, 0, state.num_turns)
                        completion = self._writer.write(context_ids, max_new_tokens=max_new_tokens, seed=seed)
                        before = len(state.spans)
                        state = protocol.add_completion(
                            state, completion, rollout=rollout, prompt=prompt, tokenizer=tokenizer
                        )
                        self._show(state.spans[before:])
        except (EngineError, RetrieverError) as error:
            self._console.print(f"this question ends here: {error}", style="red", markup=False)
            return protocol.fail(state, str(error))

    def _show(self, spans: Sequence[Span]) -> None:
        for span in spans:
            if span.author == "policy" and isinstance(self._writer, PersonWriter):
                continue  # who wrote it has seen it
            text = Text(span.text.strip("\n"))
            if span.author == "policy" and span.kind != "invalid":
                for tag in ("search", "answer"):
                    text.highlight_regex(rf"(?s)<{tag}>.*?</{tag}>", STYLES[tag])
            else:
                text.stylize(STYLES.get(span.kind, ""))
            self._console.print(text)
            if span.is_truncated:
                self._console.print("(cut at a token limit)", style="dim")

    def _judge(self, question: Question, trajectory: Trajectory) -> None:
        searches = "1 search" if trajectory.num_searches == 1 else f"{trajectory.num_searches} searches"
        facts = f"{searches}, {len(trajectory.response_ids)} tokens"
        if not question.answers:
            verdict = "answered" if trajectory.status == "answered" else "no answer"
            self._console.print(f"-- {verdict}; {facts}", style="bold", markup=False)
            return
        is_right = em_reward(trajectory, question) > 0
        accepted = "; ".join(question.answers)
        style = "bold green" if is_right else "bold red"
        self._console.print(
            f"-- {'right' if is_right else 'wrong'}; accepted: {accepted}; {facts}", style=style, markup=False
        )


def run_play(
    config: Config, console: Console, *, asked: str, as_policy: bool, read: Callable[[str], str] = input
) -> None:
    """Start what is needed, then play until somebody has had enough; only `asked`, if it is not empty.

    Raises UserError.
    """
    config = replace(config, eval=replace(config.eval, method="search"), engine=replace(config.engine, count=1))
    questions = load_questions(config.data.test) if config.data.test else []
    model_path = resolve_model(config.model.path)
    tokenizer = load_tokenizer(model_path, config.prompt)
    device = "cpu" if as_policy else choose_device(config.run.device)
    exam = Exam(config, [], model_path, tokenizer, device, samples=1)
    loop = Loop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        engines = [] if as_policy else start_engines(exam, Path(config.run.out), stack, console)
        retriever = start_exam_retriever(exam, Path(config.run.out), stack)
        assert retriever is not None
        stack.callback(lambda: loop(retriever.close()))
        writer: Writer
        if as_policy:
            writer = PersonWriter(tokenizer, console, read=read)
            console.print(HOW_TO_WRITE, markup=False)
        else:
            writer = ModelWriter(engines[0], loop, temperature=config.eval.temperature, top_p=config.rollout.top_p)
        game = Game(config, tokenizer=tokenizer, retriever=retriever, writer=writer, loop=loop, console=console)
        dice = random.Random(config.run.seed)
        for number in itertools.count():
            try:
                question = next_question(asked, questions, dice, read, number)
                if question is None:
                    return
                console.print(Text(f"\n{question.text}", style="bold"))
                game.play(question)
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if asked:
                return


def next_question(
    asked: str, questions: Sequence[Question], dice: random.Random, read: Callable[[str], str], number: int
) -> Question | None:
    """What is asked next: given, typed, or one of the data; None for the end. Raises EOFError, UserError."""
    text = asked or read(ASKING).strip()
    if text in ("q", "quit", "exit"):
        return None
    if text:
        known = [question for question in questions if question.text.strip().lower() == text.lower()]
        return known[0] if known else Question(str(number), text, (), "typed")
    if not questions:
        raise UserError("there is no question to draw: give --data FILE, or type one")
    return dice.choice(questions)
