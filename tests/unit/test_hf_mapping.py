"""The one table between HuggingFace and Megatron weights, and what a folder that does not fit is told."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from megatron_ext.hf_io import HFReader, TensorSpec, load_hf_weights, save_hf
from megatron_ext.hf_mapping import (
    EMBEDDING,
    HEAD,
    ModelShape,
    from_shards,
    hf_size,
    interleave_qkv,
    model_rules,
    model_shape,
    padded_vocab_size,
    separate_qkv,
    to_shard,
)
from megatron_ext.model import ModelSettings, build_model

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=24,
    ffn_size=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,  # heads x head size is not the hidden size: nothing may confuse the two
    vocab_size=200,
    max_positions=64,
    norm_eps=1e-6,
    rope_base=100.0,
    rope_factor=1.0,
    has_qkv_bias=True,
    has_qk_norm=True,
    tied_embeddings=False,
)
EXPERTS = replace(SHAPE, num_experts=3, experts_per_token=2, expert_ffn_size=12)
SIZES = {
    "experts.0.gate_proj.weight": (12, 24),
    "experts.1.gate_proj.weight": (12, 24),
    "experts.2.gate_proj.weight": (12, 24),
    "experts.0.up_proj.weight": (12, 24),
    "experts.1.up_proj.weight": (12, 24),
    "experts.2.up_proj.weight": (12, 24),
    "experts.0.down_proj.weight": (24, 12),
    "experts.1.down_proj.weight": (24, 12),
    "experts.2.down_proj.weight": (24, 12),
    "mlp.gate.weight": (3, 24),
    "embed_tokens.weight": (200, 24),
    "lm_head.weight": (200, 24),
    "q_proj.weight": (48, 24),
    "k_proj.weight": (16, 24),
    "v_proj.weight": (16, 24),
    "q_proj.bias": (48,),
    "k_proj.bias": (16,),
    "v_proj.bias": (16,),
    "o_proj.weight": (24, 48),
    "gate_proj.weight": (20, 24),
    "up_proj.weight": (20, 24),
    "down_proj.weight": (24, 20),
    "input_layernorm.weight": (24,),
    "post_attention_layernorm.weight": (24,),
    "q_norm.weight": (8,),
    "k_norm.weight": (8,),
    "model.norm.weight": (24,),
}


def hf_tensor(name):
    size = next(size for ending, size in SIZES.items() if name.endswith(ending))
    return torch.randn(*size, generator=torch.Generator().manual_seed(len(name)))


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("shape", "rule"),
    [pytest.param(shape, rule, id=rule.megatron) for shape in (SHAPE, EXPERTS) for rule in model_rules(shape)],
)
def test_every_rule_round_trips_to_the_same_bits(shape, rule, tensor):
    assert [hf_size(name, shape) for name in rule.hf] == [tuple(hf_tensor(name).shape) for name in rule.hf]
    parts = [hf_tensor(name) for name in rule.hf]
    shards = [to_shard(rule, parts, SHAPE, rank, tensor) for rank in range(tensor)]
    assert len({shard.shape for shard in shards}) == 1
    found = from_shards(rule, shards, SHAPE)
    assert list(found) == list(rule.hf)
    for part, name in zip(parts, rule.hf, strict=True):
        assert torch.equal(found[name], part)


def test_the_rules_name_every_tensor_of_the_family_once():
    names = [name for rule in model_rules(SHAPE) for name in rule.hf]
    assert len(names) == len(set(names)) == 3 + 14 * SHAPE.num_layers
    tied = [name for rule in model_rules(replace(SHAPE, tied_embeddings=True)) for name in rule.hf]
    assert sorted([*tied, "lm_head.weight"]) == sorted(names)
    unbiased = [name for rule in model_rules(replace(SHAPE, has_qkv_bias=False)) for name in rule.hf]
    assert unbiased == [name for name in names if not name.endswith("bias")]
    experts = [name for rule in model_rules(EXPERTS) for name in rule.hf]
    assert len(experts) == len(set(experts)) == 3 + (14 - 3 + 1 + 3 * 3) * SHAPE.num_layers
    without_norms = [name for rule in model_rules(replace(SHAPE, has_qk_norm=False)) for name in rule.hf]
    assert without_norms == [name for name in names if "q_norm" not in name and "k_norm" not in name]


def test_each_key_value_group_holds_its_queries_then_its_key_then_its_value():
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    assert interleave_qkv([q, k, v], num_kv_heads=2).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@given(
    kv_heads=st.integers(1, 4),
    queries=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    columns=st.none() | st.integers(1, 3),
)
def test_separating_undoes_interleaving(kv_heads, queries, head_dim, columns):
    tail = () if columns is None else (columns,)
    rows = (kv_heads * queries * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    parts = [torch.randn(n, *tail) for n in rows]
    found = separate_qkv(interleave_qkv(parts, kv_heads), kv_heads, head_dim)
    assert all(torch.equal(a, b) for a, b in zip(parts, found, strict=True))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("rule", [EMBEDDING, HEAD], ids=["embedding", "head"])
def test_vocabulary_rows_past_the_real_ones_are_zero(rule, tensor):
    whole = hf_tensor(rule.hf[0])
    joined = torch.cat([to_shard(rule, [whole], SHAPE, rank, tensor) for rank in range(tensor)])
    assert len(joined) == padded_vocab_size(200, tensor)
    assert torch.equal(joined[:200], whole) and not joined[200:].any()


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "padded"), [(200, 1, 256), (200, 4, 512), (256, 2, 256), (151936, 2, 152064)]
)
def test_the_padded_vocabulary_is_a_multiple_of_128_per_rank(vocab_size, tensor, padded):
    assert padded_vocab_size(vocab_size, tensor) == padded


# -- which checkpoints are understood -------------------------------------------------------------


def test_the_shape_is_read_from_a_qwen2_config(tiny_qwen2):
    config = AutoConfig.from_pretrained(tiny_qwen2)
    shape = model_shape(config)
    assert (shape.num_layers, shape.hidden_size, shape.ffn_size, shape.vocab_size) == (4, 64, 96, 200)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 16)
    assert shape.rope_base == 100.0 and shape.has_qkv_bias
    assert shape.tied_embeddings == config.tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GemmaConfig(architectures=["GemmaForCausalLM"]), "GemmaForCausalLM"),
        (GPT2Config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        (Qwen2Config(), "unknown"),
    ],
)
def test_an_architecture_without_rules_is_named_with_those_that_have_them(config, named):
    with pytest.raises(ValueError, match=f"{named}.*Qwen2ForCausalLM.*hf_mapping"):
        model_shape(config)


def test_attention_that_this_model_cannot_compute_is_refused():
    family = {"architectures": ["Qwen2ForCausalLM"]}
    with pytest.raises(ValueError, match="sliding-window"):
        model_shape(Qwen2Config(**family, use_sliding_window=True, sliding_window=64))
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 1024}
    with pytest.raises(ValueError, match="'yarn' is not supported"):
        model_shape(Qwen2Config(**family, rope_parameters=yarn))
    with pytest.raises(ValueError, match=r"4096 tokens.*v0\.2"):
        model_shape(MistralConfig(architectures=["MistralForCausalLM"], sliding_window=4096))
    with pytest.raises(ValueError, match="attention_bias=true"):
        model_shape(LlamaConfig(architectures=["LlamaForCausalLM"], attention_bias=True))
    with pytest.raises(ValueError, match="only 'silu'"):
        model_shape(LlamaConfig(architectures=["LlamaForCausalLM"], hidden_act="gelu"))
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 2.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    with pytest.raises(ValueError, match=r"low_freq_factor=1, .* has 2"):
        model_shape(LlamaConfig(architectures=["LlamaForCausalLM"], rope_parameters=scaled))


# -- folders --------------------------------------------------------------------------------------


@pytest.fixture
def load(tiny_qwen2, layout, tmp_path):
    """Loads the tiny model's folder after its tensors were changed."""

    def run(change):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_qwen2, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shape = model_shape(AutoConfig.from_pretrained(folder))
        load_hf_weights(build_model(shape, ModelSettings(torch.float32, "none"), layout), folder, shape, layout)

    return run


