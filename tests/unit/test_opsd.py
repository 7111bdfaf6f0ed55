"""OPSD: what the loss weighs, and what the round keeps."""

import contextlib
import json
import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pairs import QUESTION, trajectory

from megatron_ext.hf_mapping import ModelShape
from megatron_ext.known_models import read_shape
from megatron_ext.vocab_parallel import ClippedKL
from searche1.config import Config, DataConfig, OPSDConfig, PairsConfig, PoolConfig
from searche1.data import read_groups, write_groups
from searche1.metrics import Phases
from searche1.opsd import (
    TrainedPair,
    batch_order,
    collect_pairs,
    decayed,
    opsd_metrics,
    random_cut,
    teacher_check,
    train_adapter,
    trained_pairs,
)
from searche1.packing import Sample
from searche1.pairs import mine_pair
from searche1.types import Group, Stopped, UserError

# -- the loss and its schedule --------------------------------------------------------------------


def test_metrics_are_weighted_sums_over_rows():
    kl = ClippedKL(
        loss=torch.tensor([0.2, 0.5, -0.1]),
        kl=torch.tensor([0.2, 3.0, -0.1]),
        clipped_mass=torch.tensor([0.0, 0.8, 0.0]),
        entropy=torch.tensor([1.0, 2.0, 3.0]),
        is_suspect=torch.tensor([False, True, True]),
    )
    expected = {
        "loss": 0.125,
        "kl": 0.75,
        "entropy": 2.25,
        "clip_fraction": 0.25,
        "clipped_mass": 0.2,
        "suspect_fraction": 0.75,
    }
    metrics = opsd_metrics(kl, torch.tensor([0.25, 0.25, 0.5]))
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(expected)


@given(
    num_pairs=st.integers(1, 60),
    size=st.integers(1, 20),
    epochs=st.integers(1, 4),
    max_steps=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_batches_are_full_and_visit_a_pair_once_an_epoch(num_pairs, size, epochs, max_steps, seed):
    settings = OPSDConfig(pairs_per_step=size, epochs=epochs, max_steps=max_steps)
    order = batch_order(num_pairs, settings, seed=seed)
    assert order == batch_order(num_pairs, settings, seed=seed)
    size = min(size, num_pairs)
    per_epoch = num_pairs // size
    assert len(order) == min(max_steps, epochs * per_epoch)
    assert all(len(batch) == size for batch in order)
    for start in range(0, len(order), per_epoch):
        seen = [k for batch in order[start : start + per_epoch] for k in batch]
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(num_pairs))


def test_epochs_and_seeds_shuffle_anew():
    settings = OPSDConfig(pairs_per_step=20, epochs=2, max_steps=9)
    first, second = batch_order(20, settings, seed=0)
    assert first != second and sorted(first) == sorted(second) == list(range(20))
    assert batch_order(20, settings, seed=1)[0] != first


def test_a_linear_rate_reaches_zero_behind_the_last_update():
    rates = [decayed(4.0, "linear", step=step, num_steps=4) for step in range(4)]
    assert rates == [4.0, 3.0, 2.0, 1.0]
    assert [decayed(4.0, "constant", step=step, num_steps=4) for step in range(4)] == [4.0] * 4
    with pytest.raises(UserError, match="constant or linear, got 'cosine'"):
        decayed(4.0, "cosine", step=0, num_steps=4)


# -- the round, with a session and a policy that only keep books -----------------------------------


class CharServers:
    """No engines; a token is a character."""

    def encode(self, text):
        return tuple(ord(letter) for letter in text)


