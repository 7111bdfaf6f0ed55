"""The GRPO round: Search-R1's recipe with an exact-match reward (paper 3.1, Eqs. 1 and 2).

Shapes: R rows (policy tokens) of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.flops import attention_cost
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.vocab_parallel import TokenLogprobs
from searche1.checkpoints import CHECKPOINTS, Checkpoints
from searche1.config import Config
from searche1.data import load_questions, question_batches
from searche1.health import Watch
from searche1.metrics import Phases, rollout_metrics
from searche1.packing import PackedBatch, Sample, make_batches, row_weights, sample_of, sharing_of
from searche1.policy import Policy
from searche1.session import Session
from searche1.types import Group, SharedError, Stopped, Trajectory


def group_advantages(rewards: Sequence[float], *, eps: float) -> list[float]:
    """Eq. 1 with the unbiased standard deviation: (R - mean) / (std + eps). A group of equal rewards gets zeros.

    A group of one has nothing to compare with; Search-R1 lets its reward through as the advantage.
    """
    if len(rewards) == 1:
        return [rewards[0] / (1 + eps)]
    mean = statistics.fmean(rewards)
    std = statistics.stdev(rewards)
    return [(reward - mean) / (std + eps) for reward in rewards]


@dataclass(frozen=True)
class RowTensors:
    """Per-row values of one micro-batch, [R] float32 each."""

    old_logprobs: Tensor | None  # None where no update came before: then they are what the update itself finds
    ref_logprobs: Tensor | None  # None where the reference is the old policy
    advantages: Tensor
    engine_logprobs: Tensor
    weights: Tensor  # sum to one over the mini-batch

    def part(self, rows: slice, logprobs: Tensor) -> RowTensors:
        """Some of the rows, with what is None taken from their logprobs under the policy that is updated."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        part = {name: value[rows] for name, value in fields.items() if value is not None}
        part.setdefault("old_logprobs", logprobs.detach())
        part.setdefault("ref_logprobs", part["old_logprobs"])
        return RowTensors(**part)


class Terms(NamedTuple):
    """The parts of Eq. 2 in each row, [R]."""

    ratio: Tensor
    surrogate: Tensor
    kl: Tensor


