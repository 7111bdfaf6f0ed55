"""Trajectories into packed micro-batches: which rows are trained, with which targets and weights.

A row is a position whose next token the policy sampled. Only rows reach the language-model head and the loss, so
retrieved text never has a gradient. Each row carries its weight and weights sum to one over the global mini-batch:
splitting into micro-batches, data-parallel ranks or pipeline stages cannot change the loss.

Under context parallelism ranks share every pack: each has some tokens of each sequence, and the rows among them.

Shapes: T packed tokens and N rows of one micro-batch, R of them on this rank (all, without context parallelism).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.attention import context_positions
from megatron_ext.parallel import Layout
from megatron_ext.prefixes import Prefix
from megatron_ext.training import MicroBatch
from searche1.types import SharedError, Trajectory, UserError


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
    """A micro-batch with what its loss needs, for this rank's rows, which are in the pack's order."""

    inputs: MicroBatch
    targets: Tensor  # [R] int64
    weights: Tensor  # [R] float32, sum to one over the global mini-batch
    row_numbers: Tensor  # [R] int64, which of the pack's rows these are
    sample_of_row: Tensor  # [N] int64, for all rows of the pack: index into the samples that were packed


@dataclass(frozen=True)
class Sharing:
    """How ranks share the tokens of a pack, and so what its sequences and it must be multiples of."""

    sequence: int = 1  # tensor-parallel ranks under sequence parallelism
    context: int = 1
    context_rank: int = 0

    @property
    def sequence_multiple(self) -> int:
        return 2 * self.context if self.context > 1 else 1

    @property
    def pack_multiple(self) -> int:
        return math.lcm(self.sequence_multiple, self.context * self.sequence)


def sharing_of(layout: Layout) -> Sharing:
    return Sharing(layout.tensor if layout.sequence else 1, layout.context, layout.context_rank)


def padded_length(length: int, sharing: Sharing) -> int:
    """Tokens of a pack that holds one sequence of this length."""
    return -(-length // sharing.pack_multiple) * sharing.pack_multiple


ALONE = Sharing()
MIN_SHARED_PREFIX = 64  # tokens; what a shorter prompt saves is less than its own calls of attention cost
FAMILIES_PER_RANK = 4  # or samples of one prompt are parted, so that ranks get even shares


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


def compute_cost(length: int, attention_cost: float) -> float:
    """Work on a sequence, in units of a token through the linears: attention looks back at half of it on average.

    `attention_cost` depends on the model (`megatron_ext.flops`).
    """
    return length + attention_cost * length * length


def share_of_rank(costs: Sequence[float], *, rank: int, num_ranks: int) -> list[int]:
    """Indices that this data-parallel rank takes: dearest first to the least loaded rank, in original order.

    The dearest rank then has at most 4/3 of what the best possible split leaves it with (Graham's bound).
    """
    loads = [0.0] * num_ranks
    owner = {}
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(num_ranks), key=lambda r: (loads[r], r))
        owner[index] = lightest
        loads[lightest] += costs[index]
    return [index for index in range(len(costs)) if owner[index] == rank]


def bins_by_budget(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Bins of at most `max_tokens`, longest items first into the first bin with room (at most 11/9 of the fewest bins
    possible, and one). Raises SharedError if one item alone is larger: every rank packs the same.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > max_tokens:
            raise SharedError(
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
    return [sorted(members) for members in bins]


def pack(
    samples: Sequence[Sample],
    weights: Sequence[float],
    indices: Sequence[int],
    *,
    sharing: Sharing = ALONE,
    share_prefix: bool = False,
) -> PackedBatch:
    """One micro-batch of the named samples, padded so that ranks can share its tokens evenly.

    `share_prefix` has one copy of a long prompt for all samples in a row that have it (`megatron_ext.prefixes`).
    With no indices it is an empty micro-batch: padding only, zero rows.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    bounds = [0]
    rows: list[int] = []
    targets: list[int] = []
    row_weight: list[float] = []
    owners: list[int] = []
    prefixes: list[Prefix] = []

    def add(ids: Sequence[int], multiple: int, *, position: int = 0) -> None:
        """A sequence; empty ones too are padded to a whole multiple."""
        length = max(1, -(-len(ids) // multiple)) * multiple
        token_ids.extend([*ids, *(0 for _ in range(length - len(ids)))])
        positions.extend(range(position, position + length))
        bounds.append(len(token_ids))

    def add_rows(index: int, *, end: int, own: int) -> None:
        """The rows of a sample whose prompt ends before place `end` and whose response begins at place `own`."""
        sample = samples[index]
        for k, is_policy in enumerate(sample.policy_mask):
            if is_policy:
                rows.append(own + k - 1 if k else end - 1)
                targets.append(sample.response_ids[k])
                row_weight.append(weights[index])
                owners.append(index)

    for prompt_ids, family in itertools.groupby(indices, key=lambda index: samples[index].prompt_ids):
        assert prompt_ids, "the first response token needs a token before it"
        members = list(family)
        start, end = len(token_ids), len(token_ids) + len(prompt_ids)
        is_shared = share_prefix and len(members) > 1 and len(prompt_ids) >= MIN_SHARED_PREFIX
        if is_shared:
            add(prompt_ids, 1)
        for index in members:
            sample, here = samples[index], len(token_ids)
            own = sample.response_ids[: sample.num_inputs - len(prompt_ids)]
            if is_shared:
                add_rows(index, end=end, own=here)
                if own:
                    add(own, 1, position=len(prompt_ids))
            else:
                add_rows(index, end=here + len(prompt_ids), own=here + len(prompt_ids))
                add(prompt_ids + own, sharing.sequence_multiple)
        if is_shared and len(token_ids) > end:
            prefixes.append(Prefix(start, end, len(token_ids)))
    missing = -len(token_ids) % sharing.pack_multiple
    if missing or not token_ids:
        add([0] * missing, sharing.pack_multiple if not token_ids else sharing.sequence_multiple)

    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    held = context_positions(cu_seqlens, rank=sharing.context_rank, size=sharing.context)
    place = torch.full((len(token_ids),), -1)  # of each token among those that this rank holds
    place[held] = torch.arange(len(held))
    row_places = place[torch.tensor(rows, dtype=torch.int64)]
    numbers = (row_places >= 0).nonzero()[:, 0]
    inputs = MicroBatch(
        token_ids=torch.tensor(token_ids)[held],
        position_ids=torch.tensor(positions)[held],
        cu_seqlens=cu_seqlens,
        max_seqlen=max(positions) + 1,
        rows=row_places[numbers],
        prefixes=tuple(prefixes),
    )
    return PackedBatch(
        inputs=inputs,
        targets=torch.tensor(targets, dtype=torch.int64)[numbers],
        weights=torch.tensor(row_weight, dtype=torch.float32)[numbers],
        row_numbers=numbers,
        sample_of_row=torch.tensor(owners, dtype=torch.int64),
    )


def make_batches(
    samples: Sequence[Sample],
    weights: Sequence[float],
    *,
    max_tokens: int,
    rank: int,
    num_ranks: int,
    sharing: Sharing = ALONE,
    attention_cost: float = 0.0,
    share_prefix: bool = False,
) -> list[PackedBatch]:
    """This data-parallel rank's micro-batches of a mini-batch; at least one, which may be empty.

    With `share_prefix` samples of one prompt stay together as far as budgets and an even split allow.
    """
    total = sum(sample.num_inputs for sample in samples)
    even = total // (FAMILIES_PER_RANK * num_ranks) if num_ranks > 1 else max_tokens
    families = families_of(samples, max_tokens=min(max_tokens, even) if share_prefix else 0)
    lengths = [family_length(samples, family) for family in families]
    costs = [family_cost(samples, family, attention_cost) for family in families]
    chosen = plan(lengths, costs, max_tokens, sharing, rank=rank, num_ranks=num_ranks)
    indices = [[index for k in members for index in families[k]] for members in chosen]
    return [pack(samples, weights, members, sharing=sharing, share_prefix=share_prefix) for members in indices]


def families_of(samples: Sequence[Sample], *, max_tokens: int) -> list[list[int]]:
    """Samples in a row that have one long prompt, in parts of at most `max_tokens`, or of one sample."""
    families: list[list[int]] = []
    for index, sample in enumerate(samples):
        last = families[-1] if families else []
        is_same = bool(last) and samples[last[0]].prompt_ids == sample.prompt_ids
        is_long = len(sample.prompt_ids) >= MIN_SHARED_PREFIX
        if is_same and is_long and family_length(samples, [*last, index]) <= max_tokens:
            last.append(index)
        else:
            families.append([index])
    return families


def family_length(samples: Sequence[Sample], family: Sequence[int]) -> int:
    """Tokens of samples that share a prompt."""
    prompt = len(samples[family[0]].prompt_ids)
    return prompt + sum(samples[index].num_inputs - prompt for index in family)


def family_cost(samples: Sequence[Sample], family: Sequence[int], attention_cost: float) -> float:
    """As `compute_cost`, of samples that share a prompt."""
    once = compute_cost(len(samples[family[0]].prompt_ids), attention_cost)
    return once + sum(compute_cost(samples[index].num_inputs, attention_cost) - once for index in family)


def make_pair_batches(
    students: Sequence[Sample],
    teachers: Sequence[Sample],
    weights: Sequence[float],
    *,
    max_tokens: int,
    rank: int,
    num_ranks: int,
    sharing: Sharing = ALONE,
    attention_cost: float = 0.0,
) -> list[tuple[PackedBatch, PackedBatch]]:
    """(student, teacher) micro-batches with the same rows in the same order; context ranks may hold other ones of each.

    Both sides hold the same response ids, so one plan, made for the longer teacher sequences, fits both.
    """
    costs = [
        # The teacher has no gradient. The student's backward is twice a forward, less the frozen weights' gradients.
        compute_cost(teacher.num_inputs, attention_cost) + 2 * compute_cost(student.num_inputs, attention_cost)
        for student, teacher in zip(students, teachers, strict=True)
    ]
    lengths = [max(s.num_inputs, t.num_inputs) for s, t in zip(students, teachers, strict=True)]
    chosen = plan(lengths, costs, max_tokens, sharing, rank=rank, num_ranks=num_ranks)
    return [
        (
            pack(students, weights, members, sharing=sharing),
            pack(teachers, weights, members, sharing=sharing),
        )
        for members in chosen
    ]


def plan(
    lengths: Sequence[int], costs: Sequence[float], max_tokens: int, sharing: Sharing, *, rank: int, num_ranks: int
) -> list[list[int]]:
    """Which items go into which micro-batch of this rank.

    All ranks get as many, at least one, the last of some empty: ranks that share experts run every pass together.
    """
    multiple = sharing.sequence_multiple
    padded = [-(-length // multiple) * multiple for length in lengths]
    budget = max_tokens // sharing.pack_multiple * sharing.pack_multiple
    every = []
    for other in range(num_ranks):
        share = share_of_rank(costs, rank=other, num_ranks=num_ranks)
        bins = bins_by_budget([padded[i] for i in share], max_tokens=budget)
        every.append([[share[k] for k in members] for members in bins])
    most = max(1, *(len(bins) for bins in every))
    return every[rank] + [[] for _ in range(most - len(every[rank]))]
