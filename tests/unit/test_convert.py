"""Checkpoints between HuggingFace's format and Megatron's: the same bits there and back, or a message."""

import json
import pickle
import random
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked_ranks import FORKING
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_model
from transformers import AutoConfig

from megatron_ext.convert import RELEASE, hf_to_megatron, megatron_to_hf, stored_size
from megatron_ext.hf_io import HFReader, hf_tensors
from megatron_ext.hf_mapping import hf_sizes, model_rules, model_shape
from megatron_ext.model import ModelSettings, build_model
from megatron_ext.torch_dist import TorchDistReader
from megatron_ext.verify import compare_tensors, hf_logits, megatron_logits

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "searche1" / "assets" / "toy_policy"


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (True, False)], ids=str)
def any_model(request, tmp_path):
    family, tied = request.param
    folder = make_model(tmp_path / "source", family, tied=tied)
    return folder, model_shape(AutoConfig.from_pretrained(folder))


@pytest.fixture
def qwen2(tmp_path):
    folder = make_model(tmp_path / "source", "qwen2", tied=False)
    return folder, model_shape(AutoConfig.from_pretrained(folder))


def assert_same_folder(found: Path, expected: Path) -> None:
    ours, theirs = HFReader(found), HFReader(expected)
    assert ours.names() == theirs.names()
    for name in theirs.names():
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())


def back(checkpoint, out, shape, source, **options):
    megatron_to_hf(TorchDistReader(checkpoint), out, shape, config_from=source, **{"shard_bytes": 1 << 30, **options})
    return out


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [1, 2])
def test_every_family_comes_back_to_the_same_bits(any_model, tensor, tmp_path):
    source, shape = any_model
    hf_to_megatron(source, tmp_path / "megatron", shape, tensor=tensor)
    assert_same_folder(back(tmp_path / "megatron", tmp_path / "hf", shape, source, shard_bytes=100_000), source)


@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_loads_what_is_written_and_asks_for_nothing_else(any_model, tensor, layout, tmp_path):
    source, shape = any_model
    hf_to_megatron(source, tmp_path / "megatron", shape, tensor=tensor)
    model = build_model(shape, ModelSettings(torch.float32, "none"), layout)
    wanted = {"model": model.sharded_state_dict()}
    loaded, not_asked_for, not_there = dist_checkpointing.load(
        wanted, str(tmp_path / "megatron" / RELEASE), strict=dist_checkpointing.validation.StrictHandling.RETURN_ALL
    )
    assert not not_there
    assert all("_extra_state" in name for name in not_asked_for)  # what Transformer Engine's layers ask for
    model.load_state_dict(loaded["model"])
    reader = HFReader(source)
    assert all(torch.equal(tensor, reader.tensor(name)) for name, tensor in hf_tensors(model, shape, layout))


def test_what_megatron_saves_is_read(any_model, layout, tmp_path):
    source, shape = any_model
    hf_to_megatron(source, tmp_path / "megatron", shape)
    model = build_model(shape, ModelSettings(torch.float32, "none"), layout)
    names = {v.key for v in model.sharded_state_dict().values() if hasattr(v, "key") and "_extra" not in v.key}
    assert names == TorchDistReader(tmp_path / "megatron").names()
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(tmp_path / "megatron" / RELEASE))
    model.load_state_dict(loaded["model"])
    for name, metadata in (("stacked", {}), ("numbered", {"non_homogeneous_layers": True})):
        # As Megatron-LM and Megatron-Bridge keep their checkpoints.
        folder = tmp_path / name / "iter_0000020"
        folder.mkdir(parents=True)
        dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata), "iteration": 20}, str(folder))
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("20")
        assert_same_folder(back(folder.parent, tmp_path / f"{name}-hf", shape, source), source)


def test_a_type_asked_for_is_given_to_all_weights_and_the_config(any_model, tmp_path):
    source, shape = any_model
    hf_to_megatron(source, tmp_path / "megatron", shape, dtype=torch.bfloat16)
    out = back(tmp_path / "megatron", tmp_path / "hf", shape, tmp_path / "megatron" / "hf")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, HFReader(source).tensor(name).bfloat16())
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    back(tmp_path / "megatron", tmp_path / "single", shape, out, dtype=torch.float32)
    assert {t.dtype for t in load_file(tmp_path / "single" / "model.safetensors").values()} == {torch.float32}


def test_blocks_cut_for_a_tensor_parallel_size_are_what_its_ranks_read(qwen2, tmp_path):
    source, shape = qwen2
    hf_to_megatron(source, tmp_path / "megatron", shape, tensor=2)
    stored = TorchDistReader(tmp_path / "megatron")._metadata.state_dict_metadata
    for rule in model_rules(shape):
        size = stored_size(rule, shape, tensor=2)
        assert tuple(stored[rule.key].size) == size
        blocks = {"replicated": 1, "gate_up": 4}.get(rule.layout, 2)
        assert len(stored[rule.key].chunks) == blocks * (shape.num_layers if rule.place else 1), rule.key