def grpo_terms(logprobs: Tensor, rows: RowTensors, *, clip_eps: float) -> Terms:
    """Ratio, clipped surrogate and the KL to the reference policy."""
    assert rows.old_logprobs is not None and rows.ref_logprobs is not None
    ratio = (logprobs - rows.old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.minimum(ratio * rows.advantages, clipped * rows.advantages)
    log_ref_ratio = (rows.ref_logprobs - logprobs).clamp(-20.0, 20.0)  # exp stays finite, and so does the gradient
    kl = (log_ref_ratio.exp() - log_ref_ratio - 1).clamp(max=10.0)  # k3 estimator; the bound is verl's
    return Terms(ratio, surrogate, kl)


def grpo_loss(
    logprobs: Tensor,  # [R], with gradient
    entropy: Tensor,  # [R], with gradient
    rows: RowTensors,
    *,
    clip_eps: float,
    kl_coef: float,
    entropy_coef: float,
) -> Tensor:
    """Eq. 2 with a KL term to the reference policy and an entropy bonus: a weighted sum over rows."""
    terms = grpo_terms(logprobs, rows, clip_eps=clip_eps)
    return (rows.weights * (kl_coef * terms.kl - terms.surrogate - entropy_coef * entropy)).sum()


def grpo_metrics(
    found: TokenLogprobs, rows: RowTensors, *, clip_eps: float, temperature: float = 1.0
) -> dict[str, Tensor]:
    """What the rows say, as weighted sums. The engine's logprobs are those at temperature 1, so only there compared."""
    terms = grpo_terms(found.logprobs, rows, clip_eps=clip_eps)
    assert rows.old_logprobs is not None
    is_clipped = terms.ratio * rows.advantages > terms.surrogate
    metrics = {
        "kl": (rows.weights * terms.kl).sum(),
        "entropy": (rows.weights * found.entropy).sum(),
        "clip_fraction": (rows.weights * is_clipped).sum(),
        "ratio_mean": (rows.weights * terms.ratio).sum(),
        "ratio_max": terms.ratio.max() if len(terms.ratio) else terms.ratio.new_zeros(()),
    }
    if temperature == 1.0:
        metrics["engine_gap"] = (rows.weights * (rows.old_logprobs - rows.engine_logprobs).abs()).sum()
    return metrics


def learning_rate(step: int, *, lr: float, warmup_ratio: float, num_steps: int) -> float:
    """Linear warm-up over a share of the round, then constant. `step` counts from 0; step 0 already learns."""
    warmup = round(warmup_ratio * num_steps)
    return lr * min(1.0, (step + 1) / warmup) if warmup else lr


@dataclass(frozen=True)
class TrainedSample:
    """A valid trajectory with the advantage that all its policy tokens share."""

    trajectory: Trajectory
    sample: Sample
    advantage: float


def trained_samples(groups: Sequence[Group], *, advantage_eps: float) -> list[TrainedSample]:
    """Every trajectory that is the policy's own behaviour, with its group's advantage. Faulty ones leave the group.

    One without a policy token counts in its group, but has nothing to train.
    """
    samples = []
    for group in groups:
        valid = [
            (trajectory, reward)
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
            if trajectory.status != "error"
        ]
        if not valid:
            continue
        advantages = group_advantages([reward for _, reward in valid], eps=advantage_eps)
        for (trajectory, _), advantage in zip(valid, advantages, strict=True):
            if trajectory.num_policy_tokens:
                samples.append(TrainedSample(trajectory, sample_of(trajectory), advantage))
    return samples


def mini_batches(samples: Sequence[TrainedSample], size: int) -> list[list[TrainedSample]]:
    """Consecutive mini-batches of `size` sequences; 0 takes all.

    Where faults have left another number, there are as many as come closest to that size, of about as many sequences.
    """
    count = max(1, round(len(samples) / size)) if size > 0 else 1
    ends = [(k + 1) * len(samples) // count for k in range(count)]
    return [list(samples[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def run_grpo_round(session: Session, *, model_path: Path, stage: str, round_index: int) -> Path:
    """Train `grpo.steps` steps from `model_path`; returns the HuggingFace folder of the result. Collective.

    A round that was interrupted continues from its last whole checkpoint, and takes the rollouts of the steps behind it
    from the disk. One that collapses ends with its best checkpoint, or goes back to it (`health.on_collapse`).
    """
    config = session.config
    settings = config.grpo
    folder = session.run.directory / stage
    policy = session.policy(
        model_path,
        optimizer=OptimizerSettings(
            lr=settings.lr,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
            distributed=config.train.distributed_optimizer,
        ),
    )
    # pi_ref of the KL term is the policy at the start of this round, also when the round is continued.
    reference = policy.snapshot() if settings.kl_coef else None
    checkpoints = Checkpoints(session, policy, folder / CHECKPOINTS)
    watch = session.watch(stage)
    step = checkpoints.resume().get("step", 0)
    roll_backs = session.continue_behind(watch, step)
    questions = load_questions(config.data.train)
    while step < settings.steps:
        if session.is_asked_to_stop():
            checkpoints.stop(step, score=session.average_em(watch))
        batch = next(
            question_batches(
                questions,
                batch_size=settings.prompts_per_step,
                seed=config.run.seed,
                round_index=round_index,
                start=step,
            )
        )
        phases = session.phases(stage, step + 1)
        file = folder / "rollouts" / f"step_{step + 1:05d}.jsonl.gz"
        is_sampled_before = session.from_writer(file.is_file)
        with phases("sync"):
            session.sync(policy, stage=stage)
        with phases("rollout"):
            try:
                groups = session.rollout(
                    batch,
                    samples=config.rollout.group_size,
                    temperature=config.rollout.temperature,
                    seed=config.run.seed * 1_000_003 + round_index * 10_007 + step + roll_backs * 1_000_000_007,
                    title=f"{stage} step {step + 1}",
                    file=file,
                )
            except Stopped:
                checkpoints.stop(step, score=session.average_em(watch))
        checkpoints.poll()  # it has had a rollout's time to be written
        with phases("train"):
            session.to_trainer(policy)
            lr = learning_rate(step, lr=settings.lr, warmup_ratio=settings.warmup_ratio, num_steps=settings.steps)
            lr *= config.health.roll_back_lr**roll_backs
            updates = grpo_step(policy, reference, groups, config=config, lr=lr)
        values = log_step(session, stage, step, groups, updates, phases, is_sampled_before=is_sampled_before)
        if all(update["is_skipped"] for update in updates):
            raise SharedError(
                f"{stage} step {step + 1}: no update had a finite gradient, so the weights did not move; "
                "the same would happen again. See in metrics.jsonl where it began; lower grpo.lr, in a new run.out"
            )
        step += 1
        action = session.from_writer(functools.partial(watch.step, step, values))
        if action == "stop":
            checkpoints.save(step, score=session.average_em(watch))
            checkpoints.finish()
            raise SharedError(
                f"{stage} step {step}: stopped for the alarm above, as health.on_alarm and health.on_collapse say; "
                "the same command continues, with other settings of health too"
            )
        if action in ("roll_back", "end_round"):
            checkpoints.finish()
            best = checkpoints.best()
            if action == "roll_back" and best and roll_backs < config.health.max_roll_backs:
                step = roll_back(session, checkpoints, watch, to=best, number=roll_backs + 1, stage=stage)
                roll_backs = session.continue_behind(watch, step)
                continue
            policy = end_round(session, policy, checkpoints, watch, step=step, best=best, model_path=model_path)
            break
        # Last, so that a continued run lacks no record of a step.
        if settings.save_every and step % settings.save_every == 0 and step < settings.steps:
            checkpoints.save(step, score=session.average_em(watch))
    checkpoints.finish()
    policy.save_hf(folder / "hf")
    return folder / "hf"


def roll_back(session: Session, checkpoints: Checkpoints, watch: Watch, *, to: int, number: int, stage: str) -> int:
    """Weights and optimizer of the checkpoint of step `to`; what was sampled since is set aside. Collective."""
    checkpoints.drop_after(to)
    checkpoints.load(to)
    rollouts = checkpoints.folder.parent / "rollouts"

    def set_aside() -> None:
        aside = rollouts.with_name(f"rolled_back_{number}")
        aside.mkdir(exist_ok=True)
        for file in sorted(rollouts.glob("step_*")):
            if int(re.sub(r"\D", "", file.name.partition(".")[0])) > to:
                file.rename(aside / file.name)
        watch.record(to, rolled_back_to=to)

    session.from_writer(set_aside)
    session.tell(f"{stage}: back at step {to}, with new draws and a lower learning rate ({number}. time)")
    return to


def end_round(
    session: Session,
    policy: Policy,
    checkpoints: Checkpoints,
    watch: Watch,
    *,
    step: int,
    best: int,
    model_path: Path,
) -> Policy:
    """The policy that a collapsed round hands on: its best checkpoint's, or the one it began with. Collective."""
    checkpoints.drop_after(best)  # whoever is killed here must not go on behind the collapse
    if best:
        checkpoints.load(best)
    else:
        policy.optimizer_to_host()  # two of them need not fit
        policy.weights_to_host()
        policy = session.policy(model_path, optimizer=None)
    session.from_writer(lambda: watch.record(step, ended_with=best))
    session.tell(f"the round ends at step {step} with the weights of step {best}, the best that were kept")
    return policy


def grpo_step(
    policy: Policy, reference: dict[str, Tensor] | None, groups: Sequence[Group], *, config: Config, lr: float
) -> list[dict[str, float]]:
    """All updates of one rollout batch; returns the metrics of each. Collective."""
    settings, layout = config.grpo, policy.layout
    temperature = config.rollout.temperature
    samples = trained_samples(groups, advantage_eps=settings.advantage_eps)
    if not samples:
        raise SharedError("every trajectory of a rollout batch failed; see the engine and retriever logs")
    packed = []
    for part in mini_batches(samples, settings.mini_batch_size):
        batches = make_batches(
            [s.sample for s in part],
            row_weights([s.sample for s in part], settings.loss_norm),
            max_tokens=config.train.max_tokens,
            rank=layout.data_rank,
            num_ranks=layout.data,
            sharing=sharing_of(layout),
            attention_cost=attention_cost(policy.shape),
            share_prefix=policy.share_prefix,
        )
        packed.append((part, batches))
    # Before the first update the policy is still the old one, and the update's own forward pass finds its logprobs.
    # Those of later mini-batches, and of the reference, take a pass each before anything moves.
    nothing: list[None] = [None] * len(packed[0][1])
    old: list[Sequence[Tensor | None]] = [nothing]
    old += [policy.logprobs(batches, temperature=temperature) for _, batches in packed[1:]]
    ref = old
    if reference is not None:
        with policy.weights(reference):
            ref = [policy.logprobs(batches, temperature=temperature) for _, batches in packed]

    updates = []
    for (part, batches), old_rows, ref_rows in zip(packed, old, ref, strict=True):
        rows = (
            [
                row_tensors(part, batch, old_logprobs=o, ref_logprobs=r, device=layout.device)
                for batch, o, r in zip(batches, old_rows, ref_rows, strict=True)
            ]
            if layout.is_last_stage
            else []
        )

        def loss(hidden: Tensor, index: int, *, batches=batches, rows=rows) -> tuple[Tensor, dict[str, Tensor]]:
            def row_loss(new: TokenLogprobs, chunk: slice) -> Tensor:
                return grpo_loss(
                    *new,
                    rows[index].part(chunk, new.logprobs),
                    clip_eps=settings.clip_eps,
                    kl_coef=settings.kl_coef,
                    entropy_coef=settings.entropy_coef,
                )

            value, found = policy.token_loss(hidden, batches[index].targets, row_loss, temperature=temperature)
            every = rows[index].part(slice(None), found.logprobs)
            metrics = grpo_metrics(found, every, clip_eps=settings.clip_eps, temperature=temperature)
            return value, {"loss": value.detach(), **metrics}

        updates.append(policy.train_step(batches, loss, lr=lr))
    return updates


def row_tensors(
    part: Sequence[TrainedSample],
    batch: PackedBatch,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    device: torch.device,
) -> RowTensors:
    """Line up what the loss needs with this rank's rows of a micro-batch."""
    owners = batch.sample_of_row.tolist()
    advantages = torch.tensor([part[owner].advantage for owner in owners])
    engine = torch.tensor([x for owner in dict.fromkeys(owners) for x in part[owner].trajectory.engine_logprobs])
    return RowTensors(
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages[batch.row_numbers].to(device),
        engine_logprobs=engine[batch.row_numbers].to(device),
        weights=batch.weights.to(device),
    )


def log_step(
    session: Session,
    stage: str,
    step: int,
    groups: Sequence[Group],
    updates: Sequence[dict[str, float]],
    phases: Phases,
    *,
    is_sampled_before: bool,
) -> dict[str, float]:
    """One line on the screen and one record: rollout statistics, the mean over the step's updates, phase times.

    Returns the values, on rank 0. Rollouts that came from the disk say nothing about speed.
    """
    if session.metrics is None:
        return {}
    rollouts = rollout_metrics(groups)
    values = rollouts | {name: statistics.fmean(u[name] for u in updates) for name in updates[0]}
    values["num_updates"] = float(len(updates))
    values["ratio_max"] = max(u["ratio_max"] for u in updates)
    if not is_sampled_before:
        values["tokens_per_s"] = rollouts.get("policy_tokens", 0.0) / max(phases.seconds["rollout"], 1e-9)
    session.metrics.log(
        stage=stage, step=step + 1, num_steps=session.config.grpo.steps, values=values, seconds=phases.seconds
    )
    if num_skipped := sum(update["is_skipped"] for update in updates):
        session.tell(f"  {num_skipped:.0f} of {len(updates)} updates left the weights alone: a gradient was not finite")
    if step == 0:  # docs/debugging.md says what each of these should be, and why it might not
        first = updates[0]
        gap = f"engine against trainer {first['engine_gap']:.1e} per logprob, " if "engine_gap" in first else ""
        session.tell(
            f"  first update: KL {first['kl']:.1e} (0), {gap}"
            f"truncated {rollouts.get('truncated_share', 0):.1%}, "
            f"invalid actions {rollouts.get('invalid_action_share', 0):.1%}, "
            f"groups of one reward {rollouts.get('same_reward_share', 0):.0%}"
        )
    return values
