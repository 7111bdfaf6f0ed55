"""Packing: exactly the policy tokens are predicted, and no split changes what they weigh."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.attention import context_positions
from megatron_ext.prefixes import Prefix
from searche1 import packing
from searche1.packing import (
    ALONE,
    Sample,
    Sharing,
    bins_by_budget,
    compute_cost,
    families_of,
    family_cost,
    family_length,
    make_batches,
    make_pair_batches,
    pack,
    plan,
    row_weights,
    sample_of,
    share_of_rank,
)
from searche1.types import Span, Trajectory, UserError

# Prompts, the policy and the environment use ids of their own, so that an id tells where it came from.
PROMPT, POLICY, ENVIRONMENT = range(1, 100), range(100, 200), range(200, 300)


@pytest.fixture(autouse=True, scope="module")
def short_prompts_are_shared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MIN_SHARED_PREFIX", 1)
        yield


def ids(of, *, min_size=1, max_size=6):
    return st.lists(st.sampled_from(of), min_size=min_size, max_size=max_size)


@st.composite
def drawn_sample(draw):
    prompt = draw(ids(PROMPT, max_size=8))
    turns = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=5))
    turns.insert(draw(st.integers(0, len(turns))), (True, draw(st.integers(1, 6))))  # the policy says something
    response, mask = [], []
    for is_policy, length in turns:
        response += draw(ids(POLICY if is_policy else ENVIRONMENT, min_size=length, max_size=length))
        mask += [is_policy] * length
    return Sample(tuple(prompt), tuple(response), tuple(mask))


@st.composite
def drawn_family(draw):
    first, *others = draw(st.lists(drawn_sample(), min_size=1, max_size=4))
    return [first, *(replace(other, prompt_ids=first.prompt_ids) for other in others)]


drawn_samples = st.lists(drawn_family(), min_size=1, max_size=4).map(lambda families: [*itertools.chain(*families)])
splits = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(48, 200),
        "sharing": st.sampled_from([Sharing(sequence=multiple) for multiple in (1, 2, 4)]),
        "num_ranks": st.integers(1, 4),
        "attention_cost": st.sampled_from([0.0, 0.1]),
        "share_prefix": st.booleans(),
    }
)
norms = st.sampled_from(["token_mean", "sequence_mean"])


def on_all_ranks(samples, weights, *, num_ranks, **split):
    """Every micro-batch of every data-parallel rank."""
    return [
        batch
        for rank in range(num_ranks)
        for batch in make_batches(samples, weights, rank=rank, num_ranks=num_ranks, **split)
    ]


def predicted_tokens(batch):
    """(context, target, weight, sample) of each row: what the model sees there and what it must say next."""
    token_ids, bounds = batch.inputs.token_ids.tolist(), batch.inputs.cu_seqlens.tolist()
    prompts = {row: token_ids[p.start : p.end] for p in batch.inputs.prefixes for row in range(p.end, p.last)}
    columns = (batch.inputs.rows, batch.targets, batch.weights, batch.sample_of_row)
    for row, target, weight, owner in zip(*(c.tolist() for c in columns), strict=True):
        start = max(bound for bound in bounds if bound <= row)
        yield (*prompts.get(row, ()), *token_ids[start : row + 1]), target, weight, owner


def policy_tokens(samples):
    """(context, token, sample) of each policy token, from the samples themselves."""
    for owner, sample in enumerate(samples):
        for k, is_policy in enumerate(sample.policy_mask):
            if is_policy:
                yield sample.prompt_ids + sample.response_ids[:k], sample.response_ids[k], owner


# -- rows -----------------------------------------------------------------------------------------


@given(samples=drawn_samples, split=splits)
def test_rows_predict_every_policy_token_once_from_all_that_came_before_it(samples, split):
    batches = on_all_ranks(samples, row_weights(samples, "token_mean"), **split)
    found = [(context, target, owner) for b in batches for context, target, _, owner in predicted_tokens(b)]
    assert sorted(found) == sorted(policy_tokens(samples))


@given(samples=drawn_samples, split=splits)
def test_no_environment_token_is_ever_a_target(samples, split):
    for batch in on_all_ranks(samples, row_weights(samples, "token_mean"), **split):
        assert all(target in POLICY for target in batch.targets.tolist())


@given(samples=drawn_samples, split=splits)
def test_a_packs_sequences_are_whole_start_at_position_zero_or_behind_their_prompt_and_fit(samples, split):
    for batch in on_all_ranks(samples, row_weights(samples, "token_mean"), **split):
        inputs, bounds = batch.inputs, batch.inputs.cu_seqlens.tolist()
        lengths = [b - a for a, b in itertools.pairwise(bounds)]
        prompts = {start: p.end - p.start for p in inputs.prefixes for start in bounds if p.end <= start < p.last}
        assert split["share_prefix"] or not prompts
        firsts = [prompts.get(start, 0) for start in bounds[:-1]]
        assert bounds[0] == 0 and bounds[-1] == len(inputs.token_ids) == len(inputs.position_ids)
        assert min(lengths) > 0
        assert inputs.max_seqlen == max(first + length for first, length in zip(firsts, lengths, strict=True))
        expected = [p for first, length in zip(firsts, lengths, strict=True) for p in range(first, first + length)]
        assert inputs.position_ids.tolist() == expected
        assert len(inputs.token_ids) % split["sharing"].pack_multiple == 0
        assert len(inputs.token_ids) <= split["max_tokens"]


def test_samples_of_one_prompt_read_it_once():
    prompt = tuple(range(1, 9))
    samples = [Sample(prompt, tuple(range(100, 100 + n)), (True,) * n) for n in (3, 1, 5)]
    batch = pack(samples, [1.0] * 3, [0, 1, 2], share_prefix=True)
    # The last response token is read by nobody, so the second sample has a row and no token of its own.
    assert batch.inputs.token_ids.tolist() == [*prompt, 100, 101, 100, 101, 102, 103]
    assert batch.inputs.cu_seqlens.tolist() == [0, 8, 10, 14]
    assert batch.inputs.prefixes == (Prefix(0, 8, 14),)
    assert batch.inputs.rows.tolist() == [7, 8, 9, 7, 7, 10, 11, 12, 13]
    assert batch.sample_of_row.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]


def test_families_are_parted_where_ranks_or_the_budget_need_it():
    samples = [Sample((1,) * 10, (100,) * 11, (True,) * 11)] * 8
    assert families_of(samples, max_tokens=50) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert families_of(samples, max_tokens=0) == [[k] for k in range(8)]
    assert family_length(samples, [0, 1, 2, 3]) == 50
    assert family_cost(samples, [0, 1], 0.5) == compute_cost(20, 0.5) * 2 - compute_cost(10, 0.5)
    batches = on_all_ranks(samples, [1.0] * 8, num_ranks=4, max_tokens=1000, share_prefix=True)
    assert [len(set(batch.sample_of_row.tolist())) for batch in batches] == [2] * 4


def test_a_short_prompt_is_not_shared(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_PREFIX", 9)
    samples = [Sample((1,) * 8, (100, 101), (True, True))] * 2
    assert families_of(samples, max_tokens=1000) == [[0], [1]]
    assert pack(samples, [1.0] * 2, [0, 1], share_prefix=True).inputs.prefixes == ()


def test_nothing_behind_the_last_target_is_read():
    sample = Sample((1, 2), (100, 101, 200, 102, 201, 202), (True, True, False, True, False, False))
    assert sample.num_rows == 3 and sample.num_inputs == 5
    batch = pack([sample], [1.0], [0])
    assert batch.inputs.token_ids.tolist() == [1, 2, 100, 101, 200]
    assert batch.inputs.rows.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [100, 101, 102]


def test_padding_is_a_sequence_of_its_own_without_rows():
    sample = Sample((1, 2), (100, 101, 102), (True, True, True))
    batch = pack([sample], [1.0], [0], sharing=Sharing(sequence=4))
    assert batch.inputs.token_ids.tolist() == [1, 2, 100, 101]
    batch = pack([sample], [1.0], [0], sharing=Sharing(sequence=3))
    assert batch.inputs.token_ids.tolist() == [1, 2, 100, 101, 0, 0]
    assert batch.inputs.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.inputs.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.inputs.rows.tolist() == [1, 2, 3]


@pytest.mark.parametrize("multiple_of", [1, 2, 4])
def test_a_rank_without_samples_gets_an_empty_micro_batch(multiple_of):
    sample = Sample((1,), (100, 101), (True, True))
    given_to = [
        make_batches([sample], [0.5], max_tokens=8, sharing=Sharing(sequence=multiple_of), rank=rank, num_ranks=2)
        for rank in range(2)
    ]
    assert [len(batches) for batches in given_to] == [1, 1]
    empty = given_to[1][0]
    assert len(empty.inputs.token_ids) == multiple_of
    assert empty.inputs.cu_seqlens.tolist() == [0, multiple_of]
    assert len(empty.inputs.rows) == len(empty.targets) == len(empty.weights) == len(empty.sample_of_row) == 0


def test_a_trajectory_becomes_a_sample_under_its_own_prompt_or_the_teachers():
    spans = (
        Span("policy", "search", (100, 101), (-1.0, -2.0), "a"),
        Span("environment", "information", (200,), (), "b"),
        Span("policy", "answer", (102,), (-3.0,), "c"),
    )
    trajectory = Trajectory((1, 2), spans, "answered")
    student, teacher = sample_of(trajectory), sample_of(trajectory, (7, 8, 9))
    assert student == Sample((1, 2), (100, 101, 200, 102), (True, True, False, True))
    assert teacher == Sample((7, 8, 9), student.response_ids, student.policy_mask)


# -- weights --------------------------------------------------------------------------------------


@given(samples=drawn_samples, split=splits, norm=norms)
def test_weights_sum_to_one_however_the_mini_batch_is_split(samples, split, norm):
    batches = on_all_ranks(samples, row_weights(samples, norm), **split)
    assert math.isclose(sum(batch.weights.double().sum().item() for batch in batches), 1.0, rel_tol=1e-5)


@given(samples=drawn_samples, split=splits, norm=norms)
def test_a_tokens_weight_does_not_depend_on_the_split(samples, split, norm):
    def weights(**how):
        batches = on_all_ranks(samples, row_weights(samples, norm), **how)
        return sorted((c, target, owner, weight) for b in batches for c, target, weight, owner in predicted_tokens(b))

    assert weights(**split) == weights(max_tokens=1000, num_ranks=1)


@given(samples=drawn_samples)
def test_token_mean_weighs_tokens_alike_and_sequence_mean_sequences(samples):
    assert set(row_weights(samples, "token_mean")) == {1 / sum(s.num_rows for s in samples)}
    for weight, sample in zip(row_weights(samples, "sequence_mean"), samples, strict=True):
        assert weight * sample.num_rows == pytest.approx(1 / len(samples))


def test_an_unknown_norm_names_the_known_ones():
    with pytest.raises(UserError, match="token_mean or sequence_mean, got 'mean'"):
        row_weights([Sample((1,), (100,), (True,))], "mean")


# -- shares and bins ------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 50), max_size=20), num_ranks=st.integers(1, 5))
def test_ranks_share_the_samples_among_them_and_almost_evenly(lengths, num_ranks):
    shares = [share_of_rank(lengths, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(lengths=st.lists(st.integers(1, 30), max_size=20), max_tokens=st.integers(30, 60))
def test_bins_hold_everything_once_within_the_budget(lengths, max_tokens):
    bins = bins_by_budget(lengths, max_tokens=max_tokens)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in members) for members in bins]
    assert all(0 < load <= max_tokens for load in loads)
    assert all(a + b > max_tokens for a, b in itertools.pairwise(loads)), "two neighbours would fit in one"


def test_compute_is_shared_more_evenly_by_cost_than_by_tokens():
    """256 trajectories of log-normal lengths on 16 ranks, with attention a third of the longest one's work."""
    dice = random.Random(0)
    lengths = [min(6144, int(dice.lognormvariate(math.log(1200), 0.7))) for _ in range(256)]
    costs = [compute_cost(length, 8e-5) for length in lengths]

    def excess(given):
        loads = [sum(costs[i] for i in share_of_rank(given, rank=rank, num_ranks=16)) for rank in range(16)]
        return max(loads) / (sum(loads) / 16) - 1

    assert excess(costs) < excess(lengths)


