"""Trajectories into packed micro-batches: which rows are trained, with which targets and weights.

A row is a position whose next token the policy sampled. Only rows reach the language-model head and the loss, so
retrieved text never has a gradient. Each row carries its weight and weights sum to one over the global mini-batch:
splitting into micro-batches, data-parallel ranks or pipeline stages cannot change the loss.

Shapes: T packed tokens, R rows of one micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.training import MicroBatch
from searche1.types import Trajectory, UserError


@dataclass(frozen=True)
class Sample:
    """One sequence to train on. `prompt_ids` is the student's or the teacher's; the response is the same."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    policy_mask: tuple[bool, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.policy_mask)

    @property
    def num_inputs(self) -> int:
        """Tokens the model reads: all before the last target, none behind it."""
        last = max(k for k, is_policy in enumerate(self.policy_mask) if is_policy)
        return len(self.prompt_ids) + last


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch with what its loss needs. All row tensors have length R and the same order."""

    inputs: MicroBatch
    targets: Tensor  # [R] int64
    weights: Tensor  # [R] float32, sum to one over the global mini-batch
    sample_of_row: Tensor  # [R] int64, index into the samples that were packed


def sample_of(trajectory: Trajectory, prompt_ids: tuple[int, ...] | None = None) -> Sample:
    """The trajectory as a sample, under its own prompt or another (the teacher's)."""
    return Sample(prompt_ids or trajectory.prompt_ids, trajectory.response_ids, trajectory.policy_mask)


def row_weights(samples: Sequence[Sample], norm: str) -> list[float]:
    """The weight of each sample's rows in a mini-batch of these samples.

    "token_mean": all policy tokens count alike (verl). "sequence_mean": the mean of each sequence's mean (Eq. 7).
    """
    if norm == "token_mean":
        total = sum(sample.num_rows for sample in samples)
        return [1.0 / total] * len(samples)
    if norm == "sequence_mean":
        return [1.0 / (len(samples) * sample.num_rows) for sample in samples]
    raise UserError(f"loss_norm must be token_mean or sequence_mean, got {norm!r}")


def share_of_rank(lengths: Sequence[int], *, rank: int, num_ranks: int) -> list[int]:
    """Indices that this data-parallel rank takes: longest first to the least loaded rank, in original order."""
    loads = [0] * num_ranks
    owner = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(num_ranks), key=lambda r: (loads[r], r))
        owner[index] = lightest
        loads[lightest] += lengths[index]
    return [index for index in range(len(lengths)) if owner[index] == rank]


def bins_by_budget(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """First-fit bins of at most `max_tokens`. Raises UserError if one item alone is larger."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise UserError(
                f"a trajectory has {length} tokens but train.max_tokens is {max_tokens}; "
                "raise train.max_tokens or lower rollout.max_context_tokens"
            )
        fit = next((k for k, free in enumerate(room) if free >= length), None)
        if fit is None:
            bins.append([])
            room.append(max_tokens)
            fit = len(bins) - 1
        bins[fit].append(index)
        room[fit] -= length
    return bins


def pack(
    samples: Sequence[Sample], weights: Sequence[float], indices: Sequence[int], *, multiple_of: int
) -> PackedBatch:
    """One micro-batch of the named samples, padded to a multiple (sequence parallelism splits tokens evenly).

    With no indices it is an empty micro-batch: padding only, zero rows.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    bounds = [0]
    rows: list[int] = []
    targets: list[int] = []
    row_weight: list[float] = []
    owners: list[int] = []
    for index in indices:
        sample = samples[index]
        assert sample.prompt_ids, "the first response token needs a token before it"
        ids = (sample.prompt_ids + sample.response_ids)[: sample.num_inputs]
        first = len(token_ids) + len(sample.prompt_ids) - 1  # this position predicts the first response token
        for k, is_policy in enumerate(sample.policy_mask):
            if is_policy:
                rows.append(first + k)
                targets.append(sample.response_ids[k])
                row_weight.append(weights[index])
                owners.append(index)
        token_ids += ids
        positions += range(len(ids))
        bounds.append(len(token_ids))
    if missing := (-len(token_ids) % multiple_of) or (not token_ids) * multiple_of:
        token_ids += [0] * missing
        positions += range(missing)
        bounds.append(len(token_ids))
    inputs = MicroBatch(
        token_ids=torch.tensor(token_ids),
        position_ids=torch.tensor(positions),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in itertools.pairwise(bounds)),
        rows=torch.tensor(rows, dtype=torch.int64),
    )
    return PackedBatch(
        inputs=inputs,
        targets=torch.tensor(targets, dtype=torch.int64),
        weights=torch.tensor(row_weight, dtype=torch.float32),
        sample_of_row=torch.tensor(owners, dtype=torch.int64),
    )


def make_batches(
    samples: Sequence[Sample],
    weights: Sequence[float],
    *,
    max_tokens: int,
    multiple_of: int,
    rank: int,
    num_ranks: int,
) -> list[PackedBatch]:
    """This data-parallel rank's micro-batches of a mini-batch; at least one, which may be empty."""
    lengths = [sample.num_inputs for sample in samples]
    chosen = plan(lengths, max_tokens, multiple_of, rank=rank, num_ranks=num_ranks)
    return [pack(samples, weights, members, multiple_of=multiple_of) for members in chosen]


def make_pair_batches(
    students: Sequence[Sample],
    teachers: Sequence[Sample],
    weights: Sequence[float],
    *,
    max_tokens: int,
    multiple_of: int,
    rank: int,
    num_ranks: int,
) -> list[tuple[PackedBatch, PackedBatch]]:
    """(student, teacher) micro-batches whose rows are the same tokens in the same order.

    Both sides hold the same response ids, so one plan, made from the longer teacher sequences, fits both.
    """
    chosen = plan([t.num_inputs for t in teachers], max_tokens, multiple_of, rank=rank, num_ranks=num_ranks)
    return [
        (
            pack(students, weights, members, multiple_of=multiple_of),
            pack(teachers, weights, members, multiple_of=multiple_of),
        )
        for members in chosen
    ]


def plan(lengths: Sequence[int], max_tokens: int, multiple_of: int, *, rank: int, num_ranks: int) -> list[list[int]]:
    """Which items go into which micro-batch of this rank.

    All ranks get as many, at least one, the last of some empty: ranks that share experts run every pass together.
    """
    every = []
    for other in range(num_ranks):
        share = share_of_rank(lengths, rank=other, num_ranks=num_ranks)
        bins = bins_by_budget([lengths[i] for i in share], max_tokens=max_tokens // multiple_of * multiple_of)
        every.append([[share[k] for k in members] for members in bins])
    most = max(1, *(len(bins) for bins in every))
    return every[rank] + [[] for _ in range(most - len(every[rank]))]
