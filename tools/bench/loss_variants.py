"""Who computes the vocabulary losses that losses.py times: ours, and what a user would pick instead.

A variant is built once for its inputs and then called: it returns the loss of each row (None where it has only a sum)
and the gradient of what it trains, and may use up the inputs it was given. `covers` says what part of the job it does:
a number is only comparable where that is said beside it.

Shapes: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.vocab_parallel import (
    MODES,
    VocabShard,
    clipped_kl,
    kl_loss,
    native,
    row_kernels,
    token_logprobs,
    token_loss,
)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@dataclass(frozen=True)
class Inputs:
    """Fresh tensors for one call. The trained one requires no gradient yet; variants ask for it as they need."""

    student: Tensor  # [N, V] logits, or [N, H] hidden states
    teacher: Tensor | None
    head: Tensor | None  # [V, H]
    targets: Tensor  # [N]
    upstream: Tensor  # [N] float32, gradient of the loss in each row
    upstream_entropy: Tensor  # [N]
    kl_clip: float
    shard: VocabShard


Result = tuple[Tensor | None, Tensor]
Run = Callable[[Inputs], Result]


@dataclass(frozen=True)
class Variant:
    name: str
    run: Run
    covers: str = ""  # what it leaves out of the job, or does besides
    is_ours: bool = False
    has_clip: bool = True
    has_entropy: bool = True
    library: str = ""  # where it comes from, if that may be absent
    needs_gpu: bool = False


def variants(job: str, device: str) -> list[Variant]:
    """Everybody who can do at least a part of a job here: "kl", "tokens", "head kl" or "head tokens"."""
    makers = {"kl": _kl, "tokens": _tokens, "head kl": _head_kl, "head tokens": _head_tokens}
    without = absent()
    return [v for v in makers[job](device) if v.library not in without and (device == "cuda" or not v.needs_gpu)]


def absent() -> list[str]:
    """Libraries that could be measured but are not installed."""
    return [name for name in ("trl", "liger_kernel") if importlib.util.find_spec(name) is None]


def our_kernels(device: str) -> list[str]:
    if device == "cuda":
        return ["triton"]
    return ["torch"] if native.why_absent() else ["native", "torch"]


def _trained(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


# -- clipped KL from logits -----------------------------------------------------------------------


def naive_kl(student: Tensor, teacher: Tensor, kl_clip: float) -> Tensor:
    """What OPSD's and TRL's trainers write: two log_softmax in float32, kl_div, clamp."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).clamp(max=kl_clip).sum(-1)


def _kl(device: str) -> list[Variant]:
    def naive(x: Inputs, function: Callable[..., Tensor] = naive_kl) -> Result:
        assert x.teacher is not None
        z = _trained(x.student)
        loss = function(z, x.teacher, x.kl_clip)
        loss.backward(x.upstream)
        assert z.grad is not None
        return loss.detach(), z.grad

    compiled = torch.compile(naive_kl, dynamic=False)

    def trl(x: Inputs) -> Result:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        def loss(z: Tensor, teacher: Tensor, kl_clip: float) -> Tensor:
            entries = GKDTrainer.generalized_jsd_loss(z.float(), teacher.float(), beta=0.0, reduction="none")
            return entries.clamp(max=kl_clip).sum(-1)

        return naive(x, loss)

    def liger(x: Inputs) -> Result:
        from liger_kernel.ops import LigerKLDivLossFunction

        def loss(z: Tensor, teacher: Tensor, kl_clip: float) -> Tensor:
            log_q, log_p = z.float().log_softmax(-1), teacher.float().log_softmax(-1)
            return LigerKLDivLossFunction.apply(log_q, log_p, "none", True).clamp(max=kl_clip).sum(-1)

        return naive(x, loss)

    def ours(kernels: str) -> Run:
        def run(x: Inputs) -> Result:
            assert x.teacher is not None
            z = _trained(x.student)
            options = {"kl_clip": x.kl_clip, "consume": True, "kernels": row_kernels(kernels)}
            found = clipped_kl(z, x.teacher, x.shard, **options)
            found.loss.backward(x.upstream)
            assert z.grad is not None
            return found.loss.detach(), z.grad

        return run

    return [
        Variant("naive torch", naive),
        Variant("torch.compile(naive)", lambda x: naive(x, compiled)),
        Variant("TRL generalized_jsd_loss", trl, "upcast and clamp added by us", library="trl"),
        Variant("Liger KLDiv", liger, "log_softmax in torch", library="liger_kernel", needs_gpu=True),
        *(Variant(f"ours, {k}", ours(k), is_ours=True) for k in our_kernels(device)),
    ]


