"""The vocabulary losses against float64, on every kind of kernel that runs here and in every mode.

"triton" is the GPU where there is one; without one it is Triton's interpreter, if TRITON_INTERPRET=1 is set
(tests/unit/test_vocab_parallel_triton.py sees to that).
"""

import itertools
import math
import os
import shutil
import signal
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_cases import CLIPS, CUTS, DTYPES, NAMES, ROWS, SIZES, STORED, TEMPERATURES, WHOLE, V, case, draw, rounding

from megatron_ext.vocab_parallel import (
    MODES,
    TokenLogprobs,
    VocabShard,
    clipped_kl,
    cpu,
    kl_loss,
    linear_clipped_kl,
    linear_token_logprobs,
    native,
    reference,
    row_kernels,
    tile_cuts,
    token_logprobs,
    token_loss,
    whole_vocabulary,
)
from megatron_ext.vocab_parallel.gpu import TritonRows
from megatron_ext.vocab_parallel.protocol import KLBlock, KLRows

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
WHY_NOT = {"torch": None, "native": native.why_absent()}
if HAS_GPU or IS_INTERPRETED:
    WHY_NOT["triton"] = None
on_each = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.skipif(bool(reason), reason=str(reason))) for n, reason in WHY_NOT.items()],
)


def kernels_named(name):
    return TritonRows(block=128) if name == "triton" and IS_INTERPRETED else row_kernels(name)


def device_of(name):
    return "cuda" if name == "triton" and HAS_GPU else "cpu"


def types_of(name):
    return native.DTYPES if name == "native" else DTYPES


def worst(found, want):
    """The largest difference; infinities must be the same."""
    found, want = found.double().cpu(), want.double().cpu()
    assert torch.equal(found.isinf(), want.isinf()) and torch.equal(found.isnan(), want.isnan())
    is_number = want.isfinite()
    return float((found - want)[is_number].abs().max()) if is_number.any() else 0.0


def check(found, want, *, rows, gradient, exact_gradient, lost, dtype, upstream):
    """Values of the live rows, and the gradient as a whole, to within what float32 loses of such logits."""
    for name in want._fields:
        if name != "is_suspect":
            got, exact = getattr(found, name)[rows], getattr(want, name)
            size = float(exact[exact.isfinite()].abs().max()) if exact.isfinite().any() else 0.0
            assert worst(got, exact) <= 4 * lost * (1 + size), name
    others = torch.ones(len(gradient), dtype=torch.bool, device=rows.device)
    others[rows] = False
    assert not any(value[others].any() for value in (*found, gradient)), "a row that is not live has a value"
    assert not gradient[:, V:].any(), "padding has a gradient"
    error = float((gradient[rows, :V].double() - exact_gradient[:, :V]).norm())
    assert error <= (STORED[dtype] + 8 * lost) * float(exact_gradient.norm() + 0.01 * upstream.norm())


def check_kl(kernels, found, *, kl_clip, temperature, upstream):
    student, rows = found.student.clone().requires_grad_(), found.rows
    options = {"kl_clip": kl_clip, "temperature": temperature}
    got = clipped_kl(student, found.teacher, WHOLE, live=found.live, kernels=kernels, **options)
    (got.loss * upstream).sum().backward()
    exact = found.student[rows].double().requires_grad_()
    want = reference.clipped_kl(exact, found.teacher[rows], vocab_size=V, **options)
    (want.loss * upstream[rows]).sum().backward()
    check(
        got,
        want,
        rows=rows,
        gradient=student.grad,
        exact_gradient=exact.grad,
        lost=rounding(found.student[rows], temperature) + rounding(found.teacher[rows], temperature),
        dtype=student.dtype,
        upstream=upstream,
    )
    clipped = want.clipped_mass > 0
    assert (got.is_suspect[rows] | ~clipped).all(), "a row that is clipped was not read again"


def check_tokens(kernels, found, *, temperature, upstream, upstream_entropy):
    logits, rows = found.student.clone().requires_grad_(), found.rows
    got = token_logprobs(logits, found.targets, WHOLE, temperature=temperature, live=found.live, kernels=kernels)
    (got.logprobs * upstream + got.entropy * upstream_entropy).sum().backward()
    exact = found.student[rows].double().requires_grad_()
    want = reference.token_logprobs(exact, found.targets[rows], vocab_size=V, temperature=temperature)
    (want.logprobs * upstream[rows] + want.entropy * upstream_entropy[rows]).sum().backward()
    check(
        got,
        want.detach(),
        rows=rows,
        gradient=logits.grad,
        exact_gradient=exact.grad,
        lost=rounding(found.student[rows], temperature),
        dtype=logits.dtype,
        upstream=upstream,
    )


