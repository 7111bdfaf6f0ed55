"""Weights that a trainer writes and an engine reads in one memory."""

import shutil

import pytest
import torch
from tiny_models import FAMILIES, make_model
from transformers import AutoConfig

from megatron_ext.hf_io import HFReader
from megatron_ext.hf_mapping import hf_sizes, model_shape
from megatron_ext.shared_weights import KEPT_FREE, VOCAB_MULTIPLE, SharedWeights, shared_weights
from searche1.rollout.weight_loaders import adopt


def given(folder):
    """A model's shape, and its tensors."""
    shape = model_shape(AutoConfig.from_pretrained(folder))
    reader = HFReader(folder)
    return shape, {name: reader.tensor(name) for name in hf_sizes(shape)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_but_experts_is_there_with_its_bits(tmp_path, family, dtype):
    shape, tensors = given(make_model(tmp_path / "model", family, tied=False))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    memory = SharedWeights(shape, dtype)
    passed_on = dict(memory.take(tensors.items()))
    assert passed_on.keys() == {name for name in tensors if ".experts." in name}
    found = dict(memory.tensors())
    assert found.keys() == tensors.keys() - passed_on.keys()
    for name, view in found.items():  # after all are written: none lies in another
        assert view.dtype == dtype and view.is_shared() and torch.equal(view, tensors[name])
    assert len({view.untyped_storage().data_ptr() for view in found.values()}) == 1
    (size,) = {view.untyped_storage().nbytes() for view in found.values()}
    assert size == SharedWeights.nbytes(shape, dtype)


def test_what_an_engine_fuses_is_one_matrix_and_its_rows_lie_as_columns(tmp_path):
    shape, tensors = given(make_model(tmp_path / "model", "qwen2", tied=True))
    memory = SharedWeights(shape, torch.float32)
    assert not list(memory.take(tensors.items()))
    views = dict(memory.tensors())
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        parts = [f"model.layers.1.{name}.weight" for name in names]
        whole = torch.cat([tensors[name] for name in parts])
        lies = views[parts[0]].as_strided(whole.shape, (1, len(whole)))
        assert torch.equal(lies, whole) and lies.t().is_contiguous()
    biases = [f"model.layers.1.self_attn.{kind}_proj.bias" for kind in "qkv"]
    whole = torch.cat([tensors[name] for name in biases])
    assert torch.equal(views[biases[0]].as_strided(whole.shape, (1,)), whole)
    rows = shape.vocab_size + -shape.vocab_size % VOCAB_MULTIPLE
    embedding = views["model.embed_tokens.weight"].as_strided((rows, shape.hidden_size), (shape.hidden_size, 1))
    assert rows > shape.vocab_size and not embedding[shape.vocab_size :].any()


def test_no_memory_is_shared_where_there_is_no_room_for_it(tmp_path, monkeypatch):
    shape, _ = given(make_model(tmp_path / "model", "qwen2", tied=True))
    assert isinstance(shared_weights(shape, torch.float32), SharedWeights)
    usage = shutil.disk_usage(tmp_path)
    room = SharedWeights.nbytes(shape, torch.float32) + KEPT_FREE
    for free, has_room in ((room, True), (room - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        found = shared_weights(shape, torch.float32)
        assert isinstance(found, SharedWeights) if has_room else "--shm-size" in found
    monkeypatch.undo()

    def nothing_left(num_bytes: int) -> None:  # another engine's lead was quicker
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_using_filename_cpu", nothing_left)
    assert "gave no memory (unable to allocate" in shared_weights(shape, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr("megatron_ext.shared_weights.SHARED_MEMORY", tmp_path / "nothing")
    assert "mount a tmpfs" in shared_weights(shape, torch.float32)


class Fused(torch.nn.Module):
    """Loads as SGLang's models do: parts into rows of one parameter, a vocabulary into the first rows."""

    def __init__(self, *, vocab_rows: int = 12) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros(vocab_rows, 8), requires_grad=False)
        self.gate_up = torch.nn.Parameter(torch.randn(32, 8), requires_grad=False)
        self.norm = torch.nn.Parameter(torch.randn(8), requires_grad=False)

    def load_weights(self, named):
        for name, tensor in named:
            if name == "embed":
                self.embed.data[: len(tensor)].copy_(tensor)
                self.embed.data[len(tensor) :].fill_(0)
            elif name == "norm":
                self.norm.data.copy_(tensor)
            else:
                self.gate_up.data.narrow(0, 16 * (name == "up"), 16).copy_(tensor)


def sent(*, up_from: int = 16) -> dict[str, torch.Tensor]:
    memory = torch.randn(1000)
    memory[80:96] = 0  # behind the vocabulary
    matrix = memory[200:].as_strided((32 + up_from, 8), (1, 32 + up_from))
    return {"embed": memory[:80].view(10, 8), "gate": matrix[:16], "up": matrix[up_from:][:16], "norm": memory[800:808]}


def test_an_engine_computes_with_memory_that_it_took_over():
    model, tensors = Fused(), sent()
    was = model.gate_up.clone()
    adopt(model, list(tensors.items()))
    assert not torch.equal(model.gate_up, was) and model.embed.shape == (12, 8)
    for _ in range(2):
        assert torch.equal(model.gate_up, torch.cat([tensors["gate"], tensors["up"]]))
        assert torch.equal(model.embed[:10], tensors["embed"]) and not model.embed[10:].any()
        assert torch.equal(model.norm, tensors["norm"])
        for tensor in tensors.values():  # what the trainer writes next
            tensor.normal_()


@pytest.mark.parametrize(
    ("changes", "vocab_rows", "message"),
    [
        ({"up": torch.randn(16, 8)}, 12, "the trainer's tensors of gate_up do not lie as this engine holds them"),
        ({"gate": sent(up_from=17)["gate"]}, 12, "the trainer's tensors of gate_up do not lie as this engine"),
        ({"norm": torch.randn(8).double()}, 12, "the trainer's tensors of norm do not lie as this engine holds them"),
        ({}, 13, "embed has 13 rows, of which the trainer sends 10"),  # one more than the trainer left zero
    ],
)
def test_an_engine_keeps_its_weights_if_the_trainers_lie_otherwise(changes, vocab_rows, message):
    model = Fused(vocab_rows=vocab_rows)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=f"{message}.*; set engine.share_weights=never"):
        adopt(model, list({**sent(), **changes}.items()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
