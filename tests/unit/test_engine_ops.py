"""The engine's C++ layers against PyTorch in float64, and what they leave to SGLang's own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from searche1.rollout import engine_ops as ops
from searche1.rollout.cpu_kernels import seeded_multinomial

WHY_NOT = ops.library() if isinstance(ops.library(), str) else ""
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def unlike(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Layer(SimpleNamespace):
    """As much of SGLang's layers as is read; its own forward says that it was asked."""

    def forward_native(self, *arguments):
        return ("native", len(arguments))


@pytest.mark.parametrize("size", ops.HEAD_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_a_new_token_attends_to_all_tokens_of_its_request_wherever_they_are(size, heads, kv_heads):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 7, 8, 33, 250])
    places, requests = 400, len(lengths)
    slots = torch.stack([torch.randperm(places)[:256] for _ in range(9)]).int()
    numbers = torch.randperm(9)[:requests]
    query = 3 * torch.randn(requests, heads, size)
    keys, values = torch.randn(2, places, kv_heads, size)
    assert ops.can_decode(query, keys)
    output = torch.full_like(query, float("nan"))
    options = {"keys": keys, "values": values, "slots": slots, "scale": size**-0.5}
    ops.decode_attention(query, output, numbers=numbers, lengths=lengths, **options)
    for i, length in enumerate(lengths.tolist()):
        own = slots[numbers[i], :length].long()
        k, v = (x[own].double().transpose(0, 1) for x in (keys, values))
        expected = F.scaled_dot_product_attention(query[i].double()[:, None], k, v, enable_gqa=True)[:, 0]
        assert unlike(output[i], expected) < 2e-6
    alone = torch.empty_like(query[3:4])
    ops.decode_attention(query[3:4], alone, numbers=numbers[3:4], lengths=lengths[3:4], **options)
    assert torch.equal(alone[0], output[3])  # the same bits in any company


def test_other_sizes_and_dtypes_are_left_to_pytorch():
    assert not ops.can_decode(torch.zeros(2, 2, 80), torch.zeros(9, 2, 80))
    assert not ops.can_decode(torch.zeros(2, 2, 64).bfloat16(), torch.zeros(9, 2, 64).bfloat16())


@pytest.mark.parametrize("width", [16, 128, 896])
def test_the_norm_and_the_sum_that_it_is_of(width):
    torch.manual_seed(0)
    x, residual, weight = 5 * torch.randn(7, width), torch.randn(7, width), torch.randn(width)
    layer = Layer(weight=weight, variance_epsilon=1e-6, variance_size_override=None)
    normed, total = ops.rms_norm(layer, x, residual)
    assert torch.equal(total, x + residual)
    assert unlike(normed, F.rms_norm(total.double(), (width,), weight.double(), 1e-6)) < 1e-6
    assert unlike(ops.rms_norm(layer, x), F.rms_norm(x.double(), (width,), weight.double(), 1e-6)) < 1e-6
    assert ops.rms_norm(layer, x, residual, x) == ("native", 3)
    assert ops.rms_norm(layer, x.bfloat16()) == ("native", 3)
    assert ops.rms_norm(Layer(**{**vars(layer), "variance_size_override": 8}), x) == ("native", 3)


def test_the_gate_of_the_feed_forward_layer():
    x = torch.cat([torch.linspace(-120, 120, 64), torch.linspace(-3, 3, 64)]).repeat(3, 1)
    found = ops.silu_and_mul(Layer(), x)
    assert found.shape == (3, 64)
    assert unlike(found, F.silu(x[:, :64].double()) * x[:, 64:].double()) < 1e-6
    assert ops.silu_and_mul(Layer(), x[:, :24]) == ("native", 1)  # halves of 12


@pytest.mark.parametrize("size", [32, 64, 128])
def test_positions_rotate_queries_and_keys(size):
    torch.manual_seed(0)
    half = size // 2
    angle = torch.arange(50)[:, None] * 100.0 ** (-torch.arange(half) / half)
    table = torch.cat([angle.cos(), angle.sin()], dim=-1)
    layer = Layer(head_size=size, rotary_dim=size, is_neox_style=True, cos_sin_cache=table)
    packed = torch.randn(6, 5 * size)  # as the projection gives them: rows of q, k and v
    query, key, _ = packed.split([3 * size, size, size], dim=-1)
    positions = torch.tensor([0, 1, 2, 49, 7, 7])
    for x, found in zip((query, key), ops.rotate(layer, positions, query, key), strict=True):
        a, b = x.double().reshape(6, -1, 2, half).unbind(2)
        cos, sin = (part[:, None].double() for part in table[positions].chunk(2, dim=-1))
        expected = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1)
        assert found.shape == x.shape and unlike(found, expected) < 1e-6
    assert ops.rotate(Layer(**{**vars(layer), "is_neox_style": False}), positions, query, key) == ("native", 3)
    assert ops.rotate(layer, positions, query, key, positions) == ("native", 4)


@pytest.mark.parametrize("vocab", [1, 7, 426, 5000])
def test_draws_are_those_of_plain_pytorch(vocab):
    torch.manual_seed(0)
    logprobs = (3 * torch.randn(500, vocab)).log_softmax(-1).double()
    logprobs[::3, : vocab // 2] = -torch.inf
    seeds, positions = torch.randint(0, 2**31, (500,)), torch.randint(0, 999, (500,))
    assert torch.equal(
        ops.seeded_multinomial(logprobs, seeds, positions), seeded_multinomial(logprobs, seeds, positions)
    )
