"""A prompt that several responses share is computed once, and nothing else changes: attention, logprobs, gradients."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from one_policy import ADAM, TRAIN, likelihood_loss, samples
from torch.nn.attention.bias import causal_lower_right

from megatron_ext.attention import together
from megatron_ext.model import why_no_shared_prefix
from megatron_ext.prefixes import Prefix, PrefixedSelfAttention, copied_keys, pack_params
from searche1.packing import Sample, make_batches, row_weights
from searche1.policy import check_model
from searche1.types import UserError

# Two families, the second of them long, and a sequence alone.
BOUNDS = torch.tensor([0, 7, 10, 15, 16, 56, 86, 106, 115], dtype=torch.int32)
PREFIXES = (Prefix(0, 7, 16), Prefix(16, 56, 106))
HEADS, GROUPS, SIZE = 4, 2, 16


def visible() -> torch.Tensor:
    """[T, T], which keys a token sees."""
    mask = torch.zeros(115, 115, dtype=torch.bool)
    for start, end in itertools.pairwise(BOUNDS.tolist()):
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    for p in PREFIXES:
        mask[p.end : p.last, p.start : p.end] = True
    return mask


def dense(query, key, value):
    """All of the pack under one mask, in float64."""
    q, k, v = (x.double().transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(), enable_gqa=True)[0].transpose(0, 1)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = ((115, HEADS, SIZE), (115, GROUPS, SIZE), (115, GROUPS, SIZE), (115, HEADS, SIZE))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("most_padded", [1, 64, 4096], ids=["one by one", "some together", "all together"])
def test_attention_and_its_gradient_are_those_under_a_dense_mask(tensors, most_padded, monkeypatch):
    monkeypatch.setattr("megatron_ext.prefixes.MOST_PADDED_TOKENS", most_padded)
    *inputs, gradient = tensors
    inputs = [x.requires_grad_() for x in inputs]
    params = pack_params(BOUNDS, 90, device=torch.device("cpu"), prefixes=PREFIXES)
    module = SimpleNamespace(scale=None)
    found = PrefixedSelfAttention.forward(module, *inputs, None, packed_seq_params=params).unflatten(1, (HEADS, SIZE))
    expected = dense(*inputs)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
    ours = torch.autograd.grad(found, inputs, gradient)
    theirs = torch.autograd.grad(expected, inputs, gradient.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_short_neighbours_are_padded_together_and_long_ones_are_alone():
    lengths = [100, 120, 100, 129, 300, 50, 60, 128]
    assert together(lengths, max_tokens=256) == [[100, 120], [100], [129], [300], [50, 60], [128]]
    assert together(lengths, max_tokens=4096) == [[100, 120, 100], [129], [300], [50, 60, 128]]


def test_copies_of_the_prompts_keys_and_a_mask_from_the_lower_right_are_the_same(tensors):
    """What Transformer Engine is asked for on a GPU."""
    query, key, value, _ = tensors
    places, bounds_of_keys = copied_keys(BOUNDS, PREFIXES, device=torch.device("cpu"))
    outputs = []
    pairs = zip(itertools.pairwise(BOUNDS.tolist()), itertools.pairwise(bounds_of_keys.tolist()), strict=True)
    for (start, end), (first, last) in pairs:
        q, k, v = query[start:end], key[places[first:last]], value[places[first:last]]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask = causal_lower_right(end - start, last - first)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    torch.testing.assert_close(torch.cat(outputs).double(), dense(query, key, value), atol=2e-6, rtol=0)


# -- the policy -----------------------------------------------------------------------------------


@pytest.fixture
def group():
    """Four responses to one prompt, the second of a single token, between samples of other prompts."""
    generator = torch.Generator().manual_seed(1)
    prompt = tuple(torch.randint(200, (70,), generator=generator).tolist())
    responses = [torch.randint(200, (length,), generator=generator).tolist() for length in (9, 1, 30, 4)]
    family = [Sample(prompt, tuple(ids), tuple(k % 3 != 1 for k in range(len(ids)))) for ids in responses]
    return [*samples(0), *family, *samples(1)]


def packed(group, *, share_prefix, max_tokens=400):
    weights = row_weights(group, "token_mean")
    return make_batches(group, weights, max_tokens=max_tokens, rank=0, num_ranks=1, share_prefix=share_prefix)


def trained(policy, batches, num_samples):
    """Logprobs, and loss and gradient of an update."""
    logprobs = policy.by_sample(batches, policy.logprobs(batches, temperature=1.0), num_samples=num_samples)
    metrics = policy.train_step(batches, likelihood_loss(policy, batches), lr=1e-3)
    gradient = torch.cat([p.main_grad.flatten() for p in policy._model.parameters()])
    return torch.tensor([x for sample in logprobs for x in sample]), metrics["loss"], gradient


@pytest.mark.parametrize("max_tokens", [400, 110], ids=["one pack", "a parted family"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_logprobs_loss_and_gradient_are_those_of_a_prompt_for_each(make_policy, group, recompute, max_tokens):
    train, free = replace(TRAIN, recompute=recompute), replace(ADAM, grad_clip=1e9)
    batches = packed(group, share_prefix=True, max_tokens=max_tokens)
    assert any(batch.inputs.prefixes for batch in batches)
    ours = trained(make_policy(train=train, optimizer=free), batches, len(group))
    theirs = trained(make_policy(train=train, optimizer=free), packed(group, share_prefix=False), len(group))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=0)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
    assert theirs[2].norm() > 0.1
    assert (ours[2] - theirs[2]).norm() <= 3e-6 * theirs[2].norm()


def test_tokens_of_the_prompt_are_computed_once(group):
    once, often = (sum(len(b.inputs.token_ids) for b in packed(group, share_prefix=p)) for p in (True, False))
    assert often - once == 3 * 70


def test_a_cpu_shares_prompts_unless_told_otherwise(make_policy):
    wishes = {wish: make_policy(train=replace(TRAIN, share_prefix=wish)).share_prefix for wish in ("auto", "never")}
    assert wishes == {"auto": True, "never": False}


def test_context_ranks_cannot_share_prompts(layout, tiny_qwen2):
    two = replace(layout, context=2)
    assert (
        "2 context-parallel ranks" in why_no_shared_prefix(two, torch.float32)
        and why_no_shared_prefix(layout, torch.float32) == ""
    )
    with pytest.raises(UserError, match=r"share_prefix=always is not possible here.*auto or never"):
        check_model(tiny_qwen2, two, replace(TRAIN, share_prefix="always"))
    check_model(tiny_qwen2, two, TRAIN)
