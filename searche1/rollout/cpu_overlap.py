"""SGLang's overlap schedule on a CPU: a thread computes batches while the scheduler works on those before and after.

On a GPU the scheduler starts a batch before it has seen the tokens of the last one, which the GPU's stream hands on.
Here it is a stream of batches in C++ (`ops_start`), each of which goes through embedding, layers, head and draw
without the interpreter. A batch that it is not built for waits until it is empty and is SGLang's.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers import sampler
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.managers import overlap_utils
from sglang.srt.managers.io_struct import AbortReq, BatchTokenizedGenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor

from megatron_ext import blas
from searche1.rollout.cpu_attention import BatchedNativeAttention
from searche1.rollout.cpu_layers import DirectLayer, direct_layer
from searche1.rollout.engine_ops import Batch, Layer, Model, Tokens, empty_panels, kernels, to_panels

logger = logging.getLogger(__name__)

MOST_PANELS = 2 << 30  # bytes of weights that are kept twice

MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM")
GENERATION = (AbortReq, BatchTokenizedGenerateReqInput, TokenizedGenerateReqInput)

Method = Callable[..., Any]


class Pending(GenerationBatchResult):
    """Of a batch in the stream. By `delay_sample_func` SGLang knows that its tokens are not there yet."""

    delay_sample_func: Callable[[], None] | None

    def __init__(self, number: int, drawn: Tensor, logprobs: Tensor, kept: tuple[Any, ...]) -> None:
        """The batch is `number` in the stream; `kept` is what it reads."""
        super().__init__(delay_sample_func=self.wait)
        self.number, self.drawn, self.logprobs, self.kept = number, drawn, logprobs, kept

    def wait(self) -> None:
        """Until the tokens and their logprobs are there."""
        if self.delay_sample_func is None:
            return
        kernels().ops_wait(self.number)
        self.next_token_ids = self.drawn
        self.logits_output = LogitsProcessorOutput(next_token_logits=None, next_token_logprobs=self.logprobs)
        self.delay_sample_func, self.kept = None, ()


class DirectModel:
    """A model of SGLang's on its own weights, in one call of C++ for a batch. One for a process."""

    def __init__(self, runner: Any) -> None:
        """Of SGLang's ModelRunner, with a model that `why_not` has nothing against."""
        model, layers = runner.model, list(filter(None, map(direct_layer, runner.model.model.layers)))
        self.layers: list[DirectLayer] = layers
        self.ends = (model.model.embed_tokens, model.model.norm, model.lm_head)
        self.slots, self.cache = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool
        self.panels = _empty_panels(layers)
        self.structs = (Layer * len(layers))()
        self.struct = Model(
            layers=ctypes.addressof(self.structs),
            sgemm=blas.sgemm_address(),
            count=len(layers),
            vocab=model.config.vocab_size,
            scratch=layers[0].scratch,
        )
        self.started = 0  # batches so far
        self.latest: deque[Pending] = deque(maxlen=2)  # what they read stays even if the scheduler ends meanwhile
        self.is_changed = True  # whether weights and cache may have changed since the last batch

    def start(self, batch: Any, newest: Tensor) -> Pending:
        """Puts a batch that `fits` into the stream.

        newest: int64 [requests the pool holds], the last token of each; the stream reads and writes it.
        """
        if self.is_changed:
            self._point()
        info = batch.sampling_info
        numbers, lengths, places = (x.long() for x in (batch.req_pool_indices, batch.seq_lens, batch.out_cache_loc))
        ids = counts = temperatures = None
        if not batch.forward_mode.is_decode():
            ids, counts = batch.input_ids.long(), torch.tensor(batch.extend_lens, dtype=torch.int64)
        if not info.is_all_greedy:
            temperatures = info.temperatures.float().contiguous()
        seeds = info.sampling_seed.long()
        drawn, logprobs = torch.empty(len(numbers), dtype=torch.int32), torch.empty(len(numbers))
        struct = Batch(
            tokens=Tokens(
                count=len(places),
                requests=len(numbers),
                slots_stride=self.slots.stride(0),
                places=places.data_ptr(),
                numbers=numbers.data_ptr(),
                lengths=lengths.data_ptr(),
                counts=_pointer(counts),
                slots=self.slots.data_ptr(),
            ),
            ids=_pointer(ids),
            newest=newest.data_ptr(),
            temperatures=_pointer(temperatures),
            seeds=seeds.data_ptr(),
            drawn=drawn.data_ptr(),
            logprobs=logprobs.data_ptr(),
        )
        kernels().ops_start(ctypes.byref(self.struct), ctypes.byref(struct))
        self.started += 1
        kept = (numbers, lengths, places, ids, counts, temperatures, seeds, newest)
        self.latest.append(Pending(self.started, drawn, logprobs, kept))
        return self.latest[-1]

    def wait(self) -> None:
        """Until the stream is empty."""
        kernels().ops_wait(self.started)

    def invalidate(self) -> None:
        """Waits until the stream is empty. Weights and cache may be changed then, until the next batch starts."""
        self.wait()
        self.is_changed = True

    def _point(self) -> None:
        """At where weights and cache are now."""
        for layer, struct, panels in zip(self.layers, self.structs, self.panels, strict=True):
            layer.point(self.cache)
            ctypes.pointer(struct)[0] = layer.layer
            for name, panel in panels.items():
                weight, _ = layer.linears[name]
                to_panels(weight, panel)
                getattr(struct, name).panels = panel.data_ptr()
        for name, end in zip(("embedding", "norm", "head"), self.ends, strict=True):
            setattr(self.struct, name, end.weight.data_ptr())
        self.is_changed = False