@dataclass
class BookSession:
    """Answers as a session does; `rollouts` and `continuations` say what was asked for."""

    config: Config
    respond: object = None  # question -> (trajectory, reward), ...
    validation_ems: list = field(default_factory=list)
    rollouts: list = field(default_factory=list)
    continuations: list = field(default_factory=list)
    said: list = field(default_factory=list)
    metrics: None = None
    servers: CharServers = field(default_factory=CharServers)
    layout: object = field(default_factory=lambda: SimpleNamespace(is_writer=True))
    run: object = None
    stop_after: int = 99  # updates

    def from_writer(self, function):
        return function()

    def is_asked_to_stop(self):
        self.stop_after -= 1
        return self.stop_after < 0

    def watch(self, stage):
        return SimpleNamespace(step=lambda step, values: "")

    def continue_behind(self, watch, step):
        return 0

    def phases(self, stage, step):
        return Phases()

    def tell(self, message):
        self.said.append(message)

    def to_trainer(self, policy):
        pass

    def sync(self, policy, *, stage):
        pass

    def rollout(self, questions, *, file, **how):
        if file.is_file():
            return read_groups(file)
        groups = self.sampled(questions)
        write_groups(file, groups)
        return groups

    def sampled(self, questions):
        self.rollouts.append([question.key for question in questions])
        if self.validation_ems:
            em = self.validation_ems.pop(0)
            half = len(questions) * em
            texts = ["<answer>ann</answer>" if k < half else "" for k in range(len(questions))]
            return [
                Group(q, (trajectory(text),), (float(bool(text)),)) for q, text in zip(questions, texts, strict=True)
            ]
        return [Group(q, *zip(*self.respond(q), strict=True)) for q in questions]

    def continue_trajectories(self, starts, **how):
        self.continuations.append(starts)
        reward = float(len(self.continuations) == 1)  # the teacher, who is asked first, is always right
        return [Group(start.question, (trajectory(),), (reward,)) for start in starts]


@dataclass
class BookPolicy:
    """Counts updates; its "adapter" is their number."""

    version: int = 0
    layout: object = field(
        default_factory=lambda: SimpleNamespace(
            sequence=False, tensor=1, data_rank=0, data=1, context=1, context_rank=0
        )
    )

    shape: ModelShape = field(default_factory=lambda: read_shape("Qwen/Qwen2.5-3B-Instruct"))

    def adapter_disabled(self):
        return contextlib.nullcontext()

    def hidden_rows(self, batches):
        return [torch.zeros(len(batch.targets), 1) for batch in batches]

    def train_step(self, batches, loss, *, lr):
        self.version += 1
        return {"loss": 0.0}

    def snapshot(self):
        return {"adapter": self.version}


class BookCheckpoints:
    """Checkpoints of a BookPolicy, in memory."""

    def __init__(self, folder):
        self.folder = folder
        self.saved = {}
        self.policy = None

    def save(self, step, *, score=None, state=None):
        self.saved[step] = (self.policy.version, {**state, "step": step})

    def stop(self, step, *, state):
        self.save(step, state=state)
        raise Stopped("stopped")

    def resume(self):
        if self.saved:
            self.load(max(self.saved))
        return self.saved[max(self.saved)][1] if self.saved else {}

    def load(self, step):
        self.policy.version = self.saved[step][0]

    def is_whole(self, step):
        return step in self.saved

    def poll(self): ...

    def finish(self): ...


