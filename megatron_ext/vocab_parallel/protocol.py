"""What ranks tell one another, and in which order: the losses of one block of logits from tile sums to gradients.

Three steps, the same for every kind of kernel. *Stats* reads this rank's logits once and reduces each tile to a few
numbers; one all-gather gives every rank the tiles of all ranks, which *merge* combines in vocabulary order. The clip
of the KL needs more only for rows whose bound on max_v f_v exceeds it (suspects): *scan* reads those again and a
second all-gather adds up what it found. *Grad* then writes the gradient, without any rank waiting for another.

docs/losses.md derives the formulas. Shapes: R rows, v local columns, K tiles of the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.vocab_parallel.shard import VocabShard
from megatron_ext.vocab_parallel.values import ClippedKL, TokenLogprobs

BOUND_SLACK = 1 + 1e-5  # the bound is float32 arithmetic; a row this close to the clip is read again

# One tile of a row.    m = max z,  l = sum e,  u = sum e (z - m),  e = exp(z - m);  z_y the target's logit or -inf
TOKEN_STATS = ("m", "l", "u", "z_y")
# s student, t teacher; d = (t - m_t) - (s - m_s):  w = sum e_t d,  top = max(0, max_v e_t d)
KL_STATS = ("m_s", "l_s", "u_s", "m_t", "l_t", "w", "top")
# What a whole row comes to. m and log l stay apart: folding both into one log-sum-exp loses digits.
TOKEN_ROW = ("m", "log_l", "logprob", "entropy")
KL_ROW = ("m_s", "log_l_s", "m_t", "log_l_t", "kl", "bound", "entropy")


class RowKernels(Protocol):
    """Arithmetic on the logits themselves: rows on one rank, without communication.

    `logits`, `student`, `teacher`: [R, v] with unit column stride, all of one dtype; z = logits * scale in float32.
    `live`: [R] bool or None for all; what other rows hold does not matter, and their gradient is 0, all else free.
    Stats and sums have a slot for each tile of the rank that holds most, [R, slots, ...] float32.
    """

    name: str

    def merge_tokens(self, stats: Tensor) -> Tensor:
        """[R, K, 4] TOKEN_STATS -> [R, 4] TOKEN_ROW."""

    def merge_kl(self, stats: Tensor) -> Tensor:
        """[R, K, 7] KL_STATS -> [R, 7] KL_ROW."""

    def token_stats(
        self, logits: Tensor, targets: Tensor, live: Tensor | None, shard: VocabShard, *, scale: float, stats: Tensor
    ) -> None:
        """Fill `stats` [R, slots, 4]. `targets` are ids of the whole vocabulary, int64 [R]."""

    def token_grad(
        self,
        logits: Tensor,
        targets: Tensor,
        live: Tensor | None,
        rows: Tensor,  # [R, 4] TOKEN_ROW
        shard: VocabShard,
        *,
        scale: float,
        for_logprobs: Tensor,  # [R] float32, d loss / d logprob
        for_entropy: Tensor | None,  # [R] float32, d loss / d entropy; None is zero
        out: Tensor,  # [R, v], may be `logits`
    ) -> None:
        """scale [g (delta_uy - p_u) - h p_u (log p_u + H)], zero in padding columns."""

    def kl_stats(
        self, student: Tensor, teacher: Tensor, live: Tensor | None, shard: VocabShard, *, scale: float, stats: Tensor
    ) -> None:
        """Fill `stats` [R, slots, 7]."""

    def kl_scan(
        self,
        student: Tensor,
        teacher: Tensor,
        suspect: Tensor,  # [R] bool; other rows are not read
        rows: Tensor,  # [R, 7] KL_ROW
        shard: VocabShard,
        *,
        scale: float,
        kl_clip: float,
        sums: Tensor,
    ) -> None:
        """Fill `sums` [R, slots, 2] of suspect rows: sum min(f, clip), and the teacher's mass where f > clip."""

    def kl_grad(
        self,
        student: Tensor,
        teacher: Tensor,
        live: Tensor | None,
        rows: Tensor,  # [R, 7] KL_ROW
        clipped_mass: Tensor,  # [R] S_C
        shard: VocabShard,
        *,
        scale: float,
        kl_clip: float,
        for_loss: Tensor,  # [R] float32, d loss / d row
        out: Tensor,  # [R, v], may be `student` or `teacher`
    ) -> None:
        """scale * for_loss [Q_u (1 - S_C) - P_u 1{f_u <= clip}], zero in padding columns."""