# -- values and gradients in all the corners ------------------------------------------------------


@on_each
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("which", NAMES)
def test_clipped_kl_and_its_gradient_equal_float64(name, which, temperature):
    clips = (0.05, 10.0) if IS_INTERPRETED else CLIPS  # the interpreter is slow
    for dtype, kl_clip in itertools.product(types_of(name), clips):
        found = case(which, dtype).to(device_of(name))
        upstream = draw(3, ROWS).to(device_of(name))
        check_kl(kernels_named(name), found, kl_clip=kl_clip, temperature=temperature, upstream=upstream)


@on_each
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("which", NAMES)
def test_logprobs_entropy_and_their_gradients_equal_float64(name, which, temperature):
    for dtype in types_of(name):
        found = case(which, dtype).to(device_of(name))
        upstream, upstream_entropy = draw(3, ROWS).to(device_of(name)), draw(4, ROWS).to(device_of(name))
        check_tokens(
            kernels_named(name), found, temperature=temperature, upstream=upstream, upstream_entropy=upstream_entropy
        )


@pytest.mark.parametrize("kl_clip", CLIPS)
def test_the_gradient_formula_is_what_autograd_and_central_differences_see(kl_clip):
    found = case("disagreeing")
    student, teacher = found.student[:, :40].double(), found.teacher[:, :40].double()
    options = {"vocab_size": 40, "kl_clip": kl_clip, "temperature": 0.8}
    formula = reference.clipped_kl_gradient(student, teacher, **options)

    def loss(x):
        return reference.clipped_kl(x, teacher, **options).loss

    (by_autograd,) = torch.autograd.grad(loss(student.requires_grad_()).sum(), student)
    assert (formula - by_autograd).abs().max() < 1e-15
    assert torch.autograd.gradcheck(loss, student, eps=1e-7, atol=1e-7)
    assert formula.sum(-1).abs().max() < 1e-15


@on_each
def test_a_row_without_any_possible_token_is_not_a_number(name):
    logits = torch.full((2, V), -math.inf, device=device_of(name))
    logits[1] = 0.0
    whole, targets = whole_vocabulary(V), torch.zeros(2, dtype=torch.int64, device=device_of(name))
    found = token_logprobs(logits, targets, whole, kernels=kernels_named(name))
    assert found.logprobs.isnan().tolist() == [True, False]
    kl = clipped_kl(logits, logits.clone(), whole, kl_clip=1.0, kernels=kernels_named(name))
    assert kl.loss.isnan().tolist() == [True, False]


@on_each
def test_a_logit_that_is_not_a_number_makes_its_row_not_a_number_and_no_other(name):
    found = case("plain").to(device_of(name))
    for hurt in (found.student, found.teacher):
        hurt[2, 131] = math.nan
        student = found.student.clone().requires_grad_()
        got = clipped_kl(student, found.teacher, WHOLE, kl_clip=10.0, kernels=kernels_named(name))
        got.loss.sum().backward()
        for value in (got.loss, got.kl, student.grad[:, 0]):
            assert value.isnan().nonzero().tolist() == [[2]]
        hurt[2, 131] = 0.0