def test_a_checksum_finds_one_changed_bit(qwen2, tmp_path):
    source, shape = qwen2
    hf_to_megatron(source, tmp_path / "megatron", shape)
    dtypes = dict.fromkeys(hf_sizes(shape), torch.float32)
    reader = TorchDistReader(tmp_path / "megatron")
    assert len(compare_tensors(HFReader(source), reader, shape, dtypes=dtypes)) == 64
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"].view(torch.int32)[5, 7] ^= 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.up_proj\.weight is not the same"):
        compare_tensors(HFReader(source), reader, shape, dtypes=dtypes)


# -- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(qwen2, tmp_path):
    source, shape = qwen2
    hf_to_megatron(source, tmp_path / "megatron", shape)
    return tmp_path / "megatron" / RELEASE


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt"])
def test_a_checkpoint_that_was_cut_off_is_not_whole(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=rf"is not whole: it has no {name}"):
        TorchDistReader(checkpoint)


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("name", ["metadata.json", "common.pt"])
def test_a_record_that_was_cut_is_told(checkpoint, name, share):
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        TorchDistReader(checkpoint).common()


def test_a_short_or_missing_file_is_not_whole(checkpoint):
    file = next(checkpoint.glob("*.distcp"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"is not whole: {file.name} has {len(whole) - 1} bytes of at least"):
        TorchDistReader(checkpoint)
    file.unlink()
    with pytest.raises(ValueError, match=rf"is not whole: {file.name} is missing"):
        TorchDistReader(checkpoint)


def test_a_folder_of_another_kind_is_told(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"does not exist"):
        TorchDistReader(tmp_path / "none")
    with pytest.raises(ValueError, match=r"is no Megatron checkpoint in torch_dist format.*--ckpt-format torch_dist"):
        TorchDistReader(tmp_path / "source")
    (checkpoint / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    with pytest.raises(ValueError, match=r"is stored as 'zarr'; only 'torch_dist' is read"):
        TorchDistReader(checkpoint)
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ValueError, match=r"names iter_0000007, which is not in"):
        TorchDistReader(checkpoint.parent)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_metadata_that_would_run_something_is_refused(checkpoint, capfd):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"cannot be read: it refers to builtins\.print"):
        TorchDistReader(checkpoint)
    (checkpoint / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"cannot be read"):
        TorchDistReader(checkpoint)
    assert "must not run" not in capfd.readouterr().out


FEWER = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            FEWER,
            r"linear_qkv\.layer_norm_weight in .* is \(4, 64\) where config\.json says \(3, 64\)",
        ),
        ({"vocab_size": 300}, r"word_embeddings\.weight in .* is \(256, 64\) .* at least 300 rows of \(64,\)"),
        ({"intermediate_size": 100}, r"linear_fc1\.weight in .* is \(4, 192, 64\) .* \(4, 200, 64\)"),
        ({"tie_word_embeddings": True}, r"holds 1 tensors without a mapping rule, first: output_layer\.weight"),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}, r"lacks 2 tensors .*first: .*k_layernorm"),
        ({"architectures": ["GPT2LMHeadModel"]}, r"is a GPT2LMHeadModel; this trainer maps"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(qwen2, checkpoint, change, message, tmp_path):
    source, _ = qwen2
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        back(checkpoint, tmp_path / "hf", model_shape(AutoConfig.from_pretrained(source)), source)
    assert not (tmp_path / "hf").exists()


def test_tensors_of_two_types_in_one_of_megatrons_are_refused_unless_one_is_chosen(qwen2, tmp_path):
    source, shape = qwen2
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"stores model\.layers\.0.* as torch\.float32 and .*layers\.2.*--dtype"):
        hf_to_megatron(source, tmp_path / "megatron", shape)
    hf_to_megatron(source, tmp_path / "megatron", shape, dtype=torch.float32)


def test_a_block_that_is_damaged_is_told(checkpoint, qwen2, tmp_path):
    source, shape = qwen2
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ValueError, match=r"a block of embedding\.word_embeddings\.weight in .* cannot be read"):
        back(checkpoint, tmp_path / "hf", shape, source)


def test_what_a_cut_off_run_left_is_not_cleared_while_it_is_read(qwen2, tmp_path):
    source, _ = qwen2
    left = shutil.copytree(source, tmp_path / "new.partial")
    result = program("hf-to-megatron", "--hf", left, "--out", tmp_path / "new")
    assert result.returncode == 2 and "is what a cut-off run left for" in result.stderr
    assert_same_folder(left, source)


