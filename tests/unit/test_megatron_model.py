"""The trainable policy in one process: the same numbers as transformers and PEFT."""

import json
from dataclasses import replace

import pytest
import torch
from one_policy import (
    LORA,
    TRAIN,
    assert_same_bits,
    exported,
    logprobs,
    randomize_adapter,
    samples,
    transformers_logprobs,
    update,
)
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import FAMILIES, make_model
from transformers import AutoModelForCausalLM, GemmaConfig

from megatron_ext.parallel import init_parallel
from searche1.models import choose_dtype, resolve_model
from searche1.packing import Sharing, pack, row_weights
from searche1.policy import Policy
from searche1.types import UserError

# -- the same model as transformers' --------------------------------------------------------------


def test_weights_come_back_to_the_same_bits(tiny_qwen2, make_policy):
    assert_same_bits(exported(make_policy()), load_file(tiny_qwen2 / "model.safetensors"))


def test_a_saved_folder_is_one_that_transformers_loads(tiny_qwen2, make_policy, tmp_path):
    make_policy(optimizer=None).save_hf(tmp_path / "hf")
    found, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "hf", tiny_qwen2))
    assert_same_bits(found.state_dict(), original.state_dict())


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2"])
def test_every_family_is_the_model_that_transformers_has(family, is_tied, make_policy, tmp_path):
    folder = make_model(tmp_path / "model", family, tied=is_tied)
    policy = make_policy(folder=folder, lora=LORA)
    assert_same_bits(exported(policy), load_file(folder / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logprobs(policy), transformers_logprobs(model), rtol=0, atol=1e-4)

    randomize_adapter(policy)
    policy.save_adapter(tmp_path / "adapter")
    policy.save_hf(tmp_path / "merged")
    adapted = transformers_logprobs(PeftModel.from_pretrained(model, tmp_path / "adapter").eval())
    merged = transformers_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    for expected in (adapted, merged):
        torch.testing.assert_close(logprobs(policy), expected, rtol=0, atol=1e-4)


def test_llama_3s_scaled_positions_are_not_ordinary_ones(make_policy, tmp_path):
    folder = make_model(tmp_path / "model", "llama", tied=False)
    scaled = logprobs(make_policy(folder=folder, optimizer=None))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert (logprobs(make_policy(folder=folder, optimizer=None)) - scaled).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_packed_sequences_equal_transformers(tiny_qwen2, make_policy, temperature):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    expected = transformers_logprobs(model, temperature=temperature)
    found = logprobs(make_policy(), temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_neighbour_in_the_pack_changes_no_bit(make_policy):
    policy = make_policy(optimizer=None)
    mine, first, second = samples(0)[0], samples(1), samples(2)
    for place in range(3):
        found = []
        for others in (first, second):
            members = [*others[1:3]]
            members.insert(place, mine)
            batch = pack(members, row_weights(members, "token_mean"), range(3))
            rows = policy.logprobs([batch], temperature=1.0)[0]
            found.append(rows[batch.sample_of_row == place])
        assert torch.equal(*found)


def test_padding_behind_the_sequences_changes_nothing(make_policy):
    policy = make_policy(optimizer=None)
    weights = row_weights(samples(), "token_mean")
    plain, padded = (pack(samples(), weights, range(4), sharing=Sharing(sequence=multiple)) for multiple in (1, 64))
    assert len(padded.inputs.token_ids) == 64 > len(plain.inputs.token_ids)
    one, other = (policy.logprobs([batch], temperature=1.0)[0] for batch in (plain, padded))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# -- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, r"4 attention heads, which tensor-parallel size 3.*parallel\.tensor to a divisor of 4"),
        ({"tensor": 4}, r"2 key-value heads, which tensor-parallel size 4.*parallel\.tensor to a divisor of 2"),
        ({"pipeline": 3}, r"4 layers, which pipeline-parallel size 3.*parallel\.pipeline to a divisor of 4"),
    ],
)
def test_a_layout_that_cannot_hold_the_model_is_told_which_size_to_change(tiny_qwen2, layout, sizes, message):
    with pytest.raises(UserError, match=message):
        Policy(model_path=tiny_qwen2, layout=replace(layout, **sizes), train=TRAIN, optimizer=None)


