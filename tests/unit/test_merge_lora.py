"""Adapters of PEFT's and ours, merged by tools/merge_lora.py: the same logits, and no merge that would be wrong."""

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_qwen2
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ext.convert import check_checkpoint
from megatron_ext.lora import LoraSettings
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.peft_io import BASE_NAME, MERGED_NAME, fingerprint, read_adapter, read_peft_folder
from megatron_ext.torch_dist import TorchDistReader
from searche1.config import TrainConfig
from searche1.packing import Sample, make_batches, row_weights
from searche1.policy import Policy

TOOL = Path(__file__).parents[2] / "tools" / "merge_lora.py"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 40)[None]


spec = importlib.util.spec_from_file_location("merge_lora", TOOL)
assert spec and spec.loader
merge_lora = importlib.util.module_from_spec(spec)
spec.loader.exec_module(merge_lora)


def merge(base, adapter, out, *flags):
    """Runs the program's main; the exit code, what it printed, and its complaint."""
    printed, complaint = io.StringIO(), io.StringIO()
    arguments = ["merge_lora.py", "--base", base, "--adapter", adapter, "--out", out, *flags]
    with (
        command_line(arguments),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(complaint),
    ):
        code = merge_lora.main()
    return SimpleNamespace(returncode=code, stdout=printed.getvalue(), stderr=complaint.getvalue())


@contextlib.contextmanager
def command_line(arguments):
    before, sys.argv = sys.argv, [str(argument) for argument in arguments]
    try:
        yield
    finally:
        sys.argv = before


def refusal(base, adapter, out):
    """What the tool says when it refuses; nothing is left behind."""
    result = merge(base, adapter, out)
    assert result.returncode == 2, result.stdout
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return result.stderr


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request, tmp_path_factory):
    """A base folder with a tokenizer's file beside the weights."""
    folder = make_qwen2(tmp_path_factory.mktemp("base") / "hf", tied=True)
    AutoModelForCausalLM.from_pretrained(folder, dtype=request.param).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder


