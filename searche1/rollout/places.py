"""Where engines run: beside the trainer's ranks, on all nodes."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from searche1.types import UserError


@dataclass(frozen=True)
class EnginePlace:
    """One engine, the ranks whose GPUs it shares, and the first of them, which starts it and talks to it."""

    number: int
    lead: int
    sources: tuple[int, ...]  # for each rank of the engine, the trainer's rank that hands it its weights
    device: str  # "cpu", or the first of its GPUs on its node: "cuda:4"


def engine_places(
    *, count: int, tensor: int, device: str, world_size: int, ranks_per_node: int
) -> tuple[EnginePlace, ...]:
    """Engines of `tensor` GPUs each, in the order of ranks; a count of 0 is as many as fit, or one on a CPU.

    Raises UserError if they do not fit.
    """
    if device == "cpu":
        places = []
        for number in range(count or 1):
            lead = number % world_size
            places.append(EnginePlace(number, lead, (lead,) * tensor, "cpu"))
        return tuple(places)
    if ranks_per_node % tensor:
        raise UserError(
            f"engine.tensor={tensor} does not divide the {ranks_per_node} GPUs of a node, and an engine lives on one "
            "node; choose a divisor"
        )
    most = world_size // tensor
    if count > most:
        raise UserError(
            f"engine.count={count} engines of engine.tensor={tensor} GPUs do not fit the job's {world_size} GPUs; "
            f"lower it to {most} or less, or 0 for as many as fit"
        )
    return tuple(
        EnginePlace(
            number=number,
            lead=number * tensor,
            sources=tuple(range(number * tensor, (number + 1) * tensor)),
            device=f"cuda:{number * tensor % ranks_per_node}",
        )
        for number in range(count or most)
    )


def own_address() -> str:
    """Where the other ranks reach this node: the loopback if all ranks are on it."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        return "127.0.0.1"
    # Which of the node's addresses leads to the master; a datagram socket sends nothing by being connected.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        return probe.getsockname()[0]
