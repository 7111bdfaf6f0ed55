"""The table at full size, without weights: every parameter of the real models exactly once, in every legal layout."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ext.hf_mapping import from_shards, hf_sizes, model_rules, model_shape, to_shard
from megatron_ext.known_models import KNOWN_MODELS, hf_config
from megatron_ext.model import ModelSettings, transformer_config
from megatron_ext.parallel import Layout


@pytest.fixture(params=KNOWN_MODELS, scope="module")
def model(request):
    """(config, {name: meta tensor}) as transformers would build it."""
    known = KNOWN_MODELS[request.param]
    config = AutoConfig.for_model(known.model_type, **known.numbers)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(built).__name__]
    assert hf_config(known).architectures == config.architectures
    parameters = as_saved(built.named_parameters())  # a tied head is listed once
    assert sum(p.numel() for p in parameters.values()) / 1e9 == pytest.approx(known.billions, abs=0.01)
    return config, parameters


def as_saved(parameters):
    """transformers holds a layer's experts in two tensors, and saves each expert's projections apart."""
    saved = {}
    for name, tensor in parameters:
        experts, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for e in range(len(tensor)):
                gate, up = tensor[e].chunk(2)
                saved[f"{experts}.experts.{e}.gate_proj.weight"] = gate
                saved[f"{experts}.experts.{e}.up_proj.weight"] = up
        elif kind == "down_proj":
            saved.update({f"{experts}.experts.{e}.down_proj.weight": tensor[e] for e in range(len(tensor))})
        else:
            saved[name] = tensor
    return saved


def layout(tensor, pipeline, expert=1):
    return Layout(
        tensor=tensor, pipeline=pipeline, data=expert, sequence=tensor > 1, device=torch.device("cpu"),
        rank=0, tensor_rank=0, pipeline_rank=0, data_rank=0, expert=expert,
    )  # fmt: skip


def test_the_rules_cover_every_parameter_once(model):
    config, parameters = model
    names = [name for rule in model_rules(model_shape(config)) for name in rule.hf]
    assert len(names) == len(set(names))
    assert hf_sizes(model_shape(config)) == {name: tuple(tensor.shape) for name, tensor in parameters.items()}


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


@pytest.mark.parametrize("expert", [1, 2, 3, 8, 128])
def test_experts_are_spread_over_a_divisor_of_their_number(model, expert):
    shape, settings = model_shape(model[0]), ModelSettings(torch.bfloat16, "none")
    if expert == 1 or (shape.num_experts and shape.num_experts % expert == 0):
        assert transformer_config(shape, settings, layout(1, 1, expert)).num_layers == shape.num_layers
        return
    with pytest.raises(ValueError, match=r"expert-parallel size \d+ does not divide; set parallel\.expert to"):
        transformer_config(shape, settings, layout(1, 1, expert))
