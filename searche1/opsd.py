"""The on-policy self-distillation round (paper 3.2): pool, pairs, privileged prompts, clipped forward KL, merge.

Shapes: R rows (policy tokens of the student trajectory) of a micro-batch, H hidden size.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.flops import attention_cost
from megatron_ext.lora import LoraSettings
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.vocab_parallel import ClippedKL
from searche1.checkpoints import CHECKPOINTS, Checkpoints
from searche1.config import Config, OPSDConfig, PoolConfig
from searche1.data import load_questions, shuffled
from searche1.evaluation.scores import scores_of
from searche1.evaluation.summary import summarize
from searche1.packing import Sample, make_pair_batches, padded_length, row_weights, sample_of, sharing_of
from searche1.pairs import Pair, PairRecord, mine_pair
from searche1.policy import Policy
from searche1.prompts import teacher_prompt
from searche1.rollout.sampler import Start
from searche1.runs import PAIR_KL_FILE, SELECTION_FILE, atomic_write_json, atomic_write_text
from searche1.session import Session
from searche1.types import Group, SharedError, Stopped, Trajectory, UserError

# -- the loss (Eq. 7) -----------------------------------------------------------------------------


def opsd_metrics(kl: ClippedKL, weights: Tensor) -> dict[str, Tensor]:
    """What the rows [R] of Eq. 7 say, as weighted sums; with sequence_mean weights the loss is its mean over R_tau."""
    return {
        "loss": (weights * kl.loss).sum(),
        "kl": (weights * kl.kl).sum(),
        "entropy": (weights * kl.entropy).sum(),
        "clip_fraction": (weights * (kl.clipped_mass > 0)).sum(),
        "clipped_mass": (weights * kl.clipped_mass).sum(),
        "suspect_fraction": (weights * kl.is_suspect).sum(),
    }


@dataclass(frozen=True)
class TrainedPair:
    """A pair as two samples over the same response ids: P_S(q) and P_T(q, tau_ref) in front of tau_stu."""

    student: Sample
    teacher: Sample
    question: str  # its key


def opsd_step(policy: Policy, pairs: Sequence[TrainedPair], *, config: Config, lr: float) -> dict[str, float]:
    """One update: teacher rows with the adapter off, then the student pass on the same rows. Collective."""
    settings, train, layout = config.opsd, config.train, policy.layout
    students = [pair.student for pair in pairs]
    batches = make_pair_batches(
        students,
        [pair.teacher for pair in pairs],
        row_weights(students, settings.loss_norm),
        max_tokens=max(train.max_tokens, padded_length(settings.max_teacher_tokens, sharing_of(layout))),
        rank=layout.data_rank,
        num_ranks=layout.data,
        sharing=sharing_of(layout),
        attention_cost=attention_cost(policy.shape),
    )
    with policy.adapter_disabled():  # Eq. 6: the frozen weights, no gradient
        teacher_rows = policy.hidden_rows([teacher for _, teacher in batches])

    def loss(hidden: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batches[index][0]
        weights = batch.weights.to(hidden.device)
        teacher = teacher_rows[index][batch.row_numbers.to(hidden.device)]
        value, kl = policy.kl_loss(hidden, teacher, weights, kl_clip=settings.kl_clip, temperature=settings.temperature)
        return value, opsd_metrics(kl, weights)

    return policy.train_step([student for student, _ in batches], loss, lr=lr)


# -- what a pair teaches, token by token ----------------------------------------------------------

NUM_SHOWN_PAIRS = 64  # of a round, for whoever reads the report


@dataclass(frozen=True)
class TokenKL:
    """KL(teacher || student) at every policy token of a pair's student trajectory, in nats, unclipped."""

    question: str
    before: tuple[float, ...]  # without the adapter
    after: tuple[float, ...]  # with the one that was kept


