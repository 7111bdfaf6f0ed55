"""What the GPUs are said to do, and everything else that a plan takes for granted: it is printed with every plan."""

from __future__ import annotations

from dataclasses import dataclass

from searche1.types import UserError


@dataclass(frozen=True)
class Gpu:
    """Vendor's peaks of the SXM module. Bytes and bytes a second."""

    name: str
    memory: float  # nominal; what a card shows beyond it is left to the allocator's gaps
    flops: float  # dense bfloat16, a second
    memory_rate: float
    nvlink_rate: float  # both directions together
    network_rate: float  # one direction, of a GPU's own adapter: 400 Gb/s, or 200 Gb/s for A100
    host_rate: float  # one direction, PCIe x16


GPUS = {
    "a100": Gpu("A100 80GB", 80e9, 312e12, 2.039e12, 600e9, 25e9, 32e9),
    "h100": Gpu("H100 80GB", 80e9, 989e12, 3.35e12, 900e9, 50e9, 64e9),
    "h800": Gpu("H800 80GB", 80e9, 989e12, 3.35e12, 400e9, 50e9, 64e9),
    "h200": Gpu("H200 141GB", 141e9, 989e12, 4.8e12, 900e9, 50e9, 64e9),
}


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


def cluster(name: str, *, nodes: int, gpus_per_node: int) -> Cluster:
    """Raises UserError for a GPU that is not known, or fewer than one of anything."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu must be one of {', '.join(GPUS)}, got {name!r}; take the one nearest to yours")
    if nodes < 1 or gpus_per_node < 1:
        raise UserError(f"--nodes and --gpus-per-node must be 1 or more, got {nodes} and {gpus_per_node}")
    return Cluster(GPUS[name.lower()], nodes, gpus_per_node)


@dataclass(frozen=True)
class Assumptions:
    """Guesses, not measurements: no GPU has run any of this. Shares are of the vendor's peak."""

    train_share: float = 0.40  # of the FLOPs in training and in passes without gradient
    prefill_share: float = 0.40  # of the FLOPs when an engine reads prompts and passages
    decode_share: float = 0.50  # of the memory rate when an engine writes tokens
    nvlink_share: float = 0.70
    network_share: float = 0.70
    host_share: float = 0.60
    tail: float = 1.5  # a rollout lasts so much longer than with all engines busy to the end
    context_bytes: float = 2.0e9  # CUDA context, NCCL and cuBLAS of a trainer rank
    asleep_bytes: float = 1.5e9  # CUDA context and graphs of an engine that sleeps
    engine_work_bytes: float = 3.0e9  # activations and graphs of an engine beside its weights and cache
    index_bytes: float = 64.6e9  # wiki-18 in a Flat E5 index, if the index is not on this machine


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of a trajectory in tokens: what speed depends on, and what only a run can tell."""

    turns: float = 3.0  # generations; all but the last search
    turn_tokens: float = 120.0  # the policy writes in one
    observation_tokens: float = 450.0
    prompt_tokens: float = 250.0

    def __post_init__(self) -> None:
        if self.turns < 1 or min(self.turn_tokens, self.observation_tokens, self.prompt_tokens) <= 0:
            raise UserError(
                f"mean lengths must be positive and --mean-turns at least 1, got {self.turns:g} turns of "
                f"{self.turn_tokens:g} tokens, observations of {self.observation_tokens:g}, "
                f"prompts of {self.prompt_tokens:g}"
            )

    @property
    def policy(self) -> float:
        return self.turns * self.turn_tokens

    @property
    def observations(self) -> float:
        return (self.turns - 1) * self.observation_tokens

    @property
    def total(self) -> float:
        return self.prompt_tokens + self.policy + self.observations
