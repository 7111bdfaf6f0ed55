"""The table at full size, without weights: every parameter of the real models exactly once, in every legal layout."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ext.hf_mapping import from_shards, model_rules, model_shape, to_shard
from megatron_ext.model import ModelSettings, transformer_config
from megatron_ext.parallel import Layout

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def sizes(hidden, layers, heads, kv_heads, ffn, vocab, *, tied=False, **others):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **others,
    }


# From the config.json of the released checkpoints: family, sizes, billions of parameters.
MODELS = {
    "Qwen2.5-3B": ("qwen2", sizes(2048, 36, 16, 2, 11008, 151936, tied=True), 3.09),
    "Qwen2.5-7B": ("qwen2", sizes(3584, 28, 28, 4, 18944, 152064), 7.62),
    "Qwen2.5-14B": ("qwen2", sizes(5120, 48, 40, 8, 13824, 152064), 14.77),
    "Qwen2.5-32B": ("qwen2", sizes(5120, 64, 40, 8, 27648, 152064), 32.76),
    "Qwen2.5-72B": ("qwen2", sizes(8192, 80, 64, 8, 29568, 152064), 72.71),
    "Qwen3-8B": ("qwen3", sizes(4096, 36, 32, 8, 12288, 151936, head_dim=128), 8.19),
    "Llama-3.3-70B": ("llama", sizes(8192, 80, 64, 8, 28672, 128256, rope_parameters=LLAMA3), 70.55),
    "Mistral-7B-v0.3": ("mistral", sizes(4096, 32, 32, 8, 14336, 32768, sliding_window=None), 7.25),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    """(config, {name: meta tensor}) as transformers would build it."""
    family, numbers, billions = MODELS[request.param]
    config = AutoConfig.for_model(family, **numbers)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(built).__name__]
    parameters = dict(built.named_parameters())  # a tied head is listed once
    assert sum(p.numel() for p in parameters.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    return config, parameters


def layout(tensor, pipeline):
    return Layout(
        tensor=tensor, pipeline=pipeline, data=1, sequence=False, device=torch.device("cpu"),
        rank=0, tensor_rank=0, pipeline_rank=0, data_rank=0,
    )  # fmt: skip


def test_the_rules_cover_every_parameter_once(model):
    config, parameters = model
    names = [name for rule in model_rules(model_shape(config)) for name in rule.hf]
    assert len(names) == len(set(names))
    assert set(names) == set(parameters)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_shards_of_every_legal_size_put_together_have_the_sizes_they_came_from(model, tensor):
    config, parameters = model
    shape = model_shape(config)
    if shape.num_kv_heads % tensor:  # not legal, and said so
        with pytest.raises(ValueError, match="heads, which tensor-parallel size"):
            transformer_config(shape, ModelSettings(torch.bfloat16, "none"), layout(tensor, 1))
        return
    for rule in model_rules(shape):
        parts = [parameters[name] for name in rule.hf]
        shards = [to_shard(rule, parts, shape, rank, tensor) for rank in range(tensor)]
        assert len({shard.shape for shard in shards}) == 1, rule.megatron
        whole = from_shards(rule, shards, shape)
        assert {name: t.shape for name, t in whole.items()} == {name: parameters[name].shape for name in rule.hf}


@pytest.mark.parametrize(("tensor", "pipeline"), itertools.product((1, 2, 4, 8), repeat=2))
def test_a_layout_is_either_legal_or_says_which_setting_to_change(model, tensor, pipeline):
    shape = model_shape(model[0])
    settings = ModelSettings(torch.bfloat16, "none")
    if shape.num_kv_heads % tensor == shape.num_heads % tensor == shape.num_layers % pipeline == 0:
        assert transformer_config(shape, settings, layout(tensor, pipeline)).num_layers == shape.num_layers
        return
    with pytest.raises(ValueError, match=r"does not divide; set parallel\.(tensor|pipeline) to a divisor of \d+"):
        transformer_config(shape, settings, layout(tensor, pipeline))
