"""The vocabulary losses with the vocabulary split over 1, 2, 4 and 8 ranks: the same bits, as few messages as said."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked_ranks import run_ranks
from vocab_cases import CUTS, NAMES, ROWS, SIZES, V, case, draw

from megatron_ext.vocab_parallel import (
    MODES,
    VocabShard,
    clipped_kl,
    kl_loss,
    linear_token_logprobs,
    native,
    protocol,
    row_kernels,
    token_logprobs,
    token_loss,
)

HIDDEN, HEAD_ROWS, CHUNK = 8, 11, 3
DTYPES = (torch.float32, torch.bfloat16)
CLIPS = (0.05, 10.0)
KERNELS = [name for name in ("torch", "native") if name != "native" or native.why_absent() is None]

pytestmark = pytest.mark.slow


class Counter:
    """Counts the collectives of the losses as they go by."""

    def __init__(self) -> None:
        self.count = 0
        self._really = dist.all_gather_into_tensor
        protocol.dist.all_gather_into_tensor = self

    def __call__(self, *args, **options):
        self.count += 1
        return self._really(*args, **options)

    def of(self, function):
        before = self.count
        return function(), self.count - before


def columns_of(whole, rank, size):
    """This rank's slice of [R, V] or of a head [V, H], behind V the zeros of a padded head."""
    if whole.shape[0] == V:
        return F.pad(whole, (0, 0, 0, 8 * SIZES[1] - V))[rank * size : (rank + 1) * size].contiguous()
    return F.pad(whole[:, :V], (0, 8 * SIZES[1] - V))[:, rank * size : (rank + 1) * size].contiguous()


def compute(kernels, shard, counted):
    """Everything that must not depend on the number of ranks, and how many messages it took."""
    rank = shard.start // shard.size
    local = functools.partial(columns_of, rank=rank, size=shard.size)
    found, messages = {}, {}
    for which, dtype, kl_clip in itertools.product(NAMES, DTYPES, CLIPS):
        inputs, key = case(which, dtype), f"{which} {dtype} {kl_clip}"
        options = {"live": inputs.live, "temperature": 0.8, "kernels": kernels}
        student, teacher, upstream = local(inputs.student).requires_grad_(), local(inputs.teacher), draw(3, ROWS)
        kl, messages[key] = counted(functools.partial(clipped_kl, student, teacher, shard, kl_clip=kl_clip, **options))
        _, backward = counted(lambda x=kl.loss, u=upstream: (x * u).sum().backward())
        found[key] = (*kl, student.grad)
        assert backward == 0 and messages[key] == (1 + bool(kl.is_suspect.any())) * (shard.group is not None)

        logits = local(inputs.student).requires_grad_()
        tokens, number = counted(functools.partial(token_logprobs, logits, inputs.targets, shard, **options))
        _, backward = counted(lambda x=tokens, u=upstream: (x.logprobs * u + 0.3 * x.entropy).sum().backward())
        found[f"tokens {key}"] = (*tokens, logits.grad)
        assert backward == 0 and number == (shard.group is not None)

    # From hidden states the products themselves depend on the layout, so these agree to rounding only.
    hidden, teacher, head = draw(5, HEAD_ROWS, HIDDEN), draw(6, HEAD_ROWS, HIDDEN, scale=2.0), local(draw(7, V, HIDDEN))
    targets, weights = torch.arange(HEAD_ROWS) * 27, draw(8, HEAD_ROWS)
    chunks = -(-HEAD_ROWS // CHUNK)
    options = {"chunk": CHUNK, "kernels": kernels}
    close = {}
    for mode, loss in itertools.product(MODES, ("kl", "tokens")):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if loss == "kl":
            run = functools.partial(kl_loss, h, teacher, w, shard, weights, kl_clip=0.5, mode=mode, **options)
        else:

            def row_loss(x, rows):
                return (weights[rows] * (x.logprobs + 0.1 * x.entropy)).sum()

            run = functools.partial(token_loss, h, w, targets, shard, row_loss, mode=mode, **options)
        (value, rows), number = counted(run)
        _, backward = counted(value.backward)
        assert backward == 0, "backward waited for other ranks"
        if shard.group is not None:
            assert number <= (1 if mode == "materialized" else chunks) * (2 if loss == "kl" else 1)
            dist.all_reduce(h.grad, group=shard.group)  # what the caller's gather does in its backward
        close[f"{mode} {loss}"] = (value.detach(), rows[0], h.grad, w.grad)
    with torch.no_grad():
        old = linear_token_logprobs(hidden, head, targets, shard, **options)
    close["without gradients"] = tuple(old)
    return found, close


def one_rank(folder, kernels):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shard = VocabShard(dist.group.WORLD, rank * SIZES[ranks], SIZES[ranks], V, CUTS)
    counter = Counter()
    results = {name: compute(row_kernels(name), shard, counter.of) for name in kernels}
    torch.save(results, folder / f"{ranks}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    shard = VocabShard(None, 0, SIZES[1], V, CUTS)
    return {name: compute(row_kernels(name), shard, lambda function: (function(), 0)) for name in KERNELS}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_splitting_the_vocabulary_changes_no_bit_of_values_or_gradients(ranks, alone, tmp_path):
    run_ranks(one_rank, ranks, tmp_path, KERNELS)
    parts = [torch.load(tmp_path / f"{ranks}_{rank}.pt", weights_only=True) for rank in range(ranks)]
    for name in KERNELS:
        exact, close = alone[name]
        for key, (*values, gradient) in exact.items():
            for part in parts:
                assert all(torch.equal(a, b) for a, b in zip(values, part[name][0][key][:-1], strict=True)), key
            whole = torch.cat([part[name][0][key][-1] for part in parts], dim=1)
            assert torch.equal(whole[:, :V], gradient[:, :V]), key
            assert not whole[:, V:].any(), key
        for key, values in close.items():
            for part in parts:
                for one, other in zip(values[:3], part[name][1][key][:3], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            if len(values) > 3:
                whole = torch.cat([part[name][1][key][3] for part in parts])
                torch.testing.assert_close(whole[:V], values[3][:V], rtol=1e-4, atol=1e-5)


def test_with_three_ranks_one_of_which_holds_only_padding():
    """A size the tiles were not made for: the same to rounding."""
    run_ranks(three_ranks, 3)


def three_ranks():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), 160
    inputs = case("disagreeing")
    cuts = (0, 160, V)
    shard = VocabShard(dist.group.WORLD, rank * size, size, V, cuts)
    whole = VocabShard(None, 0, V, V, cuts)
    student, teacher = (x[:, :V].contiguous() for x in (inputs.student, inputs.teacher))
    local = functools.partial(columns_of, rank=rank, size=size)
    for name in KERNELS:
        mine, all_of_it = local(student).requires_grad_(), student.clone().requires_grad_()
        options = {"kl_clip": 0.05, "kernels": row_kernels(name)}
        found = clipped_kl(mine, local(teacher), shard, **options)
        expected = clipped_kl(all_of_it, teacher, whole, **options)
        for x in (found, expected):
            x.loss.sum().backward()
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(mine.grad, local(all_of_it.grad))
    dist.destroy_process_group()