# -- log-probabilities and entropy from logits ----------------------------------------------------


def naive_tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(logits.float(), -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _tokens(device: str) -> list[Variant]:
    def both(x: Inputs, function: Callable[..., tuple[Tensor, Tensor]] = naive_tokens) -> Result:
        z = _trained(x.student)
        logprobs, entropy = function(z, x.targets)
        torch.autograd.backward([logprobs, entropy], [x.upstream, x.upstream_entropy])
        assert z.grad is not None
        return logprobs.detach(), z.grad

    compiled = torch.compile(naive_tokens, dynamic=False)

    def megatron(x: Inputs) -> Result:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        _one_rank_group()
        z = _trained(x.student)
        loss = vocab_parallel_cross_entropy(z[:, None].float(), x.targets[:, None])[:, 0]
        (-loss).backward(x.upstream)
        assert z.grad is not None
        return -loss.detach(), z.grad

    def trl(x: Inputs) -> Result:
        from trl.trainer.utils import selective_log_softmax_and_entropy

        return both(x, lambda z, y: selective_log_softmax_and_entropy(z.float(), y, entropy_requires_grad=True))

    def liger(x: Inputs) -> Result:
        from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

        z = _trained(x.student)
        loss = LigerVocabParallelCrossEntropy()(z[:, None], x.targets[:, None], None)[:, 0]
        (-loss).backward(x.upstream)
        assert z.grad is not None
        return -loss.detach(), z.grad

    def ours(kernels: str) -> Run:
        def run(x: Inputs) -> Result:
            z = _trained(x.student)
            logits = z.view_as(z)  # what a head would have given: no leaf, so its memory may be given up
            found = token_logprobs(logits, x.targets, x.shard, consume=True, kernels=row_kernels(kernels))
            torch.autograd.backward([*found], [x.upstream, x.upstream_entropy])
            assert z.grad is not None
            return found.logprobs.detach(), z.grad

        return run

    return [
        Variant("naive torch", both),
        Variant("torch.compile(naive)", lambda x: both(x, compiled)),
        Variant("Megatron cross entropy", megatron, "no entropy; overwrites float32 logits", has_entropy=False),
        Variant("TRL selective_log_softmax", trl, "upcast added by us", library="trl"),
        Variant(
            "Liger vocab-parallel CE", liger, "no entropy", has_entropy=False, library="liger_kernel", needs_gpu=True
        ),
        *(Variant(f"ours, {k}", ours(k), is_ours=True) for k in our_kernels(device)),
    ]


def _one_rank_group() -> None:
    """Megatron's cross entropy asks for a tensor-parallel group even where there is one rank."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


# -- from hidden states ---------------------------------------------------------------------------

CHUNK = {"cuda": 2048, "cpu": 64}  # rows whose logits live at a time, for ours and where others can be told


def _head_kl(device: str) -> list[Variant]:
    def naive(x: Inputs) -> Result:
        assert x.teacher is not None and x.head is not None
        h = _trained(x.student)
        with torch.no_grad():
            teacher = F.linear(x.teacher, x.head)
        loss = naive_kl(F.linear(h, x.head), teacher, x.kl_clip)
        loss.backward(x.upstream)
        assert h.grad is not None
        return loss.detach(), h.grad

    def trl(x: Inputs) -> Result:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        h = _trained(x.student)
        loss, _ = ChunkedDivergenceFunction.apply(h, x.head, None, x.teacher, x.head, None, 0.0, 1.0)
        loss.backward(x.upstream)
        assert h.grad is not None
        return loss.detach(), h.grad

    def liger(x: Inputs) -> Result:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        h = _trained(x.student)
        divergence = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=True, chunk_size=CHUNK[device]
        )
        loss = divergence(h, x.head, x.teacher, x.head, x.targets)
        (loss * x.upstream.sum()).backward()
        assert h.grad is not None
        return None, h.grad

    def ours(mode: str) -> Run:
        def run(x: Inputs) -> Result:
            assert x.teacher is not None and x.head is not None
            h = _trained(x.student)
            options = {
                "kl_clip": x.kl_clip,
                "mode": mode,
                "chunk": CHUNK[device],
                "kernels": row_kernels(our_kernels(device)[0]),
            }
            value, found = kl_loss(h, x.teacher, x.head, x.shard, x.upstream, **options)
            value.backward()
            assert h.grad is not None
            return found.loss, h.grad

        return run

    equal_weights = "no clip, equal row weights only, computes the frozen head's gradient"
    return [
        Variant("naive torch", naive),
        Variant("TRL chunked divergence", trl, "no clip", has_clip=False, library="trl"),
        Variant("Liger chunked JSD, beta 0", liger, equal_weights, has_clip=False, library="liger_kernel"),
        *(Variant(f"ours, {mode}", ours(mode), is_ours=True) for mode in MODES),
    ]


def _head_tokens(device: str) -> list[Variant]:
    def naive(x: Inputs) -> Result:
        assert x.head is not None
        h, w = _trained(x.student), _trained(x.head)
        logprobs, entropy = naive_tokens(F.linear(h, w), x.targets)
        torch.autograd.backward([logprobs, entropy], [x.upstream, x.upstream_entropy])
        assert h.grad is not None
        return logprobs.detach(), h.grad

    def trl(x: Inputs) -> Result:
        from trl.kernels import ChunkedLogProbFunction

        assert x.head is not None
        h, w = _trained(x.student), _trained(x.head)
        found = ChunkedLogProbFunction.apply(h, w, None, x.targets, 1.0, 32768, None, 1.0, ("entropy",))
        torch.autograd.backward(list(found[:2]), [x.upstream, x.upstream_entropy])
        assert h.grad is not None
        return found[0].detach(), h.grad

    def liger(x: Inputs) -> Result:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

        assert x.head is not None
        h, w = _trained(x.student), _trained(x.head)
        nll, entropy = _FusedLinearPPOFallbackFunction.apply(h, w, x.targets, 1.0, -100, True)
        torch.autograd.backward([-nll, entropy], [x.upstream, x.upstream_entropy])
        assert h.grad is not None
        return -nll.detach(), h.grad

    def ours(mode: str) -> Run:
        def run(x: Inputs) -> Result:
            assert x.head is not None
            h, w = _trained(x.student), _trained(x.head)

            def rows(found, part):  # type: ignore[no-untyped-def]
                return (x.upstream[part] * found.logprobs + x.upstream_entropy[part] * found.entropy).sum()

            options = {"mode": mode, "chunk": CHUNK[device], "kernels": row_kernels(our_kernels(device)[0])}
            value, found = token_loss(h, w, x.targets, x.shard, rows, **options)
            value.backward()
            assert h.grad is not None
            return found.logprobs, h.grad

        return run

    return [
        Variant("naive torch", naive),
        Variant("TRL chunked logprob", trl, library="trl"),
        Variant("Liger scaled CE, torch path", liger, library="liger_kernel"),
        *(Variant(f"ours, {mode}", ours(mode), is_ours=True) for mode in MODES),
    ]
