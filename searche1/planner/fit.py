"""Settings that a config may leave to the memory of the GPU: recompute mode and tokens of a micro-batch."""

from __future__ import annotations

import dataclasses

from megatron_ext.hf_mapping import ModelShape
from megatron_ext.memory import RECOMPUTE_MODES
from searche1.config import Config
from searche1.planner.hardware import Assumptions, Cluster
from searche1.planner.phases import longest_trajectory, memory_of

STEP = 1024  # tokens
MOST_TOKENS = 32_768  # of a micro-batch that is chosen: larger ones are no faster
GOOD_PACK = 2  # longest trajectories that a pack should hold before recompute is tried
WITHOUT_GPU = ("none", 16_384)


def leaves_open(config: Config) -> bool:
    """Whether anything is left to be chosen."""
    return config.train.recompute == "auto" or config.train.max_tokens == 0


def with_train(config: Config, *, recompute: str, max_tokens: int) -> Config:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, recompute=recompute, max_tokens=max_tokens)
    )


def with_least_memory(config: Config) -> Config:
    """With what is left open as a GPU needs least of: full recompute, one longest trajectory."""
    train = config.train
    return with_train(
        config,
        recompute=RECOMPUTE_MODES[-1] if train.recompute == "auto" else train.recompute,
        max_tokens=train.max_tokens or _least_tokens(config),
    )


def _least_tokens(config: Config) -> int:
    return -(-longest_trajectory(config) // STEP) * STEP


def fit_to_gpu(config: Config, shape: ModelShape, cluster: Cluster, guess: Assumptions) -> Config:
    """The config with `train.recompute=auto` and `train.max_tokens=0` replaced by what the GPU holds.

    The mode that repeats least, with a pack of at least two longest trajectories; both training phases must fit. Where
    nothing does, the least that can run. The layout must be one that the GPUs can hold.
    """
    train = config.train
    modes = RECOMPUTE_MODES if train.recompute == "auto" else (train.recompute,)
    least = _least_tokens(config)

    def fits(mode: str, tokens: int) -> bool:
        memory = memory_of(with_train(config, recompute=mode, max_tokens=tokens), shape, cluster, guess)
        return all(phase.fits for phase in memory.phases if phase.name.startswith("train"))

    fallback = with_least_memory(config)
    for mode in modes:
        sizes = [train.max_tokens] if train.max_tokens else range(max(MOST_TOKENS, least), least - 1, -STEP)
        tokens = next((size for size in sizes if fits(mode, size)), 0)
        if tokens and (train.max_tokens or tokens >= min(GOOD_PACK * least, MOST_TOKENS)):
            return with_train(config, recompute=mode, max_tokens=tokens)
        if tokens:
            fallback = with_train(config, recompute=mode, max_tokens=tokens)
    return fallback