def test_a_trajectory_that_is_too_long_names_both_settings():
    sample = Sample((1,) * 5, (100,) * 6, (True,) * 6)
    with pytest.raises(UserError, match=r"has 10 tokens but train\.max_tokens is 9; .*rollout\.max_context_tokens"):
        make_batches([sample], [1.0], max_tokens=9, rank=0, num_ranks=1)


@pytest.mark.parametrize("multiple_of", [1, 2])
def test_a_trajectory_as_long_as_the_budget_fits(multiple_of):
    sample = Sample((1,) * 5, (100,) * 6, (True,) * 6)
    (batch,) = make_batches([sample], [1.0], max_tokens=10, sharing=Sharing(sequence=multiple_of), rank=0, num_ranks=1)
    assert len(batch.inputs.token_ids) == 10


def test_a_budget_that_is_no_multiple_is_not_exceeded_by_padding():
    samples = [Sample((1,), (100,) * length, (True,) * length) for length in (5, 6)]
    batches = make_batches(samples, [0.1, 0.1], max_tokens=11, sharing=Sharing(sequence=4), rank=0, num_ranks=1)
    assert [len(batch.inputs.token_ids) for batch in batches] == [8, 8]


# -- context parallelism --------------------------------------------------------------------------


@given(samples=drawn_samples, context=st.sampled_from([2, 3, 4]), sequence=st.sampled_from([1, 2]))
def test_context_ranks_hold_every_token_and_every_row_once(samples, context, sequence):
    weights = row_weights(samples, "token_mean")
    whole = pack(samples, weights, range(len(samples)))
    parts = [pack(samples, weights, range(len(samples)), sharing=Sharing(sequence, context, r)) for r in range(context)]
    bounds = parts[0].inputs.cu_seqlens
    held = [context_positions(bounds, rank=rank, size=context) for rank in range(context)]
    assert sorted(torch.cat(held).tolist()) == list(range(int(bounds[-1])))
    assert len({len(tokens) for tokens in held}) == 1 and len(held[0]) % sequence == 0

    numbers = torch.cat([part.row_numbers for part in parts])
    assert sorted(numbers.tolist()) == list(range(len(whole.targets)))
    back = numbers.argsort()
    for name in ("targets", "weights"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts])[back], getattr(whole, name))
    assert all(torch.equal(part.sample_of_row, whole.sample_of_row) for part in parts)
    for name in ("token_ids", "position_ids"):
        found = torch.cat([getattr(part.inputs, name)[part.inputs.rows] for part in parts])[back]
        assert torch.equal(found, getattr(whole.inputs, name)[whole.inputs.rows])