def write_questions(path, count):
    rows = [
        {"id": str(k), "question": f"who is {k}?", "golden_answers": ["ann"], "data_source": "nq"} for k in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [TrainedPair(Sample((1,), (2, 3), (True, True)), Sample((1, 1), (2, 3), (True, True)), "nq:0")] * 4


@pytest.mark.parametrize(
    ("ems", "best"),
    [
        ([0.5, 0.25, 0.25, 0.25], 0),
        ([0.5, 0.5, 0.5, 0.5], 0),
        ([0.25, 0.5, 0.75, 0.75], 4),
        ([0.25, 0.75, 0.5, 0.75], 2),
        ([0.25, 0.25, 0.5, 1.0], 5),
    ],
)
def test_the_adapter_with_the_best_validation_em_is_kept_and_ties_keep_the_earlier(tmp_path, ems, best):
    """Five updates, validated after the second, the fourth and the last; no adapter is a candidate too."""
    settings = OPSDConfig(pairs_per_step=4, epochs=5, max_steps=5, validate_every=2)
    config = Config(opsd=settings, data=DataConfig(validation=write_questions(tmp_path / "v.jsonl", 4)))
    run = SimpleNamespace(directory=tmp_path)
    session = BookSession(config, validation_ems=list(ems), run=run)
    checkpoints = BookCheckpoints(tmp_path / "opsd" / "checkpoints")
    policy = checkpoints.policy = BookPolicy()
    fresh = policy.snapshot()
    kept = train_adapter(session, policy, PAIRS, checkpoints, fresh=fresh, stage="opsd", round_index=0)
    assert kept == {"adapter": best}
    assert policy.version == 5 and len(session.rollouts) == 4
    chosen = json.loads((tmp_path / "opsd" / "selection.json").read_text())
    assert chosen == {"start_em": ems[0], "best_em": max(ems), "best_step": best, "num_steps": 5}


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4])
def test_a_stopped_round_trains_the_rest_and_keeps_the_same_adapter(tmp_path, stop_after):
    settings = OPSDConfig(pairs_per_step=4, epochs=5, max_steps=5, validate_every=2)
    config = Config(opsd=settings, data=DataConfig(validation=write_questions(tmp_path / "v.jsonl", 4)))
    run = SimpleNamespace(directory=tmp_path)
    checkpoints = BookCheckpoints(tmp_path / "opsd" / "checkpoints")
    ems = [0.25, 0.75, 0.5, 0.5]
    for session in (BookSession(config, run=run, stop_after=stop_after), BookSession(config, run=run)):
        session.validation_ems = ems  # one list: what was validated before the stop is not validated again
        policy = checkpoints.policy = BookPolicy()
        fresh = policy.snapshot()
        try:
            kept = train_adapter(session, policy, PAIRS, checkpoints, fresh=fresh, stage="opsd", round_index=0)
        except Stopped:
            assert session.stop_after < 0
    assert kept == {"adapter": 2}
    assert policy.version == 5 and ems == []


def answers(question):
    """Questions with an even id are answered right once, the others never."""
    is_pair = int(question.id) % 2 == 0
    return [(trajectory(f"right {question.id}"), float(is_pair)), (trajectory(f"wrong {question.id}"), 0.0)]


def pool_config(tmp_path, **pool):
    train = write_questions(tmp_path / "train.jsonl", 12)
    return Config(data=DataConfig(train=train), pool=PoolConfig(**{"chunk_questions": 4, **pool}))


def test_questions_are_rolled_out_until_the_pairs_suffice(tmp_path):
    session = BookSession(pool_config(tmp_path), respond=answers)
    groups, pairs = collect_pairs(session, tmp_path, round_index=0, num_pairs_wanted=3, stage="opsd")
    assert len(pairs) >= 3 and len(groups) == 4 * len(session.rollouts) < 12
    everything = BookSession(pool_config(tmp_path, max_questions=12), respond=answers)
    groups, pairs = collect_pairs(everything, tmp_path / "all", round_index=0, num_pairs_wanted=3, stage="opsd")
    assert (len(groups), len(pairs)) == (12, 6)
    assert len({key for keys in everything.rollouts for key in keys}) == 12


def test_a_pool_that_was_interrupted_goes_on_where_it_stopped(tmp_path):
    first = BookSession(pool_config(tmp_path), respond=answers)
    found = collect_pairs(first, tmp_path, round_index=0, num_pairs_wanted=99, stage="opsd")
    (tmp_path / "pool" / "groups_00001.jsonl.gz").unlink()
    again = BookSession(pool_config(tmp_path), respond=answers)
    assert collect_pairs(again, tmp_path, round_index=0, num_pairs_wanted=99, stage="opsd") == found
    assert again.rollouts == [first.rollouts[1]]


def test_every_question_has_a_line_that_says_why_it_gave_its_pair_or_none(tmp_path):
    session = BookSession(pool_config(tmp_path), respond=answers)
    collect_pairs(session, tmp_path, round_index=0, num_pairs_wanted=99, stage="opsd")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        is_pair = int(row["question"].removeprefix("nq:")) % 2 == 0
        assert row["outcome"] == ("pair" if is_pair else "no correct trajectory")
        assert row["student"] == (1 if is_pair else None)


