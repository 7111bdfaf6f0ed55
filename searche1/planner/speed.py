"""How long a step takes, from FLOPs and bytes at assumed shares of the vendor's peaks. An estimate, nothing measured.

Parts add up as if nothing overlapped. Waiting for the retriever is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.flops import head_flops, layer_flops
from megatron_ext.hf_mapping import ModelShape
from megatron_ext.memory import (
    ParallelSizes,
    Parameters,
    adam_bytes,
    engine_weight_bytes,
    kv_bytes,
    model_parameters,
    stage_parameters,
)
from searche1.config import Config
from searche1.planner.hardware import Assumptions, Cluster, Lengths
from searche1.planner.phases import Cache, dtype_bytes, is_offloaded, sizes_of


@dataclass(frozen=True)
class Duration:
    name: str
    seconds: float


@dataclass(frozen=True)
class StepTime:
    parts: tuple[Duration, ...]  # of a GRPO step
    opsd_update: float  # seconds
    sequences: int
    updates: int

    @property
    def total(self) -> float:
        return sum(part.seconds for part in self.parts)


@dataclass(frozen=True)
class _Rates:
    """Bytes and FLOPs a second of one GPU, as assumed."""

    flops: float
    memory: float
    nvlink: float
    network: float
    host: float


def _rates(cluster: Cluster, guess: Assumptions) -> _Rates:
    gpu = cluster.gpu
    return _Rates(
        flops=gpu.flops * guess.train_share,
        memory=gpu.memory_rate * guess.decode_share,
        nvlink=gpu.nvlink_rate / 2 * guess.nvlink_share,  # one direction
        network=gpu.network_rate * guess.network_share,
        host=gpu.host_rate * guess.host_share,
    )


def step_time(
    config: Config, shape: ModelShape, cluster: Cluster, cache: Cache | None, guess: Assumptions, lengths: Lengths
) -> StepTime:
    sizes, rates, b = sizes_of(config, cluster.world), _rates(cluster, guess), dtype_bytes(config)
    sequences = config.grpo.prompts_per_step * config.rollout.group_size
    per_update = config.grpo.mini_batch_size or sequences
    updates = max(1, sequences // per_update)
    forward = _pass_time(config, shape, sizes, cluster, rates, lengths, per_update, is_training=False)
    training = _pass_time(config, shape, sizes, cluster, rates, lengths, per_update, is_training=True)
    held = max((stage_parameters(shape, sizes, s) for s in range(sizes.pipeline)), key=lambda held: held.total)
    weights = held.total * b
    share, state = _optimizer_share(config, sizes, held), adam_bytes(b)
    parts = []
    if cache is not None:
        parts += _rollout_parts(config, shape, cluster, cache, guess, lengths)
    if is_offloaded(config):
        parts.append(Duration("trainer state to the host and back", 2 * (weights + state * share) / rates.host))
    if updates > 1:  # the first update finds its own
        parts.append(Duration("old logprobs", (updates - 1) * forward))
    if config.grpo.kl_coef:
        # The own weights go to the host, the reference's come, the own come back.
        parts.append(Duration("reference logprobs", updates * forward + 3 * weights / rates.host))
    parts += [
        Duration(f"{updates} updates, forward and backward", updates * training),
        Duration(
            "gradients and weights between replicas", updates * _replica_time(config, sizes, cluster, rates, held)
        ),
        Duration("Adam", updates * share * (4 + 2 * state + b) / rates.memory),
        Duration("weight sync", _sync_time(shape, sizes, cluster, rates, b)),
    ]
    return StepTime(tuple(parts), _opsd_time(config, shape, sizes, cluster, rates, lengths), sequences, updates)


# -- training -------------------------------------------------------------------------------------


def _pass_time(
    config: Config,
    shape: ModelShape,
    sizes: ParallelSizes,
    cluster: Cluster,
    rates: _Rates,
    lengths: Lengths,
    sequences: int,
    *,
    is_training: bool,
) -> float:
    """One pass over a mini-batch, the pipeline's idle ends and the messages of its layers included."""
    tokens = sequences * lengths.total
    full = config.train.recompute == "full"
    repeats = (4 if full else 3) if is_training else 1  # backward is twice a forward
    flops = repeats * layer_flops(shape, tokens, lengths.total)
    flops += (3 if is_training else 1) * head_flops(shape, sequences * lengths.policy)
    # A replica has at least one micro-batch, and one of less than a sequence there is none.
    replica_tokens = max(tokens / sizes.data, lengths.total)
    busy = replica_tokens * sizes.data / tokens
    micro_batches = max(1.0, replica_tokens / config.train.max_tokens)
    idle = (micro_batches + sizes.pipeline - 1) / micro_batches
    messages = _layer_messages(config, shape, sizes, cluster, rates, replica_tokens, is_training=is_training)
    return (flops / (cluster.world * rates.flops) * busy + messages) * idle


