"""What a plan says of memory against what a process really takes, and what it says of layouts against what is built."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from measured_memory import shape_of

from megatron_ext.dry_build import dry_build
from megatron_ext.hf_mapping import hf_sizes
from megatron_ext.known_models import KNOWN_MODELS, hf_config, read_shape
from megatron_ext.memory import (
    RECOMPUTE_MODES,
    HeadPass,
    ParallelSizes,
    TrainingPass,
    activation_bytes,
    head_bytes,
    layer_activations,
    lora_parameters,
    model_parameters,
    model_state,
    stage_parameters,
)
from searche1.cli import main
from searche1.config import load_config
from searche1.planner.advice import Setting, judge, legal_layouts, refusal, with_keys
from searche1.planner.fit import MOST_TOKENS, fit_to_gpu
from searche1.planner.hardware import Assumptions, Lengths, cluster
from searche1.planner.plan import make_plan

ROOT = Path(__file__).parents[2]
CLOSE = 0.10  # of the computed bytes
MODEL = {
    "type": "qwen2",
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 16000,
    "tie_word_embeddings": True,
}
SMALL = {**MODEL, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "norm_topk_prob": True}
SHAPES = {
    "qwen2": SMALL,
    "qwen3": {**SMALL, "type": "qwen3", "head_dim": 96},
    "qwen3_moe": {**SMALL, "type": "qwen3_moe", "head_dim": 96, **EXPERTS},
}
HARDWARE = {  # nodes of eight H800, as the first line of each file says
    "qwen2.5-3b": 1,
    "qwen2.5-7b": 2,
    "qwen2.5-14b": 2,
    "qwen2.5-32b": 4,
    "qwen2.5-72b": 8,
    "qwen3-30b-a3b": 4,
}
H800 = cluster("h800", nodes=1, gpus_per_node=8)


def measured(**request):
    """What a process of its own counts; memory that is freed there goes back to the system at once."""
    trimmed = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    # The libraries of products keep memory too: MKL some for packed matrices, as much as suits the CPU, and oneDNN
    # some where the CPU has products of bfloat16.
    trimmed |= {"MKL_DISABLE_FAST_MM": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("measured_memory.py"), json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, **trimmed},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("dtype", "recompute", "lora_rank"), [("float32", "full", 0), ("bfloat16", "none", 0), ("float32", "full", 32)]
)
def test_a_training_step_takes_as_much_memory_as_computed(dtype, recompute, lora_rank):
    tokens, b = (1024, 4) if dtype == "float32" else (320, 2)  # many CPUs have no products of bfloat16
    found = measured(
        measure="resident", model=MODEL, dtype=dtype, recompute=recompute, tokens=tokens, lora_rank=lora_rank
    )
    shape, alone = shape_of(MODEL), ParallelSizes(1)
    state = model_state(shape, alone, 0, dtype_bytes=b, distributed_optimizer=True, lora_rank=lora_rank)
    settings = TrainingPass(recompute, b, lora_rank, is_fused=False)
    activations = activation_bytes(shape, alone, settings, tokens=tokens)
    noise = 4e6  # bytes that no tensor of the model explains
    assert found["weights"] == pytest.approx(state.weights, rel=CLOSE)
    assert found["gradients"] == pytest.approx(state.gradients, rel=CLOSE, abs=noise)
    assert found["main weights"] + found["moments"] == pytest.approx(state.optimizer, rel=CLOSE, abs=noise)
    assert found["saved"] == pytest.approx(activations.saved, rel=CLOSE, abs=noise)
    assert found["peak"] == pytest.approx(activations.total, rel=CLOSE, abs=noise)


def saved_cases():
    layouts = [("qwen2", 1, False), ("qwen2", 2, True), ("qwen2", 2, False), ("qwen3", 1, False), ("qwen3", 2, True)]
    for family, tensor, sequence in [*layouts, ("qwen3_moe", 1, False)]:
        for recompute in RECOMPUTE_MODES:
            for lora_rank in (0, 16):
                yield {
                    "model": SHAPES[family], "tensor": tensor, "sequence": sequence, "recompute": recompute,
                    "lora_rank": lora_rank, "dtype": "float32", "tokens": 256,
                }  # fmt: skip


def test_layers_save_as_much_for_backward_as_computed():
    cases = list(saved_cases())
    for case, found in zip(cases, measured(measure="saved", cases=cases), strict=True):
        shape, tokens = shape_of(case["model"]), case["tokens"]
        settings = TrainingPass(case["recompute"], 4, case["lora_rank"], is_fused=False)
        sizes = ParallelSizes(case["tensor"], case["tensor"], sequence=case["sequence"])
        computed = shape.num_layers * layer_activations(shape, sizes, settings, tokens=tokens).kept
        # Layers that are computed again keep, once for all of them, every token's rotary angles.
        angles = tokens * shape.head_dim * 4 if case["recompute"] == "full" else 0
        assert found == pytest.approx(computed + angles, rel=0.02), case


# -- parameters and layouts -----------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_ranks_hold_the_model_between_them_and_padding(name):
    shape = read_shape(KNOWN_MODELS[name].hub_ids[0])
    assert model_parameters(shape) / 1e9 == pytest.approx(KNOWN_MODELS[name].billions, abs=0.01)
    assert stage_parameters(shape, ParallelSizes(1), 0).total >= model_parameters(shape)
    for sizes in (ParallelSizes(8, tensor=2), ParallelSizes(8, pipeline=2), ParallelSizes(8, 2, 2)):
        held = sum(sizes.tensor * stage_parameters(shape, sizes, s).total for s in range(sizes.pipeline))
        # Norms are on every tensor rank, and a tied embedding on the first and the last stage.
        copied = shape.vocab_size * shape.hidden_size if shape.tied_embeddings and sizes.pipeline > 1 else 0
        assert held - copied == pytest.approx(model_parameters(shape), rel=2e-3)


@pytest.mark.parametrize(("hub_id", "sizes"), [
    ("Qwen/Qwen2.5-3B-Instruct", ParallelSizes(8, pipeline=2)),
    ("Qwen/Qwen2.5-7B-Instruct", ParallelSizes(16, tensor=4, sequence=True)),
    ("Qwen/Qwen2.5-72B-Instruct", ParallelSizes(64, tensor=8, pipeline=2, sequence=True)),
    ("Qwen/Qwen3-30B-A3B", ParallelSizes(32, tensor=2, pipeline=2, expert=2, sequence=True)),
])  # fmt: skip
def test_every_rank_of_a_dry_build_holds_what_is_computed_and_together_the_model(hub_id, sizes):
    shape = read_shape(hub_id)
    built = dry_build(shape, sizes, recompute="full", distributed_optimizer=True, lora_rank=64)
    assert len(built.ranks) == sizes.tensor * sizes.pipeline * sizes.expert
    assert {(r.tensor_rank, r.pipeline_rank, r.expert_rank) for r in built.ranks} == {
        (t, p, e) for t in range(sizes.tensor) for p in range(sizes.pipeline) for e in range(sizes.expert)
    }
    assert built.num_tensors == len(hf_sizes(shape))
    for rank in built.ranks:
        state = model_state(shape, sizes, rank.pipeline_rank, dtype_bytes=2, distributed_optimizer=True)
        assert rank.parameters == stage_parameters(shape, sizes, rank.pipeline_rank).total
        assert rank.gradients == pytest.approx(state.gradients / 4, rel=1e-4)  # buffers are padded
        assert rank.optimizer == pytest.approx(state.optimizer / 12, rel=1e-4)
        assert rank.adapters == lora_parameters(shape, sizes, 64).total


def test_a_dry_build_of_an_illegal_layout_says_what_the_trainer_would_say():
    shape = read_shape("Qwen/Qwen2.5-3B-Instruct")
    with pytest.raises(ValueError, match="2 key-value heads, which tensor-parallel size 4 does not divide; set"):
        dry_build(shape, ParallelSizes(8, tensor=4), recompute="full", distributed_optimizer=True, lora_rank=0)


def test_every_listed_layout_is_one_that_the_trainer_accepts():
    for name, nodes in (("Qwen/Qwen2.5-7B-Instruct", 2), ("Qwen/Qwen3-30B-A3B", 4)):
        shape, machines = read_shape(name), cluster("h800", nodes=nodes, gpus_per_node=8)
        listed = list(legal_layouts(shape, machines))
        assert len(listed) == len(set(listed)) > 10
        for sizes in listed:
            config = load_config(None, [f"model.path={name}", *keys(sizes)])
            assert refusal(config, shape, machines) == ""


def keys(sizes):
    names = ("tensor", "pipeline", "context", "expert", "sequence")
    return [f"parallel.{name}={str(getattr(sizes, name)).lower()}" for name in names]


# -- advice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "remedy"), [
    (["parallel.tensor=4"], r"2 key-value heads, .* set parallel\.tensor to a divisor of 2"),
    (["parallel.pipeline=5"], r"cannot hold .*parallel\.pipeline=5.* use a multiple of 5 GPUs"),
    (["parallel.pipeline=8"], r"36 layers, .* set parallel\.pipeline to a divisor of 36"),
    (["parallel.tensor=16"], r"use a multiple of 16 GPUs"),
    (["parallel.expert=2"], r"no experts, .* set parallel\.expert to 1"),
    (["parallel.expert=3"], r"set parallel\.expert to a divisor of 8"),
    (["parallel.sequence=true"], r"set parallel\.sequence=false"),
    (["engine.tensor=3"], r"set engine\.tensor to a divisor of both"),
    (["engine.count=9"], r"set engine\.count=0"),
    (["engine.tensor=16"], r"set engine\.tensor to a divisor of both"),
    (["parallel.tensor=16", "train.recompute=auto"], r"use a multiple of 16 GPUs"),
    (["train.max_tokens=4096"], r"set train\.max_tokens=6144 or more"),
])  # fmt: skip
def test_a_wrong_layout_is_told_with_its_remedy(overrides, remedy):
    config = load_config(ROOT / "configs" / "qwen2.5-3b.yaml", overrides)
    plan = make_plan(config, H800, builds=False)
    assert re.search(remedy, plan.refusal)
    assert not plan.fits and plan.judgement is None
    assert plan.layouts  # what would be legal


def test_advice_to_make_a_config_fit_makes_it_fit():
    config = load_config(ROOT / "configs" / "qwen2.5-3b.yaml", ["train.recompute=none"])
    plan = make_plan(config, H800, builds=False)
    assert not plan.fits
    assert {"train.recompute": "full"} in [advice.changes for advice in plan.advice]
    for advice in plan.advice:
        assert judge(plan.setting.changed(advice.changes)).memory.fits


def test_a_model_too_large_for_the_node_is_sent_to_more_nodes():
    config = load_config(ROOT / "configs" / "qwen2.5-72b.yaml")
    plan = make_plan(config, H800, builds=False)
    assert not plan.fits
    assert plan.advice[0].nodes > 1
    larger = cluster("h800", nodes=plan.advice[0].nodes, gpus_per_node=8)
    changed = plan.setting.changed(plan.advice[0].changes).config
    assert make_plan(changed, larger, builds=False).fits


def test_advice_of_a_config_that_fits_is_quicker_and_fits():
    config = load_config(ROOT / "configs" / "qwen2.5-3b.yaml")
    plan = make_plan(config, H800, builds=False)
    assert plan.fits and plan.advice
    for advice in plan.advice:
        judged = judge(plan.setting.changed(advice.changes))
        assert judged.memory.fits
        assert judged.time.total < plan.judgement.time.total


@pytest.mark.parametrize("name", HARDWARE)
def test_a_shipped_config_fits_the_hardware_it_names(name):
    path = ROOT / "configs" / f"{name}.yaml"
    assert path.read_text().startswith(f"# {HARDWARE[name]} x 8 H800 80GB")
    plan = make_plan(load_config(path), cluster("h800", nodes=HARDWARE[name], gpus_per_node=8), builds=False)
    assert plan.refusal == ""
    assert plan.fits


def test_every_config_of_a_released_model_is_planned_here():
    assert {path.stem for path in (ROOT / "configs").glob("qwen*.yaml")} == set(HARDWARE)


# -- phases ---------------------------------------------------------------------------------------


def phases_of(changes):
    config = with_keys(load_config(ROOT / "configs" / "qwen2.5-3b.yaml"), changes)
    memory = judge(Setting(config, read_shape(config.model.path), H800, Assumptions(), Lengths())).memory
    return {phase.name: {part.name: part.bytes for part in phase.parts} for phase in memory.phases}


def test_engine_and_trainer_take_turns_unless_nothing_is_offloaded():
    turns, together = phases_of({}), phases_of({"train.offload": "never"})
    assert "gradients" not in turns["rollout"] and "key-value cache" not in turns["train GRPO"]
    for name in ("rollout", "train GRPO", "sync"):
        assert {"key-value cache", "weights", "gradients", "Adam, main weights"} <= together[name].keys()


def test_engines_elsewhere_take_nothing_here():
    phases = phases_of({"engine.urls": ["http://elsewhere:30000"]})
    assert phases.keys() == {"train GRPO", "train OPSD", "sync"}
    assert not any(name.startswith(("engine", "key")) for parts in phases.values() for name in parts)


def test_opsd_trains_adapters_only_and_packs_whole_teacher_prompts():
    grpo, opsd = phases_of({})["train GRPO"], phases_of({})["train OPSD"]
    assert opsd["weights"] > grpo["weights"]
    assert opsd["gradients"] + opsd["Adam, main weights"] < 0.1 * grpo["gradients"]
    small = phases_of({"train.max_tokens": 6144})  # less than opsd.max_teacher_tokens
    assert small["train OPSD"]["activations"] > 1.5 * small["train GRPO"]["activations"]


def test_ranks_of_an_axis_divide_what_they_should():
    shape, settings = read_shape("Qwen/Qwen2.5-7B-Instruct"), TrainingPass("none", 2)

    def saved(sizes, stage=0):
        return activation_bytes(shape, sizes, settings, tokens=8192, stage=stage).saved

    def adam(sizes):
        return model_state(shape, sizes, 0, dtype_bytes=2, distributed_optimizer=True).optimizer

    alone = ParallelSizes(1)
    assert saved(ParallelSizes(2, tensor=2, sequence=True)) == pytest.approx(saved(alone) / 2, rel=0.02)
    assert saved(ParallelSizes(2, tensor=2)) > 1.05 * saved(alone) / 2  # what lies between linears is whole
    assert saved(ParallelSizes(2, context=2)) == pytest.approx(saved(alone) / 2, rel=0.02)
    two = ParallelSizes(2, pipeline=2)
    assert saved(two, stage=0) == pytest.approx(saved(alone), rel=0.02)  # half the layers, twice the micro-batches
    assert saved(two, stage=1) == pytest.approx(saved(alone) / 2, rel=0.02)
    assert adam(ParallelSizes(8)) == pytest.approx(adam(alone) / 8)
    assert adam(ParallelSizes(8, context=4)) == pytest.approx(adam(alone) / 8)


def test_experts_and_their_optimizer_are_divided_by_other_ranks_than_the_rest():
    shape = read_shape("Qwen/Qwen3-30B-A3B")
    one, eight = ParallelSizes(32), ParallelSizes(32, expert=8)
    assert stage_parameters(shape, eight, 0).dense == stage_parameters(shape, one, 0).dense
    assert stage_parameters(shape, eight, 0).expert * 8 == stage_parameters(shape, one, 0).expert
    # Every element's moments are somewhere once, however the experts are spread.
    adam = [model_state(shape, s, 0, dtype_bytes=2, distributed_optimizer=True).optimizer for s in (one, eight)]
    assert adam[0] == pytest.approx(adam[1])


def test_a_config_that_leaves_recompute_open_is_planned_with_the_least_that_fits():
    config = with_keys(load_config(ROOT / "configs" / "qwen2.5-3b.yaml"), {"train.recompute": "auto"})
    assert make_plan(config, H800, builds=False).setting.config.train.recompute == "full"
    small = with_keys(config, {"train.max_tokens": 8192})
    assert make_plan(small, H800, builds=False).setting.config.train.recompute == "none"


def test_tokens_that_are_left_open_fill_the_gpu_and_what_is_given_stays():
    config = with_keys(load_config(ROOT / "configs" / "qwen2.5-3b.yaml"), {"train.recompute": "auto"})
    open_config = with_keys(config, {"train.max_tokens": 0})
    for gpu in ("h800", "h200"):
        on_it = cluster(gpu, nodes=1, gpus_per_node=8)
        plan = make_plan(open_config, on_it, builds=False)
        train = plan.setting.config.train
        assert plan.judgement.memory.fits and train.max_tokens >= 2 * 6144
        more = with_keys(plan.setting.config, {"train.max_tokens": train.max_tokens + 1024})
        assert train.max_tokens == MOST_TOKENS or not make_plan(more, on_it, builds=False).judgement.memory.fits
    given = with_keys(config, {"train.recompute": "full", "train.max_tokens": 0})
    assert fit_to_gpu(given, read_shape(given.model.path), H800, Assumptions()).train.recompute == "full"


def test_where_nothing_fits_the_least_is_tried():
    config = with_keys(
        load_config(ROOT / "configs" / "qwen2.5-72b.yaml"),
        {"train.recompute": "auto", "train.max_tokens": 0, "parallel.pipeline": 1, "parallel.tensor": 1},
    )
    config = with_keys(config, {"parallel.sequence": False})
    train = fit_to_gpu(config, read_shape(config.model.path), H800, Assumptions()).train
    assert (train.recompute, train.max_tokens) == ("full", 6144)


# -- the head -------------------------------------------------------------------------------------


def test_the_head_takes_what_docs_losses_says():
    shape = read_shape("Qwen/Qwen2.5-3B-Instruct")
    chunked = HeadPass("chunked", 2048, 2)
    rows, hidden = 2048, shape.hidden_size
    tokens = head_bytes(shape, ParallelSizes(1), chunked, rows=rows, is_pair=False, is_trained=True)
    pairs = head_bytes(shape, ParallelSizes(1), chunked, rows=rows, is_pair=True, is_trained=False)
    assert tokens - 2 * rows * hidden * 2 == pytest.approx(0.62e9 + 1.9e9, rel=0.02)
    assert pairs - 2 * rows * hidden * 2 == pytest.approx(1.24e9, rel=0.02)


# -- the command ----------------------------------------------------------------------------------


def test_the_command_takes_settings_between_options_and_says_by_its_status_whether_it_fits(tmp_path, capsys):
    config = str(ROOT / "configs" / "qwen2.5-3b.yaml")
    out = tmp_path / "plan.json"
    command = ["plan", config, "--nodes", "1", "train.max_tokens=8192", "--gpu", "a100", "--no-dry-build"]
    assert main([*command, "--json", str(out)]) == 0
    assert "It fits" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["fits"] and written["cluster"]["gpu"]["name"].startswith("A100")
    for phase in written["phases"]:
        assert phase["total"] == sum(phase["parts"].values()) <= phase["available"]
    assert main([*command, "train.recompute=none", "train.max_tokens=32768"]) == 1
    assert "train GRPO does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "give one config file"),
    (["configs/absent.yaml"], "config file not found"),
    (["--gpu", "b17"], "--gpu must be one of a100, h100, h800, h200"),
    (["--nodes", "0"], "must be 1 or more"),
    (["model.path=Qwen/Qwen2.5-3B-Instrukt"], "Did you mean 'Qwen/Qwen2.5-3B-Instruct'"),
    (["--mean-turns", "0"], "--mean-turns at least 1"),
])  # fmt: skip
def test_a_mistake_is_told_kindly(arguments, told, capsys):
    config = str(ROOT / "configs" / "qwen2.5-3b.yaml")
    given = arguments if not arguments or arguments[0].endswith(".yaml") else [config, *arguments]
    assert main(["plan", *given]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_needs_no_more_than_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(KNOWN_MODELS["Qwen2.5-7B"]).to_dict()))
    assert read_shape(str(tmp_path)) == read_shape("Qwen/Qwen2.5-7B-Instruct")


def test_the_heavier_a_model_the_longer_its_step_and_the_more_gpus_the_shorter():
    def seconds(size, nodes):
        config = load_config(ROOT / "configs" / "qwen2.5-3b.yaml", [f"model.path=Qwen/Qwen2.5-{size}-Instruct"])
        machines = cluster("h800", nodes=nodes, gpus_per_node=8)
        return judge(Setting(config, read_shape(config.model.path), machines, Assumptions(), Lengths())).time.total

    assert seconds("3B", 1) < seconds("7B", 1) < seconds("14B", 1)
    assert seconds("7B", 4) < seconds("7B", 2) < seconds("7B", 1)