def test_a_rank_holds_an_early_and_a_late_chunk_of_every_sequence():
    bounds = torch.tensor([0, 8, 12])
    assert context_positions(bounds, rank=0, size=2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_positions(bounds, rank=1, size=2).tolist() == [2, 3, 4, 5, 9, 10]


# -- student and teacher --------------------------------------------------------------------------


@given(students=drawn_samples, split=splits, data=st.data())
def test_teacher_rows_are_the_students_rows_behind_another_prompt(students, split, data):
    prompts = [tuple(data.draw(ids(PROMPT, max_size=12))) for _ in students]
    teachers = [Sample(p, s.response_ids, s.policy_mask) for p, s in zip(prompts, students, strict=True)]
    weights = row_weights(students, "sequence_mean")
    num_ranks = split["num_ranks"]
    seen = []
    for rank in range(num_ranks):
        options = {key: split[key] for key in ("sharing", "num_ranks", "attention_cost")}
        for student, teacher in make_pair_batches(students, teachers, weights, max_tokens=300, rank=rank, **options):
            for mine, privileged in zip(predicted_tokens(student), predicted_tokens(teacher), strict=True):
                assert mine[1:] == privileged[1:]  # target, weight and sample
                context, _, _, owner = mine
                assert privileged[0] == prompts[owner] + context[len(students[owner].prompt_ids) :]
                seen.append((context, mine[1], owner))
    assert sorted(seen) == sorted(policy_tokens(students))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_ranks_make_as_many_micro_batches(num_ranks):
    """Ranks that share experts meet in every pass: one more on one of them would wait for ever."""
    lengths = [10, 6, 6, 3, 9, 9, 1]
    plans = [plan(lengths, lengths, 10, ALONE, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert len({len(bins) for bins in plans}) == 1
    assert sorted(i for bins in plans for members in bins for i in members) == list(range(len(lengths)))
    for bins in plans:
        filled = [members for members in bins if members]
        assert bins[: len(filled)] == filled
    assert [
        len(bins) for bins in (plan([10, 6, 6], [10, 6, 6], 10, ALONE, rank=rank, num_ranks=2) for rank in (0, 1))
    ] == [2, 2]
