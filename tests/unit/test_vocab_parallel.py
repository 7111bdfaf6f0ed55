"""The vocabulary losses against torch's log_softmax, a float64 reference and the gradient formula.

Shapes: R rows, V real columns, v columns with padding.
"""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.vocab_parallel import (
    VocabShard,
    clipped_kl,
    linear_clipped_kl,
    linear_token_logprobs,
    token_logprobs,
)

V = 17
WHOLE = VocabShard(group=None, start=0, vocab_size=V)
CLIPS = (0.05, 10.0)


def draw(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_garbage(logits, padding=3):
    """The same logits behind whose real columns a head has written anything at all."""
    garbage = torch.tensor([math.nan, 1e30, -math.inf]).repeat(len(logits), 1)[:, :padding]
    return torch.cat([logits.detach(), garbage], dim=1).requires_grad_(logits.requires_grad)


def targets_for(seed, rows):
    return torch.randint(V, (rows,), generator=torch.Generator().manual_seed(seed))


def disagreeing(rows=8):
    """Student and teacher logits [R, V] of which some entries pass even tau = 10: the teacher is sure, the student not.

    No entry is near a kink of either clip.
    """
    student, teacher = draw(1, rows, V, scale=2.0), draw(2, rows, V, scale=2.0)
    teacher[0, 3], student[0, 3] = 30.0, -30.0
    teacher[1, 5], student[1, 5] = 25.0, -15.0
    terms = reference_terms(student.double(), teacher.double(), temperature=1.0)
    for clip in CLIPS:
        assert (terms - clip).abs().min() > 1e-4
        assert (terms > clip).any() and (terms <= clip).any()
    return student, teacher


def reference_terms(student, teacher, *, temperature):
    """P_T log(P_T / P_S) of every entry, in the precision of its input."""
    log_p, log_q = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    return torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0)


def reference_loss(student, teacher, *, kl_clip, temperature=1.0):
    return reference_terms(student, teacher, temperature=temperature).clamp(max=kl_clip).sum(-1)


def gradient_formula(student, teacher, *, kl_clip, temperature=1.0):
    """Q * S_A - P * 1{not clipped}, over the temperature; S_A is the teacher's mass on entries that are not clipped."""
    kept = reference_terms(student, teacher, temperature=temperature) <= kl_clip
    p, q = F.softmax(teacher / temperature, -1), F.softmax(student / temperature, -1)
    return (q * (p * kept).sum(-1, keepdim=True) - p * kept) / temperature


# -- token logprobs and entropy -------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_entropy_and_their_gradients_equal_torchs_log_softmax(temperature):
    logits, targets = draw(0, 9, V, scale=4.0).requires_grad_(), targets_for(1, 9)
    found = token_logprobs(logits, targets, WHOLE, temperature=temperature)
    exact = logits.detach().double().requires_grad_()
    log_p = F.log_softmax(exact / temperature, dim=-1)
    logprobs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)

    for_logprobs, for_entropy = draw(2, 9), draw(3, 9)
    (found.logprobs * for_logprobs + found.entropy * for_entropy).sum().backward()
    (logprobs * for_logprobs + entropy * for_entropy).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_padding_columns_change_no_logprob_and_get_no_gradient():
    logits, targets = draw(0, 5, V).requires_grad_(), targets_for(1, 5)
    padded = with_garbage(logits)
    plain, beside_garbage = (token_logprobs(x, targets, WHOLE) for x in (logits, padded))
    assert torch.equal(plain.logprobs, beside_garbage.logprobs)
    assert torch.equal(plain.entropy, beside_garbage.entropy)
    for found in (plain, beside_garbage):
        (found.logprobs + found.entropy).sum().backward()
    assert torch.equal(padded.grad[:, :V], logits.grad)
    assert not padded.grad[:, V:].any()


