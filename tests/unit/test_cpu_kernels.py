"""What a CPU's engine computes in plain PyTorch."""

import pytest
import torch

from searche1.rollout.cpu_kernels import (
    attend,
    chunk_ranges,
    filtered_multinomial,
    make_chunks,
    new_positions,
    seeded_multinomial,
    transpose_memory,
)
from searche1.rollout.weight_loaders import compare

HEAD = 8


def naive_attention(query, keys, values, *, num_cached):
    """One request: query [Q, H, D]; keys, values [L, K, D]."""
    repeat = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeat, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * HEAD**-0.5
    later = torch.arange(len(keys)) > (num_cached + torch.arange(len(query)))[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), values)


@pytest.mark.parametrize("chunk_tokens", [1, 40, 4096])
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1], [7, 3, 1, 12], [5, 9, 9, 30]])
def test_requests_attended_together_get_what_each_would_get_alone(monkeypatch, chunk_tokens, query_lens):
    monkeypatch.setattr("searche1.rollout.cpu_kernels.CHUNK_TOKENS", chunk_tokens)
    torch.manual_seed(0)
    seq_lens = [7, 9, 20, 30]
    num_heads, num_kv_heads, cache_size = 4, 2, 100
    keys, values = torch.randn(2, cache_size, num_kv_heads, HEAD)
    slots = torch.stack([torch.randperm(cache_size)[:40] for _ in seq_lens]).int()
    query_lens = [min(q, s) for q, s in zip(query_lens, seq_lens, strict=True)]
    query = torch.randn(sum(query_lens), num_heads, HEAD)
    expected = [
        naive_attention(part, keys[own], values[own], num_cached=length - len(part))
        for part, own, length in (
            (part, slots[i, : seq_lens[i]].long(), seq_lens[i]) for i, part in enumerate(query.split(query_lens))
        )
    ]
    chunks = make_chunks(slots, seq_lens=seq_lens, query_lens=query_lens)
    output = torch.full_like(query, float("nan"))
    attend(query, output, keys=keys, values=values, chunks=chunks, scale=None, enable_gqa=True)
    assert torch.allclose(output, torch.cat(expected), atol=1e-5)


def test_chunks_cover_every_request_once_and_stay_small():
    lengths = [5, 6, 100, 1, 1, 1, 8, 7]
    ranges = chunk_ranges(lengths, max_tokens=20)
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(lengths)))
    assert all(last - first == 1 or (last - first) * max(lengths[first:last]) <= 20 for first, last in ranges)
    assert chunk_ranges([], max_tokens=20) == []


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_go_on_from_what_is_known(dtype):
    positions, starts = new_positions(torch.tensor([0, 5, 2], dtype=dtype), torch.tensor([3, 1, 2], dtype=dtype))
    assert positions.tolist() == [0, 1, 2, 5, 2, 3] and positions.dtype == torch.int64
    assert starts.tolist() == [0, 3, 4] and starts.dtype == dtype


def test_seeded_draws_follow_the_distribution():
    num_draws = 20_000
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    logprobs = probabilities.log().expand(num_draws, -1)
    positions = torch.arange(num_draws) % 50
    seeds = torch.arange(num_draws) // 50
    drawn = seeded_multinomial(logprobs, seeds, positions)
    assert drawn.shape == (num_draws, 1)
    shares = drawn.flatten().bincount(minlength=5) / num_draws
    assert torch.allclose(shares, probabilities, atol=0.015)  # four standard errors


def test_a_draw_depends_on_its_own_seed_and_position_only():
    torch.manual_seed(0)
    logprobs = torch.randn(64, 300).log_softmax(-1)
    seeds, positions = torch.randint(0, 2**31, (64,)), torch.randint(0, 4096, (64,))
    drawn = seeded_multinomial(logprobs, seeds, positions)
    order = torch.randperm(64)
    assert torch.equal(seeded_multinomial(logprobs[order], seeds[order], positions[order]), drawn[order])
    assert not torch.equal(seeded_multinomial(logprobs, seeds + 1, positions), drawn)
    assert not torch.equal(seeded_multinomial(logprobs, seeds, positions + 1), drawn)


def test_a_row_without_limits_draws_what_it_draws_beside_none_and_a_limited_one_keeps_to_its_limits():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(500, 40, generator=generator).softmax(-1)
    seeds, positions = torch.arange(500), torch.arange(500) % 7
    top_ks, top_ps = torch.full((500,), 2**30), torch.ones(500)
    top_ks[::5], top_ps[1::5], top_ks[2::5] = 1, 0.5, 3
    drawn = filtered_multinomial(seeded_multinomial, probs, top_ks, top_ps, seeds, positions)
    free = seeded_multinomial(probs.double().log(), seeds, positions).view(-1)
    assert torch.equal(drawn[3::5], free[3::5].int()) and torch.equal(drawn[4::5], free[4::5].int())
    assert torch.equal(drawn[::5], probs[::5].argmax(-1).int())
    ranks = (probs > probs.gather(1, drawn.long()[:, None])).sum(1)
    larger = (probs * (probs > probs.gather(1, drawn.long()[:, None]))).sum(1)
    assert (ranks[2::5] < 3).all() and ranks[2::5].max() == 2
    assert (larger[1::5] <= 0.5).all() and larger[1::5].max() > 0.4


def test_neighbouring_seeds_and_positions_draw_independently():
    logprobs = torch.zeros(4000, 2)
    numbers = torch.arange(4000)
    by_seed = seeded_multinomial(logprobs, numbers, torch.zeros_like(numbers)).flatten()
    by_position = seeded_multinomial(logprobs, torch.zeros_like(numbers), numbers).flatten()
    for drawn in (by_seed, by_position):
        agree_with_next = (drawn[1:] == drawn[:-1]).float().mean().item()
        assert abs(agree_with_next - 0.5) < 0.035
    assert abs((by_seed == by_position).float().mean().item() - 0.5) < 0.035


def test_a_weight_in_transposed_memory_is_the_same_and_loads_its_parts_as_before():
    before, part, whole = torch.randn(200, 24), torch.randn(130, 24, dtype=torch.bfloat16), torch.randn(200, 24)
    weight = torch.nn.Parameter(before.clone(), requires_grad=False)

    def load(held, loaded, shard=None):  # as SGLang loads what it fuses
        rows = held.data if shard is None else held.data.narrow(0, shard, len(loaded))
        rows.copy_(loaded)

    weight.weight_loader = load
    transpose_memory(weight)
    assert torch.equal(weight, before) and weight.t().is_contiguous()
    weight.weight_loader(weight, part, 20)
    assert torch.equal(weight[20:150], part.float()) and weight.t().is_contiguous()
    assert torch.equal(weight[:20], before[:20]) and torch.equal(weight[150:], before[150:])
    weight.weight_loader(weight, whole)
    assert torch.equal(weight, whole)


def test_an_engine_compares_weights_in_transposed_memory_too():
    class Model(torch.nn.Linear):
        def load_weights(self, named):
            for name, tensor in named:
                assert name == "weight"
                self.weight.weight_loader(self.weight, tensor)

    model = Model(24, 200, bias=False).requires_grad_(False)
    model.weight.weight_loader = lambda held, loaded: held.data.copy_(loaded)
    transpose_memory(model.weight)
    held = model.weight.clone()
    compare(model, [("weight", held)])
    other = held.clone()
    other[3, 5] += 1
    other[130] += 1
    with pytest.raises(RuntimeError, match="weight differs from the trainer's in 25 of 4800 numbers"):
        compare(model, [("weight", other)])
    assert torch.equal(model.weight, held)