def test_too_few_processes_for_the_layout_are_told_how_many_to_start():
    with pytest.raises(ValueError, match="1 processes cannot hold tensor-parallel 2 x pipeline-parallel 1"):
        init_parallel(tensor=2, pipeline=1, sequence=False, device="cpu")
    with pytest.raises(ValueError, match="x context-parallel 3; start a multiple of 3 processes"):
        init_parallel(tensor=1, pipeline=1, context=3, sequence=False, device="cpu")


def test_sequence_parallelism_without_tensor_parallelism_is_refused():
    with pytest.raises(ValueError, match="needs tensor parallelism of at least 2"):
        init_parallel(tensor=1, pipeline=1, sequence=True, device="cpu")


def test_unknown_choices_name_the_known_ones(make_policy, layout):
    with pytest.raises(UserError, match=r"recompute must be one of .*'full', 'none', 'selective'.*got 'ful'"):
        make_policy(train=replace(TRAIN, recompute="ful"))
    with pytest.raises(UserError, match=r"train\.dtype must be one of .*got 'fp32'"):
        choose_dtype("fp32", "cpu")


def test_a_folder_of_another_family_is_refused_as_a_users_mistake(make_policy, tmp_path):
    GemmaConfig(architectures=["GemmaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GemmaForCausalLM"):
        make_policy(folder=tmp_path)


def test_a_model_that_is_no_folder_and_no_name_is_refused():
    with pytest.raises(UserError, match="neither a folder nor a model that can be downloaded"):
        resolve_model("no/such/place")


# -- adapters -------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_no_bit(make_policy):
    adapted, plain = make_policy(lora=LORA), make_policy(optimizer=None)
    assert torch.equal(logprobs(adapted), logprobs(plain))
    assert_same_bits(exported(adapted), exported(plain))


def test_merged_weights_give_the_adapters_logprobs(make_policy, tmp_path):
    policy = make_policy(lora=LORA)
    before = logprobs(policy)
    randomize_adapter(policy)
    assert (logprobs(policy) - before).abs().max() > 0.1
    policy.save_hf(tmp_path / "hf")
    merged = make_policy(folder=tmp_path / "hf", optimizer=None)
    torch.testing.assert_close(logprobs(merged), logprobs(policy), rtol=0, atol=1e-5)


def test_with_the_adapter_off_the_model_is_its_base_and_then_itself_again(make_policy):
    policy, base = make_policy(lora=LORA), logprobs(make_policy(optimizer=None))
    randomize_adapter(policy)
    adapted = logprobs(policy)
    with policy.adapter_disabled():
        assert torch.equal(logprobs(policy), base)
    assert torch.equal(logprobs(policy), adapted)


def test_peft_loads_the_saved_adapter_and_computes_the_same_logprobs(tiny_qwen2, make_policy, tmp_path):
    policy = make_policy(lora=LORA)
    randomize_adapter(policy)
    policy.save_adapter(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = transformers_logprobs(model)
    torch.testing.assert_close(logprobs(policy), expected, rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert (transformers_logprobs(model) - expected).abs().max() > 0.1


def test_training_an_adapter_moves_it_and_nothing_else(make_policy):
    policy = make_policy(lora=LORA)
    before, base = policy.snapshot(), logprobs(policy)
    assert all("lora" in name for name in before)
    update(policy, lr=1e-2)
    after = policy.snapshot()
    assert all(not torch.equal(before[name], after[name]) for name in before if ".b." in name)
    with policy.adapter_disabled():
        assert torch.equal(logprobs(policy), base)
    assert not torch.equal(logprobs(policy), base)
