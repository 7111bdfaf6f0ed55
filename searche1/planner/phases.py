"""Memory of the fullest GPU in each phase of a round, part by part, and of the host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.hf_mapping import ModelShape, padded_vocab_size
from megatron_ext.memory import (
    HeadPass,
    ModelState,
    ParallelSizes,
    TrainingPass,
    activation_bytes,
    adam_bytes,
    engine_weight_bytes,
    head_bytes,
    kv_bytes,
    largest_tensor,
    model_state,
    stage_parameters,
)
from searche1.config import Config
from searche1.planner.hardware import Assumptions, Cluster


@dataclass(frozen=True)
class Part:
    name: str
    bytes: float


@dataclass(frozen=True)
class Phase:
    """One GPU of the pipeline stage that needs most."""

    name: str
    stage: int
    parts: tuple[Part, ...]
    available: float  # bytes of the GPU

    @property
    def total(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.total <= self.available


@dataclass(frozen=True)
class Cache:
    """The key-value cache of one engine."""

    engines: int
    tokens: int  # fewer than none: the weights alone take more than mem_fraction
    longest: int  # tokens of the longest sequence that an engine must hold
    trajectory: int  # tokens of a full-length trajectory

    @property
    def fits(self) -> bool:
        return self.tokens >= self.longest


@dataclass(frozen=True)
class Memory:
    phases: tuple[Phase, ...]
    cache: Cache | None  # None: the engines run elsewhere
    host: tuple[Part, ...]  # of the node that runs the retriever

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases) and (self.cache is None or self.cache.fits)

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def dtype_bytes(config: Config) -> int:
    """Of the weights that are trained; a GPU's default is bfloat16."""
    return 4 if config.train.dtype == "float32" else 2


def sizes_of(config: Config, world: int) -> ParallelSizes:
    parallel = config.parallel
    return ParallelSizes(
        world=world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        expert=parallel.expert,
        sequence=parallel.sequence,
    )


def is_offloaded(config: Config) -> bool:
    """Whether trainer and engines take turns on the GPUs."""
    return config.train.offload != "never" and not config.engine.urls


def longest_trajectory(config: Config) -> int:
    return config.rollout.max_start_tokens + config.rollout.max_context_tokens


def memory_of(config: Config, shape: ModelShape, cluster: Cluster, guess: Assumptions) -> Memory:
    """Every phase of a legal layout: exact where tensors are known, assumed where a library decides."""
    sizes = sizes_of(config, cluster.world)
    cache = None if config.engine.urls else engine_cache(config, shape, cluster)
    phases = [
        *([] if cache is None else [_rollout(config, shape, sizes, cluster, guess)]),
        _training(config, shape, sizes, cluster, guess, lora_rank=0),
        _training(config, shape, sizes, cluster, guess, lora_rank=config.opsd.lora_rank),
        _sync(config, shape, sizes, cluster, guess),
    ]
    return Memory(tuple(phases), cache, _host(config, shape, sizes, cluster, guess))


def _heaviest(name: str, by_stage: list[list[Part]], cluster: Cluster) -> Phase:
    stage = max(range(len(by_stage)), key=lambda s: sum(part.bytes for part in by_stage[s]))
    parts = tuple(part for part in by_stage[stage] if part.bytes)
    return Phase(name, stage, parts, cluster.gpu.memory)


def _state(config: Config, shape: ModelShape, sizes: ParallelSizes, stage: int, lora_rank: int = 0) -> ModelState:
    return model_state(
        shape,
        sizes,
        stage,
        dtype_bytes=dtype_bytes(config),
        distributed_optimizer=config.train.distributed_optimizer,
        lora_rank=lora_rank,
    )