def test_padding_columns_change_no_kl_and_get_no_gradient():
    student, teacher = disagreeing()
    student.requires_grad_()
    padded = with_garbage(student)
    plain = clipped_kl(student, teacher, WHOLE, kl_clip=0.05)
    beside_garbage = clipped_kl(padded, with_garbage(teacher), WHOLE, kl_clip=0.05)
    for one, other in zip(plain, beside_garbage, strict=True):
        assert torch.equal(one, other)
    plain.loss.sum().backward()
    beside_garbage.loss.sum().backward()
    assert torch.equal(padded.grad[:, :V], student.grad)
    assert not padded.grad[:, V:].any()


def test_bfloat16_logits_are_computed_in_float32():
    logits, targets = draw(0, 6, V, scale=4.0).bfloat16(), targets_for(1, 6)
    found, exact = token_logprobs(logits, targets, WHOLE), token_logprobs(logits.float(), targets, WHOLE)
    assert found.logprobs.dtype == torch.float32
    assert torch.equal(found.logprobs, exact.logprobs) and torch.equal(found.entropy, exact.entropy)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.0, 60.0))
def test_logprobs_are_at_most_zero_and_entropy_lies_between_zero_and_log_v(seed, scale):
    found = token_logprobs(draw(seed, 4, V, scale=scale), targets_for(seed, 4), WHOLE)
    assert (found.logprobs <= 1e-6).all()
    assert (found.entropy >= -1e-5).all() and (found.entropy <= math.log(V) + 1e-5).all()


# -- clipped KL -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("kl_clip", [*CLIPS, math.inf])
def test_clipped_kl_and_its_gradient_equal_a_float64_reference(kl_clip, temperature):
    student, teacher = disagreeing()
    student.requires_grad_()
    found = clipped_kl(student, teacher, WHOLE, kl_clip=kl_clip, temperature=temperature)
    exact = student.detach().double().requires_grad_()
    loss = reference_loss(exact, teacher.double(), kl_clip=kl_clip, temperature=temperature)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=1e-5)
    weights = draw(3, len(student))
    (found.loss * weights).sum().backward()
    (loss * weights).sum().backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl_clip", CLIPS)
def test_the_gradient_is_the_formula_and_the_formula_is_what_central_differences_see(kl_clip):
    student, teacher = disagreeing()
    found = student.clone().requires_grad_()
    clipped_kl(found, teacher, WHOLE, kl_clip=kl_clip).loss.sum().backward()
    exact_student, exact_teacher = student.double(), teacher.double()
    formula = gradient_formula(exact_student, exact_teacher, kl_clip=kl_clip)
    torch.testing.assert_close(found.grad.double(), formula, rtol=1e-5, atol=1e-6)
    assert formula.sum(-1).abs().max() < 1e-12

    step = 1e-5
    for column in range(V):
        nudge = torch.zeros(V, dtype=torch.float64)
        nudge[column] = step
        above, below = (reference_loss(exact_student + s * nudge, exact_teacher, kl_clip=kl_clip) for s in (1, -1))
        torch.testing.assert_close((above - below) / (2 * step), formula[:, column], rtol=1e-6, atol=1e-8)