def token_kls(policy: Policy, pairs: Sequence[TrainedPair], config: Config) -> list[TokenKL]:
    """Two forward passes over the first pairs of a round, for the policy's present adapter. Collective."""
    students = [pair.student for pair in pairs]
    sharing = sharing_of(policy.layout)
    batches = make_pair_batches(  # every data-parallel rank takes all of them
        students,
        [pair.teacher for pair in pairs],
        [1.0] * len(pairs),
        max_tokens=max(config.train.max_tokens, padded_length(config.opsd.max_teacher_tokens, sharing)),
        rank=0,
        num_ranks=1,
        sharing=sharing,
    )
    packed = [student for student, _ in batches]

    def values(teacher_rows: Sequence[Tensor]) -> list[list[float]]:
        rows = policy.kl_rows(packed, teacher_rows, temperature=config.opsd.temperature)
        return policy.by_sample(packed, rows, num_samples=len(pairs))

    with policy.adapter_disabled():
        teacher_rows = policy.hidden_rows([teacher for _, teacher in batches])
        before = values(teacher_rows)
    after = values(teacher_rows)
    return [TokenKL(pair.question, tuple(b), tuple(a)) for pair, b, a in zip(pairs, before, after, strict=True)]


def write_token_kls(path: Path, found: Sequence[TokenKL]) -> None:
    """A JSON line a pair, to a tenth of a millinat."""

    def rounded(values: Sequence[float]) -> list[float]:
        return [round(value, 4) for value in values]

    lines = ({"question": kl.question, "before": rounded(kl.before), "after": rounded(kl.after)} for kl in found)
    atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


# -- the round ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherCheck:
    """EM of wrong trajectories cut at a turn boundary and continued under both prompts."""

    num_starts: int
    teacher_em: float
    student_em: float

    @property
    def gap(self) -> float:
        return self.teacher_em - self.student_em


def run_opsd_round(session: Session, *, model_path: Path, stage: str, round_index: int) -> Path:
    """Distil from `model_path` and merge the best adapter; returns the HuggingFace folder. Collective."""
    config = session.config
    settings = config.opsd
    folder = session.run.directory / stage
    policy = session.policy(
        model_path,
        optimizer=OptimizerSettings(
            lr=settings.lr,
            betas=(0.9, 0.999),
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
            distributed=config.train.distributed_optimizer,
        ),
        lora=LoraSettings(rank=settings.lora_rank, alpha=settings.lora_alpha, seed=config.run.seed + round_index),
    )
    fresh = policy.snapshot()
    checkpoints = Checkpoints(session, policy, folder / CHECKPOINTS)
    if session.is_asked_to_stop():
        checkpoints.stop(0)
    session.sync(policy, stage=stage)
    num_pairs_wanted = settings.max_steps * settings.pairs_per_step
    groups, pairs = collect_pairs(
        session, folder, round_index=round_index, num_pairs_wanted=num_pairs_wanted, stage=stage
    )
    check_file = folder / "teacher_check.json"
    if not session.from_writer(check_file.is_file):
        check = teacher_check(session, groups, pairs, round_index=round_index)
        if session.layout.is_writer and check is not None:
            atomic_write_json(check_file, {**asdict(check), "gap": check.gap})
    trained = session.from_writer(lambda: trained_pairs(session, pairs))
    best = train_adapter(session, policy, trained, checkpoints, fresh=fresh, stage=stage, round_index=round_index)
    session.to_trainer(policy)
    policy.restore(best)
    shown = token_kls(policy, trained[:NUM_SHOWN_PAIRS], config)
    if session.layout.is_writer:
        write_token_kls(folder / PAIR_KL_FILE, shown)
    policy.save_adapter(folder / "adapter")
    policy.save_hf(folder / "hf")
    return folder / "hf"