def test_verifying_unpickles_nothing_of_the_checkpoint(qwen2, tmp_path, monkeypatch):
    source, shape = qwen2
    real_save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, *rest: real_save([Evil()] if value == [None] else value, *rest))
    hf_to_megatron(source, tmp_path / "megatron", shape)
    monkeypatch.undo()
    ran = []
    monkeypatch.setattr("builtins.print", lambda *words: ran.append(words))
    prompt = torch.arange(7)
    found = megatron_logits(tmp_path / "megatron", shape, [prompt], dtype=torch.float32)
    assert not ran
    torch.testing.assert_close(found, hf_logits(source, [prompt], dtype=torch.float32), rtol=0, atol=1e-4)


def test_a_full_disk_is_told_before_anything_is_written(qwen2, checkpoint, tmp_path, monkeypatch):
    source, shape = qwen2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    for run in (
        lambda out: hf_to_megatron(source, out, shape),
        lambda out: back(checkpoint, out, shape, source),
    ):
        with pytest.raises(ValueError, match=r"has 0\.0 GB free, new needs"):
            run(tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


# -- killed ---------------------------------------------------------------------------------------


def convert_once(direction: str, source: Path, out: Path) -> None:
    shape = model_shape(AutoConfig.from_pretrained(source))
    if direction == "hf-to-megatron":
        hf_to_megatron(source, out, shape)
    else:
        back(source.with_name("checkpoint"), out, shape, source, shard_bytes=1 << 20)


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_ten_kills_at_random_moments_never_leave_a_folder_that_is_not_whole(direction, tmp_path):
    source, out = make_model(tmp_path / "source", "qwen3_moe", tied=False, vocab_size=20_000), tmp_path / "out"
    shape = model_shape(AutoConfig.from_pretrained(source))
    hf_to_megatron(source, tmp_path / "checkpoint", shape)

    def start():
        process = FORKING.Process(target=convert_once, args=(direction, source, out))
        process.start()
        return process

    process = start()  # the first starts the server
    process.join()
    begin = time.perf_counter()
    shutil.rmtree(out)
    process = start()
    process.join()
    whole = time.perf_counter() - begin
    assert process.exitcode == 0 and out.is_dir()
    shutil.rmtree(out)

    dice, killed = random.Random(0), 0
    for _ in range(10):
        process = start()
        time.sleep(dice.uniform(0, whole))
        process.kill()
        process.join()
        if process.exitcode != 0:
            killed += 1
        else:
            whole *= 0.6  # the machine was busier when it was measured
        if out.exists():
            reader = TorchDistReader(out) if direction == "hf-to-megatron" else TorchDistReader(tmp_path / "checkpoint")
            dtypes = dict.fromkeys(hf_sizes(shape), torch.float32)
            compare_tensors(HFReader(source if direction == "hf-to-megatron" else out), reader, shape, dtypes=dtypes)
            shutil.rmtree(out)
    assert killed >= 3
    process = start()
    process.join()
    assert process.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out", "source"]


# -- the program ----------------------------------------------------------------------------------


def program(*arguments):
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)


def test_the_program_converts_and_verifies_both_ways(tmp_path):
    source = make_model(tmp_path / "source", "qwen3_moe", tied=False, vocab_size=2000)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    there = program("hf-to-megatron", "--hf", source, "--out", tmp_path / "m", "--dtype", "bfloat16", "--verify")
    assert there.returncode == 0, there.stderr
    assert "all checksums are equal" in there.stdout and "logits of transformers and Megatron differ by" in there.stdout
    back = program("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "hf", "--verify")
    assert back.returncode == 0, back.stderr
    carried = {path.name for path in source.iterdir() if path.suffix != ".safetensors"}
    assert carried | {"model.safetensors"} == {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= carried


def test_the_program_refuses_in_words(qwen2, checkpoint, tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"))["main"]
    source, _ = qwen2
    out = ("--out", tmp_path / "new")
    lonely = shutil.copytree(checkpoint, tmp_path / "lonely" / "deep")
    for arguments, message in (
        (("hf-to-megatron", "--hf", tmp_path / "none", *out), "give a local HuggingFace folder (hf download"),
        (("hf-to-megatron", "--hf", source, "--out", checkpoint), "is already there; remove it, or give another --out"),
        (
            ("hf-to-megatron", "--hf", source, *out, "--tensor", "3"),
            "--tensor 3 does not divide the model's 2 key-value",
        ),
        (("megatron-to-hf", "--megatron", source, *out), "is no Megatron checkpoint"),
        (("megatron-to-hf", "--megatron", lonely, *out), "give --config-from with the HuggingFace folder"),
        (("megatron-to-hf", "--megatron", checkpoint, *out, "--shard-gb", "0"), "--shard-gb must be above 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        assert main() == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("new*"))
