"""Which layouts are legal, and which settings to change: everything advised was tried in the same arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.hf_mapping import ModelShape
from megatron_ext.memory import RECOMPUTE_MODES, ParallelSizes
from megatron_ext.model import ModelSettings, transformer_config
from megatron_ext.parallel import Layout
from searche1.config import Config
from searche1.planner.hardware import Assumptions, Cluster, Lengths
from searche1.planner.phases import Memory, engine_cache, longest_trajectory, memory_of, sizes_of
from searche1.planner.speed import StepTime, step_time

Changes = Mapping[str, Any]  # key -> value
SHOWN = 6  # layouts and ways to make a config fit
QUICKER_SHOWN = 3  # ways to make one that fits quicker
QUICKER = 0.97  # of the step time: less is not worth a line
NODES_TRIED = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Setting:
    """All that a judgement depends on."""

    config: Config
    shape: ModelShape
    cluster: Cluster
    guess: Assumptions
    lengths: Lengths

    def changed(self, changes: Changes) -> Setting:
        return dataclasses.replace(self, config=with_keys(self.config, changes))


@dataclass(frozen=True)
class Judgement:
    memory: Memory
    time: StepTime


def judge(setting: Setting) -> Judgement:
    """Memory and time of a legal layout."""
    memory = memory_of(setting.config, setting.shape, setting.cluster, setting.guess)
    time = step_time(setting.config, setting.shape, setting.cluster, memory.cache, setting.guess, setting.lengths)
    return Judgement(memory, time)


def with_keys(config: Config, changes: Changes) -> Config:
    """The config with dotted keys set."""
    for key, value in changes.items():
        section, name = key.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


# -- what is legal --------------------------------------------------------------------------------


def refusal(config: Config, shape: ModelShape, cluster: Cluster) -> str:
    """Why the config cannot run on these GPUs, and the way out; empty if it can."""
    return layout_refusal(config, shape, cluster) or settings_refusal(config, shape, cluster)


def layout_refusal(config: Config, shape: ModelShape, cluster: Cluster) -> str:
    """Why these GPUs cannot hold the model in the config's layout; empty if they can."""
    sizes, world = sizes_of(config, cluster.world), cluster.world
    gpus = f"{cluster.nodes} x {cluster.gpus_per_node} GPUs"
    product = sizes.tensor * sizes.pipeline * sizes.context
    if world % product:
        return (
            f"{gpus} cannot hold parallel.tensor={sizes.tensor} x parallel.pipeline={sizes.pipeline} x "
            f"parallel.context={sizes.context}; use a multiple of {product} GPUs or lower the sizes"
        )
    if sizes.tensor > cluster.gpus_per_node:
        return (
            f"parallel.tensor={sizes.tensor} would cross nodes of {cluster.gpus_per_node} GPUs, over a network many "
            f"times slower; set parallel.tensor to {cluster.gpus_per_node} or less and raise parallel.pipeline"
        )
    if sizes.optimizer_shards % sizes.expert:
        return (
            f"{sizes.optimizer_shards} replicas cannot share experts {sizes.expert}-fold; "
            f"set parallel.expert to a divisor of {sizes.optimizer_shards}"
        )
    if sizes.sequence and sizes.tensor == 1:
        return "sequence parallelism needs tensor parallelism of at least 2; set parallel.sequence=false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformer_config(shape, ModelSettings(torch.bfloat16, config.train.recompute), _layout(sizes))
    except ValueError as error:
        return str(error)
    return ""


def settings_refusal(config: Config, shape: ModelShape, cluster: Cluster) -> str:
    """What is wrong with engines or lengths, whatever the layout; empty if nothing is."""
    engine, world = config.engine, cluster.world
    if not engine.urls and (shape.num_heads % engine.tensor or cluster.gpus_per_node % engine.tensor):
        return (
            f"engine.tensor={engine.tensor} must divide the model's {shape.num_heads} attention heads and a node's "
            f"{cluster.gpus_per_node} GPUs; set engine.tensor to a divisor of both"
        )
    if not engine.urls and engine.count * engine.tensor > world:
        return (
            f"engine.count={engine.count} engines of engine.tensor={engine.tensor} need more than {world} GPUs; "
            "set engine.count=0, which takes as many as there is room for"
        )
    if longest_trajectory(config) > config.train.max_tokens:
        return (
            f"a trajectory may have {longest_trajectory(config)} tokens (rollout.max_start_tokens + "
            f"rollout.max_context_tokens) but train.max_tokens is {config.train.max_tokens}; "
            f"set train.max_tokens={longest_trajectory(config)} or more"
        )
    return ""


