"""report.html: one page of a run that needs no other file and no network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from searche1.data import read_groups
from searche1.evaluation.stages import table_cells
from searche1.metrics import read_metrics
from searche1.report.plots import DARK, LIGHT, Theme, curve_png, training_panels, training_png, write_curve
from searche1.runs import StageRow, atomic_write_text, read_summary
from searche1.types import Group, Span, Trajectory, UserError

NUM_EXAMPLES = 6

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #ffffff; --quiet: #57606a; --line: #d0d7de;
        --search: #cfe8fa; --answer: #c8f0df; --information: #f3f4f6; --invalid: #fde0d2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --quiet: #9198a1; --line: #3d444d;
        --search: #12405e; --answer: #0f4a39; --information: #1c222a; --invalid: #5c2a12; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
details { border-top: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; margin: .6rem 0; }
.search, .answer, .information, .invalid { border-radius: 3px; padding: 0 .15rem; }
.search { background: var(--search); } .answer { background: var(--answer); }
.information { background: var(--information); color: var(--quiet); } .invalid { background: var(--invalid); }
"""
LEGEND = (
    ("search", "the policy searches"),
    ("information", "what the retriever returned"),
    ("answer", "the policy answers"),
    ("invalid", "no complete tag, and what the policy was told"),
)
ESCAPED_ACTION = re.compile(r"&lt;(search|answer)&gt;.*?&lt;/\1&gt;", re.DOTALL)


def write_report(directory: Path, *, examples: Path | None = None) -> Path:
    """Writes curve.png and report.html into a run directory and returns the page's path.

    `examples` is a groups file, such as those of the last evaluation, of which a few are shown.
    """
    rows = read_summary(directory).stages
    if not rows:
        raise UserError(f"{directory} has no finished stage in summary.json; give a run that has evaluated one")
    write_curve(rows, directory / "curve.png")
    page = directory / "report.html"
    atomic_write_text(page, render_page(directory, rows, read_groups(examples) if examples else []))
    return page


def render_page(directory: Path, rows: Sequence[StageRow], groups: Sequence[Group]) -> str:
    """The page as text. Everything a model, a corpus or a user wrote is escaped."""
    metrics_path = directory / "metrics.jsonl"
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    parts = [
        f"<h1>{html.escape(directory.resolve().name)}</h1>",
        _provenance(directory / "provenance.json"),
        _picture("EM and searches by stage", lambda theme: curve_png(rows, theme)),
        "<h2>Stages</h2>",
        _table(rows),
        _by_source(rows),
    ]
    panels = training_panels(metrics)
    if panels:
        picture = _picture("Measures of every step", lambda theme: training_png(metrics, panels, theme))
        parts += ["<h2>Training</h2>", picture]
    if groups:
        parts += ["<h2>Example trajectories</h2>", _legend(), *map(_example, choose_examples(groups))]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(directory.resolve().name)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _provenance(path: Path) -> str:
    if not path.exists():
        return ""
    start = json.loads(path.read_text(encoding="utf-8"))["starts"][-1]
    commit = f"commit {start['git']['commit'][:12]}" if start["git"] else "not a git checkout"
    if start["git"] and start["git"]["is_dirty"]:
        commit += " with local changes"
    versions = [f"{name} {version}" for name, version in start["versions"].items() if version]
    facts = [start["time"], commit, f"seed {start['seed']}", *versions]
    return f'<p class="quiet">{html.escape(" / ".join(facts))}</p>'


def _picture(description: str, draw: Callable[[Theme], bytes]) -> str:
    light, dark = (base64.b64encode(draw(theme)).decode() for theme in (LIGHT, DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{html.escape(description)}" src="data:image/png;base64,{light}"></picture>'
    )


def _table(rows: Sequence[StageRow]) -> str:
    header, *lines = table_cells(rows)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _by_source(rows: Sequence[StageRow]) -> str:
    sources = sorted({source for row in rows for source in row.em_by_source})
    if len(sources) < 2:
        return ""
    head = "<th>stage</th>" + "".join(f"<th>{html.escape(source)}</th>" for source in sources)
    body = ""
    for row in rows:
        cells = [f"{row.em_by_source[source]:.3f}" if source in row.em_by_source else "-" for source in sources]
        body += f"<tr><td>{html.escape(row.name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f'<h2>EM by source</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def choose_examples(groups: Sequence[Group]) -> list[Group]:
    """A few groups for reading: first some that were answered right at least once, then some that never were."""
    right = [group for group in groups if any(reward > 0 for reward in group.rewards)]
    wrong = [group for group in groups if group.trajectories and not any(reward > 0 for reward in group.rewards)]
    num_wrong = min(len(wrong), max(NUM_EXAMPLES // 2, NUM_EXAMPLES - len(right)))
    return right[: NUM_EXAMPLES - num_wrong] + wrong[:num_wrong]


def _legend() -> str:
    marks = " ".join(f'<span class="{name}">{html.escape(text)}</span>' for name, text in LEGEND)
    return f"<p>{marks}</p>"


def _example(group: Group) -> str:
    """The group's best trajectory."""
    best = max(range(len(group.rewards)), key=lambda index: group.rewards[index])
    trajectory = group.trajectories[best]
    verdict = "right" if group.rewards[best] > 0 else "wrong"
    heading = f"{group.question.text} [{verdict}, searches: {trajectory.num_searches}]"
    answers = f"Accepted: {'; '.join(group.question.answers)} ({group.question.key})"
    return (
        f"<details><summary>{html.escape(heading)}</summary>"
        f'<p class="quiet">{html.escape(answers)}</p>{_trajectory(trajectory)}</details>'
    )


def _trajectory(trajectory: Trajectory) -> str:
    fault = f'<p class="quiet">{html.escape(trajectory.error)}</p>' if trajectory.error else ""
    return f"<pre>{''.join(map(_span, trajectory.spans))}</pre>{fault}"


def _span(span: Span) -> str:
    """The span's text. Of what the policy wrote, only the action is coloured, or all of it if there is none."""
    text = html.escape(span.text)
    if span.author == "policy" and span.kind != "invalid":
        return ESCAPED_ACTION.sub(r'<span class="\1">\g<0></span>', text)
    return f'<span class="{"information" if span.kind == "information" else "invalid"}">{text}</span>'
