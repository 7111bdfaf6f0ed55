"""The vocabulary losses against float64, on every kind of kernel that runs here: values, gradients, properties."""

import itertools
import math
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_cases import CLIPS, NAMES, ROWS, TEMPERATURES, WHOLE, V, case, draw
from vocab_checks import (
    IS_INTERPRETED,
    WHY_NOT,
    check_kl,
    check_tokens,
    device_of,
    kernels_named,
    on_each,
    types_of,
)

from megatron_ext.vocab_parallel import (
    TokenLogprobs,
    VocabShard,
    clipped_kl,
    cpu,
    reference,
    row_kernels,
    tile_cuts,
    token_logprobs,
    whole_vocabulary,
)
from megatron_ext.vocab_parallel.protocol import KLBlock

# -- values and gradients in all the corners ------------------------------------------------------


@on_each
@pytest.mark.parametrize("temperature", TEMPERATURES[:2] if IS_INTERPRETED else TEMPERATURES)
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