def test_a_pool_without_a_single_pair_stops_the_run(tmp_path):
    session = BookSession(pool_config(tmp_path), respond=lambda question: [(trajectory(), 0.0)])
    with pytest.raises(UserError, match=r"no pair could be mined from 12 questions \(see .*pairs\.jsonl\)"):
        collect_pairs(session, tmp_path, round_index=0, num_pairs_wanted=3, stage="opsd")
    assert (tmp_path / "pairs.jsonl").is_file()


def mined_pair(question=QUESTION, student=None, reference="the reference"):
    student = student or trajectory("wrong", searches=2)
    pair, _ = mine_pair(Group(question, (trajectory(reference), student), (1.0, 0.0)), PairsConfig())
    return pair


def test_the_teacher_reads_the_reference_and_answers_with_the_students_own_tokens():
    pair = mined_pair()
    session = BookSession(Config())
    (trained,) = trained_pairs(session, [pair])
    assert trained.student == Sample(pair.student.prompt_ids, pair.student.response_ids, pair.student.policy_mask)
    assert trained.teacher == replace(trained.student, prompt_ids=trained.teacher.prompt_ids)
    prompt = "".join(chr(letter) for letter in trained.teacher.prompt_ids)
    assert "the reference" in prompt and "who wrote it?" in prompt and "wrong" not in prompt
    assert session.said == []


def test_a_teacher_sequence_that_is_too_long_drops_its_pair_and_nothing_else():
    pairs = [mined_pair(), mined_pair(reference="r" * 5000), mined_pair(reference="short")]
    session = BookSession(Config(opsd=OPSDConfig(max_teacher_tokens=3000)))
    assert trained_pairs(session, pairs) == trained_pairs(BookSession(Config()), [pairs[0], pairs[2]])
    assert "1 pairs dropped" in session.said[0]
    with pytest.raises(UserError, match=r"no pair fits opsd\.max_teacher_tokens=3000"):
        trained_pairs(session, [pairs[1]])


# -- the teacher check ----------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(0, 99))
def test_a_cut_keeps_nothing_or_ends_with_an_observation(searches, seed):
    cut_at = trajectory(searches=searches)
    cut = random_cut(cut_at, random.Random(seed))
    assert cut == 0 or cut_at.spans[cut - 1].kind == "information"


def test_every_observation_may_be_the_last_that_is_kept():
    generator = random.Random(0)
    assert {random_cut(trajectory(searches=3), generator) for _ in range(100)} == {0, 2, 4, 6}


def test_the_teacher_check_continues_wrong_students_from_the_same_cuts_under_both_prompts():
    questions = [replace(QUESTION, id=str(k)) for k in range(6)]
    pairs = [mined_pair(question) for question in questions]
    pairs[0] = replace(pairs[0], student_reward=1.0)
    session = BookSession(Config(opsd=OPSDConfig(teacher_check_questions=4)))
    check = teacher_check(session, [], pairs, round_index=0)
    assert (check.num_starts, check.teacher_em, check.student_em, check.gap) == (4, 1.0, 0.0, 1.0)
    with_reference, without = session.continuations
    assert [start.question.id for start in with_reference] == ["1", "2", "3", "4"]
    for teacher, student, pair in zip(with_reference, without, pairs[1:], strict=False):
        assert teacher.spans == student.spans == pair.student.spans[: len(student.spans)]
        assert student.prompt_ids == pair.student.prompt_ids
        assert "the reference" in "".join(chr(letter) for letter in teacher.prompt_ids)


def test_the_teacher_check_can_be_switched_off_and_needs_a_wrong_student():
    session = BookSession(Config(opsd=OPSDConfig(teacher_check_questions=0)))
    assert teacher_check(session, [], [mined_pair()], round_index=0) is None
    session = BookSession(Config())
    assert teacher_check(session, [], [replace(mined_pair(), student_reward=1.0)], round_index=0) is None
    assert session.continuations == []
