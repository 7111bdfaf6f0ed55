"""How many bytes a rank needs, from the numbers of the model and of the layout: arithmetic, nothing is allocated.

Parameters are counted over the same rules that build and load the model. What a layer saves for backward is the list
of tensors that Megatron's local layers save, checked against measurements in tests/unit/test_planner.py.
Symbols: H hidden size, F feed-forward size, q and k sizes of all query and all key heads, d head size, V vocabulary,
T tensor-, P pipeline-, C context- and E expert-parallel ranks, b bytes of the training type.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

from megatron_ext.hf_mapping import (
    EMBEDDING,
    FINAL,
    HEAD,
    ModelShape,
    Rule,
    hf_size,
    layer_rules,
    model_rules,
    padded_vocab_size,
)

RECOMPUTE_MODES = ("none", "selective", "full")  # the cheapest first
GRADIENT_BYTES = 4  # gradients are summed in float32
MOMENT_BYTES = 8  # Adam's two, float32


@dataclass(frozen=True)
class ParallelSizes:
    """How `world` ranks share a model. Their product with the data-parallel size is `world`."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def optimizer_shards(self) -> int:
        """Ranks that hold the same weights, experts apart: the sharded optimizer divides its state over them."""
        return self.data * self.context

    @property
    def expert_shards(self) -> int:
        return self.optimizer_shards // self.expert


@dataclass(frozen=True)
class Parameters:
    """Elements on one rank."""

    dense: int
    expert: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.expert


