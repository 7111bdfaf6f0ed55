import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest

from searche1.config import Config, load_config
from searche1.runs import (
    HARMLESS_KEYS,
    StageRow,
    add_stage_row,
    atomic_write_json,
    atomic_write_text,
    is_complete,
    keep_inputs,
    only_run_in,
    open_run,
    read_manifest,
    read_summary,
    set_final_model,
    write_manifest,
)
from searche1.types import UserError


def row(name, em=0.5):
    return StageRow(
        name=name,
        em=em,
        em_interval=(em - 0.1, em + 0.1),
        temperature=1.0,
        em_greedy=None,
        em_greedy_interval=None,
        em_by_source={"nq": em},
        mean_searches=1.5,
        answered_share=0.9,
        num_questions=100,
        seconds=12.5,
    )


def finished_stage(tmp_path):
    stage = open_run(tmp_path / "run", Config()).stage_dir("cycle0/grpo")
    (stage / "hf").mkdir()
    (stage / "hf" / "config.json").write_text("{}")
    (stage / "hf" / "model.safetensors").write_bytes(b"weights")
    (stage / "pairs.jsonl").write_text("{}\n")
    write_manifest(
        stage,
        stage="cycle0/grpo",
        inputs={"policy": "Qwen/Qwen2.5-3B-Instruct"},
        outputs={"hf": stage / "hf", "pairs": stage / "pairs.jsonl"},
        config=Config(),
        metrics={"em": 0.25},
    )
    return stage


def test_a_new_run_records_its_settings_so_that_they_load_back_the_same(tmp_path):
    config = load_config(None, ["grpo.lr=3e-6", "prompt.document='{rank}: {text}\n'", "grpo.adam_betas=[0.8,0.9]"])
    run = open_run(tmp_path / "run", config)
    assert load_config(run.directory / "config.yaml") == config


def test_provenance_names_versions_and_hardware_but_no_credentials(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["searche1", "retriever.url=http://me:hunter2@host:80/retrieve"])
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    run = open_run(tmp_path / "run", load_config(None, ["run.seed=7"]))
    text = (run.directory / "provenance.json").read_text()
    (start,) = json.loads(text)["starts"]
    assert start["seed"] == 7
    assert start["versions"]["megatron-core"] is not None
    assert start["hardware"]["cores"] >= 1 and start["hardware"]["memory_gib"] > 0
    assert start["command"][1] == "retriever.url=http://***@host:80/retrieve"
    assert "hunter2" not in text


def test_every_start_of_a_run_is_remembered(tmp_path):
    for _ in range(3):
        run = open_run(tmp_path / "run", Config())
    assert len(json.loads((run.directory / "provenance.json").read_text())["starts"]) == 3


def test_a_run_is_not_continued_with_other_settings_and_every_one_is_listed(tmp_path):
    open_run(tmp_path / "run", Config())
    other = load_config(None, ["grpo.lr=1e-5", "opsd.lora_rank=8", "engine.port=4000"])
    with pytest.raises(UserError) as refusal:
        open_run(tmp_path / "run", other)
    message = str(refusal.value)
    assert "grpo.lr: 1e-06 there, 1e-05 now" in message and "opsd.lora_rank: 64 there, 8 now" in message
    assert "engine.port" not in message and "Give a new run.out" in message
    assert load_config(tmp_path / "run" / "config.yaml") == Config()


def test_a_run_is_continued_on_another_port_and_with_more_patience(tmp_path):
    open_run(tmp_path / "run", Config())
    now = load_config(None, ["engine.port=4000", "retriever.timeout_s=99", "run.out=elsewhere"])
    run = open_run(tmp_path / "run", now)
    assert load_config(run.directory / "config.yaml") == now


@pytest.mark.parametrize(
    "override",
    [
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence=true",
        "engine.tensor=2",
        "train.max_tokens=4096",
        "train.sync_tolerance=0.1",
        "retriever.threads=0",
    ],
)
def test_a_run_is_continued_on_another_machine_in_another_layout(tmp_path, override):
    open_run(tmp_path / "run", Config())
    now = load_config(None, [override])
    assert now != Config()
    run = open_run(tmp_path / "run", now)
    assert load_config(run.directory / "config.yaml") == now


