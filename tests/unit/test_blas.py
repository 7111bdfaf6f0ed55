"""Products by OpenBLAS behind PyTorch's operators, against float64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron_ext import blas

pytestmark = pytest.mark.skipif(bool(blas.why_not()), reason=blas.why_not())


@pytest.fixture(autouse=True)
def by_openblas():
    assert blas.multiply_by_openblas() and blas.multiply_by_openblas()  # twice is once


@pytest.fixture
def products(monkeypatch):
    """The shapes that OpenBLAS has multiplied."""
    shapes = []
    multiply = blas._multiply

    def counting(orders, a, b, out, **options):
        shapes.append((a.shape, b.shape))
        return multiply(orders, a, b, out, **options)

    monkeypatch.setattr(blas, "_multiply", counting)
    return shapes


def unlike(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def in_memory(rows, columns):
    """Matrices that lie in every way: some of which OpenBLAS cannot be told of."""
    around = torch.randn(2 * rows, 2 * columns)
    yield torch.randn(rows, columns)
    yield torch.randn(columns, rows).t()
    yield around[:rows, :columns]
    yield around.t()[:columns, :rows].t()
    yield around[::2, ::2]
    yield torch.randn(rows, 1).expand(rows, columns)
    yield torch.randn(1, columns).expand(rows, columns)


def test_matrices_however_they_lie():
    torch.manual_seed(0)
    start, bias = torch.randn(30, 20), torch.randn(20)
    for a in in_memory(30, 40):
        for b in in_memory(40, 20):
            expected = a.double() @ b.double()
            assert unlike(a @ b, expected) < 1e-5
            assert unlike(torch.mm(a, b, out=torch.full((30, 20), torch.nan)), expected) < 1e-5
            assert unlike(torch.addmm(bias, a, b), bias + expected) < 1e-5
            assert unlike(torch.addmm(start, a, b, beta=0.5, alpha=2), start / 2 + 2 * expected) < 1e-5
            assert unlike(start.clone().addmm_(a, b, alpha=-1), start - expected) < 1e-5
            into = torch.full((30, 50), torch.nan)
            torch.mm(a, b, out=into[:, 20:40])
            assert unlike(into[:, 20:40], expected) < 1e-5
            assert into[:, :20].isnan().all() and into[:, 40:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (1, 9, 9), (9, 9, 1), (64, 64, 64)])
def test_sizes_that_are_left_to_pytorch_and_one_that_is_not(products, shape):
    rows, inner, columns = shape
    a, b, bias = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(columns)
    assert torch.allclose(a @ b, (a.double() @ b.double()).float(), atol=1e-4)
    assert torch.allclose(torch.addmm(bias, a, b), (bias + a.double() @ b.double()).float(), atol=1e-4)
    assert bool(products) == (shape == (64, 64, 64))


def test_what_is_wrong_is_told_by_pytorch():
    a = torch.ones(16, 16)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(a, torch.ones(17, 16))
    with pytest.raises(RuntimeError, match=r"must have the same dtype|to have the same dtype"):
        torch.mm(a, torch.ones(16, 16, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expanded size"):
        torch.addmm(torch.ones(7), a, a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(products, dtype):
    x = torch.ones(16, 16, dtype=dtype)
    assert torch.equal(x @ x, 16 * x) and not products


def test_a_linear_layer_forward_and_backward(products):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 24, requires_grad=True)
    weight, bias = torch.randn(32, 24, requires_grad=True), torch.randn(32, requires_grad=True)
    for has_bias in (True, False):
        given = [x, weight, bias] if has_bias else [x, weight]
        asked = torch.randn(3, 20, 32)
        found = torch.autograd.grad((F.linear(*given) * asked).sum(), given)
        precise = [tensor.detach().double().requires_grad_() for tensor in given]
        expected = torch.autograd.grad((F.linear(*precise) * asked).sum(), precise)
        assert all(unlike(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    assert len(products) == 6  # the precise ones are not its own


FORK = """
import os, torch
from megatron_ext.blas import multiply_by_openblas
from megatron_ext.host import use_threads

use_threads(2)
assert multiply_by_openblas()
x = torch.ones(512, 512)
assert torch.equal(x @ x, 512 * x)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(x @ x, 512 * x) else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.equal(x @ x, 512 * x)
"""


def test_a_fork_multiplies_too():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


def test_several_threads():
    a, b = torch.randn(300, 257), torch.randn(257, 190)
    blas.use_threads(2)
    try:
        assert unlike(a @ b, a.double() @ b.double()) < 1e-5
    finally:
        blas.use_threads(1)