@on_each
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("columns", [1, 16, 129])
def test_few_rows_and_few_columns(name, rows, columns):
    shard, options = whole_vocabulary(columns), {"kernels": kernels_named(name)}
    student, teacher = (draw(k, rows, columns, scale=2.0).to(device_of(name)) for k in (1, 2))
    student.requires_grad_()
    kl = clipped_kl(student, teacher, shard, kl_clip=0.1, **options)
    exact = reference.clipped_kl(student, teacher, vocab_size=columns, kl_clip=0.1)
    torch.testing.assert_close(kl.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    targets = torch.full((rows,), columns - 1, device=device_of(name))
    tokens = token_logprobs(student, targets, shard, **options)
    (kl.loss + tokens.logprobs + tokens.entropy).sum().backward()
    assert student.grad.shape == student.shape and student.grad.isfinite().all()
    if columns == 1:
        assert not tokens.logprobs.any() and not tokens.entropy.any() and not student.grad.any()


@on_each
def test_an_entry_exactly_at_the_clip_is_kept(name):
    """As clamp has it. The teacher is as sure of the first entry as the student: f is 0, and so is the clip."""
    out = -200.0  # so far below that sums are exact
    student, teacher = (torch.tensor([row], device=device_of(name)) for row in ([0.0, out, 0.0], [0.0, 0.0, out]))
    found = clipped_kl(student, teacher, whole_vocabulary(3), kl_clip=0.0, kernels=kernels_named(name))
    assert found.is_suspect.item() and found.clipped_mass.item() == 0.5


# -- properties -----------------------------------------------------------------------------------

CPU_KERNELS = [n for n in ("torch", "native") if WHY_NOT[n] is None]
scales = st.tuples(st.floats(0.0, 30.0), st.floats(0.0, 30.0))


def kl_of(student, teacher, name, kl_clip, **options):
    return clipped_kl(student, teacher, whole_vocabulary(V), kl_clip=kl_clip, kernels=row_kernels(name), **options)


@pytest.mark.parametrize("name", CPU_KERNELS)
@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), scales=scales, kl_clip=st.floats(0.0, 20.0))
def test_the_clipped_sum_lies_between_minus_one_over_e_and_the_kl(name, seed, scales, kl_clip):
    student, teacher = draw(seed, 100, V, scale=scales[0]), draw(seed + 1, 100, V, scale=scales[1])
    found = kl_of(student, teacher, name, kl_clip)
    assert (found.loss >= -1 / math.e - 1e-5).all()
    assert (found.loss <= found.kl + 1e-4).all()
    assert (found.clipped_mass >= 0).all() and (found.clipped_mass <= 1 + 1e-5).all()
    assert (found.entropy >= -1e-4).all() and (found.entropy <= math.log(V) + 1e-4).all()


@pytest.mark.parametrize("name", CPU_KERNELS)
@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), scales=scales)
def test_the_bound_is_never_below_the_largest_entry(name, seed, scales):
    student, teacher = draw(seed, 100, V, scale=scales[0]), draw(seed + 1, 100, V, scale=scales[1])
    shard = VocabShard(None, 0, V, V, tile_cuts(V, (128, 100)))
    block = KLBlock(row_kernels(name), student, teacher, None, shard, 1.0, 10.0)
    bound = block.kernels.merge_kl(block.start().wait())[:, 5].double()
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    largest = (log_p.exp() * (log_p - log_q)).amax(-1)
    assert (bound * (1 + 1e-5) + 1e-6 >= largest).all()


@pytest.mark.parametrize("name", CPU_KERNELS)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), kl_clip=st.sampled_from((0.05, 10.0)))
def test_gradients_sum_to_zero_over_the_vocabulary(name, seed, kl_clip):
    student, teacher = draw(seed, 50, V, scale=5.0).requires_grad_(), draw(seed + 1, 50, V, scale=5.0)
    kl_of(student, teacher, name, kl_clip).loss.sum().backward()
    assert student.grad.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("name", CPU_KERNELS)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), shifts=st.tuples(st.floats(-50.0, 50.0), st.floats(-50.0, 50.0)))
def test_adding_a_constant_to_a_rows_logits_changes_nothing(name, seed, shifts):
    student, teacher = draw(seed, 20, V), draw(seed + 1, 20, V)
    targets = torch.arange(20)
    for one, other in zip(
        (*kl_of(student, teacher, name, 10.0), *token_logprobs(student, targets, whole_vocabulary(V))),
        (
            *kl_of(student + shifts[0], teacher + shifts[1], name, 10.0),
            *token_logprobs(student + shifts[0], targets, whole_vocabulary(V)),
        ),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CPU_KERNELS)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_the_vocabulary_does_not_matter(name, seed):
    student, teacher = draw(seed, 20, V, scale=3.0), draw(seed + 1, 20, V, scale=3.0)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    for one, other in zip(
        kl_of(student, teacher, name, 0.5),
        kl_of(student[:, order].contiguous(), teacher[:, order].contiguous(), name, 0.5),
        strict=True,
    ):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-5, atol=1e-5)