def collect_pairs(
    session: Session, folder: Path, *, round_index: int, num_pairs_wanted: int, stage: str
) -> tuple[list[Group], list[Pair]]:
    """Roll out training questions, K each, until the pairs suffice; restartable piece by piece. Collective."""
    config = session.config
    pool: PoolConfig = config.pool
    order = shuffled(load_questions(config.data.train), seed=config.run.seed, round_index=1000 + round_index)
    if pool.max_questions:
        order = order[: pool.max_questions]
    groups: list[Group] = []
    pairs: list[Pair] = []
    records: list[PairRecord] = []
    for number, start in enumerate(range(0, len(order), pool.chunk_questions)):
        if len(pairs) >= num_pairs_wanted and not pool.max_questions:
            break
        piece = folder / "pool" / f"groups_{number:05d}.jsonl.gz"
        questions = order[start : start + pool.chunk_questions]
        found = session.rollout(
            questions,
            samples=pool.rollouts_per_question,
            temperature=config.rollout.temperature,
            seed=config.run.seed * 1_000_003 + (500 + round_index) * 10_007 + number,
            title=f"{stage} pool {start + len(questions)}/{len(order)} questions",
            file=piece,
        )
        groups += found
        for group in found:
            pair, record = mine_pair(group, config.pairs)
            records.append(record)
            if pair is not None:
                pairs.append(pair)
    if session.layout.is_writer:
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        atomic_write_text(folder / "pairs.jsonl", lines)
    if not pairs:
        raise SharedError(
            f"no pair could be mined from {len(groups)} questions (see {folder / 'pairs.jsonl'}); "
            "the policy answers nothing or always the same: train GRPO longer or raise pool.rollouts_per_question, "
            "in a new run.out"
        )
    num_wrong = sum(pair.student_reward == 0.0 for pair in pairs)
    session.tell(
        f"{stage}: {len(pairs)} pairs from {len(groups)} questions x {pool.rollouts_per_question} rollouts; "
        f"{num_wrong} wrong students, references search {_mean(p.reference.num_searches for p in pairs):.2f} times, "
        f"students {_mean(p.student.num_searches for p in pairs):.2f}"
    )
    return groups, pairs


def trained_pairs(session: Session, pairs: Sequence[Pair]) -> list[TrainedPair]:
    """Both prompts of every pair, on rank 0. A teacher sequence that is too long drops its pair, never a token."""
    assert session.servers is not None
    limit = session.config.opsd.max_teacher_tokens
    kept = []
    for pair in pairs:
        text = teacher_prompt(pair.question.text, pair.reference.text, session.config.prompt)
        teacher = sample_of(pair.student, session.servers.encode(text))
        if teacher.num_inputs <= limit:
            kept.append(TrainedPair(sample_of(pair.student), teacher, pair.question.key))
    if len(kept) < len(pairs):
        session.tell(f"  {len(pairs) - len(kept)} pairs dropped: longer than opsd.max_teacher_tokens={limit}")
    if not kept:
        raise UserError(f"no pair fits opsd.max_teacher_tokens={limit}; raise it")
    return kept