def _empty_panels(layers: list[DirectLayer]) -> list[dict[str, Tensor]]:
    """Where each layer's weights will lie for products on one thread; nowhere if they are large."""
    weights = [{name: weight for name, (weight, _) in layer.linears.items()} for layer in layers]
    size = sum(weight.nbytes for of_layer in weights for weight in of_layer.values())
    if size > MOST_PANELS or torch.get_num_threads() > 1:
        return [{} for _ in layers]
    return [{name: empty_panels(weight) for name, weight in of_layer.items()} for of_layer in weights]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def why_not(runner: Any) -> str:
    """What keeps a ModelRunner's model out of the stream; empty if nothing does. Its weights have their final form."""
    model, slots = runner.model, runner.req_to_token_pool.req_to_token
    if type(model).__name__ not in MODELS:
        return f"it is a {type(model).__name__}"
    if not runner.spec_algorithm.is_none():
        return "another model speculates for it"
    if type(runner.attn_backend) is not BatchedNativeAttention:
        return "it has another attention backend"
    if runner.token_to_kv_pool.dtype != torch.float32 or slots.dtype != torch.int32 or slots.stride(1) != 1:
        return "its cache is not in float32"
    if not sampler.SGLANG_RETURN_ORIGINAL_LOGPROB or runner.sampler.rl_on_policy_target is not None:
        return "it is to give logprobs of another kind than those at temperature 1"
    if overlap_utils._DEBUG_ASSERT:
        return "SGLANG_IS_IN_CI is set, with which SGLang looks at tokens that are not there yet"
    embedding, norm, head, logits = model.model.embed_tokens, model.model.norm, model.lm_head, model.logits_processor
    if type(embedding) is not VocabParallelEmbedding or type(head) not in (VocabParallelEmbedding, ParallelLMHead):
        return "its embedding or head is not SGLang's own"  # such as LoRA's
    if any(x.weight.dtype != torch.float32 or not x.weight.is_contiguous() for x in (embedding, norm, head)):
        return "it is not in float32"
    if type(norm) is not RMSNorm or norm.variance_size_override is not None:
        return "its last norm has options"
    if type(logits) is not LogitsProcessor or logits.logit_scale is not None or logits.final_logit_softcapping:
        return "its logits are scaled"
    if getattr(head, "bias", None) is not None:
        return "its head has a bias"
    layers = [direct_layer(layer) for layer in model.model.layers]
    known = [layer for layer in layers if layer is not None]
    if not known or len(known) < len(layers):
        return "its layers are not computed directly"
    if len({(layer.layer.hidden, layer.scratch, layer.layer.eps) for layer in known}) > 1:
        return "its layers are not alike"
    if ctypes.c_float(norm.variance_epsilon).value != known[0].layer.eps:
        return "its norms differ"
    return ""