@on_each
def test_a_higher_clip_never_gives_a_lower_loss_and_none_gives_torchs_kl_divergence(name):
    found = case("disagreeing").to(device_of(name))
    student, teacher = found.student[:, :V].contiguous(), found.teacher[:, :V].contiguous()
    losses = [
        clipped_kl(student, teacher, whole_vocabulary(V), kl_clip=clip, kernels=kernels_named(name))
        for clip in (0.0, 0.05, 1.0, 10.0, math.inf)
    ]
    for lower, higher in itertools.pairwise(losses):
        assert (lower.loss <= higher.loss + 1e-6).all()
        assert torch.equal(lower.kl, higher.kl)
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    exact = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(losses[-1].loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(losses[-1].loss, losses[-1].kl) and not losses[-1].clipped_mass.any()


@on_each
def test_equal_distributions_have_no_loss_and_no_gradient(name):
    student = case("equal").to(device_of(name)).student.requires_grad_()
    found = clipped_kl(student, student.detach().clone(), WHOLE, kl_clip=10.0, kernels=kernels_named(name))
    found.loss.sum().backward()
    assert not found.loss.any() and not found.kl.any() and not found.clipped_mass.any() and not student.grad.any()


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_the_number_of_threads_changes_no_bit(name):
    student, teacher = draw(1, 301, V, scale=3.0), draw(2, 301, V, scale=3.0)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            z = student.clone().requires_grad_()
            found = kl_of(z, teacher, name, 0.5)
            found.loss.sum().backward()
            results.append((*found, z.grad))
            assert torch.get_num_threads() == threads
            inside = []
            cpu.for_rows(9, lambda rows, inside=inside: inside.append(torch.get_num_threads()), at_once=1)
            assert inside == [1] * 9 or threads == 1, "torch's own threads would spin beside ours"
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# -- what a caller may rely on --------------------------------------------------------------------


@on_each
def test_logits_are_left_alone_unless_they_are_given_up(name):
    found = case("plain").to(device_of(name))
    student, teacher = found.student.clone().requires_grad_(), found.teacher.clone()
    kl = clipped_kl(student, teacher, WHOLE, kl_clip=1.0, kernels=kernels_named(name))
    tokens = token_logprobs(student, found.targets, WHOLE, kernels=kernels_named(name))
    (kl.loss.sum() + tokens.logprobs.sum()).backward(retain_graph=True)
    once = student.grad.clone()
    (kl.loss.sum() + tokens.logprobs.sum()).backward()
    assert torch.equal(student.grad, 2 * once)
    assert torch.equal(student.detach(), found.student) and torch.equal(teacher, found.teacher)


@on_each
def test_logits_that_are_given_up_hold_the_gradient_and_backward_runs_once(name):
    found, kernels = case("plain").to(device_of(name)), kernels_named(name)
    plain = found.student.clone().requires_grad_()
    clipped_kl(plain, found.teacher, WHOLE, kl_clip=1.0, kernels=kernels).loss.sum().backward()
    student, teacher = found.student.clone().requires_grad_(), found.teacher.clone()
    loss = clipped_kl(student, teacher, WHOLE, kl_clip=1.0, consume=True, kernels=kernels).loss.sum()
    loss.backward(retain_graph=True)
    assert torch.equal(student.grad, plain.grad) and torch.equal(teacher, plain.grad)
    with pytest.raises(RuntimeError, match="consume=False"):
        loss.backward()

    leaf = found.student.clone().requires_grad_()
    logits = leaf * 1
    logprobs = token_logprobs(logits, found.targets, WHOLE, consume=True, kernels=kernels).logprobs.sum()
    logprobs.backward(retain_graph=True)
    assert torch.equal(logits.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="consume=False"):
        logprobs.backward()


def test_nothing_of_the_size_of_the_logits_is_saved_but_the_logits():
    found = case("disagreeing")
    student = found.student.clone().requires_grad_()
    known = {student.data_ptr(), found.teacher.data_ptr()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        clipped_kl(student, found.teacher, WHOLE, kl_clip=1.0)
        token_logprobs(student, found.targets, WHOLE)
    others = [x for x in saved if x.data_ptr() not in known]
    assert len(saved) - len(others) == 3 and all(x.numel() <= 7 * ROWS for x in others)


def test_the_teacher_gets_no_gradient():
    found = case("disagreeing")
    student, teacher = found.student.requires_grad_(), found.teacher.requires_grad_()
    got = clipped_kl(student, teacher, WHOLE, kl_clip=0.05)
    got.loss.sum().backward()
    assert student.grad.any() and teacher.grad is None
    assert not any(value.requires_grad for value in got[1:])


@pytest.mark.parametrize("target", [-1, V, V + 1])
def test_a_target_in_the_padding_is_refused(target):
    targets = torch.tensor([0] * (ROWS - 1) + [target])
    with pytest.raises(ValueError, match=rf"the vocabulary has ids 0 to {V - 1}"):
        token_logprobs(case("plain").student, targets, WHOLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k.update(student=k["student"][:, :-1]), "logits must be"),
        (lambda k: k.update(teacher=k["teacher"][:-1]), "logits must be"),
        (lambda k: k.update(teacher=k["teacher"].bfloat16()), "of one dtype"),
        (lambda k: k.update(student=k["student"].t().contiguous().t()), "next to each other"),
        (
            lambda k: k.update(teacher=k["teacher"][:1].expand(ROWS, -1), student=k["student"][:1].expand(ROWS, -1)),
            "consume",
        ),
        (lambda k: k.update(temperature=0.0), "temperature must be more than 0"),
        (lambda k: k.update(temperature=math.inf), "more than 0 and finite"),
        (lambda k: k.update(kl_clip=-1.0), "kl_clip must be 0 or more"),
        (lambda k: k.update(kl_clip=math.nan), "kl_clip must be 0 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    found = case("plain")
    arguments = {"student": found.student, "teacher": found.teacher, "shard": WHOLE, "kl_clip": 1.0, "consume": True}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        clipped_kl(**arguments)


@on_each
def test_more_rows_than_a_grid_of_two_dimensions_may_have(name):
    if IS_INTERPRETED:
        pytest.skip("70,000 programs take the interpreter minutes")
    rows = 70_000
    student, teacher = (draw(k, rows, 8).to(device_of(name)) for k in (1, 2))
    found = clipped_kl(student, teacher, whole_vocabulary(8), kl_clip=10.0, kernels=row_kernels(name))
    exact = reference.clipped_kl(student[-3:], teacher[-3:], vocab_size=8, kl_clip=10.0)
    torch.testing.assert_close(found.loss[-3:].double(), exact.loss, rtol=1e-5, atol=1e-6)


# -- from hidden states ---------------------------------------------------------------------------

HIDDEN = 8


def head_inputs(rows, dtype=torch.float32, device="cpu"):
    student, teacher, weight = draw(0, rows, HIDDEN, scale=2.0), draw(1, rows, HIDDEN, scale=2.0), draw(2, 384, HIDDEN)
    return tuple(x.to(device=device, dtype=dtype) for x in (student, teacher, weight))


@on_each
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_every_mode_gives_the_loss_and_gradients_of_float64(name, rows, chunk):
    if IS_INTERPRETED and (rows, chunk) not in ((0, 3), (7, 3)):
        pytest.skip("the interpreter is slow; two sizes suffice")
    device, kernels = device_of(name), kernels_named(name)
    student, teacher, weight = head_inputs(rows, device=device)
    targets, weights = torch.arange(rows, device=device) * 40, draw(3, rows).to(device)

    def token_rows(found, part):
        return (found.logprobs * weights[part] + 0.3 * found.entropy * weights[part] ** 2).sum()

    def exact(function):
        s, w = (x.double().requires_grad_() for x in (student, weight))
        value = function(s, w)
        return value.detach(), *torch.autograd.grad(value, (s, w))

    def exact_tokens(s, w):
        found = reference.token_logprobs(F.linear(s, w), targets, vocab_size=V, temperature=0.8)
        return token_rows(found, slice(0, rows))

    def exact_kl(s, w):
        logits = F.linear(s, w), F.linear(teacher.double(), w.detach())
        return (weights * reference.clipped_kl(*logits, vocab_size=V, kl_clip=0.3, temperature=0.8).loss).sum()

    want_tokens, want_kl = exact(exact_tokens), exact(exact_kl)
    for mode in MODES:
        options = {"mode": mode, "chunk": chunk, "temperature": 0.8, "kernels": kernels}
        for want, loss in (
            (want_tokens, lambda s, w, options=options: token_loss(s, w, targets, WHOLE, token_rows, **options)),
            (want_kl, lambda s, w, options=options: kl_loss(s, teacher, w, WHOLE, weights, kl_clip=0.3, **options)),
        ):
            s, w = (x.clone().requires_grad_() for x in (student, weight))
            value, found = loss(s, w)
            assert not any(x.requires_grad for x in found) and len(found[0]) == rows
            (3.0 * value).backward()
            got = (value.detach(), s.grad / 3, w.grad / 3)
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_head_gets_no_gradient_and_no_buffer_for_one(mode, monkeypatch):
    import megatron_ext.vocab_parallel.linear as linear

    monkeypatch.setattr(linear, "_add_product", lambda *_: pytest.fail("a frozen head's gradient was computed"))
    student, teacher, weight = head_inputs(5)
    student.requires_grad_()
    value, _ = kl_loss(student, teacher, weight, WHOLE, torch.ones(5), kl_clip=1.0, mode=mode, chunk=2)
    value.backward()
    assert student.grad.any() and weight.grad is None


def test_without_gradients_only_values_are_computed():
    student, teacher, weight = head_inputs(5)
    student.requires_grad_()
    with torch.no_grad():
        found = linear_token_logprobs(student, weight, torch.arange(5), WHOLE, chunk=2)
        value, kl = kl_loss(student, teacher, weight, WHOLE, torch.ones(5), kl_clip=1.0, mode="chunked", chunk=2)
    assert not found.logprobs.requires_grad and not value.requires_grad
    exact = reference.token_logprobs(F.linear(student, weight), torch.arange(5), vocab_size=V)
    torch.testing.assert_close(found.logprobs.double(), exact.logprobs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value, kl.loss.sum())


def test_recomputed_rows_serve_any_later_loss():
    student, teacher, weight = head_inputs(5)
    student.requires_grad_()
    found = linear_clipped_kl(student, teacher, weight, WHOLE, kl_clip=1.0, chunk=2)
    loss = (found.loss**2).sum()
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, 2 * once)
    exact = student.detach().double().requires_grad_()
    logits = F.linear(exact, weight.double()), F.linear(teacher.double(), weight.double())
    (reference.clipped_kl(*logits, vocab_size=V, kl_clip=1.0).loss ** 2).sum().backward()
    torch.testing.assert_close(once.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_do_not_belong_together_are_refused_before_memory_is_read(mode):
    student, teacher, weight = head_inputs(5)
    options = {"kl_clip": 1.0, "mode": mode, "chunk": 3}
    for other, weights, message in (
        (teacher[:-1], torch.ones(5), "rows of one shape"),
        (torch.cat([teacher, teacher]), torch.ones(5), "rows of one shape"),
        (teacher, torch.ones(1), r"row_weights must be \[5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            kl_loss(student, other, weight, WHOLE, weights, **options)
    found = case("plain")
    with pytest.raises(ValueError, match=r"live must be bool \[6\]"):
        token_logprobs(found.student, found.targets, WHOLE, live=torch.ones(3, dtype=torch.bool))


@on_each
def test_targets_and_masks_may_be_strided(name):
    device, kernels = device_of(name), kernels_named(name)
    found = case("plain").to(device)
    targets, live = torch.arange(2 * ROWS, device=device)[::2], torch.ones(2 * ROWS, dtype=torch.bool, device=device)
    live[1::2] = False
    one, other = (
        token_logprobs(found.student, y, WHOLE, live=mask, kernels=kernels)
        for y, mask in ((targets, live[::2]), (targets.clone(), None))
    )
    assert torch.equal(one.logprobs, other.logprobs)
    student, _, weight = head_inputs(ROWS, device=device)
    one, other = (
        linear_token_logprobs(student, weight, y, WHOLE, chunk=4, kernels=kernels) for y in (targets, targets.clone())
    )
    assert torch.equal(one.logprobs, other.logprobs)


def test_a_chunk_without_a_loss_of_its_own_gets_no_gradient():
    student, _, weight = head_inputs(5)
    student.requires_grad_()

    def row_loss(found, rows):
        return torch.zeros(()) if rows.start == 0 else found.logprobs.sum()

    value, _ = token_loss(student, weight, torch.arange(5), WHOLE, row_loss, mode="chunked", chunk=2)
    value.backward()
    assert not student.grad[:2].any() and student.grad[2:].any(dim=1).all()


@pytest.mark.parametrize("mode", ["recompute", "materialized"])
def test_a_head_that_changes_before_backward_is_refused(mode):
    student, teacher, weight = head_inputs(5)
    student.requires_grad_()
    value, _ = kl_loss(student, teacher, weight, WHOLE, torch.ones(5), kl_clip=1.0, mode=mode, chunk=2)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_forked_process_starts_threads_of_its_own():
    found = case("plain")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        clipped_kl(found.student, found.teacher, WHOLE, kl_clip=1.0)
        child = os.fork()
        if not child:
            clipped_kl(found.student, found.teacher, WHOLE, kl_clip=1.0)
            os._exit(0)
        for _ in range(200):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert done and status == 0, "the forked process hangs"
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(bool(WHY_NOT["native"]), reason=str(WHY_NOT["native"]))
@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_native_kernels_that_are_absent_or_do_not_load_are_a_reason_and_no_crash(content, tmp_path, monkeypatch):
    shutil.copy(Path(native.__file__).with_name("rows.cpp"), tmp_path)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    look = native._library.__wrapped__  # without what was found before
    assert "they are not built" in look()
    for level in ("v3", "v4"):
        (tmp_path / f"_rows_{level}.so").write_bytes(content)
    assert "does not load" in look()


@on_each
def test_shards_of_every_size_give_the_bits_of_the_whole(name):
    """What ranks compute and exchange, without ranks (tests/parallel/test_vocab_ranks.py has them)."""
    kernels, device = kernels_named(name), device_of(name)
    found, upstream = case("disagreeing").to(device), draw(3, ROWS).to(device)
    options = {"scale": 1.25, "kl_clip": 0.05}

    def columns(x, rank, size):
        return F.pad(x[:, :V], (0, 8 * 384 - V))[:, rank * size : (rank + 1) * size].contiguous()

    def together(ranks):
        shards = [VocabShard(None, r * SIZES[ranks], SIZES[ranks], V, CUTS) for r in range(ranks)]
        logits = [[columns(x, r, SIZES[ranks]) for x in (found.student, found.teacher)] for r in range(ranks)]
        blocks = [KLBlock(kernels, *z, None, shard, **options) for z, shard in zip(logits, shards, strict=True)]
        rows = kernels.merge_kl(torch.cat([block.start().wait()[:, : len(block.shard.tiles)] for block in blocks], 1))
        suspect, sums = rows[:, 5] > 0.05, []
        for block in blocks:
            own = torch.zeros(ROWS, len(block.shard.tiles), 2, device=device)
            kernels.kl_scan(block.student, block.teacher, suspect, rows, block.shard, sums=own, **options)
            sums.append(own)
        loss, mass = torch.cat(sums, 1).sum(1).t().contiguous()
        gradients = [torch.empty_like(block.student) for block in blocks]
        for block, out in zip(blocks, gradients, strict=True):
            block.grad(KLRows(rows, suspect, loss, mass), upstream, out=out)
        return rows, loss, mass, torch.cat(gradients, dim=1)[:, :V]

    whole = together(1)
    assert (whole[2] > 0).any()
    for ranks in (2, 4, 8):
        assert all(torch.equal(a, b) for a, b in zip(together(ranks), whole, strict=True))


def test_a_gradient_taken_in_forward_is_handed_out_once():
    student, teacher, weight = head_inputs(5)
    student.requires_grad_()
    value, _ = kl_loss(student, teacher, weight, WHOLE, torch.ones(5), kl_clip=1.0, mode="chunked", chunk=2)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='mode="recompute"'):
        value.backward()


@on_each
@pytest.mark.parametrize("mode", ["chunked", "recompute"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_megatrons_main_gradient_takes_the_sum_in_float32(name, mode, is_tied):
    """bfloat16 weights under Megatron's DDP: `main_grad` accumulates, and what autograd gets must not count twice."""
    if IS_INTERPRETED:
        pytest.skip("the interpreter cuts bfloat16 off instead of rounding it")
    device, kernels = device_of(name), kernels_named(name)
    student, teacher, weight = head_inputs(40, torch.bfloat16, device)
    logits = F.linear(student, weight), F.linear(teacher, weight)
    d_logits = reference.clipped_kl_gradient(*logits, vocab_size=V, kl_clip=10.0).bfloat16().double()
    exact = F.pad(d_logits, (0, 384 - V)).t() @ student.double()

    head = torch.nn.Parameter(weight)
    head.main_grad, head.grad_added_to_main_grad = torch.ones(384, HIDDEN, device=device), False
    if is_tied:
        head.zero_out_wgrad = True
    ones, options = torch.ones(40, device=device), {"kl_clip": 10.0, "mode": mode, "chunk": 8, "kernels": kernels}
    value, _ = kl_loss(student.requires_grad_(), teacher, head, WHOLE, ones, **options)
    value.backward()
    assert head.grad_added_to_main_grad
    assert (head.main_grad.double() - 1 - exact).norm() / exact.norm() < 2**-11  # rounded, it would be 2**-9
    if is_tied:
        assert not head.grad.any()


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_mode_and_a_head_of_another_shape_are_refused(mode):
    student, teacher, weight = head_inputs(5)
    with pytest.raises(ValueError, match="mode must be one of chunked, recompute, materialized"):
        kl_loss(student, teacher, weight, WHOLE, torch.ones(5), kl_clip=1.0, mode=mode + "s", chunk=2)
    with pytest.raises(ValueError, match=r"slice must be \[384, 8\]|logits must be \[rows, 384\]"):
        kl_loss(student, teacher, weight[:-1], WHOLE, torch.ones(5), kl_clip=1.0, mode=mode, chunk=2)


# -- these tests can fail -------------------------------------------------------------------------

MUTATIONS = {
    "clipped mass left in": ("(1 - clipped_mass[part])", "1"),
    "clipped entries keep their gradient": ("p.masked_fill_((f > kl_clip) &", "p.masked_fill_((f > math.inf) &"),
    "clip at the tie": ("mass = (p * (f > kl_clip))", "mass = (p * (f >= kl_clip))"),
    "clip not applied": ("f.clamp_(max=kl_clip)", "f"),
    "padding has a gradient": ("out[:, shard.num_columns :] = 0", "out[:, shard.num_columns :] = 1e-3"),
    "maximum forgotten": ("m_s, m_t = s.amax(-1), t.amax(-1)", "m_s, m_t = s.amax(-1).clamp(min=0), t.amax(-1)"),
    "entropy moment": ("l_s, u_s = work.sum(-1)", "l_s, u_s = 1.001 * work.sum(-1)"),
    "temperature in the gradient": ("g = for_logprobs[part] * scale", "g = for_logprobs[part]"),
    "target's own gradient": ("torch.where(is_here, g, 0.0)", "torch.where(is_here, 0.999 * g, 0.0)"),
}


def passes(kernels):
    """Whether these kernels stand up to the corners above."""
    try:
        for which, temperature, kl_clip in itertools.product(NAMES, (1.0, 0.6), (0.05, 10.0)):
            found = case(which)
            check_kl(kernels, found, kl_clip=kl_clip, temperature=temperature, upstream=draw(3, ROWS))
            check_tokens(
                kernels, found, temperature=temperature, upstream=draw(3, ROWS), upstream_entropy=draw(4, ROWS)
            )
        student, teacher = torch.tensor([[0.0, -200.0, 0.0]]), torch.tensor([[0.0, 0.0, -200.0]])
        at_the_tie = clipped_kl(student, teacher, whole_vocabulary(3), kl_clip=0.0, kernels=kernels)
        assert at_the_tie.clipped_mass.item() == 0.5
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("mutation", ["none", *MUTATIONS])
def test_a_kernel_with_a_defect_is_found_out(mutation):
    source = Path(cpu.__file__).read_text()
    if mutation != "none":
        before, after = MUTATIONS[mutation]
        assert source.count(before) == 1, f"{before!r} must stand in cpu.py once"
        source = source.replace(before, after)
    module = types.ModuleType("mutated")
    exec(compile(source, cpu.__file__, "exec"), module.__dict__)
    assert passes(module.TorchRows()) == (mutation == "none")


def test_detached_values_need_no_gradient():
    values = TokenLogprobs(torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True))
    assert not any(value.requires_grad for value in values.detach())