def train_adapter(
    session: Session,
    policy: Policy,
    pairs: Sequence[TrainedPair],
    checkpoints: Checkpoints,
    *,
    fresh: dict[str, Tensor],
    stage: str,
    round_index: int,
) -> dict[str, Tensor]:
    """Train, validate every few updates, and return the adapter with the best validation EM. Collective.

    The `fresh` adapter (step 0), which engines have, is a candidate; ties keep the earlier one. A checkpoint is written
    with each validation; a round that was stopped continues from the last.
    """
    settings = session.config.opsd
    order = batch_order(len(pairs), settings, seed=session.config.run.seed + round_index)
    start_em = validation_em(session, stage=stage, step=0)
    session.tell(f"{stage} step 0/{len(order)}  validation EM {start_em:.3f} (adapter off)")
    found = resume_adapter(session, policy, checkpoints)
    best_em, best_step, best = (start_em, 0, fresh) if found.adapter is None else (found.em, found.step, found.adapter)
    watch = session.watch(stage)
    session.continue_behind(watch, found.done)
    for step, members in enumerate(order[found.done :], start=found.done + 1):
        if session.is_asked_to_stop():
            checkpoints.stop(step - 1, state={"best_em": best_em, "best_step": best_step})
        phases = session.phases(stage, step)
        with phases("train"):
            session.to_trainer(policy)
            lr = decayed(settings.lr, settings.lr_decay, step=step - 1, num_steps=len(order))
            metrics = opsd_step(policy, [pairs[k] for k in members], config=session.config, lr=lr)
        if step % settings.validate_every == 0 or step == len(order):
            candidate = policy.snapshot()
            with phases("sync"):
                session.sync(policy, stage=stage)
            with phases("validate"):
                try:
                    metrics["validation_em"] = validation_em(session, stage=stage, step=step)
                except Stopped:
                    checkpoints.finish()  # of the validation before, which the same command continues from
                    raise
            if metrics["validation_em"] > best_em:
                best_em, best_step, best = metrics["validation_em"], step, candidate
            session.tell(f"{stage} step {step}/{len(order)}  validation EM {metrics['validation_em']:.3f}")
        if session.metrics is not None:
            session.metrics.log(stage=stage, step=step, num_steps=len(order), values=metrics, seconds=phases.seconds)
        # KL to the teacher is what this round is about, not a sign of harm.
        action = session.from_writer(
            functools.partial(watch.step, step, {k: v for k, v in metrics.items() if k != "kl"})
        )
        if ("validation_em" in metrics and step < len(order)) or action == "stop":
            session.to_trainer(policy)
            score, state = metrics.get("validation_em"), {"best_em": best_em, "best_step": best_step}
            checkpoints.save(step, score=score, state=state)
        if action == "stop":
            checkpoints.finish()
            raise SharedError(
                f"{stage} step {step}: stopped for the alarm above, as health.on_alarm says; the same command continues"
            )
        checkpoints.poll()
    checkpoints.finish()
    selection = {"start_em": start_em, "best_em": best_em, "best_step": best_step, "num_steps": len(order)}
    session.from_writer(lambda: atomic_write_json(session.run.directory / stage / SELECTION_FILE, selection))
    kept = f"the adapter of step {best_step}" if best_step else "step 0: no adapter improved on the GRPO policy"
    session.tell(f"{stage}: best validation EM {best_em:.3f}; merging {kept}")
    return best


@dataclass(frozen=True)
class FoundAdapter:
    """What a stopped round has on the disk: updates done, and the best adapter so far; None where that is step 0's."""

    done: int = 0
    step: int = 0
    em: float = 0.0
    adapter: dict[str, Tensor] | None = None


def resume_adapter(session: Session, policy: Policy, checkpoints: Checkpoints) -> FoundAdapter:
    """The newest checkpoint in the policy, and the best adapter as it was. Collective."""
    session.to_trainer(policy)
    state = checkpoints.resume()
    done = state.get("step", 0)

    def drop_later_validations() -> None:  # of an adapter that will be trained again, to other bits on a GPU
        for file in (checkpoints.folder.parent / "validation").glob("step_*"):  # unfinished ones too
            if int(file.name[5:10]) > done:
                file.unlink()

    session.from_writer(drop_later_validations)
    step = state.get("best_step", 0)
    if step == 0:
        return FoundAdapter(done)
    if not checkpoints.is_whole(step):
        raise SharedError(
            f"the best adapter of this round, {checkpoints.folder}/step_{step}, is damaged; restore it, or delete "
            f"{checkpoints.folder} to train the round's adapter again from its first update"
        )
    checkpoints.load(step)
    best = policy.snapshot()
    checkpoints.load(done)
    return FoundAdapter(done, step, state["best_em"], best)