def merge_tokens(stats: Tensor) -> Tensor:
    """[R, K, 4] TOKEN_STATS -> [R, 4] TOKEN_ROW, in torch. The sums over K run in the same order on every rank."""
    m, l, u, z_y = stats.unbind(-1)  # noqa: E741
    top, lead, share = _lead(m)
    total = (share * l).sum(1)
    # An empty tile has u = l = 0 and share 0; its lead is -inf.
    moment = torch.where(share > 0, share * (u + lead * l), 0.0).sum(1)
    log_l = total.log()
    return torch.stack([top, log_l, (z_y.amax(1) - top) - log_l, log_l - moment / total], dim=-1)


def merge_kl(stats: Tensor) -> Tensor:
    """[R, K, 7] KL_STATS -> [R, 7] KL_ROW, in torch."""
    m_s, l_s, u_s, m_t, l_t, w, tile_top = stats.unbind(-1)
    top_s, lead_s, share_s = _lead(m_s)
    top_t, lead_t, share_t = _lead(m_t)
    sum_s, sum_t = (share_s * l_s).sum(1), (share_t * l_t).sum(1)
    moment_s = torch.where(share_s > 0, share_s * (u_s + lead_s * l_s), 0.0).sum(1)
    # d of the row is d of the tile plus this. Where a tile of the student is all -inf, d is +inf whatever is added.
    moved = lead_t - torch.where(m_s > -torch.inf, lead_s, 0.0)
    moment_t = torch.where(share_t > 0, share_t * (w + l_t * moved), 0.0).sum(1)
    largest = torch.where(share_t > 0, share_t * (tile_top + moved.clamp(min=0.0)), 0.0).amax(1)
    log_s, log_t = sum_s.log(), sum_t.log()
    kl = moment_t / sum_t + (log_s - log_t)
    bound = (largest + (log_s - log_t).clamp(min=0.0)) / sum_t
    return torch.stack([top_s, log_s, top_t, log_t, kl, bound, log_s - moment_s / sum_s], dim=-1)


