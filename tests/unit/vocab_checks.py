"""What the tests of the vocabulary losses share: the kernels that run here, and comparisons with float64.

"triton" is the GPU where there is one; without one it is Triton's interpreter, if TRITON_INTERPRET=1 is set
(tests/unit/test_vocab_parallel_triton.py sees to that).
"""

import os

import pytest
import torch
from vocab_cases import DTYPES, STORED, WHOLE, V, rounding

from megatron_ext.vocab_parallel import (
    clipped_kl,
    native,
    reference,
    row_kernels,
    token_logprobs,
)
from megatron_ext.vocab_parallel.gpu import TritonRows

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
