"""What a plan says of memory against what a process really takes, and what it says of layouts against what is built."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measured_memory import shape_of

from megatron_ext.memory import (
    RECOMPUTE_MODES,
    ParallelSizes,
    TrainingPass,
    activation_bytes,
    largest_parameter,
    layer_activations,
    model_state,
)
from searche1.planner.hardware import cluster

ROOT = Path(__file__).parents[2]
CLOSE = 0.10  # of the computed bytes
MODEL = {
    "type": "qwen2",
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 16000,
    "tie_word_embeddings": True,
}
SMALL = {**MODEL, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "norm_topk_prob": True}
SHAPES = {
    "qwen2": SMALL,
    "qwen3": {**SMALL, "type": "qwen3", "head_dim": 96},
    "qwen3_moe": {**SMALL, "type": "qwen3_moe", "head_dim": 96, **EXPERTS},
}
HARDWARE = {  # nodes of eight H800, as the first line of each file says
    "qwen2.5-3b": 1,
    "qwen2.5-7b": 2,
    "qwen2.5-14b": 2,
    "qwen2.5-32b": 4,
    "qwen2.5-72b": 8,
    "qwen3-30b-a3b": 4,
}
H800 = cluster("h800", nodes=1, gpus_per_node=8)


def measured(**request):
    """What a process of its own counts; memory that is freed there goes back to the system at once."""
    trimmed = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("measured_memory.py"), json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, **trimmed},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("dtype", "recompute", "lora_rank"), [("float32", "none", 0), ("bfloat16", "full", 0), ("float32", "none", 32)]
)
def test_a_training_step_takes_as_much_memory_as_computed(dtype, recompute, lora_rank):
    tokens, b = 1024, 4 if dtype == "float32" else 2
    found = measured(
        measure="resident", model=MODEL, dtype=dtype, recompute=recompute, tokens=tokens, lora_rank=lora_rank
    )
    shape, alone = shape_of(MODEL), ParallelSizes(1)
    state = model_state(shape, alone, 0, dtype_bytes=b, distributed_optimizer=True, lora_rank=lora_rank)
    settings = TrainingPass(recompute, b, lora_rank, is_fused=False)
    activations = activation_bytes(shape, alone, settings, tokens=tokens)
    layer_gradient = 0 if lora_rank else largest_parameter(shape, alone) * b
    noise = 4e6  # bytes that no tensor of the model explains
    assert found["weights"] == pytest.approx(state.weights, rel=CLOSE)
    assert found["gradients"] == pytest.approx(state.gradients, rel=CLOSE, abs=noise)
    assert found["main weights"] + found["moments"] == pytest.approx(state.optimizer, rel=CLOSE, abs=noise)
    assert found["saved"] == pytest.approx(activations.saved, rel=CLOSE, abs=noise)
    assert found["peak"] == pytest.approx(activations.total + layer_gradient, rel=CLOSE, abs=noise)


@pytest.mark.parametrize("lora_rank", [0, 16])
@pytest.mark.parametrize("recompute", RECOMPUTE_MODES)
@pytest.mark.parametrize(("family", "tensor", "sequence"), [
    ("qwen2", 1, False), ("qwen2", 2, True), ("qwen2", 2, False), ("qwen3", 1, False), ("qwen3", 2, True),
    ("qwen3_moe", 1, False),
])  # fmt: skip
def test_layers_save_as_much_for_backward_as_computed(family, tensor, sequence, recompute, lora_rank):
    tokens, model = 256, SHAPES[family]
    found = measured(
        measure="saved", model=model, dtype="float32", recompute=recompute, tokens=tokens, lora_rank=lora_rank,
        tensor=tensor, sequence=sequence,
    )  # fmt: skip
    shape = shape_of(model)
    settings = TrainingPass(recompute, 4, lora_rank, is_fused=False)
    layer = layer_activations(shape, ParallelSizes(tensor, tensor, sequence=sequence), settings, tokens=tokens)
    rope = tokens // 2 * shape.head_dim * 4  # the angles of the longest sequence, which recomputing layers share
    assert found["saved"] == pytest.approx(shape.num_layers * layer.kept, rel=0.02, abs=1.1 * rope)