def _layer_messages(
    config: Config,
    shape: ModelShape,
    sizes: ParallelSizes,
    cluster: Cluster,
    rates: _Rates,
    replica_tokens: float,
    *,
    is_training: bool,
) -> float:
    """Seconds that the ranks of a replica exchange activations, keys and values, and experts' tokens."""
    b, layers = dtype_bytes(config), shape.num_layers / sizes.pipeline
    full = config.train.recompute == "full"
    tokens = replica_tokens / sizes.context
    seconds = 0.0
    if sizes.tensor > 1:
        # Two gathers and two scatters a forward, as many and two gathers again a backward.
        operations = 4 + (6 + (4 if full else 0)) * is_training
        size = tokens * shape.hidden_size * b * (sizes.tensor - 1) / sizes.tensor
        seconds += layers * operations * size / rates.nvlink
    if sizes.context > 1:
        keys = 2 * shape.num_kv_heads * shape.head_dim / sizes.tensor
        passes = 1 + (1 + full) * is_training
        rate = rates.nvlink if sizes.tensor * sizes.context <= cluster.gpus_per_node else rates.network
        seconds += layers * passes * replica_tokens * keys * b * (sizes.context - 1) / sizes.context / rate
    if sizes.expert > 1:
        passes = 1 + (1 + full) * is_training
        size = 2 * shape.experts_per_token * tokens * shape.hidden_size * b / sizes.tensor
        rate = rates.nvlink if sizes.tensor * sizes.expert <= cluster.gpus_per_node else rates.network
        seconds += layers * passes * size * (sizes.expert - 1) / sizes.expert / rate
    return seconds


def _optimizer_share(config: Config, sizes: ParallelSizes, held: Parameters) -> float:
    """Elements that a rank's Adam updates: it reads gradient, moments and main weight and writes the last three."""
    if not config.train.distributed_optimizer:
        return held.total
    return held.dense / sizes.optimizer_shards + held.expert / sizes.expert_shards


def _replica_time(config: Config, sizes: ParallelSizes, cluster: Cluster, rates: _Rates, held: Parameters) -> float:
    """An update's reduce-scatter of float32 gradients and all-gather of weights."""
    stage = cluster.world // sizes.pipeline  # GPUs that hold one: neighbours
    rate = rates.nvlink if stage <= cluster.gpus_per_node else rates.network
    moved = held.dense * (1 - 1 / sizes.optimizer_shards) + held.expert * (1 - 1 / sizes.expert_shards)
    return moved * (4 + dtype_bytes(config)) / rate


def _sync_time(shape: ModelShape, sizes: ParallelSizes, cluster: Cluster, rates: _Rates, b: int) -> float:
    """Every rank gathers the whole model, from other nodes if its pipeline crosses them."""
    whole = model_parameters(shape) * b
    return whole / (rates.network if sizes.pipeline > 1 and cluster.nodes > 1 else rates.nvlink)


def _opsd_time(
    config: Config, shape: ModelShape, sizes: ParallelSizes, cluster: Cluster, rates: _Rates, lengths: Lengths
) -> float:
    """An update: teacher rows without gradient, then the student. Frozen weights cost no product for a gradient."""
    pairs = max(config.opsd.pairs_per_step, sizes.data)
    student = pairs * lengths.total
    teacher = student + pairs * (lengths.policy + lengths.observations)
    repeats = 3 if config.train.recompute == "full" else 2
    flops = layer_flops(shape, teacher, teacher / pairs) + repeats * layer_flops(shape, student, lengths.total)
    flops += 3 * head_flops(shape, pairs * lengths.policy)
    messages = _layer_messages(config, shape, sizes, cluster, rates, teacher / sizes.data, is_training=False)
    messages += _layer_messages(config, shape, sizes, cluster, rates, student / sizes.data, is_training=True)
    micro_batches = max(1.0, teacher / sizes.data / max(config.train.max_tokens, config.opsd.max_teacher_tokens))
    return (flops / (cluster.world * rates.flops) + messages) * (micro_batches + sizes.pipeline - 1) / micro_batches


# -- rollouts -------------------------------------------------------------------------------------


def running_together(config: Config, cache: Cache, lengths: Lengths) -> float:
    """Trajectories that an engine decodes at once, at mean length."""
    sequences = config.grpo.prompts_per_step * config.rollout.group_size / cache.engines
    room = max(1.0, cache.tokens / lengths.total)
    return max(1.0, min(sequences, config.engine.max_running, config.rollout.max_in_flight, room))


def _rollout_parts(
    config: Config, shape: ModelShape, cluster: Cluster, cache: Cache, guess: Assumptions, lengths: Lengths
) -> list[Duration]:
    b, tensor, rates = dtype_bytes(config), config.engine.tensor, _rates(cluster, guess)
    groups = config.grpo.prompts_per_step / cache.engines
    sequences = groups * config.rollout.group_size
    together = running_together(config, cache, lengths)
    # A step of decoding reads the weights that its tokens meet, and every sequence's keys and values so far.
    read = engine_weight_bytes(shape, tensor, b) * _share_read(shape, together)
    read += together * lengths.total / 2 * kv_bytes(shape, tensor, b)
    flops = together * (layer_flops(shape, 1, lengths.total) + head_flops(shape, 1)) / tensor
    step = max(read / rates.memory, flops / (cluster.gpu.flops * guess.prefill_share))
    decoding = sequences * lengths.policy / together * step
    # The prefix cache keeps a group's prompt and every turn so far.
    new = groups * lengths.prompt_tokens + sequences * lengths.observations
    reading = layer_flops(shape, new, lengths.total) / (tensor * cluster.gpu.flops * guess.prefill_share)
    return [
        Duration("rollout: writing", guess.tail * decoding),
        Duration("rollout: reading prompts and passages", guess.tail * reading),
    ]


def _share_read(shape: ModelShape, tokens: float) -> float:
    """Of the weights, by a step of so many tokens: all, but only the experts that one of them chose."""
    if not shape.num_experts:
        return 1.0
    matrices = 3 * shape.hidden_size * shape.expert_ffn_size
    experts = shape.num_layers * shape.num_experts * matrices / model_parameters(shape)
    met = 1 - (1 - shape.experts_per_token / shape.num_experts) ** tokens
    return 1 - experts + experts * met
