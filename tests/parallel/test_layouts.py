"""No layout changes what is learnt: tensor, sequence, pipeline and data parallel runs against a single process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import make_model, make_qwen2
from torch import Tensor
from worker import run_layout

from megatron_ext.convert import check_checkpoint, checkpoint_tensors, hf_to_megatron
from megatron_ext.peft_io import read_adapter
from megatron_ext.torch_dist import TorchDistReader
from searche1.policy import read_shape

pytestmark = pytest.mark.slow

DENSE = ("tied", "untied", "qwen3")  # Qwen2 with and without a head of its own; queries and keys with norms
EXPERTS = ("qwen3_moe",)
CONVERTED = ("llama", "mistral")  # of the same structure as qwen2 for training: loaded and saved only


@dataclass(frozen=True)
class Setup:
    tensor: int
    pipeline: int
    sequence: bool
    processes: int
    continues: str = ""  # the layout whose checkpoint this one continues
    expert: int = 1
    context: int = 1
    models: tuple[str, ...] = DENSE


SETUPS = {
    "single": Setup(1, 1, False, 1, models=DENSE + EXPERTS),
    "tensor": Setup(2, 1, False, 2),
    "sequence": Setup(2, 1, True, 2, models=DENSE + EXPERTS),
    "data": Setup(1, 1, False, 2),
    "pipeline": Setup(1, 2, False, 2, continues="tensor"),
    "tensor x pipeline": Setup(2, 2, False, 4, continues="data"),
    "context": Setup(1, 1, False, 2, context=2, models=("tied", "qwen3"), continues="pipeline"),
    "tensor x context": Setup(2, 1, True, 4, context=2, models=("tied",)),
    "pipeline x context": Setup(1, 2, False, 4, context=2, models=("qwen3",), continues="tensor"),
    "experts x context": Setup(1, 1, False, 2, context=2, expert=2, models=EXPERTS),
    "experts": Setup(1, 1, False, 2, expert=2, models=EXPERTS),
    "tensor x experts": Setup(2, 1, True, 4, expert=2, models=EXPERTS, continues="pipeline x experts"),
    "pipeline x experts": Setup(1, 2, False, 4, expert=2, models=EXPERTS),
}
CASES = [(layout, model) for layout, setup in SETUPS.items() for model in setup.models if layout != "single"]
CONVERTING = [
    *CASES,
    *((layout, model) for layout in ("tensor", "pipeline", "tensor x pipeline") for model in CONVERTED),
]
CONTINUED = [(layout, model) for layout, model in CASES if SETUPS[layout].continues]
Results = Callable[[str], Path]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The folder of a layout's results; each layout runs once, when it is first asked for."""
    root = tmp_path_factory.mktemp("layouts")
    for model in DENSE + EXPERTS + CONVERTED:
        if model in ("tied", "untied"):
            folder = make_qwen2(root / "models" / model, tied=model == "tied")
        else:
            folder = make_model(root / "models" / model, model, tied=False)
        hf_to_megatron(folder, root / "converted" / model, read_shape(folder), tensor=2)

    failed: dict[str, str] = {}

    def run(name: str) -> Path:
        out = root / name
        if name in failed:
            pytest.fail(f"layout {name!r} did not run: {failed[name]}")
        if out.exists():
            return out
        setup = SETUPS[name]
        sizes = {
            "tensor": setup.tensor,
            "pipeline": setup.pipeline,
            "sequence": setup.sequence,
            "expert": setup.expert,
            "context": setup.context,
        }
        converted = tuple(model for layout, model in CONVERTING if layout == name and model in CONVERTED)
        continued = run(setup.continues) if setup.continues else None
        try:
            run_ranks(run_layout, setup.processes, root, out, sizes, setup.models, converted, continued)
        except Exception as error:  # the tests that need this layout fail with it, and it is not tried again
            failed[name] = str(error)
            return run(name)
        return out

    return run


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def updates(folder: Path, stage: str) -> list[dict[str, float]]:
    """The metrics of every update of a stage, in order; a GRPO step makes several."""
    steps = metrics(folder)[stage]
    return [update for step in steps for update in step] if stage == "grpo" else steps


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_way(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, before: dict[str, Tensor], stage: str
) -> None:
    """Each tensor moved as far and in the same direction, to 2 percent.

    Adam divides a gradient by its size, so the few elements whose gradient is rounding noise may go anywhere.
    """
    assert found.keys() == expected.keys() == before.keys()
    for name, tensor in expected.items():
        movement, difference = (tensor - before[name]).norm(), (found[name] - tensor).norm()
        assert difference <= 0.02 * movement, name
        is_adapted = "proj.weight" in name and ".experts." not in name
        assert movement > 0 or (stage == "opsd" and not is_adapted), name


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_weights_are_exported_to_the_same_bits(results, layout, model):
    expected, found = (weights(results(name) / model, "before") for name in ("single", layout))
    assert_close(found, expected, atol=0)


