"""A report in a real browser: filter, trajectory, tokens, comparison, pair. Skipped where there is no Chromium."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))

from browser import CHROMIUM, open_browser
from run_directory import fill, trajectory

from searche1.config import Config
from searche1.report import page as pages
from searche1.report.page import write_report
from searche1.runs import add_stage_row, open_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from test_report import row

    run = open_run(tmp_path_factory.mktemp("report") / "run", Config())
    for name, em in (("start", 0.3), ("cycle0/grpo", 0.45), ("cycle0/opsd", 0.5)):
        add_stage_row(run, row(name, em))
    fill(run.directory, num_questions=120)
    with pytest.MonkeyPatch.context() as patch, open_browser() as browser:
        patch.setattr(pages, "token_texts", lambda _: lambda token: f"<{token}>")
        browser.open(write_report(run.directory))
        browser.wait("document.documentElement.dataset.ready")
        yield browser
        assert browser.errors == []


def text(page, selector):
    return page.run(f"document.querySelector({selector!r}).textContent")


def choose(page, name, value):
    page.run(f"$('{name}').value = {value!r}; $('{name}').dispatchEvent(new Event('change', {{ bubbles: true }}))")


def click(page, selector, number=0):
    page.run(f"document.querySelectorAll({selector!r})[{number}].click()")


def shown(page, name):
    """Waits for a trajectory or pair to be drawn, and for nothing else to be under way."""
    page.wait(f"document.getElementById('detail').dataset.shown === {name!r}")
    page.run("new Promise(done => setTimeout(done, 100))")


@pytest.fixture(autouse=True)
def start(page):
    page.run("setTheme(''); $('filters').reset(); state.tokens = state.after = false")
    page.run("new Promise(done => setTimeout(done, 50))")


def test_filters_leave_what_they_name(page):
    num_shown = 2 * (120 * 3 + 2 + 3)
    assert text(page, "#count") == f"{num_shown} trajectories, page 1 of {-(-num_shown // 100)}"
    choose(page, "where", "0")
    assert text(page, "#count").startswith("240 trajectories")
    choose(page, "source", "popqa")
    choose(page, "outcome", "wrong")
    assert text(page, "#count") == "60 trajectories"
    choose(page, "searches", "1")
    assert text(page, "#count") == "0 trajectories"
    page.run("$('filters').reset()")
    page.wait("$('count').textContent.startsWith('730')")
    page.run("$('text').value = 'BOOK 119?'; $('text').dispatchEvent(new Event('input'))")
    assert text(page, "#count") == "6 trajectories"


def test_pages_turn_and_stop_at_the_ends(page):
    assert page.run("$('previous').disabled")
    for _ in range(9):
        click(page, "#next")
    assert "page 8 of 8" in text(page, "#count") and page.run("$('next').disabled")
    assert page.run("document.querySelectorAll('.item').length") == 30


def test_a_trajectory_shows_its_spans_in_their_colours(page):
    choose(page, "outcome", "wrong")
    click(page, ".item")
    shown(page, "trajectories1")
    assert text(page, "#detail pre") == trajectory(False).text
    assert text(page, "#detail .search") == "<search> who </search>" and text(page, "#detail .answer").strip()
    assert page.run("document.querySelectorAll('#detail .information').length") == 2
    assert "accepted: ann (nq:0)" in text(page, "#detail")


def test_tokens_show_how_likely_they_were(page):
    click(page, ".item")
    shown(page, "trajectories0")
    page.press("t")
    page.wait("document.querySelectorAll('.token').length === 5")
    titles = page.run("[...document.querySelectorAll('.token')].map(node => node.title)")
    assert titles[1] == "p = 0.082, ln p = -2.50" and titles[2].startswith("p = 1.0")
    strength = page.run("document.querySelectorAll('.token')[1].style.background")
    assert "92%" in strength
    assert text(page, "#detail .information") == trajectory(True).spans[1].text
    page.press("t")
    page.wait("document.querySelectorAll('.token').length === 0")


def test_the_same_question_of_another_stage_stands_beside_it(page):
    click(page, ".item")
    shown(page, "trajectories0")
    page.press("c")
    page.wait("document.querySelectorAll('.column').length === 2")
    titles = page.run("[...document.querySelectorAll('.column h3')].map(node => node.textContent)")
    assert titles == ["\u2713start held-out", "\u2713cycle0/grpo rollouts step 1"]
    click(page, ".chips button[aria-pressed=true]")
    page.wait("document.querySelectorAll('.column').length === 1")


def test_a_pair_shows_reference_beside_student_and_the_kl_of_every_token(page):
    choose(page, "mode", "pairs")
    assert text(page, "#count") == "2 pairs"
    click(page, ".item")
    shown(page, "pairs0")
    titles = page.run("[...document.querySelectorAll('.column h3')].map(node => node.textContent)")
    assert titles == ["\u2713reference: the cheapest right one", "\u2717student: what it is taught on"]
    tokens = page.run("[...document.querySelectorAll('.column:last-child .token')].map(node => node.title)")
    assert len(tokens) == 8 and tokens[6].startswith("KL 1.500")
    click(page, "#toggles button", 1)
    page.wait("document.querySelectorAll('.column:last-child .token')[6].title.startsWith('KL 0.100')")
    click(page, ".item", 1)
    shown(page, "pairs1")
    assert "recorded for the first pairs" in text(page, "#toggles")


def test_keys_move_through_the_list(page):
    page.run("document.activeElement.blur(); state.chosen = -1")
    for key, name in (("j", "trajectories0"), ("j", "trajectories1"), ("k", "trajectories0"), ("m", None)):
        page.press(key)
        if name:
            shown(page, name)
    assert text(page, "#count") == "2 pairs"
    page.press("?")
    assert not page.run("$('help').hidden")
    page.press("Escape")
    assert page.run("$('help').hidden")
    page.press("/")
    assert page.run("document.activeElement.id") == "text"
    page.run("document.activeElement.blur()")


def test_the_page_turns_dark_and_its_drawings_with_it(page):
    light = page.run("getComputedStyle(document.querySelector('svg path')).fill")
    page.run("setTheme('light'); $('theme').click()")
    assert page.run("document.documentElement.style.colorScheme") == "dark"
    assert page.run("getComputedStyle(document.querySelector('svg path')).fill") != light
    page.run("$('theme').click()")
