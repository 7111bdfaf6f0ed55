"""The same losses from hidden states: the head is applied to a chunk of rows at a time, so logits are never whole.

Two ways, by what is known when forward runs. *Gradient in forward* (M1): the caller's loss is evaluated chunk by
chunk, so the gradient of a chunk's logits is written over them while they are there, and the head is applied once,
6 R H v operations. *Recompute* (M2): rows are returned for any later loss, and backward applies the head once more,
8 R H v. A head that needs no gradient costs none of its product in either.

Shapes: R rows, H hidden size, v local vocabulary columns.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.vocab_parallel.backends import kernels_for
from megatron_ext.vocab_parallel.logits import (
    check_clip,
    check_targets,
    check_temperature,
    clipped_kl,
    token_logprobs,
)
from megatron_ext.vocab_parallel.protocol import (
    Gathered,
    KLBlock,
    KLRows,
    RowKernels,
    TokenBlock,
    values_of_kl,
    values_of_tokens,
)
from megatron_ext.vocab_parallel.shard import VocabShard
from megatron_ext.vocab_parallel.values import ClippedKL, TokenLogprobs

MODES = ("chunked", "recompute", "materialized")  # M1, M2, M0

# (values of some rows, which rows) -> their part of the loss, a scalar. Parts add up; no part may look at others, and
# nothing else that is trained may be in it: only the values' gradients are followed.
RowLoss = Callable[[TokenLogprobs, slice], Tensor]
Block = TypeVar("Block", TokenBlock, KLBlock)
Values = TypeVar("Values", TokenLogprobs, ClippedKL, KLRows)


# -- one entrance for the three modes -------------------------------------------------------------


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard,
    row_loss: RowLoss,
    *,
    mode: str,
    chunk: int,
    temperature: float = 1.0,
    kernels: RowKernels | None = None,
) -> tuple[Tensor, TokenLogprobs]:
    """A loss of log p(target) and entropy of the rows of `hidden @ weight.T`, and those values, detached.

    Args:
        hidden: [R, H], whole on every rank of the shard's group; its gradient is this rank's part of a sum.
        weight: [v, H], this rank's slice of the head.
        targets: [R] int64 ids in [0, V).
        row_loss: the loss, additive over rows; it is called on chunks of them.
        mode: "chunked" (gradient in forward), "recompute" or "materialized" (all logits at once).
        chunk: rows whose logits live at a time, except when materialized.
    """
    options: dict[str, Any] = {"temperature": temperature, "kernels": kernels}
    if mode == "chunked":
        return _token_loss_in_chunks(hidden, weight, targets, shard, row_loss, chunk=chunk, **options)
    if mode == "recompute":
        found = linear_token_logprobs(hidden, weight, targets, shard, chunk=chunk, **options)
    else:
        _check_mode(mode)
        found = token_logprobs(F.linear(hidden, weight), targets, shard, consume=True, **options)
    return row_loss(found, slice(0, len(targets))), found.detach()


def kl_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    shard: VocabShard,
    row_weights: Tensor,
    *,
    kl_clip: float,
    mode: str,
    chunk: int,
    temperature: float = 1.0,
    kernels: RowKernels | None = None,
) -> tuple[Tensor, ClippedKL]:
    """The weighted sum of the rows' clipped KL between two heads' logits, and the rows' values, detached.

    Args:
        student, teacher: [R, H] hidden states; the teacher gets no gradient.
        weight: [v, H], this rank's slice of the head both share.
        row_weights: [R] float32.
        kl_clip, temperature: as in `clipped_kl`.
        mode, chunk: as in `token_loss`.
    """
    _check_teacher(student, teacher)
    if row_weights.shape != (len(student),):
        raise ValueError(f"row_weights must be [{len(student)}], got {tuple(row_weights.shape)}")
    options: dict[str, Any] = {"kl_clip": kl_clip, "temperature": temperature, "kernels": kernels}
    if mode == "chunked":
        return _kl_loss_in_chunks(student, teacher, weight, shard, row_weights, chunk=chunk, **options)
    if mode == "recompute":
        found = linear_clipped_kl(student, teacher, weight, shard, chunk=chunk, **options)
    else:
        _check_mode(mode)
        with torch.no_grad():
            teacher_logits = F.linear(teacher, weight)
        found = clipped_kl(F.linear(student, weight), teacher_logits, shard, consume=True, **options)
    return (row_weights * found.loss).sum(), found.detach()


def _check_teacher(student: Tensor, teacher: Tensor) -> None:
    if teacher.shape != student.shape or teacher.dtype != student.dtype:
        raise ValueError(
            f"student and teacher must be rows of one shape and dtype, got {student.dtype} {tuple(student.shape)} "
            f"and {teacher.dtype} {tuple(teacher.shape)}"
        )


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


# -- chunks ---------------------------------------------------------------------------------------


class _Head:
    """The head, applied to a chunk of rows at a time; collects what the logits' gradients make of rows and head.

    `hidden` are the rows that are trained: those of the student where there is a teacher too.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        shard: VocabShard,
        *,
        temperature: float,
        chunk: int,
        kernels: RowKernels | None,
    ) -> None:
        if weight.shape != (shard.size, hidden.shape[1]) or weight.dtype != hidden.dtype:
            raise ValueError(
                f"the head's slice must be [{shard.size}, {hidden.shape[1]}] of {hidden.dtype}, "
                f"got {list(weight.shape)} of {weight.dtype}"
            )
        if chunk < 1:
            raise ValueError(f"chunk must be at least one row, got {chunk}")
        self._hidden, self._weight, self._shard = hidden.detach(), weight.detach(), shard
        self._scale, self._kernels = 1 / check_temperature(temperature), kernels or kernels_for(hidden)
        self._chunk = max(1, min(chunk, len(hidden)))
        # With ranks to wait for, the next chunk's logits are under way before the answer to this one's is needed.
        self._num_ahead = 1 if shard.group is not None else 0
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None

    def want_gradients(self, *, of_weight: bool) -> None:
        self.d_hidden = torch.empty_like(self._hidden)
        if of_weight:
            self.d_weight = torch.zeros_like(self._weight, dtype=torch.float32)

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Number and rows of every chunk; at least one, which may be empty."""
        for number, begin in enumerate(range(0, max(1, len(self._hidden)), self._chunk)):
            yield number, slice(begin, min(begin + self._chunk, len(self._hidden)))

    def in_order(
        self, block_of: Callable[[int, slice], Block], finish: Callable[[slice, Block, Gathered], None]
    ) -> None:
        """Start every chunk's block and finish it: in order, up to `_num_ahead` started before the one finished."""
        under_way: deque[tuple[slice, Block, Gathered]] = deque()
        for number, rows in self.chunks():
            block = block_of(number, rows)
            under_way.append((rows, block, block.start()))
            if len(under_way) > self._num_ahead:
                finish(*under_way.popleft())
        while under_way:
            finish(*under_way.popleft())

    def token_block(self, targets: Tensor, number: int, rows: slice) -> TokenBlock:
        logits = self._logits("logits", self._hidden[rows], number)
        return TokenBlock(self._kernels, logits, targets[rows].contiguous(), None, self._shard, self._scale)

    def kl_block(self, teacher: Tensor, kl_clip: float, number: int, rows: slice) -> KLBlock:
        student_logits = self._logits("student", self._hidden[rows], number)
        teacher_logits = self._logits("teacher", teacher[rows], number)
        return KLBlock(self._kernels, student_logits, teacher_logits, None, self._shard, self._scale, kl_clip)

    def _logits(self, name: str, hidden: Tensor, number: int) -> Tensor:
        """[rows, v] in a buffer that is this chunk's until it is finished."""
        key = (name, number % (self._num_ahead + 1))
        if key not in self._buffers:
            self._buffers[key] = hidden.new_empty(self._chunk, len(self._weight))
        return torch.mm(hidden, self._weight.t(), out=self._buffers[key][: len(hidden)])

    def add_gradient(self, rows: slice, d_logits: Tensor) -> None:
        assert self.d_hidden is not None
        torch.mm(d_logits, self._weight, out=self.d_hidden[rows])
        if self.d_weight is not None:
            _add_product(self.d_weight, d_logits, self._hidden[rows])


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total [v, H] float32 += d_logits^T hidden; the sum over chunks is never rounded to bfloat16."""
    if d_logits.dtype == total.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif d_logits.is_cuda:
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(d_logits.t().float(), hidden.float())


def _weight_gradient(weight: Tensor, d_weight: Tensor | None) -> Tensor | None:
    """What autograd gets for the head. Megatron's float32 `main_grad` takes the sum before it is rounded.

    Megatron's own linears have the same understanding with its DDP: the mark says that the gradient is there already,
    and the tensor returned only fires the hook; it must be zeros where an embedding's gradient will be added to it.
    """
    main_grad = getattr(weight, "main_grad", None)
    if d_weight is None or d_weight.dtype == weight.dtype or main_grad is None:
        return None if d_weight is None else d_weight.to(weight.dtype)
    main_grad.add_(d_weight)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _catenated(pieces: list[Values]) -> Values:
    return type(pieces[0])(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


# -- gradient in forward --------------------------------------------------------------------------


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient was taken in forward. Backward only hands it out, once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, loss: Tensor, d_hidden: Tensor, d_weight: Tensor | None
    ) -> Tensor:
        ctx.weight, ctx.gradients = weight, (d_hidden, d_weight)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of this loss was taken in forward and handed out before; "
                'run forward again, or use mode="recompute"'
            )
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        if for_loss.is_cuda or for_loss != 1:  # asking a GPU costs more than multiplying
            d_hidden.mul_(for_loss)
            if d_weight is not None:
                d_weight.mul_(for_loss)
        return d_hidden, _weight_gradient(ctx.weight, d_weight), None, None, None


def _token_loss_in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, row_loss: RowLoss, **options: Any
) -> tuple[Tensor, TokenLogprobs]:
    check_targets(targets, len(hidden), shard)
    head = _Head(hidden, weight, shard, **options)
    is_trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if is_trained:
        head.want_gradients(of_weight=weight.requires_grad)
    total = torch.zeros((), device=hidden.device)
    pieces: list[TokenLogprobs] = []

    def finish(rows: slice, block: TokenBlock, started: Gathered) -> None:
        merged = block.finish(started)
        values = block.values(merged)
        pieces.append(values)
        if not is_trained:
            total.add_(row_loss(values, rows))
            return
        with torch.enable_grad():  # the loss of these rows alone: its graph is as small as their number
            leaves = TokenLogprobs(*(value.detach().requires_grad_() for value in values))
            loss = row_loss(leaves, rows)
        for_logprobs = for_entropy = None
        if loss.requires_grad:  # a chunk may have nothing to say
            for_logprobs, for_entropy = torch.autograd.grad(loss, leaves, allow_unused=True)
        if for_logprobs is None:
            for_logprobs = torch.zeros_like(values.logprobs)
        total.add_(loss.detach())
        block.grad(merged, for_logprobs, for_entropy, out=block.logits)
        head.add_gradient(rows, block.logits)

    with torch.no_grad():
        head.in_order(functools.partial(head.token_block, targets), finish)
    if is_trained:
        total = _WithGradient.apply(hidden, weight, total, head.d_hidden, head.d_weight)
    return total, _catenated(pieces)


def _kl_loss_in_chunks(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    shard: VocabShard,
    row_weights: Tensor,
    *,
    kl_clip: float,
    **options: Any,
) -> tuple[Tensor, ClippedKL]:
    check_clip(kl_clip)
    head = _Head(student, weight, shard, **options)
    is_trained = torch.is_grad_enabled() and (student.requires_grad or weight.requires_grad)
    if is_trained:
        head.want_gradients(of_weight=weight.requires_grad)
    pieces: list[ClippedKL] = []

    def finish(rows: slice, block: KLBlock, started: Gathered) -> None:
        found = block.finish(started)
        pieces.append(block.values(found))
        if is_trained:
            block.grad(found, row_weights[rows], out=block.teacher)  # the teacher's logits have done their work
            head.add_gradient(rows, block.teacher)

    with torch.no_grad():
        head.in_order(functools.partial(head.kl_block, teacher, kl_clip), finish)
        values = _catenated(pieces)
        loss = (row_weights * values.loss).sum()
    if is_trained:
        loss = _WithGradient.apply(student, weight, loss, head.d_hidden, head.d_weight)
    return loss, values


# -- recompute ------------------------------------------------------------------------------------


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard,
    *,
    temperature: float = 1.0,
    chunk: int,
    kernels: RowKernels | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of `hidden @ weight.T`; backward applies the head again. Without gradients, one pass."""
    check_targets(targets, len(hidden), shard)
    options = {"temperature": temperature, "chunk": chunk, "kernels": kernels}
    return TokenLogprobs(*_RecomputedTokens.apply(hidden, weight, targets, shard, options))


