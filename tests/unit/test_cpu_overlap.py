"""Which batches the scheduler puts into the stream, what waits for it to be empty, and what it then finds."""

import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqInput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from megatron_ext import blas
from searche1.rollout import cpu_overlap, engine_ops
from searche1.rollout.cpu_overlap import Overlap, Pending, _empty_panels, fits, why_not
from searche1.rollout.cpu_platform import CpuPlatform


def batch(**changes):
    """A batch of two requests, of which changes with `info_` are changes of its sampling options."""
    info = {
        "has_custom_logit_processor": False,
        "logit_bias": None,
        "penalizer_orchestrator": SimpleNamespace(is_required=False),
        "sampling_mask_batch_indices": None,
        "sampling_seed": torch.tensor([1, 2]),
        "is_all_greedy": False,
        "need_top_p_sampling": False,
        "need_top_k_sampling": False,
        "need_min_p_sampling": False,
        "top_ps": torch.ones(2),
        "top_ks": torch.full((2,), 1 << 30),
        "vocab_size": 500,
    }
    info |= {name.removeprefix("info_"): x for name, x in changes.items() if name.startswith("info_")}
    fields = {
        "forward_mode": ForwardMode.EXTEND,
        "reqs": [SimpleNamespace(), SimpleNamespace(beam_group=None)],
        "input_embeds": None,
        "multimodal_inputs": [None, None],
        "is_prefill_only": False,
        "has_grammar": False,
        "return_hidden_states": False,
        "return_logprob": True,
        "top_logprobs_nums": [0, 0],
        "token_ids_logprobs": [None, None],
        "extend_lens": [3, 9],
        "extend_logprob_start_lens": [3, 9],
    }
    fields |= {name: x for name, x in changes.items() if not name.startswith("info_")}
    return SimpleNamespace(sampling_info=SimpleNamespace(**info), **fields)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"forward_mode": ForwardMode.DECODE, "extend_lens": None, "extend_logprob_start_lens": None},
        {"info_is_all_greedy": True, "info_need_top_k_sampling": True},
        {"info_need_top_p_sampling": True, "info_need_top_k_sampling": True},  # of requests that have ended
        {"return_logprob": False, "extend_logprob_start_lens": [0, 0], "multimodal_inputs": None},
    ],
)
def test_plain_requests_go_into_the_stream(changes):
    assert fits(batch(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"forward_mode": ForwardMode.MIXED},
        {"forward_mode": ForwardMode.IDLE},
        {"input_embeds": torch.zeros(2, 3)},
        {"replace_embeds": torch.zeros(2, 3)},
        {"beam_tail": object()},
        {"multimodal_inputs": [None, object()]},
        {"is_prefill_only": True},
        {"has_grammar": True},
        {"return_hidden_states": True},
        {"top_logprobs_nums": [0, 5]},
        {"token_ids_logprobs": [None, [7]]},
        {"extend_logprob_start_lens": [3, 0]},
        {"info_has_custom_logit_processor": True},
        {"info_logit_bias": torch.zeros(2, 5)},
        {"info_penalizer_orchestrator": SimpleNamespace(is_required=True)},
        {"info_sampling_mask_batch_indices": torch.zeros(1)},
        {"info_sampling_seed": None},
        {"info_need_top_p_sampling": True, "info_top_ps": torch.tensor([1.0, 0.9])},
        {"info_need_top_k_sampling": True, "info_top_ks": torch.tensor([1, 1 << 30])},
        {"reqs": [SimpleNamespace(), SimpleNamespace(beam_group=object())]},
        {"info_need_min_p_sampling": True},
    ],
)
def test_requests_that_want_more_do_not(changes):
    assert not fits(batch(**changes))


class FakeModel:
    """In place of a DirectModel: writes down what happens."""

    def __init__(self, events):
        self.events = events

    def start(self, given, newest):
        self.events.append(("start", newest))
        return "pending"

    def wait(self):
        self.events.append("wait")

    def invalidate(self):
        self.events.append("invalidate")


@pytest.fixture
def scheduler(monkeypatch):
    """A scheduler and its worker with Overlap's methods around theirs, and `events`."""
    events: list[object] = []
    monkeypatch.setattr(cpu_overlap, "why_not", lambda runner: runner.model)
    monkeypatch.setattr(cpu_overlap, "DirectModel", lambda runner: FakeModel(events))
    overlap = Overlap()

    def generate(worker, given):
        events.append("SGLang computes")
        return "done"

    generate_ = overlap.forward_batch_generation(generate)
    methods = {
        "run_batch": lambda self, given: generate_("worker", given),
        "process_input_requests": lambda self, requests: events.append(("requests", len(requests))),
        "process_batch_result": lambda self, given, result: events.append("results"),
        "launch_batch_sample_if_needed": lambda self, result, given: events.append("sample"),
    }
    wrapped = {name: getattr(overlap, name)(method) for name, method in methods.items()}
    fields = {
        "enable_overlap": True,
        "tp_worker": SimpleNamespace(model_runner=SimpleNamespace(model="")),
        "future_map": SimpleNamespace(output_tokens_buf="newest"),
    }
    return SimpleNamespace(events=events, **fields, **wrapped)


