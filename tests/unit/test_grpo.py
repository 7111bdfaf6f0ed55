"""GRPO's arithmetic: advantages (Eq. 1), the loss (Eq. 2), and which trajectories are trained on, in which updates."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.vocab_parallel import TokenLogprobs
from searche1.config import Config
from searche1.grpo import (
    RowTensors,
    TrainedSample,
    group_advantages,
    grpo_loss,
    grpo_metrics,
    grpo_step,
    learning_rate,
    mini_batches,
    row_tensors,
    trained_samples,
)
from searche1.packing import Sharing, pack, row_weights, sample_of
from searche1.types import Group, Question, Span, Trajectory, UserError

EPS = 1e-6


def trajectory(num_tokens=3, *, status="answered", first=100):
    """A search, an observation and an answer of `num_tokens` policy tokens together; engine logprobs are -id."""
    tokens = tuple(range(first, first + num_tokens))
    spans = (
        Span("policy", "search", tokens[:1], tuple(-float(t) for t in tokens[:1]), ""),
        Span("environment", "information", (7, 8), (), ""),
        Span("policy", "answer", tokens[1:], tuple(-float(t) for t in tokens[1:]), ""),
    )
    return Trajectory((1, 2), spans, status)


def group(rewards, *, id="1", source="nq", statuses=None):
    made = [trajectory(status=status) for status in (statuses if statuses is not None else ["answered"] * len(rewards))]
    return Group(Question(id, "q?", ("a",), source), tuple(made), tuple(rewards))


# -- advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_correct", "correct", "wrong"),
    [
        (1, 1.788850, -0.447213),
        (2, 1.095443, -0.730295),
        (3, 0.730295, -1.095443),
        (4, 0.447213, -1.788850),
    ],
)
def test_advantages_of_five_binary_rewards(num_correct, correct, wrong):
    rewards = [1.0] * num_correct + [0.0] * (5 - num_correct)
    found = group_advantages(rewards, eps=EPS)
    assert found == pytest.approx([correct] * num_correct + [wrong] * (5 - num_correct), abs=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(reward, size):
    assert group_advantages([reward] * size, eps=EPS) == [0.0] * size


def test_a_group_of_one_passes_its_reward_through():
    assert group_advantages([1.0], eps=EPS) == pytest.approx([1.0], abs=1e-5)
    assert group_advantages([0.0], eps=EPS) == [0.0]


@given(rewards=st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12))
def test_advantages_sum_to_zero_and_order_as_rewards_do(rewards):
    found = group_advantages(rewards, eps=EPS)
    assert math.isclose(sum(found), 0.0, abs_tol=1e-9)
    for (reward, advantage), (other_reward, other) in pairwise(sorted(zip(rewards, found, strict=True))):
        assert (advantage < other) if reward < other_reward else (advantage == other)


def test_questions_of_two_data_sets_with_the_same_id_stay_two_groups():
    groups = [group([1.0, 0.0], source="nq"), group([1.0, 1.0], source="hotpotqa")]
    assert len({g.question.key for g in groups}) == 2
    found = [sample.advantage for sample in trained_samples(groups, advantage_eps=EPS)]
    assert found == pytest.approx([0.5 / math.sqrt(0.5), -0.5 / math.sqrt(0.5), 0.0, 0.0], abs=1e-5)


# -- which trajectories ---------------------------------------------------------------------------


def test_a_trajectory_with_a_fault_is_not_trained_on_and_does_not_move_the_others_advantages():
    faulty = group([1.0, 0.0, 0.0], statuses=["answered", "error", "unanswered"])
    found = trained_samples([faulty], advantage_eps=EPS)
    assert [sample.trajectory for sample in found] == [faulty.trajectories[0], faulty.trajectories[2]]
    assert [sample.advantage for sample in found] == group_advantages([1.0, 0.0], eps=EPS)


def test_a_group_of_faults_and_a_trajectory_without_policy_tokens_give_nothing():
    silent = Trajectory((1,), (Span("environment", "information", (7,), (), ""),), "unanswered")
    groups = [
        group([1.0, 0.0], statuses=["error", "error"]),
        Group(Question("2", "q?", ("a",), "nq"), (silent,), (0.0,)),
    ]
    assert trained_samples(groups, advantage_eps=EPS) == []


def test_a_trajectory_without_policy_tokens_counts_in_its_group():
    made = group([1.0, 1.0, 0.0])
    silent = Trajectory((1,), (Span("environment", "information", (7,), (), ""),), "unanswered")
    with_it = Group(made.question, (*made.trajectories[:2], silent), made.rewards)
    found = trained_samples([with_it], advantage_eps=EPS)
    assert [sample.advantage for sample in found] == group_advantages([1.0, 1.0, 0.0], eps=EPS)[:2]


def test_a_batch_in_which_everything_failed_stops_the_run():
    class NoPolicy:
        layout = None

    with pytest.raises(UserError, match="every trajectory of a rollout batch failed"):
        grpo_step(NoPolicy(), None, [group([0.0], statuses=["error"])], config=Config(), lr=1e-3)


@given(num_samples=st.integers(1, 40), size=st.integers(-1, 50))
def test_mini_batches_hold_every_sample_once_in_order_and_are_of_about_the_size(num_samples, size):
    samples = trained_samples([group([1.0] * num_samples)], advantage_eps=EPS)
    parts = mini_batches(samples, size)
    assert [id(s) for part in parts for s in part] == [id(s) for s in samples]
    if size <= 0:
        assert len(parts) == 1
    else:
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert abs(num_samples - len(parts) * size) <= max(size / 2, size - num_samples)


def test_row_values_belong_to_the_rows_of_their_trajectory():
    trajectories = [trajectory(2, first=100), trajectory(4, first=200), trajectory(3, first=300)]
    part = [
        TrainedSample(t, sample_of(t), advantage) for t, advantage in zip(trajectories, (0.5, -1.0, 2.0), strict=True)
    ]
    batch = pack(
        [s.sample for s in part],
        row_weights([s.sample for s in part], "token_mean"),
        [2, 0],
        sharing=Sharing(sequence=4),
    )
    rows = torch.arange(5.0)
    found = row_tensors(part, batch, old_logprobs=rows, ref_logprobs=rows + 1, device=torch.device("cpu"))
    assert found.engine_logprobs.tolist() == [-float(t) for t in batch.targets.tolist()]
    assert found.advantages.tolist() == [2.0, 2.0, 2.0, 0.5, 0.5]
    assert torch.equal(found.old_logprobs, rows) and torch.equal(found.ref_logprobs, rows + 1)
    assert torch.equal(found.weights, batch.weights)
    some = found.part(slice(2, 4), -rows[2:4])
    assert some.advantages.tolist() == [2.0, 0.5] and torch.equal(some.old_logprobs, rows[2:4])


def test_without_a_pass_of_their_own_old_and_reference_logprobs_are_those_that_the_update_finds():
    first = RowTensors(None, None, torch.ones(3), torch.zeros(3), torch.ones(3))
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    part = first.part(slice(1, 3), new)
    assert torch.equal(part.old_logprobs, new) and torch.equal(part.ref_logprobs, new)
    assert not part.old_logprobs.requires_grad and len(part.advantages) == 2
    reference = torch.tensor([-5.0, -6.0, -7.0])
    part = dataclasses.replace(first, ref_logprobs=reference).part(slice(1, 3), new)
    assert torch.equal(part.old_logprobs, new) and torch.equal(part.ref_logprobs, reference[1:])


# -- the loss -------------------------------------------------------------------------------------

CORNERS = [  # (ratio, advantage, whether the gradient of the surrogate is cut)
    (1.5, 1.0, True),
    (1.5, -1.0, False),
    (0.5, 1.0, False),
    (0.5, -1.0, True),
    (1.1, 1.0, False),
    (0.9, -1.0, False),
    (1.3, 0.0, False),
]
SETTINGS = {"clip_eps": 0.2, "kl_coef": 0.0, "entropy_coef": 0.0}


def loss_of(logprobs, **given):
    """Loss and metrics with what a test leaves open: old = ref = logprobs, no advantage, equal weights, no bonus."""
    rows = len(logprobs)
    defaults = {
        "entropy": torch.zeros(rows),
        "old_logprobs": logprobs.detach(),
        "ref_logprobs": logprobs.detach(),
        "advantages": torch.zeros(rows),
        "weights": torch.full((rows,), 1 / max(rows, 1)),
        "engine_logprobs": logprobs.detach(),
    }
    settings = SETTINGS | {name: value for name, value in given.items() if name in SETTINGS}
    tensors = defaults | {name: value for name, value in given.items() if name not in SETTINGS}
    entropy = tensors.pop("entropy")
    values, clip_eps = RowTensors(**tensors), settings["clip_eps"]
    found = TokenLogprobs(logprobs.detach(), entropy.detach())
    return grpo_loss(logprobs, entropy, values, **settings), grpo_metrics(found, values, clip_eps=clip_eps)


@given(
    rows=st.lists(
        st.tuples(*[st.floats(-5.0, -0.01)] * 3, st.floats(-3.0, 3.0), st.floats(0.0, 5.0)), min_size=1, max_size=6
    ),
    clip_eps=st.floats(0.05, 0.5),
    kl_coef=st.floats(0.0, 1.0),
    entropy_coef=st.floats(0.0, 1.0),
)
def test_the_loss_is_the_sum_that_the_equations_write(rows, clip_eps, kl_coef, entropy_coef):
    weight = 1 / len(rows)
    expected = expected_kl = 0.0
    for new, old, ref, advantage, entropy in rows:
        ratio = math.exp(new - old)
        policy_loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip_eps), 1 + clip_eps))
        kl = min(math.exp(ref - new) - (ref - new) - 1, 10.0)
        expected += weight * (policy_loss + kl_coef * kl - entropy_coef * entropy)
        expected_kl += weight * kl
    new, old, ref, advantages, entropy = (torch.tensor(column) for column in zip(*rows, strict=True))
    loss, metrics = loss_of(
        new,
        entropy=entropy,
        old_logprobs=old,
        ref_logprobs=ref,
        advantages=advantages,
        clip_eps=clip_eps,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert metrics["kl"].item() == pytest.approx(expected_kl, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("ratio", "advantage", "is_cut"), CORNERS)
def test_the_clip_cuts_the_gradient_only_where_a_step_would_go_on_in_the_same_direction(ratio, advantage, is_cut):
    logprobs = torch.tensor([-2.0], requires_grad=True)
    old = logprobs.detach() - math.log(ratio)
    loss, metrics = loss_of(logprobs, old_logprobs=old, advantages=torch.tensor([advantage]))
    loss.backward()
    expected = 0.0 if is_cut else -advantage * ratio
    assert logprobs.grad.item() == pytest.approx(expected, abs=1e-5)
    assert metrics["clip_fraction"].item() == float(is_cut)


@given(st.lists(st.tuples(st.floats(-30.0, 0.0), st.floats(-30.0, 0.0)), min_size=1, max_size=5))
def test_the_kl_estimate_is_never_negative(pairs):
    new, ref = (torch.tensor(column) for column in zip(*pairs, strict=True))
    _, metrics = loss_of(new, ref_logprobs=ref)
    assert -1e-6 <= metrics["kl"].item() <= 10.0


def test_the_kl_gradient_pulls_towards_the_reference():
    logprobs, ref = torch.tensor([-2.0, -1.0], requires_grad=True), torch.tensor([-1.5, -1.7])
    loss, _ = loss_of(logprobs, ref_logprobs=ref, kl_coef=0.3)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, 0.3 * 0.5 * (1 - (ref - logprobs.detach()).exp()))


@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_a_reference_that_is_far_away_gives_a_finite_loss_and_gradient(gap):
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, metrics = loss_of(logprobs, ref_logprobs=logprobs.detach() + torch.tensor([gap, 0.0]), kl_coef=0.3)
    loss.backward()
    assert torch.isfinite(logprobs.grad).all()
    assert math.isfinite(loss.item()) and metrics["kl"].item() == pytest.approx(5.0)  # the bound of 10, in one row of 2


def test_in_the_first_update_ratios_are_one_and_the_gradient_is_the_advantage():
    logprobs, advantages = torch.tensor([-0.3, -2.0, -7.0], requires_grad=True), torch.tensor([1.8, -0.4, 0.0])
    weights = torch.tensor([0.5, 0.3, 0.2])
    loss, metrics = loss_of(logprobs, advantages=advantages, weights=weights, kl_coef=0.5)
    loss.backward()
    assert metrics["ratio_mean"].item() == pytest.approx(1.0) and metrics["ratio_max"].item() == 1.0
    assert metrics["kl"].item() == metrics["clip_fraction"].item() == 0.0
    torch.testing.assert_close(logprobs.grad, -weights * advantages)


def test_the_entropy_bonus_lowers_the_loss_by_its_weighted_mean():
    entropy = torch.tensor([0.5, 2.0], requires_grad=True)
    weights = torch.tensor([0.25, 0.75])
    loss, metrics = loss_of(torch.tensor([-1.0, -1.0]), entropy=entropy, weights=weights, entropy_coef=0.01)
    loss.backward()
    assert metrics["entropy"].item() == pytest.approx(1.625)
    assert loss.item() == pytest.approx(-0.01 * 1.625)
    torch.testing.assert_close(entropy.grad, -0.01 * weights)


def test_no_rows_are_no_loss():
    loss, metrics = loss_of(torch.empty(0, requires_grad=True))
    loss.backward()
    assert loss.item() == 0.0 and all(value.item() == 0.0 for value in metrics.values())


# -- the round ------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_and_then_stays():
    rates = [learning_rate(step, lr=2e-6, warmup_ratio=0.285, num_steps=200) for step in range(200)]
    assert rates[0] == pytest.approx(2e-6 / 57)
    assert all(b - a == pytest.approx(2e-6 / 57) for a, b in pairwise(rates[:57]))
    assert rates[56:] == [2e-6] * 144


def test_without_a_warm_up_the_learning_rate_is_constant():
    assert [learning_rate(step, lr=1.0, warmup_ratio=0.0, num_steps=5) for step in range(5)] == [1.0] * 5
    assert [learning_rate(step, lr=1.0, warmup_ratio=1.0, num_steps=3) for step in range(3)] == [1 / 3, 2 / 3, 1.0]
