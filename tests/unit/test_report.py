import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from searche1.config import Config
from searche1.data import write_groups
from searche1.metrics import MetricsLog
from searche1.report.page import choose_examples, write_report
from searche1.report.plots import DARK, LIGHT, curve_png, training_panels, training_png
from searche1.runs import StageRow, add_stage_row, open_run
from searche1.types import Group, Question, Span, Trajectory, UserError


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


def group(key, reward, text="<think>well</think><answer> Paris </answer>"):
    spans = (
        Span("policy", "search", (1,), (-0.1,), "<think>hm</think><search> a < b </search>"),
        Span("environment", "information", (2,), (), "<information>Doc <script>alert(1)</script></information>"),
        Span("policy", "answer", (3,), (-0.1,), text),
    )
    question = Question(key, f"<i>capital {key}</i>?", ("Paris & co",), "nq")
    return Group(question, (Trajectory((0,), spans, "answered"),), (reward,))


def colours(png):
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(pixels, axis=0)}


class Tags(HTMLParser):
    """Every opened element, and whether each was closed in turn."""

    VOID = ("meta", "img", "source")

    def __init__(self):
        super().__init__()
        self.opened, self.stack = [], []

    def handle_starttag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

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
    assert LIGHT.first in colours(training_png(metrics, panels, LIGHT))


def test_the_page_is_whole_and_needs_nothing_from_outside(run):
    page = write_report(run.directory).read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.stack == []
    sources = [attrs.get("src") or attrs.get("srcset") for tag, attrs in tags.opened if tag in ("img", "source")]
    assert len(sources) == 4  # two pictures, each light and dark
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))).verify()
    assert not re.search(r"https?://|<script|<link", page)
    assert "cycle0/opsd" in page and "0.450 +/- 0.050" in page and "&lt;hotpotqa&gt;" in page
    assert (run.directory / "curve.png").stat().st_size > 10_000


def test_examples_are_coloured_by_action_and_escaped(run):
    write_groups(run.directory / "groups.jsonl.gz", [group("1", 1.0), group("2", 0.0, text="<img src=x>")])
    page = write_report(run.directory, examples=run.directory / "groups.jsonl.gz").read_text()
    assert '&lt;think&gt;hm&lt;/think&gt;<span class="search">&lt;search&gt; a &lt; b &lt;/search&gt;</span>' in page
    assert '<span class="answer">&lt;answer&gt; Paris &lt;/answer&gt;</span>' in page
    assert '<span class="information">&lt;information&gt;Doc &lt;script&gt;' in page
    assert "<script" not in page and "<img src=x" not in page and "<i>capital" not in page
    assert "Paris &amp; co" in page and "[right, searches: 1]" in page and "[wrong, searches: 1]" in page


def test_examples_hold_both_right_and_wrong_where_there_are_both():
    right, wrong = [group(f"r{i}", 1.0) for i in range(20)], [group(f"w{i}", 0.0) for i in range(20)]
    assert [g.question.id for g in choose_examples(right + wrong)] == ["r0", "r1", "r2", "w0", "w1", "w2"]
    assert len(choose_examples(right + wrong[:1])) == 6 and len(choose_examples(right[:1] + wrong)) == 6
    assert [g.question.id for g in choose_examples(right[:1])] == ["r0"]


def test_a_run_without_a_finished_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no finished stage"):
        write_report(open_run(tmp_path / "run", Config()).directory)
