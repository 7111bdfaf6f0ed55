"""The vocabulary losses against other people's, where those do the same thing."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from vocab_cases import ROWS, V, case, draw

from megatron_ext.vocab_parallel import clipped_kl, kl_loss, token_logprobs, token_loss, whole_vocabulary

WHOLE = whole_vocabulary(V)
BENCH = Path(__file__).parents[2] / "tools" / "bench"
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def logits():
    found = case("disagreeing")
    return (x[:, :V].contiguous() for x in (found.student, found.teacher)), found.targets


def gradients(function, z):
    """Values, and the gradient of a weighted sum of them."""
    z = z.clone().requires_grad_()
    values = function(z)
    values = values if isinstance(values, tuple) else (values,)
    sum((value * draw(3 + k, ROWS)).sum() for k, value in enumerate(values)).backward()
    return (*(value.detach() for value in values), z.grad)


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_trl
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_and_entropy_are_trls(temperature):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    (student, _), targets = logits()
    assert_equal(
        gradients(lambda z: tuple(token_logprobs(z, targets, WHOLE, temperature=temperature)), student),
        gradients(
            functools.partial(
                selective_log_softmax_and_entropy, index=targets, entropy_requires_grad=True, temperature=temperature
            ),
            student,
        ),
    )


@needs_trl
@pytest.mark.parametrize("kl_clip", [0.05, math.inf])
def test_the_clipped_kl_is_trls_divergence_with_a_clamp(kl_clip, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    (student, teacher), _ = logits()

    def theirs(z):
        return GKDTrainer.generalized_jsd_loss(z, teacher, beta=0.0, reduction="none").clamp(max=kl_clip).sum(-1)

    ours = gradients(lambda z: clipped_kl(z, teacher, WHOLE, kl_clip=kl_clip).loss, student)
    assert_equal(ours, gradients(theirs, student))


@needs_trl
def test_from_hidden_states_both_losses_are_trls():
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, teacher, head, targets = draw(0, ROWS, 8), draw(1, ROWS, 8), draw(2, V, 8), torch.arange(ROWS) * 40
    weights, options = draw(3, ROWS), {"mode": "chunked", "chunk": 4}

    def of(loss):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        value = loss(h, w)
        value.backward()
        return value.detach(), h.grad, w.grad

    def their_tokens(h, w):
        return (weights * ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 128, None, 1.0, ("entropy",))[0]).sum()

    def our_tokens(h, w):
        return token_loss(h, w, targets, WHOLE, lambda x, part: (weights[part] * x.logprobs).sum(), **options)[0]

    assert_equal(of(our_tokens), of(their_tokens))

    def their_kl(h, w):
        return (weights * ChunkedDivergenceFunction.apply(h, w, None, teacher, w, None, 0.0, 1.0)[0]).sum()

    def our_kl(h, w):
        return kl_loss(h, teacher, w, WHOLE, weights, kl_clip=math.inf, **options)[0]

    assert_equal(of(our_kl)[:2], of(their_kl)[:2])


@pytest.fixture(scope="module")
def one_rank():
    """Megatron asks for a tensor-parallel group even where there is one rank."""
    is_new = not dist.is_initialized()
    if is_new:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    if is_new:
        dist.destroy_process_group()


def test_logprobs_are_megatrons_cross_entropy_which_overwrites_its_input(one_rank):
    (student, _), targets = logits()
    theirs = student.clone()
    loss = vocab_parallel_cross_entropy(theirs[:, None], targets[:, None])[:, 0]
    assert not torch.equal(theirs, student), "Megatron has mended this; say so in docs/losses.md"
    ours = student.clone()
    torch.testing.assert_close(token_logprobs(ours, targets, WHOLE).logprobs, -loss)
    assert torch.equal(ours, student)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_logprobs_are_ligers_triton_cross_entropy():
    from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

    (student, _), targets = logits()
    assert_equal(
        gradients(lambda z: token_logprobs(z, targets, WHOLE).logprobs, student),
        gradients(lambda z: -LigerVocabParallelCrossEntropy()(z[:, None], targets[:, None], None)[:, 0], student),
    )


# -- the benchmark --------------------------------------------------------------------------------


def bench(*arguments):
    return subprocess.run([sys.executable, BENCH / "losses.py", *arguments], capture_output=True, text=True)


def test_the_benchmark_checks_everybody_and_ends_with_json():
    sizes = ("--rows", "8", "--vocab", "500", "--hidden", "16", "--repeats", "1", "--threads", "1,2")
    result = bench("--jobs", "kl,tokens,head kl,head tokens", "--only", "ours,naive torch,TRL,Megatron", *sizes)
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert list(report["jobs"]) == ["kl", "tokens", "head kl", "head tokens"]
    for job in report["jobs"].values():
        ours = {name: row for name, row in job.items() if name.startswith("ours")}
        assert len(ours) >= 2 and "naive torch" in job
        for row in job.values():
            assert row["is_right"] and row["ms_per_row"] > 0 and row["times_ours"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--jobs", "cross entropy"), "unknown job 'cross entropy'; jobs are kl, tokens, head kl, head tokens"),
        (("--rows", "0"), "must be at least 1"),
        (("--threads", "two"), "--threads must be numbers"),
        (("--only", "nobody"), "no variant of kl has a name with 'nobody' in it"),
    ],
)
def test_the_benchmark_refuses_what_it_does_not_know(arguments, message):
    result = bench(*arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_head_and_logits_agree():
    """What the benchmark's two kinds of jobs share."""
    hidden, teacher, head = draw(0, ROWS, 8), draw(1, ROWS, 8), draw(2, V, 8)
    value, rows = kl_loss(hidden, teacher, head, WHOLE, torch.ones(ROWS), kl_clip=1.0, mode="chunked", chunk=4)
    found = clipped_kl(F.linear(hidden, head), F.linear(teacher, head), WHOLE, kl_clip=1.0)
    torch.testing.assert_close(rows.loss, found.loss)
    torch.testing.assert_close(value, found.loss.sum())
