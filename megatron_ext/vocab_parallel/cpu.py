"""The row kernels in plain torch, for CPUs: a few rows of one tile at a time, in buffers that stay in the cache.

Whole-row temporaries are what makes log_softmax slow and large: each is a trip to memory. Here a block of a tile is
copied once into float32 buffers of a megabyte, and everything else happens there, in place.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_ext.vocab_parallel import protocol
from megatron_ext.vocab_parallel.shard import VocabShard

BUFFER_ELEMENTS = 256_000  # large enough to hide the cost of a torch call, small enough for the cache

_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a forked process has none of its parent's threads
_thread = threading.local()  # .buffers: scratch memory of a thread


def for_rows(num_rows: int, work: Callable[[slice], None], *, at_once: int | None = None) -> None:
    """`work` of consecutive blocks that together cover all rows, on as many Python threads as torch may use.

    Torch calls and ctypes calls release the interpreter and rows are independent, so each thread takes its range of
    rows, `at_once` at a time if that is given. Torch's own threading is off in them: OpenMP threads spin while they
    wait, and short calls wait most of the time.
    """
    step = at_once or -(-num_rows // torch.get_num_threads()) or 1
    blocks = [slice(k, min(k + step, num_rows)) for k in range(0, num_rows, step)]
    threads = min(torch.get_num_threads(), len(blocks))
    if threads <= 1:
        _in_turn(blocks, work)
        return
    bounds = [len(blocks) * k // threads for k in range(threads + 1)]
    shares = [blocks[a:b] for a, b in itertools.pairwise(bounds)]
    for finished in _pool(torch.get_num_threads()).map(_in_turn, shares, [work] * threads):
        assert finished is None  # asking is what raises a thread's error here


def _in_turn(blocks: list[slice], work: Callable[[slice], None]) -> None:
    with torch.no_grad():  # autograd's switch belongs to a thread
        for block in blocks:
            work(block)


def _pool(size: int) -> ThreadPoolExecutor:
    if size not in _pools:
        pool = ThreadPoolExecutor(size, thread_name_prefix="vocab-rows")
        together = threading.Barrier(size)

        def start() -> None:
            torch.get_num_threads()  # a thread's first question about it resets it, so it must be asked before
            torch.set_num_threads(1)
            together.wait()  # so that every thread of the pool has come by

        for started in [pool.submit(start) for _ in range(size)]:
            started.result()
        torch.set_num_threads(size)  # what a thread sets also becomes the default of threads yet to start
        _pools[size] = pool
    return _pools[size]


def _buffers(count: int, rows: int, width: int) -> list[Tensor]:
    """This thread's scratch memory as `count` float32 tensors [rows, width]; contents are left from before."""
    held = getattr(_thread, "buffers", [])
    if len(held) < count or held[0].numel() < rows * width:
        held = [torch.empty(max(BUFFER_ELEMENTS, rows * width)) for _ in range(max(count, len(held)))]
        _thread.buffers = held
    return [buffer[: rows * width].view(rows, width) for buffer in held[:count]]


def _load(buffer: Tensor, logits: Tensor, scale: float) -> Tensor:
    buffer.copy_(logits)
    return buffer.mul_(scale) if scale != 1.0 else buffer


def _log_softmax(buffer: Tensor, logits: Tensor, m: Tensor, log_l: Tensor, scale: float) -> Tensor:
    return _load(buffer, logits, scale).sub_(m[:, None]).sub_(log_l[:, None])


def _finite(m: Tensor) -> Tensor:
    """A maximum to subtract: -inf - -inf would be NaN where a tile is masked as a whole."""
    return torch.where(m > -math.inf, m, 0.0)