def test_a_missing_tensor_is_named(load):
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*model\.layers\.2\.self_attn\.k_proj\.bias"):
        load(lambda tensors: tensors.pop("model.layers.2.self_attn.k_proj.bias"))


def test_a_tensor_without_a_rule_is_named(load):
    with pytest.raises(ValueError, match=r"1 tensors without a mapping rule.*model\.layers\.0\.self_attn\.q_norm"):
        load(lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))


def test_a_tied_checkpoint_may_carry_a_copy_of_its_head(load):
    load(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("model.layers.1.mlp.down_proj.weight", (64, 90)),
        ("model.layers.1.mlp.up_proj.weight", (90, 64)),
        ("model.layers.1.self_attn.q_proj.weight", (32, 64)),
        ("model.layers.1.self_attn.k_proj.bias", (16,)),
        ("model.norm.weight", (32,)),
        ("model.embed_tokens.weight", (200, 32)),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(load, name, size):
    with pytest.raises(ValueError, match=r"is \(.* where config\.json says .*config\.json do not belong together"):
        load(lambda tensors: tensors.update({name: torch.zeros(size)}))


@pytest.mark.parametrize("rows", [190, 210])
def test_an_embedding_that_padding_would_make_fit_is_refused(load, rows):
    with pytest.raises(ValueError, match=rf"embed_tokens\.weight.* is \({rows}, 64\) .* a vocabulary of 200"):
        load(lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(rows, 64)}))


