"""What the losses need beside the logits, at the size of Qwen2.5's vocabulary, as the operating system counts it."""

import subprocess
import sys

import pytest

from megatron_ext.vocab_parallel import native

ROWS, CHUNK, V = 512, 64, 151_936
MIB = 2**20

MEASURED = """
import sys, torch
from pathlib import Path
from megatron_ext.vocab_parallel import clipped_kl, kl_loss, row_kernels, tile_cuts, token_logprobs, whole_vocabulary

what, rows, chunk, v, dtype, kernels = sys.argv[1], *map(int, sys.argv[2:5]), getattr(torch, sys.argv[5]), sys.argv[6]
torch.set_num_threads(1)
shard = whole_vocabulary(v, cuts=tile_cuts(v, (76_032, 38_016, 19_072)))
generator = torch.Generator().manual_seed(0)

def logits(requires_grad=False):
    return torch.empty(rows, v, dtype=dtype).normal_(0, 3, generator=generator).requires_grad_(requires_grad)

def resident(name):  # bytes
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) * 1024

def extra(work):  # the peak of a call above what is there before it
    once = torch.zeros(1, v, dtype=dtype, requires_grad=True)  # what torch sets up at first use does not count
    clipped_kl(once, torch.zeros(1, v, dtype=dtype), shard, kl_clip=10.0, **options).loss.sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

options = {"kernels": row_kernels(kernels)}
targets = torch.randint(v, (rows,), generator=generator)
if what == "kl":
    student, teacher = logits(True), logits()
    work = lambda: clipped_kl(student, teacher, shard, kl_clip=10.0, consume=True, **options).loss.sum().backward()
elif what == "tokens":
    leaf = logits(True)
    z = leaf.view_as(leaf)
    def work():
        found = token_logprobs(z, targets, shard, consume=True, **options)
        (found.logprobs + found.entropy).sum().backward()
else:
    hidden, teacher, head = (torch.randn(n, 16, generator=generator) for n in (rows, rows, v))
    hidden.requires_grad_()
    def work():
        weights = torch.ones(rows)
        loss, _ = kl_loss(hidden, teacher, head, shard, weights, kl_clip=10.0, mode="chunked", chunk=chunk, **options)
        loss.backward()
print(extra(work))
"""


def extra_bytes(what, dtype, kernels):
    if kernels == "native" and native.why_absent():
        pytest.skip(native.why_absent())
    arguments = [what, str(ROWS), str(CHUNK), str(V), dtype, kernels]
    result = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["kl", "tokens"])
def test_values_and_gradient_of_logits_need_less_than_16_mib(what, dtype, kernels):
    assert extra_bytes(what, dtype, kernels) < 16 * MIB  # a float32 copy of the logits would be 297 MiB


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_from_hidden_states_two_chunks_of_logits_are_all_there_is(kernels):
    chunks = 2 * CHUNK * V * 4
    assert chunks * 0.9 < extra_bytes("head", "float32", kernels) < chunks + 24 * MIB