@pytest.mark.parametrize(("layout", "model"), CASES)
@pytest.mark.parametrize("stage", ["grpo", "opsd"])
def test_the_first_update_has_the_same_loss_and_gradient_norm(results, layout, stage, model):
    expected, found = (updates(results(name) / model, stage)[0] for name in ("single", layout))
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    assert expected["grad_norm"] > 1e-3


@pytest.mark.parametrize(("layout", "model"), CASES)
@pytest.mark.parametrize("stage", ["grpo", "opsd"])
def test_all_metrics_of_all_updates_are_the_same(results, layout, stage, model):
    expected, found = (updates(results(name) / model, stage) for name in ("single", layout))
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
        assert one["is_skipped"] == 0.0


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_the_kl_of_every_token_is_the_same_and_its_mean_is_what_the_first_update_said(results, layout, model):
    expected, found = (updates(results(name) / model, "token_kls") for name in ("single", layout))
    for one, other in zip(found, expected, strict=True):
        for when in ("before", "after"):
            assert one[when] == pytest.approx(other[when], rel=1e-2, abs=1e-4)
    means = [sum(pair["before"]) / len(pair["before"]) for pair in found]
    assert sum(means) / len(means) == pytest.approx(updates(results("single") / model, "opsd")[0]["kl"], rel=1e-3)
    assert all(sum(pair["after"]) != sum(pair["before"]) for pair in found)


@pytest.mark.parametrize(("layout", "model"), CASES)
@pytest.mark.parametrize("stage", ["grpo", "opsd"])
def test_weights_move_in_the_same_way(results, layout, stage, model):
    single = results("single") / model
    assert_same_way(
        weights(results(layout) / model, stage), weights(single, stage), before=weights(single, "before"), stage=stage
    )


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_the_saved_adapters_are_the_same(results, layout, model):
    expected, found = (
        load_file(results(name) / model / "adapter" / "adapter_model.safetensors") for name in ("single", layout)
    )
    assert len(expected) == 4 * (7 if model in DENSE else 4) * 2
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # as wholes: single elements may go anywhere, as in assert_same_way
        assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_an_adapter_in_megatrons_shards_is_the_one_in_pefts_format(results, layout, model):
    folder = results(layout) / model
    stored, peft = read_adapter(folder / "adapter_checkpoint"), read_adapter(folder / "adapter")
    assert stored.low_rank.keys() == peft.low_rank.keys()
    assert stored.checksum == peft.checksum
    assert stored.base_fingerprint == peft.base_fingerprint is not None
    assert_close(weights(folder, "reloaded"), weights(folder, "opsd"), atol=0)


@pytest.mark.parametrize(("layout", "model"), CONVERTING)
def test_a_converted_checkpoint_is_loaded_and_saved_to_the_same_bits(results, layout, model):
    root, folder = results(layout).parent, results(layout) / model
    source = root / "models" / model
    expected = load_file(source / "model.safetensors")
    assert_close(weights(folder, "converted"), expected, atol=0)
    assert_close(dict(checkpoint_tensors(TorchDistReader(folder / "resaved"), read_shape(source))), expected, atol=0)


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_checkpoint_of_training_converts_to_what_training_exported(results, layout, model):
    root, folder = results(layout).parent, results(layout) / model
    reader, shape = TorchDistReader(folder / "checkpoint"), read_shape(root / "models" / model)
    check_checkpoint(reader, shape)
    assert_close(dict(checkpoint_tensors(reader, shape)), weights(folder, "grpo"), atol=0)


@pytest.mark.parametrize(("layout", "model"), CONTINUED)
def test_a_checkpoint_of_another_layout_continues_as_the_run_that_never_stopped(results, layout, model):
    folder, original = results(layout) / model, results(SETUPS[layout].continues) / model
    found, expected = metrics(folder)["continued"], metrics(original)["third"]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-4)
    before = weights(original, "before")
    assert_same_way(weights(folder, "continued"), weights(original, "third"), before=before, stage="grpo")