def engine_cache(config: Config, shape: ModelShape, cluster: Cluster) -> Cache:
    """What is left of `engine.mem_fraction` beside an engine's weights."""
    engine, rollout = config.engine, config.rollout
    weights = engine_weight_bytes(shape, engine.tensor, dtype_bytes(config))
    free = engine.mem_fraction * cluster.gpu.memory - weights
    tokens = int(free // kv_bytes(shape, engine.tensor, dtype_bytes(config)))
    return Cache(
        engines=engine.count or max(1, cluster.world // engine.tensor),
        tokens=min(tokens, engine.max_total_tokens or tokens),
        longest=max(longest_trajectory(config), config.opsd.max_teacher_tokens) + rollout.max_response_tokens,
        trajectory=longest_trajectory(config),
    )


def _awake(config: Config, shape: ModelShape, cluster: Cluster, guess: Assumptions) -> list[Part]:
    """An engine with its cache on a GPU."""
    weights = engine_weight_bytes(shape, config.engine.tensor, dtype_bytes(config))
    return [
        Part("engine weights", weights),
        Part("key-value cache", max(0.0, config.engine.mem_fraction * cluster.gpu.memory - weights)),
        Part("engine's work (assumed)", guess.engine_work_bytes),
    ]


def _beside(config: Config, shape: ModelShape, cluster: Cluster, guess: Assumptions) -> list[Part]:
    """What an engine keeps while the trainer works."""
    if config.engine.urls:
        return []
    if not is_offloaded(config):
        return _awake(config, shape, cluster, guess)
    return [Part("engine asleep (assumed)", guess.asleep_bytes)]


def _rollout(config: Config, shape: ModelShape, sizes: ParallelSizes, cluster: Cluster, guess: Assumptions) -> Phase:
    by_stage = []
    for stage in range(sizes.pipeline):
        parts = [*_awake(config, shape, cluster, guess), Part("CUDA, NCCL (assumed)", guess.context_bytes)]
        if not is_offloaded(config):
            parts += _state_parts(_state(config, shape, sizes, stage))
        by_stage.append(parts)
    return _heaviest("rollout", by_stage, cluster)


def _state_parts(state: ModelState) -> list[Part]:
    return [
        Part("weights", state.weights),
        Part("gradients", state.gradients),
        Part("Adam, main weights", state.optimizer),
    ]


def _training(
    config: Config, shape: ModelShape, sizes: ParallelSizes, cluster: Cluster, guess: Assumptions, *, lora_rank: int
) -> Phase:
    """GRPO trains every weight, OPSD adapters of `lora_rank` with teacher rows beside."""
    train, b = config.train, dtype_bytes(config)
    tokens = max(train.max_tokens, config.opsd.max_teacher_tokens) if lora_rank else train.max_tokens
    settings = TrainingPass(train.recompute, b, lora_rank)
    head = HeadPass(train.loss_mode, train.logits_chunk, b)
    by_stage = []
    for stage in range(sizes.pipeline):
        state = _state(config, shape, sizes, stage, lora_rank)
        found = activation_bytes(shape, sizes, settings, tokens=tokens, stage=stage)
        loss, teacher = 0.0, 0.0
        if stage == sizes.pipeline - 1:
            rows = tokens // sizes.context
            loss = head_bytes(shape, sizes, head, rows=rows, is_pair=bool(lora_rank), is_trained=not lora_rank)
            teacher = _teacher_bytes(config, shape, sizes) if lora_rank else 0.0
        # Once the activations of a micro-batch are gone there is room for the embedding's gradient, and for the float32
        # tensor that torch's own Adam holds of its share.
        room = found.saved / (sizes.pipeline - stage)
        embedding = 0 if lora_rank else _embedding_gradient(shape, sizes, stage) * b
        late = max(embedding, state.optimizer / adam_bytes(b) * 4) - room
        busy = max(found.work, loss, late)
        by_stage.append(
            [
                *_state_parts(state),
                Part("activations", found.saved),
                Part("layer, loss at work", busy),
                Part("teacher rows", teacher),
                Part("CUDA, NCCL (assumed)", guess.context_bytes),
                *_beside(config, shape, cluster, guess),
            ]
        )
    return _heaviest("train OPSD" if lora_rank else "train GRPO", by_stage, cluster)


def _embedding_gradient(shape: ModelShape, sizes: ParallelSizes, stage: int) -> int:
    """Elements, before they are added to the float32 sum."""
    return padded_vocab_size(shape.vocab_size, sizes.tensor) // sizes.tensor * shape.hidden_size if stage == 0 else 0


def _teacher_bytes(config: Config, shape: ModelShape, sizes: ParallelSizes) -> float:
    """Hidden states of the teacher's rows of a whole update, at the longest."""
    rollout = config.rollout
    rows = min((rollout.max_searches + 1) * rollout.max_response_tokens, rollout.max_context_tokens)
    pairs = -(-config.opsd.pairs_per_step // sizes.data)
    return pairs * rows * shape.hidden_size * dtype_bytes(config)


def _sync(config: Config, shape: ModelShape, sizes: ParallelSizes, cluster: Cluster, guess: Assumptions) -> Phase:
    b = dtype_bytes(config)
    largest = largest_tensor(shape) * b
    by_stage = []
    for stage in range(sizes.pipeline):
        parts = [
            Part("weights", _state(config, shape, sizes, stage, config.opsd.lora_rank).weights),
            Part("two buckets", 2 * config.engine.sync_bucket_mb * 2**20),
            Part("largest tensor, gathered", largest * (2 if sizes.tensor > 1 else 1)),
            Part("CUDA, NCCL (assumed)", guess.context_bytes),
        ]
        if not is_offloaded(config):
            grpo = _state(config, shape, sizes, stage)
            parts += [Part("gradients", grpo.gradients), Part("Adam, main weights", grpo.optimizer)]
            parts += _beside(config, shape, cluster, guess)
        elif not config.engine.urls:  # awake, but for its cache
            weights = engine_weight_bytes(shape, config.engine.tensor, b)
            parts += [Part("engine weights", weights), Part("engine asleep (assumed)", guess.asleep_bytes)]
        by_stage.append(parts)
    return _heaviest("sync", by_stage, cluster)


def _host(
    config: Config, shape: ModelShape, sizes: ParallelSizes, cluster: Cluster, guess: Assumptions
) -> tuple[Part, ...]:
    """Of the node that runs the retriever; its GPUs are taken for the fullest ones."""
    stage = max(range(sizes.pipeline), key=lambda s: stage_parameters(shape, sizes, s).total)
    state = _state(config, shape, sizes, stage)
    ranks = cluster.gpus_per_node
    parts = []
    if is_offloaded(config):
        parts.append(Part("trainer state during rollouts, pinned", ranks * (state.weights + state.optimizer)))
    if config.grpo.kl_coef:
        parts.append(Part("reference policy of GRPO and one copy", ranks * 2 * state.weights))
    if not config.retriever.url:
        parts.append(_index(config, guess))
    return tuple(parts)


def _index(config: Config, guess: Assumptions) -> Part:
    index = Path(config.retriever.index)
    if config.retriever.index and index.exists():
        files = [index] if index.is_file() else [path for path in index.rglob("*") if path.is_file()]
        return Part(f"retriever's index {index}", sum(path.stat().st_size for path in files))
    return Part("retriever's index (assumed: wiki-18, Flat)", guess.index_bytes)