def test_without_a_clip_it_is_torchs_kl_divergence():
    student, teacher = disagreeing()
    found = clipped_kl(student, teacher, WHOLE, kl_clip=math.inf)
    exact = F.kl_div(
        F.log_softmax(student.double(), -1), F.log_softmax(teacher.double(), -1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(found.loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.loss, found.kl)
    assert not found.clip_fraction.any()


def test_the_clip_changes_the_loss_and_not_the_reported_kl():
    student, teacher = disagreeing()
    clipped, plain = (clipped_kl(student, teacher, WHOLE, kl_clip=clip) for clip in (0.05, math.inf))
    assert torch.equal(clipped.kl, plain.kl)
    assert (clipped.loss < plain.loss).all()


@pytest.mark.parametrize("kl_clip", CLIPS)
def test_clip_fraction_is_the_teachers_mass_on_clipped_entries(kl_clip):
    student, teacher = disagreeing()
    found = clipped_kl(student, teacher, WHOLE, kl_clip=kl_clip)
    terms = reference_terms(student.double(), teacher.double(), temperature=1.0)
    exact = (F.softmax(teacher.double(), -1) * (terms > kl_clip)).sum(-1)
    torch.testing.assert_close(found.clip_fraction.double(), exact, rtol=1e-5, atol=1e-6)


def test_equal_distributions_have_no_loss_and_no_gradient():
    student = draw(0, 6, V, scale=5.0).requires_grad_()
    found = clipped_kl(student, student.detach().clone(), WHOLE, kl_clip=10.0)
    found.loss.sum().backward()
    assert not found.loss.any() and not found.kl.any() and not found.clip_fraction.any()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


def test_the_teacher_gets_no_gradient():
    student, teacher = (x.requires_grad_() for x in disagreeing())
    found = clipped_kl(student, teacher, WHOLE, kl_clip=0.05)
    found.loss.sum().backward()
    assert student.grad.any() and teacher.grad is None
    assert not found.kl.requires_grad and not found.clip_fraction.requires_grad


@given(
    seed=st.integers(0, 10**6),
    scales=st.tuples(st.floats(0.0, 30.0), st.floats(0.0, 30.0)),
    kl_clip=st.floats(0.0, 20.0),
)
def test_the_clipped_sum_is_never_below_minus_one_over_e_nor_above_the_kl(seed, scales, kl_clip):
    student, teacher = draw(seed, 4, V, scale=scales[0]), draw(seed + 1, 4, V, scale=scales[1])
    found = clipped_kl(student, teacher, WHOLE, kl_clip=kl_clip)
    assert (found.loss >= -1 / math.e - 1e-5).all()
    assert (found.loss <= found.kl + 1e-5).all()
    assert (found.clip_fraction >= 0).all() and (found.clip_fraction <= 1 + 1e-5).all()


def test_the_clipped_sum_can_be_negative():
    """The positive entry is cut to 0, the negative one stays."""
    found = clipped_kl(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 0.0]]), VocabShard(None, 0, 2), kl_clip=0.0)
    assert -1 / math.e < found.loss.item() < -0.3