def test_a_batch_that_does_not_fit_waits_for_the_stream(scheduler):
    assert scheduler.run_batch(scheduler, batch()) == "pending"
    assert scheduler.run_batch(scheduler, batch(has_grammar=True)) == "done"
    assert scheduler.events == [("start", "newest"), "wait", "SGLang computes"]


def test_only_what_is_for_tokens_leaves_the_stream_alone(scheduler):
    scheduler.run_batch(scheduler, batch())
    del scheduler.events[:]
    scheduler.process_input_requests(scheduler, [])
    scheduler.process_input_requests(scheduler, [AbortReq()])
    scheduler.process_input_requests(scheduler, [AbortReq(), FlushCacheReqInput()])
    assert scheduler.events == [("requests", 0), ("requests", 1), "invalidate", ("requests", 2)]


def test_a_model_that_cannot_go_into_it_and_another_schedule_are_left_to_sglang(scheduler, caplog):
    scheduler.enable_overlap = False
    assert scheduler.run_batch(scheduler, batch()) == "done"
    scheduler.enable_overlap = True
    scheduler.tp_worker.model_runner.model = "its norms differ"
    with caplog.at_level(logging.WARNING):
        assert scheduler.run_batch(scheduler, batch()) == scheduler.run_batch(scheduler, batch()) == "done"
    scheduler.process_input_requests(scheduler, [FlushCacheReqInput()])
    assert scheduler.events == ["SGLang computes"] * 3 + [("requests", 1)]
    assert [record.message for record in caplog.records] == [
        "the scheduler rests while a batch is computed, which is slower on a CPU: its norms differ"
    ]


def test_tokens_are_read_when_they_are_there(scheduler, monkeypatch):
    waited = []
    monkeypatch.setattr(cpu_overlap, "kernels", lambda: SimpleNamespace(ops_wait=waited.append))
    result = Pending(7, torch.tensor([4, 5]), torch.tensor([-1.0, -2.0]), ("kept",))
    scheduler.launch_batch_sample_if_needed(scheduler, result, batch())
    assert result.next_token_ids is None and not waited
    for _ in range(2):
        scheduler.process_batch_result(scheduler, batch(), result)
    assert waited == [7] and result.kept == ()
    assert result.next_token_ids.tolist() == [4, 5]
    assert result.logits_output.next_token_logprobs.tolist() == [-1.0, -2.0]
    scheduler.launch_batch_sample_if_needed(scheduler, GenerationBatchResult(), batch())
    scheduler.process_batch_result(scheduler, batch(), GenerationBatchResult())
    assert scheduler.events == ["results", "results", "sample", "results"]


def test_other_models_are_told_apart():
    pool = SimpleNamespace(req_to_token=torch.zeros(2, 2, dtype=torch.int32))
    assert why_not(SimpleNamespace(model=torch.nn.Linear(2, 2), req_to_token_pool=pool)) == "it is a Linear"


@pytest.mark.parametrize("threads", [1, 2])
def test_weights_are_kept_twice_if_they_are_small_and_one_thread_multiplies(threads, monkeypatch):
    layers = [SimpleNamespace(linears={"qkv": (torch.zeros(48, 20), None), "out": (torch.zeros(32, 8), None)})] * 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for most, is_enough in ((2 * 4 * (48 * 20 + 32 * 8), True), (2 * 4 * (48 * 20 + 32 * 8) - 1, False)):
        monkeypatch.setattr(cpu_overlap, "MOST_PANELS", most)
        found = [{name: panels.numel() for name, panels in of_layer.items()} for of_layer in _empty_panels(layers)]
        assert found == [{"qkv": 64 * 20, "out": 32 * 8} if is_enough and threads == 1 else {}] * 2


@pytest.mark.parametrize(
    ("tensor", "openblas", "kernels", "is_off"),
    [(1, "", object(), False), (2, "", object(), True), (1, "missing", object(), True), (1, "", "not built", True)],
)
def test_the_schedule_overlaps_where_there_is_something_to_overlap_with(tensor, openblas, kernels, is_off, monkeypatch):
    monkeypatch.setattr(blas, "missing", lambda: openblas)
    monkeypatch.setattr(engine_ops, "library", lambda: kernels)
    server = SimpleNamespace(tp_size=tensor, disable_overlap_schedule=False)
    CpuPlatform().apply_server_args_defaults(server)
    assert server.disable_overlap_schedule is is_off
