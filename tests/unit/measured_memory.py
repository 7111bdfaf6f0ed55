"""Measures what a plan computes, in a process of its own: `python measured_memory.py REQUEST` prints JSON.

"resident" trains a random model for one step and reads the process's resident memory after each part of it.
"saved" counts the storages that autograd keeps between forward and backward, in layouts of more ranks than there are:
process groups are torch's fake ones, so that values are wrong and sizes right.
"""

import gc
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import megatron_ext.attention
import megatron_ext.cpu_layers
import megatron_ext.model
import megatron_ext.parallel
from megatron_ext.hf_mapping import model_shape
from megatron_ext.known_models import KnownModel, hf_config
from megatron_ext.lora import LoraSettings, attach_adapters
from megatron_ext.model import ModelSettings, build_model, packed_params
from megatron_ext.optimizer import OptimizerSettings, apply_update, build_optimizer
from megatron_ext.parallel import close_parallel, init_parallel
from megatron_ext.training import MicroBatch, run_schedule, wrap_data_parallel

ADAM = OptimizerSettings(1e-6, (0.9, 0.999), 0.0, 1.0, True)
SEQUENCES = 2


def shape_of(model):
    """A request's model: its type and the numbers of its config.json."""
    numbers = {key: value for key, value in model.items() if key != "type"}
    return model_shape(hf_config(KnownModel(model["type"], numbers, 0.0, ())))


def as_on_a_gpu():
    """Layers save what Megatron's own operations save, and freed memory goes back to the system."""
    megatron_ext.attention.MOST_PADDED_TOKENS = 0  # each sequence alone, as long ones are: padding saves less
    megatron_ext.cpu_layers.library = lambda: "measured without"
    megatron_ext.model.gated_activation = gate
    megatron_ext.parallel.keep_freed_memory = lambda: True


def gate(x):
    """As in Megatron's feed-forward layer, offset included."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * (up + 0.0)


def resident(name="VmRSS"):  # bytes
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) * 1024


def batch_of(tokens, vocab_size):
    length = tokens // SEQUENCES
    return MicroBatch(
        token_ids=torch.randint(vocab_size, (tokens,)),
        position_ids=torch.arange(length).repeat(SEQUENCES),
        cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32),
        max_seqlen=length,
        rows=torch.arange(0, tokens, 64),
    )


def filled(shape, layout, *, dtype, recompute, lora_rank):
    model = build_model(shape, ModelSettings(dtype, recompute), layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    if lora_rank:
        attach_adapters(model, shape, LoraSettings(lora_rank, 2 * lora_rank, 0), layout)
    return model


def measure_resident(request):
    layout = init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
    small = {**request, "model": {**request["model"], "hidden_size": 96, "num_hidden_layers": 1, "vocab_size": 128}}
    train_once({**small, "tokens": 128}, layout)  # what libraries set up at first use does not count
    return train_once(request, layout)


def train_once(request, layout):
    """Bytes that appear with each part of a training step."""
    shape, dtype = shape_of(request["model"]), getattr(torch, request["dtype"])
    found, last = {}, resident()

    def since(name):
        nonlocal last
        now = resident()
        found[name], last = now - last, now

    model = filled(shape, layout, dtype=dtype, recompute=request["recompute"], lora_rank=request["lora_rank"])
    since("weights")
    ddp = wrap_data_parallel(model, distributed_optimizer=True)
    ddp.zero_grad_buffer()  # a page of zeros is there only once it is written
    since("gradients")
    optimizer = build_optimizer(ddp, ADAM, dtype)
    since("main weights")
    batch = batch_of(request["tokens"], shape.vocab_size)

    def loss(hidden, index):
        found["saved"] = resident() - last
        return hidden.float().sum(), None

    def reduced(*args, **options):  # without reducing, which copies all gradients in gloo
        found["peak"] = resident("VmHWM") - last

    ddp.config.finalize_model_grads_func = reduced
    ddp.train()
    last = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run_schedule(ddp, [batch], loss, layout, forward_only=False)
    last = resident()
    apply_update(optimizer, lr=1e-6)
    since("moments")
    return found


def measure_saved(request):
    """Bytes that autograd saves in the layers for one micro-batch on the first rank, of each case."""
    new_group = dist.new_group
    dist.new_group = lambda *args, backend=None, **options: new_group(*args, backend="fake", **options)
    return [saved_bytes(case) for case in request["cases"]]


def saved_bytes(case):
    tensor = case["tensor"]
    os.environ["WORLD_SIZE"] = str(tensor)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor)
    shape, dtype = shape_of(case["model"]), getattr(torch, case["dtype"])
    layout = init_parallel(tensor=tensor, pipeline=1, sequence=case["sequence"], device="cpu")
    model = filled(shape, layout, dtype=dtype, recompute=case["recompute"], lora_rank=case["lora_rank"])
    model.decoder.final_layernorm = None
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive until counted, so that its address is its own
        return tensor

    batch = batch_of(case["tokens"], shape.vocab_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            batch.token_ids[None],
            batch.position_ids[None],
            None,
            packed_seq_params=packed_params(batch.cu_seqlens, batch.max_seqlen, layout=layout),
        )
    close_parallel()
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    as_on_a_gpu()
    asked = json.loads(sys.argv[1])
    print(json.dumps({"resident": measure_resident, "saved": measure_saved}[asked["measure"]](asked)))
