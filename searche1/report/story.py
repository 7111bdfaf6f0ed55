"""The part of a page that is read from top to bottom: what the run reached, by stage, step and second."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from searche1.evaluation.results import RESULTS_FILE
from searche1.evaluation.stages import table_cells
from searche1.health import HEALTH_FILE, Alarm, read_health
from searche1.metrics import read_metrics
from searche1.report.plots import curve_figure, inline_svg, timing_figure, training_figure, training_panels
from searche1.runs import StageRow, read_json

Fragment = tuple[str, str]  # title of a section, its HTML


def run_story(directory: Path, rows: Sequence[StageRow]) -> list[Fragment]:
    """Sections about a run's stages and steps. Everything a model, a corpus or a user wrote is escaped."""
    metrics_path = directory / "metrics.jsonl"
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    curve = inline_svg(lambda theme: curve_figure(rows, theme), "EM and searches by stage")
    sections = [
        ("", f'<p class="lead">{headline(rows)}</p>{curve}'),
        ("Stages", table(table_cells(rows)) + _by_source(rows) + _teacher_checks(directory, rows)),
    ]
    if found := read_health(directory / HEALTH_FILE):
        sections.append(("Health", table([["stage", "step", "what"], *map(_health_cells, found)])))
    panels = training_panels(metrics)
    if panels:
        figure = inline_svg(lambda theme: training_figure(metrics, panels, theme), "measures of every step")
        sections.append(("Training", figure))
    if seconds := phase_seconds(metrics):
        figure = inline_svg(lambda theme: timing_figure(seconds, theme), "seconds by phase")
        sections.append(("Time", figure + table(_timing_cells(seconds, metrics))))
    return sections


def headline(rows: Sequence[StageRow]) -> str:
    """One sentence: from where to where."""
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        return f"Held-out EM {first.em:.3f}, {first.mean_searches:.2f} searches a question."
    low, high = last.em_interval
    return (
        f"Held-out EM went from {first.em:.3f} to <strong>{last.em:.3f}</strong> ({low:.3f} to {high:.3f}) in "
        f"{len(rows) - 1} stages, searches from {first.mean_searches:.2f} to {last.mean_searches:.2f} a question."
    )


def evaluation_story(directory: Path) -> list[Fragment]:
    """Sections about an evaluation: its tables, as results.md has them."""
    results = read_json(directory / RESULTS_FILE)
    low, high = results["macro_interval"]
    lead = f"EM <strong>{results['average_em']:.3f}</strong> ({low:.3f} to {high:.3f}), the average of its sources."
    sections: list[Fragment] = [("", f'<p class="lead">{lead}</p>')]
    title, blocks = "Results", ""
    for block in (directory / "results.md").read_text(encoding="utf-8").split("\n\n")[1:]:
        if block.startswith("## "):
            sections.append((title, blocks))
            title, blocks = block.removeprefix("## ").strip(), ""
        elif block.startswith("|"):
            cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.strip().splitlines()]
            blocks += table([cells[0], *cells[2:]])
        else:
            lines = "<br>".join(html.escape(line.removeprefix("- ")) for line in block.strip().splitlines())
            blocks += f'<p class="quiet">{lines}</p>'
    return [*sections, (title, blocks)]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Header and lines of text as an HTML table that may scroll sideways."""
    header, *body = lines
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _health_cells(row: Mapping[str, Any]) -> list[str]:
    if "alarm" in row:
        what = f"{Alarm(**row['alarm']).text} ({row['action']})"
    elif "rolled_back_to" in row:
        what = f"went back to step {row['rolled_back_to']}"
    else:
        what = f"ended with the weights of step {row['ended_with']}"
    return [row["stage"], str(row["step"]), what]


def _by_source(rows: Sequence[StageRow]) -> str:
    sources = sorted({source for row in rows for source in row.em_by_source})
    if len(sources) < 2:
        return ""
    lines = [["EM by source", *sources]]
    for row in rows:
        cells = [f"{row.em_by_source[source]:.3f}" if source in row.em_by_source else "-" for source in sources]
        lines.append([row.name, *cells])
    return table(lines)


def _teacher_checks(directory: Path, rows: Sequence[StageRow]) -> str:
    lines = [["teacher check", "wrong trajectories", "EM with reference", "EM without", "gap"]]
    for row in rows:
        path = directory / row.name / "teacher_check.json"
        if path.is_file():
            check = read_json(path)
            ems = [f"{check[key]:.3f}" for key in ("teacher_em", "student_em", "gap")]
            lines.append([row.name, str(check["num_starts"]), *ems])
    return table(lines) if len(lines) > 1 else ""


def phase_seconds(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{stage: {phase: seconds of all its steps}}"""
    total: dict[str, dict[str, float]] = {}
    for row in metrics:
        for phase, seconds in row["seconds"].items():
            stage = total.setdefault(row["stage"], {})
            stage[phase] = stage.get(phase, 0.0) + seconds
    return total


def _timing_cells(seconds: dict[str, dict[str, float]], metrics: Sequence[dict[str, Any]]) -> list[list[str]]:
    phases = list(dict.fromkeys(name for spent in seconds.values() for name in spent))
    lines = [["seconds", *phases, "steps"]]
    for stage, spent in seconds.items():
        steps = sum(row["stage"] == stage for row in metrics)
        lines.append([stage, *(f"{spent[name]:.1f}" if name in spent else "-" for name in phases), str(steps)])
    return lines


def provenance(directory: Path) -> str:
    """Where and with what the last start ran, in one line; "" if nobody wrote it down."""
    path = directory / "provenance.json"
    if not path.exists():
        return ""
    start = read_json(path)["starts"][-1]
    commit = f"commit {start['git']['commit'][:12]}" if start["git"] else "not a git checkout"
    if start["git"] and start["git"]["is_dirty"]:
        commit += " with local changes"
    versions = [f"{name} {version}" for name, version in start["versions"].items() if version]
    facts = [start["time"], commit, f"seed {start['seed']}", *versions]
    return f'<p class="quiet">{html.escape(" / ".join(facts))}</p>'


def settings(directory: Path) -> str:
    """config.yaml and every start of provenance.json, folded."""
    parts = []
    for name in ("config.yaml", "provenance.json"):
        path = directory / name
        if path.exists():
            text = path.read_text(encoding="utf-8")
            if name.endswith(".json"):
                text = json.dumps(json.loads(text), indent=1)
            parts.append(f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>")
    return "".join(parts)