def fits(batch: Any) -> bool:
    """Whether a batch's requests want no more than tokens drawn at their temperatures, and their logprobs."""
    mode, info = batch.forward_mode, batch.sampling_info
    if mode not in (ForwardMode.DECODE, ForwardMode.EXTEND):
        return False
    inputs = ("input_embeds", "replace_embeds", "beam_tail")
    if any(getattr(batch, name, None) is not None for name in inputs) or any(batch.multimodal_inputs or ()):
        return False
    if batch.is_prefill_only or batch.has_grammar or batch.return_hidden_states:
        return False
    if mode == ForwardMode.EXTEND and any(getattr(req, "beam_group", None) is not None for req in batch.reqs):
        return False
    if batch.return_logprob:
        if any(batch.top_logprobs_nums) or any(ids is not None for ids in batch.token_ids_logprobs):
            return False
        if mode == ForwardMode.EXTEND and list(batch.extend_lens) != list(batch.extend_logprob_start_lens):
            return False  # logprobs of a prompt
    if info.has_custom_logit_processor or info.logit_bias is not None or info.penalizer_orchestrator.is_required:
        return False
    if getattr(info, "sampling_mask_batch_indices", None) is not None or info.sampling_seed is None:
        return False
    if info.is_all_greedy:
        return True
    # What is needed once is needed until all requests have ended, by these; so what the present ones want counts.
    wants_top_p = info.need_top_p_sampling and bool((info.top_ps < 1).any())
    wants_top_k = info.need_top_k_sampling and bool((info.top_ks < info.vocab_size).any())
    return not (wants_top_p or wants_top_k or info.need_min_p_sampling)


class Overlap:
    """The scheduler's side of the stream: its and its worker's methods around SGLang's."""

    def __init__(self) -> None:
        self.model: DirectModel | None = None
        self.has_looked = False  # whether the model can go through the stream
        self.newest: Tensor | None = None  # the scheduler's, while it starts a batch that goes into the stream

    def run_batch(self, original: Method) -> Method:
        def run_batch(scheduler: Any, batch: Any, *more: Any) -> Any:
            if scheduler.enable_overlap and not self.has_looked:
                self._look_at(scheduler.tp_worker.model_runner)
            if self.model is None:
                return original(scheduler, batch, *more)
            if fits(batch):
                self.newest = scheduler.future_map.output_tokens_buf
            else:
                self.model.wait()  # its input may be tokens that are not there yet
            try:
                return original(scheduler, batch, *more)
            finally:
                self.newest = None

        return run_batch

    def forward_batch_generation(self, original: Method) -> Method:
        def forward_batch_generation(worker: Any, batch: Any, *more: Any, **named: Any) -> Any:
            if self.model is None or self.newest is None or batch is None:
                return original(worker, batch, *more, **named)
            return self.model.start(batch, self.newest)

        return forward_batch_generation

    def launch_batch_sample_if_needed(self, original: Method) -> Method:
        def launch_batch_sample_if_needed(scheduler: Any, result: Any, batch: Any) -> Any:
            return None if isinstance(result, Pending) else original(scheduler, result, batch)

        return launch_batch_sample_if_needed

    def process_batch_result(self, original: Method) -> Method:
        def process_batch_result(scheduler: Any, batch: Any, result: Any) -> Any:
            if isinstance(result, Pending):
                result.wait()
            return original(scheduler, batch, result)

        return process_batch_result

    def process_input_requests(self, original: Method) -> Method:
        def process_input_requests(scheduler: Any, requests: Any) -> Any:
            if self.model is not None and not all(isinstance(request, GENERATION) for request in requests):
                self.model.invalidate()
            return original(scheduler, requests)

        return process_input_requests

    def _look_at(self, runner: Any) -> None:
        """At the first batch: weights have their final form."""
        self.has_looked = True
        if reason := why_not(runner):
            logger.warning("the scheduler rests while a batch is computed, which is slower on a CPU: %s", reason)
        else:
            self.model = DirectModel(runner)


def register() -> None:
    """Puts it into SGLang's scheduler, for if it is to overlap."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tp_worker import TpModelWorker

    overlap = Overlap()
    for owner, name in (
        (Scheduler, "run_batch"),
        (Scheduler, "launch_batch_sample_if_needed"),
        (Scheduler, "process_batch_result"),
        (Scheduler, "process_input_requests"),
        (TpModelWorker, "forward_batch_generation"),
    ):
        setattr(owner, name, getattr(overlap, name)(getattr(owner, name)))