HOLD = """
import sys
from pathlib import Path
from searche1.runs import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_kept_out_of_a_run_until_the_first_has_left(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "inside\n"
        refused = pytest.raises(UserError, match=r"another process is running in .*run; .*give another run\.out")
        with refused, only_run_in(tmp_path / "run"):
            pass
        with only_run_in(tmp_path / "other"):  # in another folder it may be
            pass
        first.kill()  # a crash leaves no lock behind
        first.wait(timeout=30)
    with only_run_in(tmp_path / "run"):
        pass


def test_a_run_is_not_continued_with_other_data(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    keep_inputs(tmp_path, {"data.train": [data]})
    keep_inputs(tmp_path, {"data.train": [data], "data.test": [data]})
    data.write_text("[]\n")
    with pytest.raises(
        UserError, match=r"train\.jsonl has changed since .* began.*restore it, or give another run.out"
    ):
        keep_inputs(tmp_path, {"data.test": [data]})


@pytest.mark.parametrize("name", ["provenance.json", "summary.json"])
def test_a_damaged_record_of_a_run_is_named(tmp_path, name):
    open_run(tmp_path / "run", Config())
    (tmp_path / "run" / name).write_text('{"sta')
    with pytest.raises(UserError, match=f"{name} is not JSON"):
        open_run(tmp_path / "run", Config())
        read_summary(tmp_path / "run")


def test_every_harmless_key_exists():
    tree = asdict(Config())
    assert all(key.split(".")[1] in tree[key.split(".")[0]] for key in HARMLESS_KEYS)


def test_settings_of_another_version_are_refused_with_the_file_named(tmp_path):
    run = open_run(tmp_path / "run", Config())
    (run.directory / "config.yaml").write_text("grpo:\n  forgotten_key: 1\n")
    with pytest.raises(UserError, match=r"config.yaml does not fit this version.*forgotten_key"):
        open_run(tmp_path / "run", Config())


def test_a_file_in_the_place_of_the_run_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "run", Config())


def test_a_stage_is_complete_when_its_manifest_is_written(tmp_path):
    run = open_run(tmp_path / "run", Config())
    assert not is_complete(run.stage_dir("cycle0/opsd"))
    stage = finished_stage(tmp_path)
    assert is_complete(stage)
    manifest = read_manifest(stage)
    assert manifest["inputs"]["policy"] == {"path": "Qwen/Qwen2.5-3B-Instruct", "files": []}
    assert [record["path"] for record in manifest["outputs"]["hf"]["files"]] == ["config.json", "model.safetensors"]
    assert manifest["outputs"]["hf"]["files"][1]["bytes"] == 7
    assert manifest["config"]["grpo"]["lr"] == 1e-6 and manifest["metrics"] == {"em": 0.25}


def test_a_finished_run_may_be_moved(tmp_path):
    finished_stage(tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert is_complete(tmp_path / "moved" / "cycle0" / "grpo")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda stage: (stage / "pairs.jsonl").unlink(), r"pairs.jsonl has gone missing"),
        (lambda stage: (stage / "pairs.jsonl").write_text("{}\n{}\n"), r"changed \(3 bytes then, 6 now\)"),
        (lambda stage: (stage / "hf" / "model.safetensors").write_bytes(b"WEIGHTS"), "its checksum differs"),
    ],
)
def test_a_finished_stage_whose_output_was_lost_or_changed_is_not_built_upon(tmp_path, damage, complaint):
    stage = finished_stage(tmp_path)
    damage(stage)
    with pytest.raises(UserError, match=complaint):
        is_complete(stage)


def test_the_way_out_of_a_damaged_stage_names_the_folder_to_delete(tmp_path):
    stage = finished_stage(tmp_path)
    (stage / "pairs.jsonl").unlink()
    with pytest.raises(UserError) as refusal:
        is_complete(stage)
    assert f"delete the folder {stage}, " in str(refusal.value)
    shutil.rmtree(stage)
    assert not is_complete(stage)


def test_summary_rows_keep_the_order_of_stages_and_a_repeated_stage_its_place(tmp_path):
    run = open_run(tmp_path / "run", Config())
    for name in ("start", "cycle0/grpo", "cycle0/opsd"):
        add_stage_row(run, row(name))
    summary = add_stage_row(run, row("cycle0/grpo", em=0.75))
    assert [stage.name for stage in summary.stages] == ["start", "cycle0/grpo", "cycle0/opsd"]
    assert summary.stages[1].em == 0.75 and summary.final_model is None
    assert set_final_model(run) == read_summary(run.directory)
    on_disk = json.loads((run.directory / "summary.json").read_text())
    assert on_disk["final_model"] == "final"
    assert {"name", "em", "mean_searches", "num_questions", "seconds"} <= on_disk["stages"][0].keys()


def test_a_write_that_fails_leaves_the_old_text_and_no_debris(tmp_path):
    path = tmp_path / "summary.json"
    atomic_write_text(path, "old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(path, {"em": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "half \ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_the_run_directory_needs_no_torch():
    code = "import sys, searche1.runs, searche1.data, searche1.evaluation.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
