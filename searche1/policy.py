"""The trainable policy: a sharded Megatron model with its optimizer, as the algorithms see it.

Every method marked "collective" must be called on all ranks with the same arguments (each data-parallel rank with
its own batches). Row tensors come back on the last pipeline stage only; other stages get empty lists.
Shapes: R rows of a micro-batch, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.buckets import Bucket, SharedDoubleBuffer, stream_buckets
from megatron_ext.checkpoint import CheckpointWriter, load_checkpoint
from megatron_ext.hf_io import (
    BUCKET_BYTES,
    TensorSpec,
    gather_shards,
    hf_buckets,
    hf_tensors,
    hf_tensors_everywhere,
    load_hf_weights,
    save_hf,
)
from megatron_ext.hf_mapping import ModelShape, hf_sizes
from megatron_ext.known_models import folder_shape
from megatron_ext.lora import (
    Adapter,
    LoraSettings,
    adapter_tensors,
    adapters,
    adapters_disabled,
    attach_adapters,
    peft_config,
)
from megatron_ext.model import ModelSettings, build_model, transformer_config, vocab_shard, why_no_shared_prefix
from megatron_ext.offload import HostOffload
from megatron_ext.optimizer import OptimizerSettings, apply_update, build_optimizer, optimizer_tensors
from megatron_ext.parallel import Layout, context_group, pipeline_group, pipeline_last_rank, replica_group
from megatron_ext.peft_io import fingerprint, write_peft_folder
from megatron_ext.training import gradients, run_schedule, wrap_data_parallel
from megatron_ext.vocab_parallel import ClippedKL, RowLoss, TokenLogprobs, kl_loss, linear_token_logprobs, token_loss
from searche1.config import TrainConfig
from searche1.models import choose_dtype
from searche1.packing import PackedBatch
from searche1.types import SharedError, UserError

# (hidden states of the rows [R, H], micro-batch number) -> (loss, metrics). Metrics are sums over rows of
# weighted values, so they add up over micro-batches and ranks; names ending in "_max" take the maximum.
LossFunction = Callable[[Tensor, int], tuple[Tensor, dict[str, Tensor]]]


MOST_LOGITS_ON_CPU = 1 << 24  # of a chunk, over all ranks
_bucket_memory = SharedDoubleBuffer()  # of the one weight sync that this process has under way


def check_model(model_path: Path, layout: Layout, train: TrainConfig) -> None:
    """Raises UserError if the checkpoint's architecture is unknown or the layout cannot hold it. Loads no weights."""
    try:
        transformer_config(read_shape(model_path), model_settings(train, layout), layout)
    except ValueError as error:
        raise UserError(str(error)) from error
    dtype = choose_dtype(train.dtype, layout.device.type)
    if train.share_prefix == "always" and (reason := why_no_shared_prefix(layout, dtype)):
        raise UserError(f"train.share_prefix=always is not possible here: {reason}; set it to auto or never")


def read_shape(model_path: Path) -> ModelShape:
    """The model's numbers from its config.json. Raises UserError."""
    try:
        return folder_shape(model_path)
    except ValueError as error:
        raise UserError(str(error)) from error


def model_settings(train: TrainConfig, layout: Layout) -> ModelSettings:
    return ModelSettings(choose_dtype(train.dtype, layout.device.type), train.recompute)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SharedError(str(error)) from error


