"""Logits that have broken somebody's vocabulary loss, and how close float32 arithmetic must come on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.vocab_parallel import VocabShard, tile_cuts

V = 300  # no multiple of any block
SIZES = {1: 384, 2: 256, 4: 128, 8: 128}  # columns of a rank when V is padded to 128 per rank
CUTS = tile_cuts(V, tuple(SIZES.values()))
ROWS = 6
WHOLE = VocabShard(None, 0, SIZES[1], V, CUTS)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEMPERATURES = (0.6, 1.0, 1.3)
CLIPS = (0.05, 1.0, 10.0, math.inf)
NAMES = (
    "plain",
    "sure teacher",
    "disagreeing",
    "equal",
    "sure both",
    "padding of NaN",
    "rows of NaN",
    "no live row",
    "masked columns",
    "masked tile",
    "student rules out",
    "large",
    "far below zero",
    "shifted",
)


@dataclass(frozen=True)
class Case:
    student: Tensor  # [R, 384]
    teacher: Tensor
    targets: Tensor  # [R]
    live: Tensor | None

    @property
    def rows(self) -> Tensor:
        """Indices of live rows."""
        live = torch.ones(len(self.student), dtype=torch.bool) if self.live is None else self.live
        return live.nonzero()[:, 0].to(self.student.device)

    def to(self, device: str) -> Case:
        live = None if self.live is None else self.live.to(device)
        return Case(self.student.to(device), self.teacher.to(device), self.targets.to(device), live)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    s = draw(1, ROWS, V, scale=3.0)
    t = s + draw(2, ROWS, V, scale=0.5)
    peak = (torch.arange(ROWS), torch.arange(7, 7 + 40 * ROWS, 40))  # in different tiles
    targets = torch.tensor([0, V - 1, 127, 128, 255, 256])
    padding, live = 0.0, None
    if name == "sure teacher":  # more than tau = 10 in one entry
        t[peak] += 40.0
        s[peak] -= 20.0
    elif name == "disagreeing":
        t[peak] += 6.0
    elif name == "equal":
        t = s.clone()
    elif name == "sure both":
        t[peak] += 30.0
        s[peak] += 30.0
    elif name == "padding of NaN":
        padding = math.nan
    elif name == "rows of NaN":
        live = torch.tensor([False, True, True, False, True, True])
        s[~live] = math.nan
        t[0] = math.nan
    elif name == "no live row":
        live = torch.zeros(ROWS, dtype=torch.bool)
    elif name == "masked columns":
        s[:, 5:50] = t[:, 5:50] = -math.inf
        t[:, 100:120] = -math.inf
        targets = torch.tensor([60, V - 1, 127, 128, 255, 256])
    elif name == "masked tile":
        s[:, 128:256] = t[:, 128:256] = -math.inf
        targets = torch.tensor([0, V - 1, 127, 126, 257, 256])
    elif name == "student rules out":
        t[peak] += 20.0
        s[peak] = -math.inf
    elif name == "large":
        s, t = s * 300, t * 300
    elif name == "far below zero":  # a maximum that starts at 0 would win
        s, t = s - 1e4, t - 2e4
    elif name == "shifted":
        s = s + 1234.5

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, SIZES[1] - V), value=padding).to(dtype)

    return Case(padded(s), padded(t), targets, live)


def rounding(z: Tensor, temperature: float) -> float:
    """What float32 may lose of a logit: a few units in the last place of the largest."""
    finite = z[:, :V][z[:, :V].isfinite()]
    largest = float(finite.float().abs().max()) / temperature if len(finite) else 0.0
    return 1e-6 + 4 * largest * 2**-23


STORED = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}  # relative, of a gradient that is stored
