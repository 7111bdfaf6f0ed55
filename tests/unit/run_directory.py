"""A run directory as the trainer leaves it, made by hand for whoever reads one."""

import json
from pathlib import Path

from searche1.data import write_groups
from searche1.types import Group, Question, Span, Trajectory

PASSAGE = "the author of the book is ann"


def trajectory(is_right: bool, *, text: str = "", passage: str = PASSAGE) -> Trajectory:
    answer = text or f"<think> ann </think><answer> {'ann' if is_right else 'bob'} </answer>"
    searches = [
        Span("policy", "search", (3, 4, 5), (-0.1, -2.5, -0.01), "<think> hm </think><search> who </search>"),
        Span(
            "environment", "information", (9,) * 6, (), f"\n<information>Doc 1 {passage}\nDoc 2 other</information>\n"
        ),
    ]
    turns = searches if is_right else searches * 2
    return Trajectory((1, 2), (*turns, Span("policy", "answer", (6, 7), (-0.3, -0.05), answer)), "answered")


def groups(count: int, **content: str) -> list[Group]:
    """Two trajectories of each question, the first right."""
    return [
        Group(
            Question(str(i), f"who wrote book {i}?", ("ann",), "nq" if i % 2 == 0 else "popqa"),
            (trajectory(True, **content), trajectory(False, **content)),
            (1.0, 0.0),
        )
        for i in range(count)
    ]


def fill(directory: Path, *, num_questions: int = 4, rounds: int = 1, **content: str) -> None:
    """Evaluations, rollouts, pools, pairs and the KLs of the first pair of each round."""
    write_groups(directory / "start" / "eval_groups.jsonl.gz", groups(num_questions, **content))
    for number in range(rounds):
        grpo, opsd = directory / f"cycle{number}" / "grpo", directory / f"cycle{number}" / "opsd"
        write_groups(grpo / "rollouts" / "step_00001.jsonl.gz", groups(2, **content))
        write_groups(opsd / "pool" / "groups_00000.jsonl.gz", groups(3, **content))
        for stage in (grpo, opsd):
            write_groups(stage / "eval_groups.jsonl.gz", groups(num_questions, **content))
        pairs = [
            {"question": key, "outcome": outcome, "rewards": [1.0, 0.0], "num_searches": [1, 2]}
            | {"reference": 0, "student": 1, "distance": 0.5}
            for key, outcome in (("nq:0", "pair"), ("popqa:1", "student equals reference"), ("nq:2", "pair"))
        ]
        (opsd / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        kl = {"question": "nq:0", "before": [0.0, 0.9, 0.1] * 2 + [1.5, 0.0], "after": [0.0, 0.2, 0.0] * 2 + [0.1, 0.0]}
        (opsd / "pair_kl.jsonl").write_text(json.dumps(kl) + "\n")