def _lead(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row maximum [R], and of each tile m - maximum and its exponential [R, K]. A row of -inf only becomes NaN."""
    top = m.amax(1)
    lead = m - top[:, None]
    return top, lead, lead.exp()


# -- between ranks --------------------------------------------------------------------------------


class Gathered:
    """Tile values of all ranks, on their way: [R, slots, C] here -> [R, K, C] in vocabulary order on every rank."""

    def __init__(self, local: Tensor, shard: VocabShard) -> None:
        self._local, self._shard = local, shard
        self._is_whole = shard.group is None or not local.numel()
        if not self._is_whole:
            self._all = local.new_empty(len(shard.tiles_per_rank) * local.shape[0], *local.shape[1:])
            self._work = dist.all_gather_into_tensor(self._all, local, group=shard.group, async_op=True)

    def wait(self) -> Tensor:
        if self._is_whole:
            return self._local
        self._work.wait()
        by_rank = self._all.unflatten(0, (len(self._shard.tiles_per_rank), -1))  # [tp, R, slots, C]
        return torch.cat([by_rank[k, :, :n] for k, n in enumerate(self._shard.tiles_per_rank)], dim=1)


# -- log-probabilities of tokens ------------------------------------------------------------------


@dataclass(frozen=True)
class TokenBlock:
    """Rows of logits with their targets. `start` and `finish` are collective; `grad` is not."""

    kernels: RowKernels
    logits: Tensor  # [R, v]
    targets: Tensor  # [R] int64 in [0, V)
    live: Tensor | None  # [R] bool
    shard: VocabShard
    scale: float  # 1 / temperature

    def start(self) -> Gathered:
        """Read the logits once; the exchange runs while other work goes on."""
        stats = _new(self.logits, self.shard, TOKEN_STATS)
        self.kernels.token_stats(self.logits, self.targets, self.live, self.shard, scale=self.scale, stats=stats)
        return Gathered(stats, self.shard)

    def finish(self, started: Gathered) -> Tensor:
        """[R, 4] TOKEN_ROW, which `values` and `grad` take."""
        return self.kernels.merge_tokens(started.wait())

    def values(self, rows: Tensor) -> TokenLogprobs:
        return values_of_tokens(rows, self.live)

    def grad(self, rows: Tensor, for_logprobs: Tensor, for_entropy: Tensor | None, *, out: Tensor) -> None:
        """The gradient of the logits, into `out`."""
        self.kernels.token_grad(
            self.logits, self.targets, self.live, rows, self.shard,
            scale=self.scale, for_logprobs=_coefficient(for_logprobs),
            for_entropy=None if for_entropy is None else _coefficient(for_entropy), out=out,
        )  # fmt: skip


def values_of_tokens(rows: Tensor, live: Tensor | None) -> TokenLogprobs:
    return TokenLogprobs(_zero_unless(live, rows[:, 2]), _zero_unless(live, rows[:, 3]))


# -- clipped KL -----------------------------------------------------------------------------------


class KLRows(NamedTuple):
    """What `values` and `grad` need of each row."""

    rows: Tensor  # [R, 7] KL_ROW
    suspect: Tensor  # [R] bool
    loss: Tensor  # [R]
    clipped_mass: Tensor  # [R] S_C


@dataclass(frozen=True)
class KLBlock:
    """Rows of student and teacher logits. `start` and `finish` are collective; `grad` is not."""

    kernels: RowKernels
    student: Tensor  # [R, v]
    teacher: Tensor  # [R, v]
    live: Tensor | None  # [R] bool
    shard: VocabShard
    scale: float  # 1 / temperature
    kl_clip: float

    def start(self) -> Gathered:
        """Read the logits once; the exchange runs while other work goes on."""
        stats = _new(self.student, self.shard, KL_STATS)
        self.kernels.kl_stats(self.student, self.teacher, self.live, self.shard, scale=self.scale, stats=stats)
        return Gathered(stats, self.shard)

    def finish(self, started: Gathered) -> KLRows:
        """Merge, and read the suspect rows again. Where no row is suspect there is no second exchange."""
        rows = self.kernels.merge_kl(started.wait())
        kl, bound = rows[:, 4], rows[:, 5]
        suspect = ~(bound * BOUND_SLACK <= self.kl_clip)  # NaN is suspect
        if self.live is not None:
            suspect &= self.live
        loss, clipped_mass = _zero_unless(self.live, kl), torch.zeros_like(kl)
        if self._must_scan(suspect):
            sums = _new(self.student, self.shard, ("clipped sum", "clipped mass"))
            self.kernels.kl_scan(
                self.student, self.teacher, suspect, rows, self.shard,
                scale=self.scale, kl_clip=self.kl_clip, sums=sums,
            )  # fmt: skip
            total = Gathered(sums, self.shard).wait().sum(1)
            loss = torch.where(suspect, total[:, 0], loss)
            clipped_mass = torch.where(suspect, total[:, 1], clipped_mass)
        return KLRows(rows, suspect, loss, clipped_mass)

    def _must_scan(self, suspect: Tensor) -> bool:
        """Every rank has the same merged bytes and so decides alike. A GPU alone scans without asking: the kernel
        passes over rows that are not suspect, and nobody waits for the answer."""
        if self.kl_clip == torch.inf:
            return False
        if suspect.is_cuda and self.shard.group is None:
            return True
        return bool(suspect.any())

    def values(self, found: KLRows) -> ClippedKL:
        return values_of_kl(found, self.live)

    def grad(self, found: KLRows, for_loss: Tensor, *, out: Tensor) -> None:
        """The gradient of the student's logits, into `out`."""
        self.kernels.kl_grad(
            self.student, self.teacher, self.live, found.rows, found.clipped_mass, self.shard,
            scale=self.scale, kl_clip=self.kl_clip, for_loss=_coefficient(for_loss), out=out,
        )  # fmt: skip


def values_of_kl(found: KLRows, live: Tensor | None) -> ClippedKL:
    kl, entropy = _zero_unless(live, found.rows[:, 4]), _zero_unless(live, found.rows[:, 6])
    return ClippedKL(found.loss, kl, found.clipped_mass, entropy, found.suspect)


def _new(logits: Tensor, shard: VocabShard, names: tuple[str, ...]) -> Tensor:
    """Room for what each tile gives; every rank sends as many slots as the one that holds most tiles."""
    return logits.new_empty(len(logits), max(shard.tiles_per_rank), len(names), dtype=torch.float32)


def _coefficient(gradient: Tensor) -> Tensor:
    """What autograd hands back may be expanded from one number; kernels want [R] float32 in memory."""
    return gradient.float().contiguous()


def _zero_unless(live: Tensor | None, value: Tensor) -> Tensor:
    return value if live is None else torch.where(live, value, 0.0)