@contextlib.contextmanager
def out_of_memory_told(train: TrainConfig) -> Iterator[None]:
    """A GPU that runs out of memory becomes a UserError that names the settings which decide how much is needed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory: {str(error).splitlines()[0]} "
            f"Lower train.max_tokens (now {train.max_tokens}) or train.logits_chunk (now {train.logits_chunk}), "
            f"set train.recompute=full (now {train.recompute}), lower engine.mem_fraction, or spread the model with "
            "parallel.tensor; a stopped run may be continued so"
        ) from error


class Policy:
    """Weights, adapters and optimizer state that live through a round."""

    def __init__(
        self,
        *,
        model_path: Path,
        layout: Layout,
        train: TrainConfig,
        optimizer: OptimizerSettings | None,
        lora: LoraSettings | None = None,
    ) -> None:
        """Collective. Raises UserError if the checkpoint or the layout does not fit."""
        self.layout = layout
        self.model_path = model_path
        self.version = 0  # counts updates; every completion carries the version that sampled it
        self._train = train
        # On GPUs it asks Transformer Engine for a mask that no GPU of this project has tried: only when told to.
        wish = {"auto": layout.device.type == "cpu", "always": True, "never": False}[train.share_prefix]
        self.dtype = choose_dtype(train.dtype, layout.device.type)
        self.share_prefix = wish and not why_no_shared_prefix(layout, self.dtype)
        try:
            with out_of_memory_told(train):
                self.shape = read_shape(model_path)
                self._model = build_model(self.shape, model_settings(train, layout), layout)
                load_hf_weights(self._model, model_path, self.shape, layout)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        if lora is not None:
            attach_adapters(self._model, self.shape, lora, layout)
        self._lora = lora
        self._shard = vocab_shard(self.shape, layout)
        self._chunk = train.logits_chunk
        if layout.device.type == "cpu":  # where larger products are no faster
            self._chunk = min(self._chunk, max(64, MOST_LOGITS_ON_CPU // self.shape.vocab_size))
        self._ddp = None
        self._on_host: dict[str, HostOffload] = {}
        self._writer = CheckpointWriter()
        if optimizer is not None:
            with out_of_memory_told(train):
                self._ddp = wrap_data_parallel(self._model, distributed_optimizer=optimizer.distributed)
                self._optimizer = build_optimizer(self._ddp, optimizer, self.dtype)

    @property
    def has_adapters(self) -> bool:
        """Whether only an adapter is trained."""
        return self._lora is not None

    # -- what a loss is made of -------------------------------------------------------------------

    def token_loss(
        self, hidden: Tensor, targets: Tensor, row_loss: RowLoss, *, temperature: float
    ) -> tuple[Tensor, TokenLogprobs]:
        """A loss of the rows' log p(target) and entropy, and those, detached; hidden [R, H], on the last stage.

        `row_loss` sees some rows at a time, and which, so that logits need not live longer than theirs.
        """
        return token_loss(
            hidden,
            self._model.head_weight(),
            targets.to(hidden.device),
            self._shard,
            row_loss,
            mode=self._train.loss_mode,
            chunk=self._chunk,
            temperature=temperature,
        )

    def kl_loss(
        self, student: Tensor, teacher: Tensor, row_weights: Tensor, *, kl_clip: float, temperature: float
    ) -> tuple[Tensor, ClippedKL]:
        """Eq. 7 over rows [R, H] of student and teacher with their weights, and each row's values, detached."""
        return kl_loss(
            student,
            teacher,
            self._model.head_weight(),
            self._shard,
            row_weights.to(student.device),
            kl_clip=kl_clip,
            mode=self._train.loss_mode,
            chunk=self._chunk,
            temperature=temperature,
        )

    # -- passes -----------------------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch], *, temperature: float) -> list[Tensor]:
        """log p of every target of this rank's rows, float32 [R] per micro-batch. Collective."""

        def rows(hidden: Tensor, index: int) -> tuple[Tensor, Tensor]:
            found = linear_token_logprobs(
                hidden,
                self._model.head_weight(),
                batches[index].targets.to(hidden.device),
                self._shard,
                temperature=temperature,
                chunk=self._chunk,
            )
            return hidden.new_zeros(()), found.logprobs

        return self._forward(batches, rows)

    @torch.no_grad()
    def hidden_rows(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Hidden states of all rows of each micro-batch, [N, H], for a head that is applied later. Collective."""
        found = self._forward(batches, lambda hidden, index: (hidden.new_zeros(()), hidden))
        return [self._all_rows(batch, rows) for batch, rows in zip(batches, found, strict=bool(found))]

    @torch.no_grad()
    def kl_rows(
        self, batches: Sequence[PackedBatch], teacher_rows: Sequence[Tensor], *, temperature: float
    ) -> list[Tensor]:
        """Unclipped KL(teacher || this policy) of this rank's rows, float32 [R] per micro-batch; `teacher_rows` are
        `hidden_rows` of the same pairs. Collective.
        """

        def rows(hidden: Tensor, index: int) -> tuple[Tensor, Tensor]:
            teacher = teacher_rows[index][batches[index].row_numbers.to(hidden.device)]
            weights = torch.ones(len(hidden), device=hidden.device)
            _, found = self.kl_loss(hidden, teacher, weights, kl_clip=float("inf"), temperature=temperature)
            return hidden.new_zeros(()), found.kl

        return self._forward(batches, rows)

    def _all_rows(self, batch: PackedBatch, values: Tensor) -> Tensor:
        """Values [R, ...] of this rank's rows as those of all rows of the pack, [N, ...]. Collective over context."""
        if self.layout.context == 1:
            return values
        every = values.new_zeros(len(batch.sample_of_row), *values.shape[1:])
        every[batch.row_numbers.to(values.device)] = values
        dist.all_reduce(every, group=context_group())  # a row is held once, so its sum is its value
        return every

    def _forward(
        self, batches: Sequence[PackedBatch], rows: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        assert self.is_on_device
        self._model.eval()
        with out_of_memory_told(self._train):
            return run_schedule(self._model, [b.inputs for b in batches], rows, self.layout, forward_only=True)

    def by_sample(
        self, batches: Sequence[PackedBatch], rows: Sequence[Tensor], *, num_samples: int
    ) -> list[list[float]]:
        """Row values of this rank's micro-batches, sorted by the sample they belong to, on every stage. Collective."""
        values: list[list[float]] = [[] for _ in range(num_samples)]
        for batch, held in zip(batches, rows, strict=self.layout.is_last_stage):
            found = self._all_rows(batch, held)
            for owner, value in zip(batch.sample_of_row.tolist(), found.tolist(), strict=True):
                values[owner].append(value)
        if self.layout.pipeline > 1:
            outcome = [values]
            dist.broadcast_object_list(outcome, src=pipeline_last_rank(), group=pipeline_group())
            values = outcome[0]
        return values

    def train_step(self, batches: Sequence[PackedBatch], loss: LossFunction, *, lr: float) -> dict[str, float]:
        """One optimizer update on a mini-batch; returns its metrics on every rank. Collective.

        `grad_norm` and `is_skipped` (1 when a gradient was not finite and weights stayed) are added.
        """
        assert self._ddp is not None, "this policy was built without an optimizer"
        assert self.is_on_device
        self._model.train()
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        with out_of_memory_told(self._train):
            kept = run_schedule(self._ddp, [b.inputs for b in batches], loss, self.layout, forward_only=False)
            update = apply_update(self._optimizer, lr=lr)  # Adam makes its state in its first step
        self.version += 1
        metrics = self._reduce_metrics(kept)
        return {**metrics, "grad_norm": update.grad_norm, "is_skipped": float(not update.is_applied), "lr": lr}

    def _reduce_metrics(self, kept: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum (or maximum) over micro-batches and data-parallel ranks, then from the last stage to all."""
        metrics: list[dict[str, float] | None] = [None]
        if self.layout.is_last_stage:
            sums = [name for name in kept[0] if not name.endswith("_max")]
            maxima = [name for name in kept[0] if name.endswith("_max")]
            total = torch.stack([torch.stack([k[name].float() for name in sums]) for k in kept]).sum(dim=0)
            dist.all_reduce(total, group=replica_group())
            values = dict(zip(sums, total.tolist(), strict=True))
            if maxima:
                top = torch.stack([torch.stack([k[name].float() for name in maxima]) for k in kept]).amax(dim=0)
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=replica_group())
                values.update(zip(maxima, top.tolist(), strict=True))
            metrics = [values]
        if self.layout.pipeline > 1:
            dist.broadcast_object_list(metrics, src=pipeline_last_rank(), group=pipeline_group())
        assert metrics[0] is not None
        return metrics[0]

    # -- other weights in the same model ----------------------------------------------------------

    def adapter_disabled(self) -> contextlib.AbstractContextManager[None]:
        """The frozen base of Eq. 6: the same weights without the adapter."""
        return adapters_disabled(self._model)

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """A copy of this rank's trainable weights in host memory."""
        assert self.is_on_device
        return {name: p.detach().to("cpu", copy=True) for name, p in self._model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        """Put a snapshot back. Optimizer state is left alone: use it to end a round, not to rewind one."""
        assert self.is_on_device
        for name, parameter in self._model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])

    @contextlib.contextmanager
    def weights(self, other: dict[str, Tensor]) -> Iterator[None]:
        """The model with another snapshot's weights, for the reference policy of GRPO's KL term."""
        own = self.snapshot()
        self.restore(other)
        try:
            yield
        finally:
            self.restore(own)

    # -- making room ------------------------------------------------------------------------------

    def optimizer_to_host(self) -> int:
        """Moves optimizer state to the host and frees the gradients' memory; returns the bytes that came free."""
        if self._ddp is None:
            return 0
        weights = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        # In float32 the optimizer works on the weights themselves.
        state = [t for t in optimizer_tensors(self._optimizer) if t.untyped_storage().data_ptr() not in weights]
        return self._offload("optimizer", state) + self._offload("gradients", gradients(self._ddp), keep=False)

    def weights_to_host(self) -> int:
        """Moves weights and adapters to the host; returns the bytes that came free."""
        return self._offload("weights", [*self._model.parameters(), *self._model.buffers()])

    @property
    def is_on_device(self) -> bool:
        """Whether the weights are where passes and exports find them: memory that has moved is not there to read."""
        return not ("weights" in self._on_host and self._on_host["weights"].is_offloaded)

    def to_device(self) -> None:
        """Brings back what is on the host; training and forward passes need all of it."""
        with out_of_memory_told(self._train):
            for offload in self._on_host.values():
                offload.back()

    def _offload(self, what: str, tensors: Sequence[Tensor], *, keep: bool = True) -> int:
        known = self._on_host.get(what)
        if known is not None and known.is_offloaded:
            return 0
        fresh = HostOffload(tensors, keep_contents=keep)
        # Adam makes its state in its first step, and some make it anew when they load one.
        if known is None or not known.is_same_memory(fresh):
            if known is not None:
                fresh.take_host_memory(known)
            known = self._on_host[what] = fresh
        return known.to_host()

    # -- out of the trainer -----------------------------------------------------------------------

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """HuggingFace-named whole tensors, adapters merged in float32, on rank 0. Collective: exhaust it."""
        assert self.is_on_device
        return hf_tensors(self._model, self.shape, self.layout)

    def hf_buckets(self, *, bucket_bytes: int, only_adapted: bool = False) -> Iterator[Bucket]:
        """The same on every rank, in flat buckets; `only_adapted` leaves out what no adapter changes. Collective.

        On a CPU whoever takes the third bucket is done with the first.
        """
        assert self.is_on_device
        return hf_buckets(
            self._model,
            self.shape,
            self.layout,
            bucket_bytes=bucket_bytes,
            everywhere=True,
            only_adapted=only_adapted,
            allocate=_bucket_memory if self.layout.device.type == "cpu" else None,
        )

    def hf_tensors_everywhere(self, *, bucket_bytes: int, only_adapted: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The same, tensor by tensor, of which none outlives the next. Collective."""
        assert self.is_on_device
        return hf_tensors_everywhere(
            self._model, self.shape, self.layout, bucket_bytes=bucket_bytes, only_adapted=only_adapted
        )

    def save_hf(self, folder: Path) -> None:
        """A HuggingFace folder with merged weights and this model's config and tokenizer. Collective."""
        if self.layout.is_writer:
            specs = {name: TensorSpec(size, self.dtype) for name, size in hf_sizes(self.shape).items()}
            save_hf(self.hf_weights(), specs=specs, out=folder, config_from=self.model_path)
        else:
            for _ in self.hf_weights():
                pass
        dist.barrier()

    def save_adapter(self, folder: Path) -> None:
        """The adapter in PEFT's format. Collective."""
        assert self._lora is not None and self.is_on_device

        def export() -> Iterator[tuple[str, Tensor]]:
            for adapter in adapters(self._model):
                yield from self._peft_tensors(adapter)

        buckets = stream_buckets(export, self.layout, bucket_bytes=BUCKET_BYTES, everywhere=False)
        tensors = dict(tensor for bucket in buckets for tensor in bucket.tensors())
        if self.layout.is_writer:
            write_peft_folder(folder, tensors, peft_config(self._lora, self.shape), base=self.model_path)
        dist.barrier()

    def _peft_tensors(self, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
        for name, local, dim in adapter_tensors(adapter):
            yield name, local if dim is None else torch.cat(gather_shards(local, self.layout), dim=dim)

    def save_checkpoint(self, folder: Path, *, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Begin a Megatron dist_checkpoint of what is trained and its optimizer, readable in any layout. Collective.

        Training goes on while it is written; `poll_checkpoint` and `finish_checkpoint` give the folder its name.
        `state` are more plain values to keep with it. Raises UserError if an earlier one could not be written.
        """
        assert self._ddp is not None and self.is_on_device
        state = {**(state or {}), "step": step, "version": self.version}
        if self._lora is not None:
            lora = {
                "rank": self._lora.rank,
                "alpha": self._lora.alpha,
                "base_fingerprint": fingerprint(self.model_path),
            }
            state["lora"] = lora  # what tools/merge_lora.py asks for
        with _told():
            self._writer.begin(self._ddp, self._optimizer, folder, state=state, only_trained=self.has_adapters)

    def poll_checkpoint(self) -> None:
        """Publishes the checkpoint under way if it is on the disk. Collective. Raises UserError if it failed."""
        with _told():
            self._writer.poll()

    def finish_checkpoint(self) -> None:
        """Waits for the checkpoint under way. Collective. Raises UserError if it could not be written."""
        with _told():
            self._writer.finish()

    def load_checkpoint(self, folder: Path) -> int:
        """Returns the step that was saved. Collective."""
        assert self._ddp is not None and self.is_on_device
        with out_of_memory_told(self._train):
            state = load_checkpoint(self._ddp, self._optimizer, folder, only_trained=self.has_adapters)
        self.version = state["version"]
        return state["step"]