def _layout(sizes: ParallelSizes) -> Layout:
    """The first rank's place."""
    return Layout(
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        data=sizes.data,
        sequence=sizes.sequence,
        device=torch.device("meta"),
        rank=0,
        tensor_rank=0,
        pipeline_rank=0,
        data_rank=0,
        expert=sizes.expert,
        context=sizes.context,
    )


# -- layouts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A legal layout with the recompute mode that repeats least among those that fit, or full."""

    sizes: ParallelSizes
    engine_tensor: int
    recompute: str
    fits: bool
    fullest: float  # bytes of the fullest phase
    step_seconds: float

    @property
    def changes(self) -> dict[str, Any]:
        keys = {"engine.tensor": self.engine_tensor, "train.recompute": self.recompute}
        return {**_parallel_keys(self.sizes), **keys}


def _parallel_keys(sizes: ParallelSizes) -> dict[str, Any]:
    return {
        "parallel.tensor": sizes.tensor,
        "parallel.pipeline": sizes.pipeline,
        "parallel.context": sizes.context,
        "parallel.expert": sizes.expert,
        "parallel.sequence": sizes.sequence,
    }


def rank_layouts(setting: Setting) -> list[Candidate]:
    """Every legal layout of these GPUs: those that fit by estimated step time, then the others by what they need.

    Engines are as large as they must be to hold the model, or as the config says.
    """
    found = []
    engine = _engine_tensor(setting)
    setting = setting.changed({"engine.tensor": engine})
    for sizes in legal_layouts(setting.shape, setting.cluster):
        if layout_refusal(with_keys(setting.config, _parallel_keys(sizes)), setting.shape, setting.cluster):
            continue
        for mode in RECOMPUTE_MODES:
            judged = judge(setting.changed({**_parallel_keys(sizes), "train.recompute": mode}))
            if judged.memory.fits or mode == RECOMPUTE_MODES[-1]:
                fullest = judged.memory.fullest.total
                found.append(Candidate(sizes, engine, mode, judged.memory.fits, fullest, judged.time.total))
                break
    return sorted(
        found, key=lambda candidate: (not candidate.fits, candidate.step_seconds * candidate.fits, candidate.fullest)
    )


def _engine_tensor(setting: Setting) -> int:
    """The config's, or the smallest larger one whose GPUs hold weights and cache."""
    config, shape, cluster = setting.config, setting.shape, setting.cluster
    sizes = [n for n in _divisors(cluster.gpus_per_node) if n >= config.engine.tensor and shape.num_heads % n == 0]
    if config.engine.urls:
        return config.engine.tensor
    for tensor in sizes:
        cache = engine_cache(with_keys(config, {"engine.tensor": tensor}), shape, cluster)
        if cache.fits:
            return tensor
    return config.engine.tensor


