import base64
import gzip
import io
import json
import random
import re
import string
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from run_directory import fill, groups

from searche1.config import Config
from searche1.evaluation.scores import ANSWERS_FILE
from searche1.metrics import MetricsLog
from searche1.report import gather as gathering
from searche1.report import pack as packing
from searche1.report.gather import gather
from searche1.report.pack import CHUNK, KINDS, LINES, pack
from searche1.report.page import write_report
from searche1.report.plots import DARK, LIGHT, curve_png, inline_svg, timing_figure, training_figure, training_panels
from searche1.report.story import phase_seconds
from searche1.rollout.journal import Entry, Journal
from searche1.runs import StageRow, add_stage_row, open_run
from searche1.types import UserError


def row(name, em, em_greedy=0.6, temperature=1.0):
    return StageRow(
        name=name,
        em=em,
        em_interval=(em - 0.05, em + 0.05),
        temperature=temperature,
        em_greedy=em_greedy,
        em_greedy_interval=None if em_greedy is None else (em_greedy - 0.05, em_greedy + 0.05),
        em_by_source={"nq": em, "<hotpotqa>": em},
        mean_searches=1.5,
        answered_share=0.9,
        num_questions=100,
        seconds=12.5,
    )


def colours(png):
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(pixels, axis=0)}


class Tags(HTMLParser):
    """Every opened element, and whether each was closed in turn."""

    VOID = ("meta", "input", "br")

    def __init__(self):
        super().__init__()
        self.opened, self.stack = [], []

    def handle_starttag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture
def run(tmp_path):
    run = open_run(tmp_path / "my<run>", Config())
    for name, em in (("start", 0.3), ("cycle0/grpo", 0.45), ("cycle0/opsd", 0.5)):
        add_stage_row(run, row(name, em))
    log = MetricsLog(run.metrics_path)
    for step in (1, 2):
        log.log(stage="cycle0/grpo", step=step, num_steps=2, values={"em": 0.1 * step, "kl": 0.01}, seconds={})
    log.close()
    return run


def test_the_curve_shows_sampled_greedy_and_searches_in_their_colours():
    shown = colours(curve_png([row("start", 0.3), row("cycle0/grpo", 0.5)], LIGHT))
    assert {LIGHT.first, LIGHT.second, LIGHT.third} <= shown
    assert {DARK.first, DARK.second, DARK.third} <= colours(curve_png([row("start", 0.3)], DARK))


def test_a_way_of_decoding_that_was_not_evaluated_has_no_line():
    assert LIGHT.second not in colours(curve_png([row("start", 0.3, em_greedy=None)], LIGHT))
    assert LIGHT.first not in colours(curve_png([row("start", 0.3, temperature=0.0)], LIGHT))


def test_only_measured_values_get_a_training_panel():
    metrics = [
        {"stage": "cycle0/grpo", "step": 1, "values": {"em": 0.5, "kl": 0.1}},
        {"stage": "cycle0/opsd", "step": 1, "values": {"kl": None}},
    ]
    panels = training_panels(metrics)
    assert [key for key, _ in panels] == ["em", "kl"]
    drawn = inline_svg(lambda theme: training_figure(metrics, panels, theme), "training")
    assert "EM of the rollouts" in drawn and ">KL<" in drawn and "gradient norm" not in drawn


def test_a_drawing_takes_its_colours_from_the_page_and_is_the_same_each_time():
    seconds = {"cycle0/grpo": {"rollout": 2.0, "train": 1.0}}
    drawn, again = (inline_svg(lambda theme: timing_figure(seconds, theme), "time") for _ in range(2))
    assert drawn == again
    assert "var(--ink)" in drawn and "var(--paper)" in drawn and LIGHT.ink not in drawn
    assert "rollout" in drawn and 'aria-label="time"' in drawn


def test_seconds_of_phases_add_up_by_stage():
    rows = [{"stage": "a", "seconds": {"train": 1.0}}, {"stage": "a", "seconds": {"train": 2.0, "sync": 1.0}}]
    assert phase_seconds([*rows, {"stage": "b", "seconds": {}}]) == {"a": {"train": 3.0, "sync": 1.0}}


def test_the_page_is_whole_and_needs_nothing_from_outside(run):
    fill(run.directory)
    page = write_report(run.directory).read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.stack == []
    assert not any(attrs.get("src") or attrs.get("href", "#").startswith("http") for _, attrs in tags.opened)
    assert not re.search(r"https?://|<link|<img|@import|url\(h", page)
    assert "cycle0/opsd" in page and "0.450 +/- 0.050" in page and "&lt;hotpotqa&gt;" in page
    assert "went from 0.300 to <strong>0.500</strong>" in page
    assert (run.directory / "curve.png").stat().st_size > 10_000


def test_nothing_that_a_model_or_a_corpus_wrote_is_markup(run):
    fill(run.directory, text="</script><script>alert(1)</script><answer> x </answer>", passage="<img src=x onerror=y>")
    page = write_report(run.directory).read_text()
    assert "alert(1)" not in page and "onerror" not in page  # compressed; the script shows it as text
    assert page.count("<script>") == 1


def test_a_run_without_trajectories_has_a_page_without_explorer_and_script(run):
    page = write_report(run.directory).read_text()
    assert "<script" not in page and "Trajectories" not in page and "Stages" in page


def test_a_folder_that_is_neither_run_nor_evaluation_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a finished stage"):
        write_report(open_run(tmp_path / "run", Config()).directory)


# -- what is gathered -----------------------------------------------------------------------------


