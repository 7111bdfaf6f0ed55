"""Engines of other models and layouts than test_engine.py's, each with one of its own, against transformers."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_engine import (
    TOLERANCE,
    complete,
    load,
    make_model,
    prompts_of_many_lengths,
    start_options,
    true_logprobs,
    worst_gap,
)
from tiny_models import FAMILIES
from tiny_models import make_model as make_tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_ext.buckets import fill_buckets
from megatron_ext.hf_mapping import model_shape
from megatron_ext.shared_weights import SharedWeights
from searche1.rollout.engine import COMPARE, shared, start_engine

pytestmark = pytest.mark.slow


def test_a_tensor_parallel_engine_is_exact_before_and_after_new_weights(folder, reference, tmp_path):
    tensor = 2
    new = make_model(vocab_size=reference.config.vocab_size, seed=3)
    prompt = prompts_of_many_lengths()[6]
    options = {**start_options(folder, tmp_path / "engine.log"), "tensor": tensor}
    with start_engine(**options) as engine:
        engine.wait_until_ready(timeout_s=300)
        assert worst_gap(reference, prompt, complete(engine, [prompt])[0]) < TOLERANCE
        engine.begin_update()
        for bucket in fill_buckets(((n, p.detach()) for n, p in new.named_parameters()), bucket_bytes=40_000):
            payloads = [[shared(bucket.tensors()) for _ in range(tensor)] for _ in range(2)]
            engine.load_bucket(payloads[0])
            engine.load_bucket(payloads[1], load_format=COMPARE)
        engine.end_update(version="1")
        assert worst_gap(new, prompt, complete(engine, [prompt])[0]) < TOLERANCE


def test_a_llama_has_the_logprobs_of_transformers(folder, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=FAMILIES["llama"]["rope_parameters"],
    )
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(tmp_path / "model")
    for file in folder.glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    prompts = prompts_of_many_lengths()
    log = tmp_path / "engine.log"
    with start_engine(**{**start_options(tmp_path / "model", log), "context_length": 500}) as engine:
        engine.wait_until_ready(timeout_s=300)
        completions = complete(engine, prompts)
    assert "SGLang's own modules" not in log.read_text()
    assert max(worst_gap(model, p, c) for p, c in zip(prompts, completions, strict=True)) < TOLERANCE


def test_a_mixture_of_experts_is_served_and_reloaded_exactly(folder, tmp_path):
    """Its weights are sent under the names of a checkpoint, each expert apart; the engine holds them fused."""
    models = [make_tiny(tmp_path / f"model{seed}", "qwen3_moe", tied=False, seed=seed) for seed in (0, 1)]
    for model in models:
        for file in folder.glob("*token*"):
            shutil.copy(file, model)
    ids = torch.randint(0, 200, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    options = {**start_options(models[0], tmp_path / "engine.log"), "context_length": 256}
    with start_engine(**options) as engine:
        engine.wait_until_ready(timeout_s=300)
        for version, model in enumerate(models):
            if version:  # what is no expert's is shared
                memory = SharedWeights(model_shape(AutoConfig.from_pretrained(model)), torch.float32)
                load(engine, load_file(model / "model.safetensors").items(), version="1", memory=memory)
            expected = true_logprobs(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), ids)
            found = torch.tensor(engine.logprobs([ids])[0][-len(expected) :])
            assert (expected - found).abs().max() < TOLERANCE