def linear_clipped_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    shard: VocabShard,
    *,
    kl_clip: float,
    temperature: float = 1.0,
    chunk: int,
    kernels: RowKernels | None = None,
) -> ClippedKL:
    """`clipped_kl` of the two heads' logits; backward applies the head to both again."""
    check_clip(kl_clip)
    _check_teacher(student, teacher)
    options = {"temperature": temperature, "chunk": chunk, "kernels": kernels}
    return ClippedKL(*_RecomputedKL.apply(student, teacher.detach(), weight, shard, kl_clip, options))


class _RecomputedTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        head = _Head(hidden, weight, shard, **options)
        pieces: list[Tensor] = []
        head.in_order(
            functools.partial(head.token_block, targets),
            lambda _, block, started: pieces.append(block.finish(started)),
        )
        merged = torch.cat(pieces)
        ctx.save_for_backward(hidden, targets, merged, weight)
        ctx.weight, ctx.shard, ctx.options = weight, shard, options  # the very parameter: Megatron's marks are on it
        return tuple(value.clone() for value in values_of_tokens(merged, None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_logprobs: Tensor, for_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, merged, _ = ctx.saved_tensors  # asking refuses a head that was changed meanwhile
        head = _Head(hidden, ctx.weight, ctx.shard, **ctx.options)
        head.want_gradients(of_weight=ctx.needs_input_grad[1])
        for number, rows in head.chunks():  # what ranks had to agree on is in `merged`: nobody waits for anybody
            block = head.token_block(targets, number, rows)
            block.grad(merged[rows], for_logprobs[rows], for_entropy[rows], out=block.logits)
            head.add_gradient(rows, block.logits)
        return head.d_hidden, _weight_gradient(ctx.weight, head.d_weight), None, None, None


class _RecomputedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weight: Tensor,
        shard: VocabShard,
        kl_clip: float,
        options: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        head = _Head(student, weight, shard, **options)
        pieces: list[KLRows] = []
        head.in_order(
            functools.partial(head.kl_block, teacher, kl_clip),
            lambda _, block, started: pieces.append(block.finish(started)),
        )
        found = _catenated(pieces)
        ctx.save_for_backward(student, teacher, weight, *found)
        ctx.weight, ctx.shard, ctx.kl_clip, ctx.options = weight, shard, kl_clip, options
        values = tuple(value.clone() for value in values_of_kl(found, None))
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, _, *saved = ctx.saved_tensors
        found = KLRows(*saved)
        head = _Head(student, ctx.weight, ctx.shard, **ctx.options)
        head.want_gradients(of_weight=ctx.needs_input_grad[2])
        for number, rows in head.chunks():
            block = head.kl_block(teacher, ctx.kl_clip, number, rows)
            block.grad(KLRows(*(value[rows] for value in found)), for_loss[rows], out=block.teacher)
            head.add_gradient(rows, block.teacher)
        return head.d_hidden, None, _weight_gradient(ctx.weight, head.d_weight), None, None, None