def test_a_folder_without_safetensors_is_told_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        HFReader(tmp_path)


def specs_of(tensors):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_a_folder_written_in_several_shards_reads_back_the_same(tiny_qwen2, tmp_path):
    tensors = load_file(tiny_qwen2 / "model.safetensors")
    largest = max(tensor.nbytes for tensor in tensors.values())
    backwards = reversed(tensors.items())  # pipeline stages and experts may give them in any order
    options = {"specs": specs_of(tensors), "config_from": tiny_qwen2, "shard_bytes": 2 * largest}
    save_hf(backwards, out=tmp_path / "out", **options)
    files = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert not (tmp_path / "out" / "model.safetensors").exists()
    reader = HFReader(tmp_path / "out")
    assert reader.names() == set(tensors)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in tensors.items())
    assert (tmp_path / "out" / "config.json").read_text() == (tiny_qwen2 / "config.json").read_text()
    for file in files:  # as the library would have written it
        assert load_file(file).keys() <= tensors.keys()
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_rounded_to_the_type_asked_for_and_the_config_says_so(tiny_qwen2, tmp_path, dtype):
    tensors = load_file(tiny_qwen2 / "model.safetensors")
    specs = {name: TensorSpec(spec.size, dtype) for name, spec in specs_of(tensors).items()}
    save_hf(tensors.items(), specs=specs, out=tmp_path / "out", config_from=tiny_qwen2)
    assert all(torch.equal(t, tensors[n].to(dtype)) for n, t in load_file(tmp_path / "out/model.safetensors").items())
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype


def test_a_write_that_dies_leaves_no_folder(tiny_qwen2, tmp_path):
    tensors = load_file(tiny_qwen2 / "model.safetensors")

    def dying():
        yield next(iter(tensors.items()))
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        save_hf(dying(), specs=specs_of(tensors), out=tmp_path / "out", config_from=tiny_qwen2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_an_index_names_and_is_not_there_is_told(tiny_qwen2, tmp_path):
    tensors = load_file(tiny_qwen2 / "model.safetensors")
    out = tmp_path / "out"
    save_hf(tensors.items(), specs=specs_of(tensors), out=out, config_from=tiny_qwen2, shard_bytes=100_000)
    victim = sorted(out.glob("model-*.safetensors"))[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=rf"{victim.name} cannot be read .*download the folder again"):
        HFReader(out)
    victim.unlink()
    with pytest.raises(ValueError, match=rf"{victim.name} cannot be read .*download the folder again"):
        HFReader(out)
    shutil.copy(sorted(out.glob("model-*.safetensors"))[0], victim)
    with pytest.raises(
        ValueError, match=r"is not whole: model-0000\d-of-0000\d.safetensors lacks .*index.json says is in it"
    ):
        HFReader(out)


def test_a_quantized_tensor_is_refused(tiny_qwen2, tmp_path):
    tensors = load_file(tiny_qwen2 / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* stored as F8_E4M3; only .*unquantized"):
        HFReader(tmp_path).spec("model.norm.weight")