@given(seed=st.integers(0, 10**6), shifts=st.tuples(st.floats(-50.0, 50.0), st.floats(-50.0, 50.0)))
def test_adding_a_constant_to_a_rows_logits_changes_nothing(seed, shifts):
    student, teacher, targets = draw(seed, 3, V), draw(seed + 1, 3, V), targets_for(seed, 3)
    plain = clipped_kl(student, teacher, WHOLE, kl_clip=10.0)
    shifted = clipped_kl(student + shifts[0], teacher + shifts[1], WHOLE, kl_clip=10.0)
    for one, other in zip(plain, shifted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    for one, other in zip(
        token_logprobs(student, targets, WHOLE), token_logprobs(student + shifts[0], targets, WHOLE), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_an_entry_the_student_rules_out_costs_the_clip_and_has_no_gradient():
    student, teacher = draw(0, 2, V), draw(1, 2, V)
    student[:, 4] = -math.inf
    student.requires_grad_()
    found = clipped_kl(student, teacher, WHOLE, kl_clip=10.0)
    found.loss.sum().backward()
    others = reference_terms(student.detach().double(), teacher.double(), temperature=1.0)
    others[:, 4] = 10.0
    torch.testing.assert_close(found.loss.double(), others.sum(-1), rtol=1e-5, atol=1e-5)
    assert student.grad.isfinite().all() and not student.grad[:, 4].any()


def test_an_entry_the_teacher_rules_out_costs_nothing():
    student, teacher = draw(0, 2, V), draw(1, 2, V)
    teacher[:, 4] = -math.inf
    student[1, 4] = -math.inf  # and here both do
    student.requires_grad_()
    found = clipped_kl(student, teacher, WHOLE, kl_clip=10.0)
    found.loss.sum().backward()
    exact = reference_loss(student.detach().double(), teacher.double(), kl_clip=10.0)
    torch.testing.assert_close(found.loss.double(), exact, rtol=1e-5, atol=1e-5)
    formula = gradient_formula(student.detach(), teacher, kl_clip=10.0)
    torch.testing.assert_close(student.grad[0], formula[0], rtol=1e-5, atol=1e-6)
    assert student.grad.isfinite().all()


# -- from hidden states, a chunk at a time --------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_chunked_logprobs_and_gradients_equal_the_whole(rows, chunk):
    hidden, weight, targets = draw(0, rows, 8), draw(1, V + 3, 8), targets_for(2, rows)
    upstream = draw(3, rows)

    def run(function):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        found = function(h, w)
        (found.logprobs * upstream + found.entropy).sum().backward()
        return found.logprobs, found.entropy, h.grad, w.grad

    whole = run(lambda h, w: token_logprobs(F.linear(h, w), targets, WHOLE, temperature=0.8))
    chunked = run(lambda h, w: linear_token_logprobs(h, w, targets, WHOLE, temperature=0.8, chunk=chunk))
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_chunked_kl_and_gradients_equal_the_whole(rows, chunk):
    student, teacher, weight = draw(0, rows, 8, scale=2.0), draw(1, rows, 8, scale=2.0), draw(2, V + 3, 8)
    upstream = draw(3, rows)

    def run(function):
        s, t, w = (x.clone().requires_grad_() for x in (student, teacher, weight))
        found = function(s, t, w)
        (found.loss * upstream).sum().backward()
        assert t.grad is None
        return *found, s.grad, w.grad

    whole = run(
        lambda s, t, w: clipped_kl(F.linear(s, w), F.linear(t, w).detach(), WHOLE, kl_clip=0.3, temperature=0.8)
    )
    chunked = run(lambda s, t, w: linear_clipped_kl(s, t, w, WHOLE, kl_clip=0.3, temperature=0.8, chunk=chunk))
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- a vocabulary split over ranks ----------------------------------------------------------------

RANKS, COLUMNS = 3, 9  # 17 real columns: rank 1 ends with padding, rank 2 holds nothing else


def one_rank(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mine = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    shard = VocabShard(group=dist.group.WORLD, start=rank * COLUMNS, vocab_size=V)
    student, teacher = disagreeing()
    hidden, weight, targets = draw(4, 5, 8), draw(5, V, 8), targets_for(6, len(student))
    upstream = draw(7, len(student))

    def slice_of(whole):
        padded = F.pad(whole, (0, RANKS * COLUMNS - V), value=math.nan)
        return padded[:, mine].clone().requires_grad_()

    def check(found, whole, local, total):
        for one, other in zip(found, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        (found[0] * upstream[: len(found[0])]).sum().backward()
        (whole[0] * upstream[: len(found[0])]).sum().backward()
        torch.testing.assert_close(local.grad, F.pad(total.grad, (0, RANKS * COLUMNS - V))[:, mine])

    local, total = slice_of(student), student.clone().requires_grad_()
    for kl_clip in CLIPS:
        local.grad = total.grad = None
        found = clipped_kl(local, slice_of(teacher).detach(), shard, kl_clip=kl_clip, temperature=0.9)
        check(found, clipped_kl(total, teacher, WHOLE, kl_clip=kl_clip, temperature=0.9), local, total)
    for first in (0, 1):  # the gradient of the logprobs, then of the entropy
        local.grad = total.grad = None
        found = token_logprobs(local, targets, shard, temperature=0.9)
        whole = token_logprobs(total, targets, WHOLE, temperature=0.9)
        check((found[first],), (whole[first],), local, total)

    # Each rank's head is a slice, so the ranks' gradients of the hidden states add up to the whole one.
    h, w = hidden.clone().requires_grad_(), F.pad(weight, (0, 0, 0, RANKS * COLUMNS - V))[mine]
    linear_token_logprobs(h, w, targets[:5], shard, chunk=2).logprobs.sum().backward()
    dist.all_reduce(h.grad)
    whole_h = hidden.clone().requires_grad_()
    linear_token_logprobs(whole_h, weight, targets[:5], WHOLE, chunk=2).logprobs.sum().backward()
    torch.testing.assert_close(h.grad, whole_h.grad, rtol=1e-5, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
def test_splitting_the_vocabulary_over_three_ranks_changes_neither_loss_nor_gradient(tmp_path):
    torch.multiprocessing.spawn(one_rank, args=(tmp_path / "store",), nprocs=RANKS)
