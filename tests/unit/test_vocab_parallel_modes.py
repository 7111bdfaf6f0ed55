"""What a caller of the vocabulary losses may rely on, and the losses from hidden states in every mode."""

import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from vocab_cases import CUTS, ROWS, SIZES, WHOLE, V, case, draw
from vocab_checks import IS_INTERPRETED, WHY_NOT, device_of, kernels_named, on_each

from megatron_ext.vocab_parallel import (
    MODES,
    VocabShard,
    clipped_kl,
    kl_loss,
    linear_clipped_kl,
    linear_token_logprobs,
    native,
    reference,
    row_kernels,
    token_logprobs,
    token_loss,
    whole_vocabulary,
)
from megatron_ext.vocab_parallel.protocol import KLBlock, KLRows

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
