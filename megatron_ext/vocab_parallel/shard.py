"""Which columns of the vocabulary a tensor-parallel rank holds, and the tiles whose sums every rank merges alike.

A sum over the vocabulary is taken tile by tile and the tiles are merged in vocabulary order. Tiles are cut at fixed
columns of the whole vocabulary, wherever ranks of the usual tensor-parallel sizes begin, so that a tile lies on one
rank whatever the size: losses and gradients are the same bits for TP 1, 2, 4 and 8.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch.distributed as dist

SAME_BITS_FOR = (1, 2, 4, 8)  # tensor-parallel sizes whose results agree bit for bit


def tile_cuts(vocab_size: int, shard_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Tile boundaries 0 ... `vocab_size`: every column where a rank of one of these shard sizes begins."""
    begins = {begin for size in shard_sizes for begin in range(0, vocab_size, size)}
    return (*sorted(begins), vocab_size)


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, start + size) on this rank. Columns from `vocab_size` on are padding and enter no softmax.

    Every rank of `group` holds `size` columns, in rank order; `cuts` are the same on all of them.
    """

    group: dist.ProcessGroup | None  # None: the vocabulary is whole here
    start: int
    size: int
    vocab_size: int  # real V
    cuts: tuple[int, ...]  # tile boundaries in whole-vocabulary columns

    def __post_init__(self) -> None:
        assert self.cuts[0] == 0 and self.cuts[-1] == self.vocab_size, "tiles must cover the vocabulary"
        assert all(cut >= self.vocab_size or cut in self.cuts for cut in (self.start, self.start + self.size))

    @property
    def num_columns(self) -> int:
        """Real columns here; the rest of `size` is padding. A rank may hold padding only."""
        return max(0, min(self.size, self.vocab_size - self.start))

    @functools.cached_property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of this rank's tiles, in local columns."""
        return tiles_of_rank(self.cuts, self.start, self.size)

    @functools.cached_property
    def tiles_per_rank(self) -> tuple[int, ...]:
        """How many tiles each rank of the group holds."""
        ranks = dist.get_world_size(self.group) if self.group is not None else 1
        return tuple(len(tiles_of_rank(self.cuts, rank * self.size, self.size)) for rank in range(ranks))


def tiles_of_rank(cuts: tuple[int, ...], start: int, size: int) -> tuple[tuple[int, int], ...]:
    """The tiles between two columns of the whole vocabulary, as (begin, end) counted from `start`."""
    tiles = itertools.pairwise(cuts)
    return tuple((begin - start, end - start) for begin, end in tiles if start <= begin < start + size)


def whole_vocabulary(vocab_size: int, size: int | None = None, cuts: tuple[int, ...] | None = None) -> VocabShard:
    """The shard of a vocabulary that is not split; `size` counts padding columns too."""
    return VocabShard(None, 0, size or vocab_size, vocab_size, cuts or (0, vocab_size))