def test_stages_are_in_order_and_what_they_made_in_the_order_it_was_made(run):
    fill(run.directory, rounds=11)
    titles = [where.title for where in gather(run.directory).wheres]
    assert titles[:5] == [
        "start held-out",
        "cycle0/grpo rollouts step 1",
        "cycle0/grpo held-out",
        "cycle0/opsd pool",
        "cycle0/opsd held-out",
    ]
    assert titles.index("cycle2/opsd pool") < titles.index("cycle10/opsd pool")


def test_pairs_point_to_their_trajectories_with_their_kls(run):
    fill(run.directory)
    found = gather(run.directory)
    assert len(found.pairs) == 2
    first, second = found.pairs
    reference, student = found.shown[first.reference], found.shown[first.student]
    assert (reference.question, reference.sample, reference.reward) == ("nq:0", 0, 1.0)
    assert (student.question, student.sample, student.reward) == ("nq:0", 1, 0.0)
    assert found.wheres[student.where].title == "cycle0/opsd pool"
    assert len(first.before) == sum(len(ids) for ids in student.token_ids) and second.before == ()


def test_of_too_many_trajectories_whole_questions_are_kept_the_same_in_all_stages(run, monkeypatch):
    fill(run.directory, num_questions=60)
    whole = gather(run.directory)
    monkeypatch.setattr(gathering, "MAX_TRAJECTORIES", 150)
    found = gather(run.directory)
    assert found.total == whole.total == len(whole.shown) and 100 <= len(found.shown) <= 150
    counts = {key: [s.where for s in found.shown if s.question == key] for key in found.questions}
    assert all(counts[key] == [s.where for s in whole.shown if s.question == key] for key in counts)
    assert "150" not in pack(found, None).notes[0] and f"of the run's {whole.total:,}" in pack(found, None).notes[0]


def test_a_damaged_file_is_told(run):
    fill(run.directory)
    path = run.directory / "start" / "eval_groups.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cut or damaged"):
        gather(run.directory)


def random_text(length):
    """What does not compress."""
    return "".join(random.Random(0).choices(string.ascii_letters, k=length))


# -- what is packed -------------------------------------------------------------------------------


def unpacked(packed, name):
    return json.loads(gzip.decompress(base64.b64decode(packed.pieces[name])))


def spans_of(packed, i):
    """As the page's script reads them."""
    spans, *error = unpacked(packed, f"text-{i // CHUNK}")[i % CHUNK]
    texts = []
    for kind, content, _ in spans:
        if KINDS[kind] == "information":
            content = "\n".join(unpacked(packed, f"lines-{n // LINES}")[n % LINES] for n in content)
        texts.append((KINDS[kind], content))
    return texts, error


def test_every_trajectory_comes_out_as_it_went_in(run):
    fill(run.directory, num_questions=150)
    found = gather(run.directory)
    packed = pack(found, str)
    index = unpacked(packed, "index")
    assert packed.notes == [] and len(index["where"]) == len(found.shown) > CHUNK
    for i in (0, CHUNK - 1, CHUNK, len(found.shown) - 1):
        shown = found.shown[i]
        assert spans_of(packed, i) == ([(kind, text) for kind, text, _ in shown.spans], [])
        assert index["questions"][index["question"][i]][0] == shown.question
        tokens = unpacked(packed, f"tokens-{i // CHUNK}")[i % CHUNK]
        assert [ids for ids, _ in tokens] == [list(ids) for ids in shown.token_ids]
    assert unpacked(packed, "vocabulary")["7"] == "7"
    assert [len(kl) for kl in unpacked(packed, "kl")[0]] == [len(found.pairs[0].before)] * 2


def test_lines_of_observations_that_come_again_are_stored_once(run):
    fill(run.directory, num_questions=50)
    packed = pack(gather(run.directory), None)
    assert len(unpacked(packed, "lines-0")) < 10


def test_what_does_not_fit_is_left_out_in_order_and_told(run, monkeypatch):
    monkeypatch.setattr(packing, "TEXT_SHARE", 1.0)  # here texts are as small as tokens
    fill(run.directory, num_questions=150, passage=random_text(3000))
    found = gather(run.directory)
    whole = pack(found, str)
    tokens = sum(len(text) for name, text in whole.pieces.items() if name.startswith("tokens"))
    fewer = pack(found, str, budget=whole.num_bytes - tokens // 2)
    assert any("Tokens and logprobs of" in note for note in fewer.notes)
    assert fewer.num_bytes <= whole.num_bytes - tokens // 2
    text = sum(len(text) for name, text in whole.pieces.items() if name.startswith(("index", "text", "kl")))
    short = pack(found, str, budget=int(1.3 * text))
    assert any("the first" in note for note in short.notes) and short.num_bytes <= 1.3 * text
    assert spans_of(short, 0)[0][0][1] == spans_of(whole, 0)[0][0][1]
    part = pack(found, str, budget=int(0.6 * text))
    assert "the same in every stage" in part.notes[0] and part.num_bytes <= 0.6 * text
    assert 0 < len(unpacked(part, "index")["where"]) < len(found.shown)


def test_an_evaluation_has_a_page_too(tmp_path):
    from test_evaluation_results import GREEDY, one, written

    folder = tmp_path / "eval"
    with Journal(folder / ANSWERS_FILE) as answers:
        for group in groups(3):
            for sample, trajectory in enumerate(group.trajectories):
                answers.add(Entry(group.question, sample, trajectory))
    written(folder, [one(i, 1.0) for i in range(3)], GREEDY)
    page = write_report(folder).read_text()
    assert "EM <strong>1.000</strong>" in page and "Beside Table 1" in page and "no multiple of 1/125" in page
    assert len(gather(folder).shown) == 6