def batch_order(num_pairs: int, settings: OPSDConfig, *, seed: int) -> list[list[int]]:
    """Pair indices of every update: shuffled anew each epoch, at most `epochs` passes and `max_steps` updates."""
    generator = random.Random(seed)
    size = min(settings.pairs_per_step, num_pairs)
    batches: list[list[int]] = []
    for _ in range(settings.epochs):
        order = list(range(num_pairs))
        generator.shuffle(order)
        batches += [order[k : k + size] for k in range(0, num_pairs - size + 1, size)]
    return batches[: settings.max_steps]


def decayed(lr: float, kind: str, *, step: int, num_steps: int) -> float:
    """The learning rate of update `step` (from 0): constant, or linear to zero behind the last one."""
    if kind not in ("constant", "linear"):
        raise UserError(f"opsd.lr_decay must be constant or linear, got {kind!r}")
    return lr if kind == "constant" else lr * (1 - step / num_steps)


def validation_em(session: Session, *, stage: str, step: int) -> float:
    """EM on the validation questions, with the weights of the last sync. Collective."""
    config = session.config
    groups = session.rollout(
        load_questions(config.data.validation),
        samples=config.eval.validation_samples,
        temperature=config.eval.validation_temperature,
        seed=config.run.seed * 1_000_003 + 900_001,  # the same draws for every candidate
        title=f"{stage} validation at step {step}",
        file=session.run.directory / stage / "validation" / f"step_{step:05d}.jsonl.gz",
    )
    return summarize(scores_of(groups)).macro_em


# -- the teacher check ----------------------------------------------------------------------------


def teacher_check(
    session: Session, groups: Sequence[Group], pairs: Sequence[Pair], *, round_index: int
) -> TeacherCheck | None:
    """Can the teacher still rescue wrong trajectories? Collective; None when it is switched off.

    Wrong students are cut at a turn boundary and continued at temperature 1 under both prompts. A teacher that does
    no better than the student at the student's own positions has nothing to teach.
    """
    limit = session.config.opsd.teacher_check_questions
    wrong = [pair for pair in pairs if pair.student_reward == 0.0][:limit]
    if not limit or not wrong:
        return None
    generator = random.Random(session.config.run.seed + round_index)
    cuts = [random_cut(pair.student, generator) for pair in wrong]

    def starts(with_reference: bool) -> list[Start]:
        assert session.servers is not None
        encode, prompt = session.servers.encode, session.config.prompt
        return [
            Start(
                question=pair.question,
                prompt_ids=encode(teacher_prompt(pair.question.text, pair.reference.text, prompt))
                if with_reference
                else pair.student.prompt_ids,
                spans=pair.student.spans[:cut],
            )
            for pair, cut in zip(wrong, cuts, strict=True)
        ]

    ems = []
    for with_reference in (True, False):
        continued = session.continue_trajectories(
            session.from_writer(functools.partial(starts, with_reference)),
            samples=1,
            temperature=1.0,
            seed=session.config.run.seed * 1_000_003 + 950_001 + round_index,
            title="teacher check",
        )
        rewards = [
            reward
            for group in continued
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
            if trajectory.status != "error"
        ]
        ems.append(_mean(rewards))
    check = TeacherCheck(num_starts=len(wrong), teacher_em=ems[0], student_em=ems[1])
    verdict = (
        "the teacher has something to teach"
        if check.gap >= 0.15
        else ("a small gap: this round may not help" if check.gap > 0.05 else "no gap: this round can hardly help")
    )
    session.tell(
        f"teacher check: {check.num_starts} wrong trajectories continued with the reference reach EM "
        f"{check.teacher_em:.3f}, without it {check.student_em:.3f} ({verdict})"
    )
    return check


def random_cut(trajectory: Trajectory, generator: random.Random) -> int:
    """A number of leading spans to keep: none, or up to the end of one of the observations."""
    ends = [0] + [k + 1 for k, span in enumerate(trajectory.spans) if span.kind == "information"]
    return generator.choice(ends)


def _mean(values: Any) -> float:
    values = list(values)
    return statistics.fmean(values) if values else 0.0