@functools.cache
def stage_parameters(shape: ModelShape, sizes: ParallelSizes, stage: int) -> Parameters:
    """What a rank of a pipeline stage holds, vocabulary padding and the copy of a tied embedding included."""
    experts = range(shape.num_experts // sizes.expert)
    layers = shape.num_layers // sizes.pipeline
    dense = expert = 0
    for rule in layer_rules(shape, 0, experts=experts):
        if rule.is_expert:
            expert += layers * _shard_elements(rule, shape, sizes)
        else:
            dense += layers * _shard_elements(rule, shape, sizes)
    is_last = stage == sizes.pipeline - 1
    if stage == 0:
        dense += _shard_elements(EMBEDDING, shape, sizes)
    if is_last:
        dense += sum(_shard_elements(rule, shape, sizes) for rule in FINAL)
        if not shape.tied_embeddings or sizes.pipeline > 1:
            dense += _shard_elements(HEAD, shape, sizes)
    return Parameters(dense, expert)


def _shard_elements(rule: Rule, shape: ModelShape, sizes: ParallelSizes) -> int:
    if rule.layout == "vocab":
        return padded_vocab_size(shape.vocab_size, sizes.tensor) // sizes.tensor * shape.hidden_size
    whole = sum(prod(hf_size(name, shape)) for name in rule.hf)
    return whole if rule.layout == "replicated" else whole // sizes.tensor


@functools.cache
def model_parameters(shape: ModelShape) -> int:
    """Elements of the whole model, as its folder stores it."""
    return sum(prod(hf_size(name, shape)) for rule in model_rules(shape) for name in rule.hf)


@functools.cache
def largest_tensor(shape: ModelShape) -> int:
    """Elements of the largest tensor of the model's folder."""
    return max(prod(hf_size(name, shape)) for rule in model_rules(shape) for name in rule.hf)


@functools.cache
def active_parameters(shape: ModelShape) -> int:
    """Elements that one token meets in the layers: all but the experts that are not chosen."""
    chosen = layer_rules(shape, 0, experts=range(shape.experts_per_token))
    return shape.num_layers * sum(prod(hf_size(name, shape)) for rule in chosen for name in rule.hf)


def lora_parameters(shape: ModelShape, sizes: ParallelSizes, rank: int) -> Parameters:
    """Adapter elements on a rank of any stage: seven projections a layer, attention's four beside experts."""
    hidden, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    tensor = sizes.tensor
    # Of a column-parallel linear A is whole on every rank and B a slice; of a row-parallel one the other way round.
    elements = 3 * rank * hidden + rank * (queries + 2 * keys) // tensor + rank * queries // tensor + rank * hidden
    if not shape.num_experts:
        elements += 2 * rank * hidden + 3 * rank * shape.ffn_size // tensor + rank * hidden
    return Parameters(shape.num_layers // sizes.pipeline * elements)


@dataclass(frozen=True)
class ModelState:
    """Bytes on a rank that live as long as the trainer is on the GPU."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def adam_bytes(dtype_bytes: int) -> int:
    """Of an element that Adam updates: its moments, and a float32 weight unless the model's own is one."""
    return MOMENT_BYTES + (4 if dtype_bytes < 4 else 0)


def model_state(
    shape: ModelShape,
    sizes: ParallelSizes,
    stage: int,
    *,
    dtype_bytes: int,
    distributed_optimizer: bool,
    lora_rank: int = 0,
) -> ModelState:
    """Weights, gradient buffers, and Adam's moments with the float32 main weights that 2-byte weights need.

    With `lora_rank` the model is frozen and only its adapters have gradients.
    """
    held = stage_parameters(shape, sizes, stage)
    adapters = lora_parameters(shape, sizes, lora_rank) if lora_rank else Parameters(0)
    trained = adapters if lora_rank else held
    per_element = adam_bytes(dtype_bytes)
    dense, expert = trained.dense * per_element, trained.expert * per_element
    if distributed_optimizer:
        dense, expert = dense // sizes.optimizer_shards, expert // sizes.expert_shards
    return ModelState(
        weights=(held.total + adapters.total) * dtype_bytes,
        gradients=trained.total * GRADIENT_BYTES,
        optimizer=dense + expert,
    )


# -- activations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPass:
    """What decides how much a forward pass saves."""

    recompute: str  # one of RECOMPUTE_MODES
    dtype_bytes: int
    lora_rank: int = 0  # 0: all weights are trained
    is_fused: bool = True  # norms save their input only, as on a GPU; on a CPU also what they normalized, in float32


def layer_bytes(shape: ModelShape, sizes: ParallelSizes, settings: TrainingPass) -> float:
    """Bytes that a layer saves for backward per token of the rank's part of a micro-batch, without recomputing."""
    b, tensor = settings.dtype_bytes, sizes.tensor
    between = tensor if sizes.sequence else 1  # what lies between linears is cut over tensor ranks or whole on each
    hidden, d = shape.hidden_size, shape.head_dim
    queries, keys = shape.num_heads * d, shape.num_kv_heads * d
    norm_input = 2 * hidden * b / between
    linear_input = 2 * hidden * b / between  # of the fused q k v and of the MLP
    # q k v as the linear wrote them (v is a view into it), q and k turned, the output, its copy for the next linear.
    # Short sequences that the attention of this project pads and takes together save q and k less.
    attention = ((queries + 2 * keys) + (queries + keys) + queries + queries) * b / tensor
    attention += shape.num_heads * 4 / tensor  # a log-sum-exp a head
    rotation = 4 * d * b  # cosine and sine for q and for k
    if shape.has_qk_norm and shape.num_kv_heads > tensor:
        attention += queries * b / tensor  # q is copied out from between several heads' k and v to be normalized
    total = norm_input + linear_input + attention + rotation
    if not settings.is_fused:
        normed = 2 * hidden / between
        if shape.has_qk_norm:
            normed += (queries + keys) / tensor
        # In float32 the input is the saved one; of other types a float32 copy takes its place.
        trained = 0 if settings.lora_rank else normed
        total += 4 * trained if b == 4 else 4 * (normed + trained) - normed * b
    if shape.num_experts:
        total += _expert_bytes(shape, sizes, b, are_trained=not settings.lora_rank)
    else:  # gate and up as the linear wrote them, silu, up again (Megatron adds an offset of zero), their product
        total += 5 * shape.ffn_size * b / tensor
    if settings.lora_rank:
        total += _adapter_columns(shape, sizes) * settings.lora_rank * b
    return total


def _expert_bytes(shape: ModelShape, sizes: ParallelSizes, b: int, *, are_trained: bool) -> float:
    """A token's copies for its experts, and the router's numbers; experts are thought evenly loaded.

    Frozen experts do not save what enters their linears.
    """
    chosen, size = shape.experts_per_token, shape.expert_ffn_size
    copies = chosen * (5 * size + (shape.hidden_size + size if are_trained else 0)) * b / sizes.tensor
    router = (5 * shape.num_experts + 20 * chosen) / sizes.tensor
    return copies + router


def _adapter_columns(shape: ModelShape, sizes: ParallelSizes) -> float:
    """Outputs of A that B saves, in units of the adapter's rank."""
    shared, cut = (3, 1) if shape.num_experts else (5, 2)
    return shared + cut / (sizes.tensor if sizes.sequence else 1)


def attention_core_bytes(shape: ModelShape, sizes: ParallelSizes, settings: TrainingPass) -> float:
    """What `selective` recomputes: the core's output and log-sum-exp, per token and layer."""
    return (shape.num_heads * shape.head_dim * settings.dtype_bytes + shape.num_heads * 4) / sizes.tensor


def work_bytes(shape: ModelShape, sizes: ParallelSizes, settings: TrainingPass) -> float:
    """Gradients that are there when backward enters the MLP of the last layer, per token: later ones find room."""
    b, tensor = settings.dtype_bytes, sizes.tensor
    between = tensor if sizes.sequence else 1
    mlp = shape.experts_per_token * shape.expert_ffn_size if shape.num_experts else shape.ffn_size
    gathered = shape.hidden_size * b if sizes.sequence else 0  # sequence parallelism gathers a linear's input again
    normed = 0 if settings.is_fused or b == 4 else 2 * shape.hidden_size * 4 / between  # a CPU norms in float32
    return mlp * b / tensor + 2 * shape.hidden_size * b / between + gathered + normed


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer and one micro-batch on a rank."""

    whole: float  # all that its backward needs
    kept: float  # what of it is there between forward and backward; the rest is computed again


def layer_activations(
    shape: ModelShape, sizes: ParallelSizes, settings: TrainingPass, *, tokens: int
) -> LayerActivations:
    """What a layer saves of a micro-batch of `tokens` tokens, which context ranks share."""
    mine, b = tokens / sizes.context, settings.dtype_bytes
    whole = layer_bytes(shape, sizes, settings) * mine
    if sizes.context > 1:  # attention gathers the keys and values of all context ranks
        keys = shape.num_kv_heads * shape.head_dim / sizes.tensor
        whole += 2 * keys * b * (tokens - mine)
    if settings.lora_rank:  # the A's of a linear, put together: no matter how many tokens
        whole += _joined_a(shape, sizes) * settings.lora_rank * b
    if settings.recompute == "full":
        return LayerActivations(whole, _edge_bytes(shape, sizes, b) * mine)
    if settings.recompute == "selective":
        return LayerActivations(whole, whole - attention_core_bytes(shape, sizes, settings) * mine)
    return LayerActivations(whole, whole)


def _edge_bytes(shape: ModelShape, sizes: ParallelSizes, b: int) -> float:
    """Of a token between two layers."""
    return shape.hidden_size * b / (sizes.tensor if sizes.sequence else 1)


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank at the height of a training pass."""

    saved: int  # for backward, of all micro-batches under way
    work: int  # comes and goes: gradients of the layer at work, and that layer itself if it is recomputed

    @property
    def total(self) -> int:
        return self.saved + self.work


def activation_bytes(
    shape: ModelShape, sizes: ParallelSizes, settings: TrainingPass, *, tokens: int, stage: int = 0
) -> Activations:
    """Memory of the activations of a stage, at `tokens` tokens a micro-batch, which context ranks share.

    Under 1F1B a stage has as many micro-batches under way as there are stages from it to the end.
    """
    mine, under_way = tokens / sizes.context, sizes.pipeline - stage
    layer = layer_activations(shape, sizes, settings, tokens=tokens)
    saved = shape.num_layers // sizes.pipeline * layer.kept
    work = work_bytes(shape, sizes, settings) * mine + (layer.whole if settings.recompute == "full" else 0)
    if stage == sizes.pipeline - 1:  # the last norm's input and output, and what it hands on
        copies = 3 if settings.is_fused or settings.dtype_bytes == 4 else 7  # a CPU norms in float32
        if settings.lora_rank and not settings.is_fused and settings.dtype_bytes == 4:
            copies -= 1  # only a weight's gradient needs what was normalized
        saved += copies * _edge_bytes(shape, sizes, settings.dtype_bytes) * mine
    return Activations(round(under_way * saved), round(work))


def _joined_a(shape: ModelShape, sizes: ParallelSizes) -> float:
    queries = shape.num_heads * shape.head_dim
    attention = 3 * shape.hidden_size + queries / sizes.tensor
    return attention if shape.num_experts else attention + 2 * shape.hidden_size + shape.ffn_size / sizes.tensor


# -- the head -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadPass:
    """How the head and the losses run (docs/losses.md)."""

    mode: str  # train.loss_mode
    chunk: int  # rows
    dtype_bytes: int


def head_bytes(
    shape: ModelShape, sizes: ParallelSizes, settings: HeadPass, *, rows: int, is_pair: bool, is_trained: bool
) -> int:
    """What the head and the loss of a micro-batch hold on the last stage: logits, the rows' hidden states, gradients.

    Args:
        rows: policy tokens of the micro-batch.
        is_pair: the loss compares student and teacher (OPSD).
        is_trained: the head's weight gets a gradient (GRPO).
    """
    b, hidden = settings.dtype_bytes, shape.hidden_size
    columns = padded_vocab_size(shape.vocab_size, sizes.tensor) // sizes.tensor
    copies = 2 if is_pair else 1
    if settings.mode == "materialized":
        logits = rows * columns * b
    else:
        buffers = 2 if sizes.tensor > 1 else 1  # one waits for the other ranks' message
        logits = buffers * min(settings.chunk, rows) * columns * b
    gradient = columns * hidden * (4 + (b if b < 4 else 0)) if is_trained else 0
    return copies * logits + 2 * rows * hidden * b + gradient


# -- the engine -----------------------------------------------------------------------------------


@functools.cache
def engine_weight_bytes(shape: ModelShape, tensor: int, dtype_bytes: int) -> int:
    """Weights on each GPU of an engine; key-value heads are repeated when there are fewer than GPUs."""
    elements = 0.0
    for rule in model_rules(shape):
        for name in rule.hf:
            whole = prod(hf_size(name, shape))
            if rule.layout == "replicated":
                elements += whole
            elif ".k_proj" in name or ".v_proj" in name:
                elements += whole / min(tensor, shape.num_kv_heads)
            else:
                elements += whole / tensor
    return round(elements * dtype_bytes)


def kv_bytes(shape: ModelShape, tensor: int, dtype_bytes: int) -> int:
    """Key-value cache of one token on each GPU of an engine."""
    heads = max(1, shape.num_kv_heads // tensor)
    return 2 * shape.num_layers * heads * shape.head_dim * dtype_bytes
