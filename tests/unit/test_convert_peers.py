"""Our checkpoints against mbridge, which was written by others for the same purpose: names, tensors and shards."""

from collections import Counter

import pytest
import torch
from mbridge import AutoBridge
from tiny_models import make_model
from transformers import AutoConfig

from megatron_ext.convert import hf_to_megatron, stored_size
from megatron_ext.hf_io import HFReader
from megatron_ext.hf_mapping import model_rules, model_shape, to_shard
from megatron_ext.parallel import close_parallel, init_parallel
from megatron_ext.torch_dist import TorchDistReader

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama")  # it has no Mistral of text alone


@pytest.fixture(scope="module")
def process_groups():
    yield init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
    close_parallel()


def their_name(rule):
    """The parameter in the layers that Transformer Engine builds, which are the only ones mbridge knows."""
    if not rule.place:
        return rule.megatron
    name = rule.key.replace("decoder.layers.", f"decoder.layers.{rule.place[0]}.")
    return name.replace("experts.experts", "experts") + str(rule.place[1]) if rule.is_expert else name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_tensor_is_the_one_that_mbridge_makes(family, process_groups, tmp_path):
    source = make_model(tmp_path / "source", family, tied=False)
    config = AutoConfig.from_pretrained(source)
    shape = model_shape(config)
    config.rope_theta = shape.rope_base  # mbridge looks for it where transformers 4 had it
    bridge = AutoBridge.from_config(config, dtype=torch.float32)
    hf_to_megatron(source, tmp_path / "megatron", shape)
    stored, reader = TorchDistReader(tmp_path / "megatron"), HFReader(source)
    compared = Counter()
    for rule in model_rules(shape):
        name = their_name(rule)
        assert bridge._weight_name_mapping_mcore_to_hf(name) == list(rule.hf)
        parts = [reader.tensor(part) for part in rule.hf]
        theirs = bridge._weight_to_mcore_format(name, parts)
        ours = stored.tensor(rule.key, rule.place)
        if rule.layout == "vocab":  # padding is the loading side's choice
            assert not ours[shape.vocab_size :].any()
            ours = ours[: shape.vocab_size]
        assert torch.equal(ours, theirs), name
        if rule.layout not in ("vocab", "replicated"):
            whole = torch.empty(stored_size(rule, shape)[len(rule.place) :], device="meta")
            local = to_shard(rule, [torch.empty_like(part, device="meta") for part in parts], shape, 0, 2)
            assert whole.numel() == 2 * local.numel()
            shards = bridge._weight_split_across_tp(name, theirs, local, 2)
            for rank, shard in enumerate(shards):
                assert torch.equal(to_shard(rule, parts, shape, rank, 2), shard), (name, rank)
        compared[rule.layout] += 1
    assert compared["qkv"] and compared["gate_up"] and compared["columns"] and compared["vocab"] == 2
