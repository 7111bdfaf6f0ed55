"""The trainer's C++ layers for CPUs against PyTorch in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megatron_ext import cpu_layers
from megatron_ext.cpu import _rotary
from megatron_ext.cpu_layers import (
    attention,
    can_attend,
    copy_transposed,
    gated_activation,
    rms_norm,
    rotate,
    spans,
)

WHY_NOT = cpu_layers.library() if isinstance(cpu_layers.library(), str) else ""
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

# A prompt and its three responses, a sequence alone, and one that is longer than a block of queries.
ROWS = [(0, 0, 0, 40, 0), (0, 40, 40, 3, 40), (0, 40, 43, 1, 43), (0, 40, 44, 70, 44), (0, 0, 114, 16, 114)]
ROWS.append((0, 0, 130, 150, 130))
TOKENS = 280


def dense(query, key, value, rows, scale):
    """Under a mask, in float64."""
    mask = torch.zeros(len(query), len(key), dtype=torch.bool)
    for known, end, own, count, first in rows:
        mask[first : first + count, known:end] = True
        mask[first : first + count, own : own + count] = torch.ones(count, count).tril().bool()
    q, k, v = (x.double().transpose(0, 1)[None] for x in (query, key, value))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=scale)
    return found[0].transpose(0, 1)


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 3e-6 * expected.abs().max()


@pytest.mark.parametrize("size", cpu_layers.HEAD_SIZES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_and_its_gradient_are_those_under_a_dense_mask(size, heads, groups, scale):
    generator = torch.Generator().manual_seed(0)
    query, gradient = (torch.randn(TOKENS, heads, size, generator=generator) for _ in range(2))
    # As Megatron's projection gives them: a group's keys and values lie behind its queries.
    packed = torch.randn(TOKENS, groups, 4 * size, generator=generator)
    inputs = [query.requires_grad_(), packed[..., : 2 * size : 1][..., :size].requires_grad_()]
    inputs.append(packed[..., 3 * size :].detach().requires_grad_())
    assert can_attend(*inputs) and not inputs[2].is_contiguous()
    found = attention(*inputs, spans(ROWS), scale=scale)
    expected = dense(*inputs, ROWS, scale)
    close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient.double()),
        strict=True,
    ):
        close(ours, theirs)


def test_queries_may_be_elsewhere_than_their_keys():
    """As under context parallelism, where keys are of all ranks and queries of one."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(30, 2, 32, generator=generator)
    key, value = torch.randn(2, 100, 2, 32, generator=generator)
    rows = [(0, 75, 75, 25, 5), (10, 12, 12, 5, 0)]
    close(attention(query, key, value, spans(rows), scale=None), dense(query, key, value, rows, None))


def test_threads_change_no_bit(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(TOKENS, heads, 32, generator=generator).requires_grad_() for heads in (6, 3, 3)]
    x = torch.randn(TOKENS, 64, generator=generator).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = attention(*inputs, spans(ROWS), scale=None)
            gated = gated_activation(x)
            gradients = torch.autograd.grad([found.square().sum() + gated.square().sum()], [*inputs, x])
            results.append([found, gated, *gradients])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_other_sizes_and_dtypes_are_left_to_pytorch():
    fits = torch.zeros(3, 2, 64)
    assert can_attend(fits, fits, fits)
    assert not can_attend(fits.bfloat16(), fits.bfloat16(), fits.bfloat16())
    assert not can_attend(*[torch.zeros(3, 2, 80)] * 3)
    assert not can_attend(fits, fits, fits.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 48), (torch.float32, 24), (torch.bfloat16, 48)])
def test_the_gate_and_its_gradient(dtype, width):
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(5, 1, 2 * width, generator=generator)).to(dtype)
    x[0, 0, :3] = torch.tensor([-120.0, 0.0, 120.0])
    x.requires_grad_()
    gradient = torch.randn(5, 1, width, generator=generator).to(dtype)
    found = gated_activation(x)
    exact = x.double()
    expected = F.silu(exact[..., :width]) * exact[..., width:]
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    assert found.shape == (5, 1, width) and found.dtype == dtype
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    (ours,) = torch.autograd.grad(found, x, gradient)
    (theirs,) = torch.autograd.grad(expected, x, gradient.double())
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize("shape", [(5, 1, 48), (700, 3, 32)])  # rows of two sums; and of several threads
def test_the_norm_and_its_gradients(shape):
    generator = torch.Generator().manual_seed(0)
    x, gradient = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).requires_grad_()
    x.requires_grad_()
    found = rms_norm(x, weight, 1e-6)
    expected = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    close(found, expected)
    ours = torch.autograd.grad(found, (x, weight), gradient)
    theirs = torch.autograd.grad(expected, (x, weight), gradient.double())
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)
    frozen = torch.autograd.grad(rms_norm(x, weight.detach(), 1e-6), x, gradient)[0]
    assert torch.equal(frozen, ours[0])
    assert rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [32, 128])
def test_rotary_positions_are_megatrons(size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(9, size // 2, generator=generator) * 50
    angles = torch.cat([half, half], dim=-1)[:, None, None]
    packed = torch.randn(9, 2, 3 * size, generator=generator)
    x = packed[..., size : 2 * size].requires_grad_()
    gradient = torch.randn(9, 2, size, generator=generator)
    found = rotate(x, angles)
    expected = _apply_rotary_pos_emb_bshd(x.double()[:, None], angles.double()).squeeze(1)
    close(found, expected)
    close(torch.autograd.grad(found, x, gradient)[0], torch.autograd.grad(expected, x, gradient.double())[0])
    monkeypatch.setattr(torch.Tensor, "cos", lambda _: pytest.fail("a layer computed the same cosines again"))
    assert torch.equal(rotate(x, angles), found)
    assert rotate(x.bfloat16(), angles) is None and rotate(x, angles[:5]) is None


@pytest.mark.parametrize(("ranks", "is_ours"), [(None, True), (1, True), (2, False)])
def test_context_parallel_ranks_turn_by_positions_and_not_by_rows(ranks, is_ours):
    """Their table has an angle a position, and may be as long as a pack."""
    angles = torch.rand(8, 1, 1, 32)
    options = {} if ranks is None else {"cp_group": SimpleNamespace(size=lambda: ranks)}
    turn = _rotary(lambda *_, **__: "Megatron's")
    config = SimpleNamespace(rotary_interleaved=False, multi_latent_attention=False)
    found = turn(torch.randn(8, 2, 32), angles, config, **options)
    assert isinstance(found, torch.Tensor) if is_ours else found == "Megatron's"


@pytest.mark.parametrize(("rows", "width"), [(16, 8), (272, 24), (528, 100), (260, 16), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_copied_into_columns_of_another_and_nowhere_else(rows, width, dtype):
    """Also what the kernel does not know: odd sizes, and other types."""
    x = torch.randn(rows, width + 8, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :width]
    memory = torch.zeros(width, rows + 24, dtype=dtype)
    copy_transposed(x, memory[:, 8 : 8 + rows].t())
    assert torch.equal(memory[:, 8 : 8 + rows].t(), x)
    assert not memory[:, :8].any() and not memory[:, 8 + rows :].any()
