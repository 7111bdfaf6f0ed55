"""One tiny cycle with every real part, stopped in the middle and continued; and the same program under torchrun.

One file, because all of it compares with the one run: tests of a file stay in one process.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from command import POLICY, ROOT, searche1, settings, torchrun
from conftest import STRICT
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from searche1.cli import STOPPED

pytestmark = pytest.mark.slow

FAST = str(ROOT / "configs" / "quickstart-fast.yaml")


def test_ctrl_c_says_how_to_go_on_and_leaves_no_process_behind(interrupted: tuple[Path, str, int]) -> None:
    out, printed, exit_code = interrupted
    assert exit_code == 130, printed
    assert "the same command continues" in printed and "Traceback" not in printed
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(out).encode() in command]


def test_an_engine_that_was_killed_is_started_again_and_nothing_is_lost(stopped: tuple[Path, str, int]) -> None:
    out, printed, _ = stopped
    assert "starting engine 0 again" in printed
    check = json.loads((out / "cycle0/opsd/teacher_check.json").read_text())
    assert check["num_starts"] == 16


def test_sigterm_stops_a_distillation_behind_a_checkpoint_and_it_goes_on_from_there(
    stopped: tuple[Path, str, int], finished: tuple[Path, str]
) -> None:
    """With the trainer's memory on the host when the checkpoint is to be loaded."""
    _, printed, code = stopped
    # At an update, or in the validation behind it.
    assert code == STOPPED and re.search("stopped (at step|during)", printed), printed
    assert "Traceback" not in printed
    assert "continuing from step_" in finished[1]
    assert "cycle0/opsd step 1/" not in finished[1]


def test_the_same_command_skips_what_is_finished(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert "start: finished earlier, skipped" in printed
    assert "cycle0/grpo: finished earlier, skipped" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["start", "cycle0/grpo", "cycle0/opsd"]
    assert summary["final_model"] == "final"
    for stage in summary["stages"]:
        assert stage["num_questions"] == 300 and 0 < stage["em"] < 1 and stage["mean_searches"] > 1


def test_a_finished_run_only_shows_its_table(finished: tuple[Path, str]) -> None:
    result = searche1("quickstart", "--fast", "--out", str(finished[0]), *STRICT)
    assert result.returncode == 0 and "is finished" in result.stdout and "cycle0/opsd" in result.stdout


def test_the_final_folder_is_a_huggingface_model(finished: tuple[Path, str]) -> None:
    final = finished[0] / "final"
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = tokenizer("<q> what is the author of bal dur ?</q>", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5
    trained, started = (
        load_file(final / "model.safetensors"),
        load_file(finished[0] / "cycle0/grpo/hf/model.safetensors"),
    )
    assert trained.keys() == started.keys()


def test_the_merged_model_is_the_grpo_model_with_its_adapter(finished: tuple[Path, str]) -> None:
    out = finished[0]
    base = AutoModelForCausalLM.from_pretrained(out / "cycle0/grpo/hf", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, out / "cycle0/opsd/adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "cycle0/opsd/hf", dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=0)


def test_the_run_directory_holds_what_it_promises(finished: tuple[Path, str]) -> None:
    out = finished[0]
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "report.html", "curve.png", "logs/engine0.log"):
        assert (out / name).is_file(), name
    pairs = [json.loads(line) for line in (out / "cycle0/opsd/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 32 and {"question", "outcome", "rewards"} <= pairs[0].keys()
    check = json.loads((out / "cycle0/opsd/teacher_check.json").read_text())
    assert check["gap"] == pytest.approx(check["teacher_em"] - check["student_em"])


# -- under torchrun -------------------------------------------------------------------------------


def ems(out: Path) -> dict[str, float]:
    return {stage["name"]: stage["em"] for stage in json.loads((out / "summary.json").read_text())["stages"]}


def test_a_tensor_parallel_trainer_and_engine_learn_what_one_process_learns(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """Every synced weight is compared bit for bit in the engine; sampling is by seed, so rounding alone differs."""
    layout = ("parallel.tensor=2", "engine.tensor=2")  # weights are copied: each rank of the engine holds parts
    result = torchrun(2, "quickstart", "--fast", "--out", str(tmp_path / "run"), *STRICT, *layout)
    assert result.returncode == 0, result.stdout[-5000:]
    assert ems(tmp_path / "run") == pytest.approx(ems(finished[0]), abs=0.02)


def test_pipeline_stages_feed_two_engines_that_different_ranks_lead(
    finished: tuple[Path, str], toy_world: Path, tmp_path: Path
) -> None:
    given = [*settings(toy_world, tmp_path / "run"), *STRICT, "parallel.pipeline=3", "engine.count=2"]
    result = torchrun(3, "grpo", "--config", FAST, "--model", str(POLICY), *given)
    assert result.returncode == 0, result.stdout[-5000:]
    assert ems(tmp_path / "run")["grpo"] == pytest.approx(ems(finished[0])["cycle0/grpo"], abs=0.02)