def legal_layouts(shape: ModelShape, cluster: Cluster) -> Iterator[ParallelSizes]:
    """Sizes that divide what they must: tensor and context inside a node, tensor with sequence parallelism."""
    world = cluster.world
    tensors = [t for t in _divisors(shape.num_kv_heads) if shape.num_heads % t == 0]
    experts = _divisors(shape.num_experts) if shape.num_experts else [1]
    for tensor, pipeline, context, expert in itertools.product(
        tensors, _divisors(shape.num_layers), (1, 2, 4, 8), experts
    ):
        if tensor * context > cluster.gpus_per_node or world % (tensor * pipeline * context):
            continue
        if world // (tensor * pipeline) % expert:
            continue
        yield ParallelSizes(world, tensor, pipeline, context, expert, tensor > 1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# -- what to change -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    changes: dict[str, Any]
    fullest: float  # bytes of the fullest phase afterwards
    cache_tokens: int  # of an engine afterwards, 0 if engines are elsewhere
    step_seconds: float
    nodes: int  # on so many nodes


def advise(setting: Setting) -> list[Advice]:
    """Settings that make a legal config fit, or that make one that fits quicker; the quickest first.

    To fit, one change where one is enough, else two, else a whole layout, else the fewest nodes on which one fits.
    """
    now = judge(setting)
    single = _tried(setting, [[move] for move in _moves(setting)])
    if single and not now.memory.fits:
        return single[:SHOWN]
    pairs = _tried(setting, [list(pair) for pair in itertools.combinations(_moves(setting), 2)])
    if not now.memory.fits:
        return pairs[:SHOWN] or advise_layout(setting)
    found: list[Advice] = []
    for advice in single + pairs:
        # A second change must be worth it, beside each of the two alone.
        parts = [other.step_seconds for other in found if other.changes.items() <= advice.changes.items()]
        if advice.step_seconds < QUICKER * min([now.time.total, *parts]):
            found.append(advice)
    return sorted(found, key=lambda advice: advice.step_seconds)[:QUICKER_SHOWN]


def advise_layout(setting: Setting) -> list[Advice]:
    """The best layout that fits, on these GPUs or on the fewest nodes on which one does; [] if there is none."""
    for nodes in sorted({setting.cluster.nodes, *(n for n in NODES_TRIED if n > setting.cluster.nodes)}):
        larger = dataclasses.replace(setting, cluster=dataclasses.replace(setting.cluster, nodes=nodes))
        ranked = rank_layouts(larger)
        if ranked and ranked[0].fits:
            best = ranked[0]
            changes = {key: value for key, value in best.changes.items() if value != _value(setting.config, key)}
            return [Advice(changes, best.fullest, _cache_tokens(larger.changed(changes)), best.step_seconds, nodes)]
    return []


def _cache_tokens(setting: Setting) -> int:
    cache = judge(setting).memory.cache
    return cache.tokens if cache else 0


def _tried(setting: Setting, combinations: list[list[Changes]]) -> list[Advice]:
    """Those that are legal and fit, the quickest first; of changes to one key alone the quickest only."""
    best: dict[tuple[str, ...], Advice] = {}
    for combination in combinations:
        changes = {key: value for move in combination for key, value in move.items()}
        if len(changes) < sum(len(move) for move in combination):
            continue  # two values of one key
        tried = setting.changed(changes)
        if refusal(tried.config, tried.shape, tried.cluster):
            continue
        judged = judge(tried)
        if not judged.memory.fits:
            continue
        cache = judged.memory.cache
        found = Advice(
            changes,
            judged.memory.fullest.total,
            cache.tokens if cache else 0,
            judged.time.total,
            setting.cluster.nodes,
        )
        keys = tuple(sorted(changes))
        if keys not in best or found.step_seconds < best[keys].step_seconds:
            best[keys] = found
    return sorted(best.values(), key=lambda advice: advice.step_seconds)


def _moves(setting: Setting) -> list[Changes]:
    """Single changes worth trying, the current values left out."""
    config, shape = setting.config, setting.shape
    longest = longest_trajectory(config)
    budgets = sorted({longest, *range(8192, 65537, 4096)}, reverse=True)
    moves: list[dict[str, Any]] = [
        *({"train.recompute": mode} for mode in RECOMPUTE_MODES),
        *({"train.max_tokens": tokens} for tokens in budgets if tokens >= longest),
        *({"opsd.max_teacher_tokens": tokens} for tokens in (8192, 6144) if tokens < config.opsd.max_teacher_tokens),
        *({"train.logits_chunk": rows} for rows in (2048, 1024, 512, 256)),
        *({"engine.mem_fraction": percent / 100} for percent in range(90, 15, -5)),
        *({"engine.tensor": tensor} for tensor in (1, 2, 4, 8)),
        *({"parallel.pipeline": stages} for stages in _divisors(shape.num_layers) if stages <= setting.cluster.world),
        *({"parallel.context": ranks} for ranks in (1, 2, 4)),
        {"train.distributed_optimizer": True},
    ]
    for tensor in (1, 2, 4, 8):
        moves.append({"parallel.tensor": tensor, "parallel.sequence": tensor > 1})
    if shape.num_experts:
        moves += [{"parallel.expert": ranks} for ranks in _divisors(shape.num_experts)]
    if config.train.offload == "never":
        moves.append({"train.offload": "auto"})
    if config.train.loss_mode == "materialized":
        moves.append({"train.loss_mode": "chunked"})
    kept: list[Changes] = []
    for move in moves:
        changed = {key: value for key, value in move.items() if _value(config, key) != value}
        if changed:
            kept.append(changed)
    return kept


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
