"""The engine's C++ layers against PyTorch in float64, and what they leave to SGLang's own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

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
    assert ops.can_attend(query, keys)
    output = torch.full_like(query, float("nan"))
    options = {"keys": keys, "values": values, "slots": slots, "scale": size**-0.5}
    ops.attention(query, output, numbers=numbers, lengths=lengths, counts=None, **options)
    for i, length in enumerate(lengths.tolist()):
        own = slots[numbers[i], :length].long()
        k, v = (x[own].double().transpose(0, 1) for x in (keys, values))
        expected = F.scaled_dot_product_attention(query[i].double()[:, None], k, v, enable_gqa=True)[:, 0]
        assert unlike(output[i], expected) < 2e-6
    alone = torch.empty_like(query[3:4])
    ops.attention(query[3:4], alone, numbers=numbers[3:4], lengths=lengths[3:4], counts=None, **options)
    assert torch.equal(alone[0], output[3])  # the same bits in any company


@pytest.mark.parametrize("size", ops.HEAD_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (40, 1)])
def test_new_tokens_attend_to_what_is_known_and_to_new_ones_up_to_themselves(size, heads, kv_heads):
    torch.manual_seed(0)
    counts = torch.tensor([1, 7, 2, 33, 150])  # of a prompt alone, behind known tokens, and more than a block
    lengths = torch.tensor([9, 7, 40, 96, 250])
    places = 500
    slots = torch.stack([torch.randperm(places)[:256] for _ in range(9)]).int()
    numbers = torch.randperm(9)[: len(lengths)]
    query = 3 * torch.randn(int(counts.sum()), heads, size)
    keys, values = torch.randn(2, places, kv_heads, size)
    output = torch.full_like(query, float("nan"))
    options = {"keys": keys, "values": values, "slots": slots, "scale": size**-0.5}
    ops.attention(query, output, numbers=numbers, lengths=lengths, counts=counts, **options)
    parts = zip(query.split(counts.tolist()), output.split(counts.tolist()), numbers, lengths.tolist(), strict=True)
    for asked, found, number, length in parts:
        k, v = (x[slots[number, :length].long()].double().transpose(0, 1) for x in (keys, values))
        mask = causal_lower_right(len(asked), length)
        expected = F.scaled_dot_product_attention(
            asked.double().transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        assert unlike(found, expected[0].transpose(0, 1)) < 5e-6
    last = slice(-150, None)
    alone = torch.empty_like(query[last])
    ops.attention(query[last], alone, numbers=numbers[-1:], lengths=lengths[-1:], counts=counts[-1:], **options)
    assert torch.equal(alone, output[last])  # the same bits in any company


@pytest.mark.parametrize("size", [32, 128])
def test_queries_are_rotated_and_keys_and_values_go_to_their_places(size):
    torch.manual_seed(0)
    heads, kv_heads = 3, 2
    table = torch.randn(50, size)
    layer = Layer(head_size=size, rotary_dim=size, is_neox_style=True, cos_sin_cache=table)
    packed = torch.randn(6, (heads + 2 * kv_heads) * size)
    positions, places = torch.tensor([0, 1, 2, 49, 7, 7]), torch.tensor([3, 11, 4, 0, 9, 5])
    keys, values = torch.zeros(2, 12, kv_heads, size)
    query = torch.empty(6, heads, size)
    arguments = (positions, table, packed, places, keys, values, query)
    ops.kernels().ops_rotate_and_keep(6, heads, kv_heads, size, *(x.data_ptr() for x in arguments))
    q, k, v = packed.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    rotated_q, rotated_k = ops.rotate(layer, positions, q, k)
    assert torch.equal(query.flatten(1), rotated_q)
    assert torch.equal(keys[places].flatten(1), rotated_k) and torch.equal(values[places].flatten(1), v)
    assert keys.count_nonzero() == rotated_k.count_nonzero()  # and nowhere else


def test_other_sizes_and_dtypes_are_left_to_pytorch():
    assert not ops.can_attend(torch.zeros(2, 2, 80), torch.zeros(9, 2, 80))
    assert not ops.can_attend(torch.zeros(2, 2, 64).bfloat16(), torch.zeros(9, 2, 64).bfloat16())


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