class TorchRows:
    """`protocol.RowKernels` for float32, bfloat16 and float16 logits on a CPU."""

    name = "torch"
    merge_tokens = staticmethod(protocol.merge_tokens)
    merge_kl = staticmethod(protocol.merge_kl)

    def token_stats(
        self, logits: Tensor, targets: Tensor, live: Tensor | None, shard: VocabShard, *, scale: float, stats: Tensor
    ) -> None:
        def block(rows: slice) -> None:
            for k, (begin, end) in enumerate(shard.tiles):
                part = logits[rows, begin:end]
                z, exps = _buffers(2, *part.shape)
                _load(z, part, scale)
                place, is_here = _place(targets[rows] - shard.start, begin, end)
                z_y = torch.where(is_here, z.gather(1, place)[:, 0], -math.inf)
                m = z.amax(-1)
                z.sub_(_finite(m)[:, None])
                torch.exp(z, out=exps)
                total, moment = exps.sum(-1), exps.mul_(z).sum(-1)
                if not moment.isfinite().all():  # 0 * -inf
                    moment = torch.where(z > -math.inf, z.exp() * z, 0.0).sum(-1)
                stats[rows, k] = torch.stack([m, total, moment, z_y], dim=-1)

        for_rows(len(logits), block, at_once=_rows_at_once(shard))

    def token_grad(
        self,
        logits: Tensor,
        targets: Tensor,
        live: Tensor | None,
        rows: Tensor,
        shard: VocabShard,
        *,
        scale: float,
        for_logprobs: Tensor,
        for_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        def block(part: slice) -> None:
            m, log_l, _, entropy = rows[part].unbind(-1)
            g = for_logprobs[part] * scale
            for begin, end in shard.tiles:
                tile = logits[part, begin:end]
                log_p, p = _buffers(2, *tile.shape)
                torch.exp(_log_softmax(log_p, tile, m, log_l, scale), out=p)
                if for_entropy is None:
                    p.mul_(-g[:, None])
                else:  # -p (g + h (log p + H)); where p is 0 its logarithm must not matter
                    h = for_entropy[part] * scale
                    log_p.clamp_(min=-200.0).add_(entropy[:, None]).mul_(h[:, None]).add_(g[:, None])
                    p.mul_(log_p).neg_()
                place, is_here = _place(targets[part] - shard.start, begin, end)
                p.scatter_add_(1, place, torch.where(is_here, g, 0.0)[:, None])
                out[part, begin:end] = p
            _clear(out[part], shard, None if live is None else live[part])

        for_rows(len(logits), block, at_once=_rows_at_once(shard))

    def kl_stats(
        self, student: Tensor, teacher: Tensor, live: Tensor | None, shard: VocabShard, *, scale: float, stats: Tensor
    ) -> None:
        def block(rows: slice) -> None:
            for k, (begin, end) in enumerate(shard.tiles):
                part = student[rows, begin:end]
                s, t, d, work = _buffers(4, *part.shape)
                _load(s, part, scale)
                _load(t, teacher[rows, begin:end], scale)
                m_s, m_t = s.amax(-1), t.amax(-1)
                s.sub_(_finite(m_s)[:, None])
                t.sub_(_finite(m_t)[:, None])
                torch.sub(t, s, out=d)
                torch.exp(s, out=work)
                l_s, u_s = work.sum(-1), work.mul_(s).sum(-1)
                l_t = t.exp_().sum(-1)
                w, top = d.mul_(t).sum(-1), d.amax(-1)
                if not (u_s + w).isfinite().all():  # 0 * inf
                    u_s = torch.where(s > -math.inf, s.exp() * s, 0.0).sum(-1)
                    d = torch.where(t > 0, d, 0.0)
                    w, top = d.sum(-1), d.amax(-1)
                stats[rows, k] = torch.stack([m_s, l_s, u_s, m_t, l_t, w, top.clamp_(min=0.0)], dim=-1)

        for_rows(len(student), block, at_once=_rows_at_once(shard))

    def kl_scan(
        self,
        student: Tensor,
        teacher: Tensor,
        suspect: Tensor,
        rows: Tensor,
        shard: VocabShard,
        *,
        scale: float,
        kl_clip: float,
        sums: Tensor,
    ) -> None:
        def block(part: slice) -> None:
            if suspect[part].any():
                for k, tile in enumerate(shard.tiles):
                    p, f = _terms(student[part], teacher[part], rows[part], tile, scale)
                    mass = (p * (f > kl_clip)).sum(-1)
                    sums[part, k] = torch.stack([f.clamp_(max=kl_clip).sum(-1), mass], dim=-1)

        for_rows(len(student), block, at_once=_rows_at_once(shard))

    def kl_grad(
        self,
        student: Tensor,
        teacher: Tensor,
        live: Tensor | None,
        rows: Tensor,
        clipped_mass: Tensor,
        shard: VocabShard,
        *,
        scale: float,
        kl_clip: float,
        for_loss: Tensor,
        out: Tensor,
    ) -> None:
        def block(part: slice) -> None:
            m_s, log_s, m_t, log_t = rows[part, :4].unbind(-1)
            weight = for_loss[part] * scale
            for begin, end in shard.tiles:
                q, p = _buffers(2, *student[part, begin:end].shape)
                if (clipped_mass[part] > 0).any():
                    p, f = _terms(student[part], teacher[part], rows[part], (begin, end), scale)
                    p.masked_fill_((f > kl_clip) & (clipped_mass[part] > 0)[:, None], 0.0)
                else:
                    _log_softmax(p, teacher[part, begin:end], m_t, log_t, scale).exp_()
                _log_softmax(q, student[part, begin:end], m_s, log_s, scale).exp_()
                q.mul_((weight * (1 - clipped_mass[part]))[:, None]).sub_(p.mul_(weight[:, None]))
                out[part, begin:end] = q
            _clear(out[part], shard, None if live is None else live[part])

        for_rows(len(student), block, at_once=_rows_at_once(shard))


def _rows_at_once(shard: VocabShard) -> int:
    """Fixed by the tiles and not by the shard: torch's sums depend on the shape, and ranks must agree to the bit."""
    widest = max(end - begin for begin, end in itertools.pairwise(shard.cuts))
    return max(1, BUFFER_ELEMENTS // widest)


def _place(local_targets: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Column of each target inside a tile [R, 1], any where it lies elsewhere; and whether it is there [R]."""
    is_here = (local_targets >= begin) & (local_targets < end)
    return (local_targets - begin).clamp(0, end - begin - 1)[:, None], is_here


def _terms(
    student: Tensor, teacher: Tensor, rows: Tensor, tile: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """P and f = P (log P - log Q) of a tile, in the last two of four buffers."""
    begin, end = tile
    m_s, log_s, m_t, log_t = rows[:, :4].unbind(-1)
    _, log_q, p, f = _buffers(4, *student[:, begin:end].shape)
    _log_softmax(log_q, student[:, begin:end], m_s, log_s, scale)
    _log_softmax(f, teacher[:, begin:end], m_t, log_t, scale)
    torch.exp(f, out=p)
    f.sub_(log_q).mul_(p)
    return p, f.masked_fill_(p == 0, 0.0)  # P = 0 contributes nothing, whatever its logarithm


def _clear(out: Tensor, shard: VocabShard, live: Tensor | None) -> None:
    """No gradient in padding columns and in rows that are not live."""
    out[:, shard.num_columns :] = 0
    if live is not None:
        out[~live] = 0