def peft_adapter(base, folder, **settings):
    """An adapter that PEFT made and saved, with random weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def logits(folder, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_a_peft_adapter_is_merged_to_what_peft_computes(base, tmp_path, settings):
    adapter = peft_adapter(base, tmp_path / "adapter", **settings)
    result = merge(base, adapter, tmp_path / "merged", "--verify")
    assert result.returncode == 0, result.stderr
    assert "only names and shapes were compared" in result.stdout and "verified: logits are peft's" in result.stdout
    expected, found, before = logits(base, adapter), logits(tmp_path / "merged"), logits(base)
    is_exact = load_file(base / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert (found - expected).abs().mean() < (1e-5 if is_exact else 0.2 * (expected - before).abs().mean())
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert dtypes == {tensor.dtype for tensor in load_file(base / "model.safetensors").values()}


def test_an_adapter_is_not_merged_twice(base, tmp_path):
    adapter = peft_adapter(base, tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "merged").returncode == 0
    record = json.loads((tmp_path / "merged" / MERGED_NAME).read_text())
    assert record["base_fingerprint"] == fingerprint(base) and len(record["adapters"]) == 1
    assert "apply it twice" in refusal(tmp_path / "merged", adapter, tmp_path / "again")
    assert "already there" in merge(base, adapter, tmp_path / "merged").stderr
    other = peft_adapter(base, tmp_path / "other", r=2)
    assert merge(tmp_path / "merged", other, tmp_path / "both").returncode == 0
    assert len(json.loads((tmp_path / "both" / MERGED_NAME).read_text())["adapters"]) == 2


def test_our_adapter_is_merged_to_the_bits_that_training_merges_and_into_its_own_base_only(base, layout, tmp_path):
    policy = Policy(
        model_path=base,
        layout=layout,
        train=TrainConfig(dtype="float32"),
        optimizer=None,
        lora=LoraSettings(rank=4, alpha=8, seed=0),
    )
    generator = torch.Generator().manual_seed(2)
    policy.restore({n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in policy.snapshot().items()})
    policy.save_adapter(tmp_path / "adapter")
    policy.save_hf(tmp_path / "trained")
    assert json.loads((tmp_path / "adapter" / BASE_NAME).read_text())["fingerprint"] == fingerprint(base)
    result = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert result.returncode == 0, result.stderr
    trained, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("trained", "merged"))
    for name, tensor in merged.items():
        assert torch.equal(trained[name].to(tensor.dtype), tensor), name
    # Neither the merged weights nor other ones are what the adapter was trained on.
    assert "trained on other weights" in refusal(tmp_path / "trained", tmp_path / "adapter", tmp_path / "x")
    other = make_qwen2(tmp_path / "other", tied=True, seed=5)
    assert "trained on other weights" in refusal(other, tmp_path / "adapter", tmp_path / "x")


def test_an_adapter_is_merged_from_megatrons_shards_as_from_pefts_format(base, layout, tmp_path):
    policy = Policy(
        model_path=base,
        layout=layout,
        train=TrainConfig(dtype="float32"),
        optimizer=OptimizerSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0, distributed=True),
        lora=LoraSettings(rank=4, alpha=8, seed=0),
    )
    generator = torch.Generator().manual_seed(3)
    policy.restore({n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in policy.snapshot().items()})
    sample = [Sample((1, 2, 3), (4, 5, 6), (True,) * 3)]  # an optimizer has nothing to save before its first step
    weights = row_weights(sample, "token_mean")
    packed = make_batches(sample, weights, max_tokens=64, rank=0, num_ranks=1)
    policy.train_step(packed, lambda hidden, index: (hidden.sum(), {"loss": hidden.new_zeros(())}), lr=1e-3)
    policy.save_adapter(tmp_path / "adapter")
    policy.save_checkpoint(tmp_path / "checkpoint", step=1)
    policy.finish_checkpoint()
    for name in ("adapter", "checkpoint"):
        result = merge(base, tmp_path / name, tmp_path / f"from-{name}", "--verify")
        assert result.returncode == 0, result.stderr
        assert "verified: logits are peft's" in result.stdout
    from_peft, from_shards = (
        load_file(tmp_path / f"from-{n}" / "model.safetensors") for n in ("adapter", "checkpoint")
    )
    assert all(torch.equal(from_shards[name], tensor) for name, tensor in from_peft.items())
    # The same adapter is known whichever way it comes.
    assert "apply it twice" in refusal(tmp_path / "from-checkpoint", tmp_path / "adapter", tmp_path / "again")
    with pytest.raises(ValueError, match=r"an adapter that is not merged .* merge it with tools/merge_lora\.py"):
        check_checkpoint(TorchDistReader(tmp_path / "checkpoint"), policy.shape)


def test_sglangs_loader_takes_our_adapter_for_what_it_is(base, layout, tmp_path):
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

    settings = LoraSettings(rank=4, alpha=8, seed=0)
    train = TrainConfig(dtype="float32")
    policy = Policy(model_path=base, layout=layout, train=train, optimizer=None, lora=settings)
    generator = torch.Generator().manual_seed(4)
    policy.restore({n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in policy.snapshot().items()})
    policy.save_adapter(tmp_path / "adapter")
    config = AutoConfig.from_pretrained(base)
    loaded = LoRAAdapter("ours", LoRAConfig(str(tmp_path / "adapter")), config, LoadConfig(), None)
    loaded.initialize_weights_from_tensors(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    expected = read_adapter(tmp_path / "adapter")
    assert loaded.scaling == expected.scale
    fused = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    alone = {"self_attn.o_proj": ("o_proj",), "mlp.down_proj": ("down_proj",)}
    for i, layer in enumerate(loaded.layers):
        for module, parts in {**fused, **alone}.items():
            prefix = f"model.layers.{i}.{module.split('.')[0]}"
            pairs = [expected.low_rank[f"{prefix}.{part}.weight"] for part in parts]
            for kind, place in (("A", 0), ("B", 1)):
                found = layer.weights.pop(f"base_model.model.model.layers.{i}.{module}.lora_{kind}.weight")
                assert torch.equal(found, torch.cat([pair[place] for pair in pairs])), (i, module, kind)
        assert not layer.weights


def edited(adapter, **settings):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **settings}))


def retensored(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
DEFECTS = {
    "dora": (lambda a: edited(a, use_dora=True), "use_dora=True, which cannot be merged here"),
    "ranks": (lambda a: edited(a, rank_pattern={"q_proj": 2}), "rank_pattern="),
    "start": (lambda a: edited(a, init_lora_weights="pissa_niter_4"), "took from the base what the adapter began with"),
    "kind": (lambda a: edited(a, peft_type="IA3"), "holds a IA3 adapter"),
    "json": (lambda a: (a / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "no config": (
        lambda a: (a / "adapter_config.json").unlink(),
        "has no adapter_config.json, so it is no PEFT adapter",
    ),
    "pickle": (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "a pickle"),
    "cut": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"), "error: "),
    "unmerged": (
        lambda a: retensored(a, lambda t: (t.pop(FIRST + "A.weight"), t.pop(FIRST + "B.weight"))),
        "says it changes 1 weights for which it has no update, first: model.layers.0.self_attn.q_proj.weight",
    ),
    "half": (lambda a: retensored(a, lambda t: t.pop(FIRST + "B.weight")), "the file is not whole"),
    "saved module": (lambda a: retensored(a, lambda t: t.update({"x.lm_head.weight": torch.ones(1)})), "besides pairs"),
    "foreign": (
        lambda a: retensored(
            a, lambda t: t.update({n.replace("layers.0", "layers.9"): x.clone() for n, x in t.items()})
        ),
        "changes 7 weights that",
    ),
    "size": (
        lambda a: retensored(a, lambda t: t.update({FIRST + "B.weight": torch.ones(8, 4)})),
        "update of model.layers.0.self_attn.q_proj.weight is 8 x 64, the weight (64, 64)",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_an_adapter_that_would_be_merged_wrongly_is_refused(defect, tmp_path):
    base = make_qwen2(tmp_path / "base", tied=True)
    adapter = peft_adapter(base, tmp_path / "adapter")
    spoil, message = DEFECTS[defect]
    spoil(adapter)
    assert message in refusal(base, adapter, tmp_path / "merged")


def test_a_base_that_is_none_is_told_by_the_program_itself(tmp_path):
    base = make_qwen2(tmp_path / "base", tied=True)
    adapter = peft_adapter(base, tmp_path / "adapter")
    command = [sys.executable, TOOL, "--base", tmp_path / "nowhere", "--adapter", adapter, "--out", tmp_path / "x"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "error: " in result.stderr
    assert "holds no model.safetensors" in refusal(tmp_path / "nowhere", adapter, tmp_path / "merged")


def test_the_fingerprint_sees_one_changed_element_and_not_the_files_name(tmp_path):
    base = make_qwen2(tmp_path / "base", tied=False)
    copy = shutil.copytree(base, tmp_path / "copy")
    assert fingerprint(base) == fingerprint(copy)
    retensor = load_file(copy / "model.safetensors")
    retensor["model.norm.weight"][0] += 1
    save_file(retensor, copy / "model.safetensors")
    assert fingerprint(base) != fingerprint(copy)


def test_scale_follows_the_adapters_settings(tmp_path):
    base = make_qwen2(tmp_path / "base", tied=True)
    assert read_peft_folder(peft_adapter(base, tmp_path / "plain")).scale == 2.0
    assert read_peft_folder(peft_adapter(base, tmp_path / "stable", use_rslora=True)).scale == 4.0
