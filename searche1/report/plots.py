"""The curves of a run as pictures: held-out EM and searches by stage, and the steps of training."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from searche1.runs import StageRow, atomic_path


@dataclass(frozen=True)
class Theme:
    """Colours of one page background. Series colours are Okabe and Ito's, told apart with any colour vision."""

    ink: str
    quiet: str  # axes and grid
    paper: str
    first: str
    second: str
    third: str


LIGHT = Theme(ink="#24292f", quiet="#d0d7de", paper="#ffffff", first="#0072B2", second="#D55E00", third="#009E73")
DARK = Theme(ink="#e6edf3", quiet="#3d444d", paper="#0d1117", first="#56B4E9", second="#E69F00", third="#2BC49A")

TRAINING = (
    ("em", "EM of the rollouts"),
    ("mean_searches", "searches per rollout"),
    ("mean_response_tokens", "tokens per rollout"),
    ("tokens_per_s", "policy tokens per second"),
    ("kl", "KL"),
    ("entropy", "entropy"),
    ("clip_fraction", "clipped share"),
    ("grad_norm", "gradient norm"),
    ("validation_em", "validation EM of adapters"),
    ("peak_memory_gb", "peak memory of rank 0, GB"),
)
PANELS_A_ROW = 4
PHASE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#999999")


def write_curve(rows: Sequence[StageRow], path: Path) -> None:
    """curve.png of a run, for a page with a white background."""
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(curve_png(rows, LIGHT))


def curve_png(rows: Sequence[StageRow], theme: Theme) -> bytes:
    """Held-out EM with its 95 % intervals, and mean searches, by stage."""
    return _png(curve_figure(rows, theme))


def curve_figure(rows: Sequence[StageRow], theme: Theme) -> Figure:
    figure = Figure(figsize=(10, 4), dpi=144, layout="constrained", facecolor=theme.paper)
    em, searches = figure.subplots(1, 2, width_ratios=(3, 2))
    places = range(len(rows))

    sampled = [(place, row) for place, row in zip(places, rows, strict=True) if row.temperature > 0]
    if sampled:
        _em_line(
            em,
            [place - 0.04 for place, _ in sampled],  # beside the greedy point, so that intervals stay readable
            [row.em for _, row in sampled],
            [row.em_interval for _, row in sampled],
            label=f"sampled, T={sampled[0][1].temperature:g}",
            colour=theme.first,
            style="o-",
        )
    greedy = [
        (place, row.em_greedy, row.em_greedy_interval)
        for place, row in zip(places, rows, strict=True)
        if row.em_greedy is not None and row.em_greedy_interval is not None
    ]
    if greedy:
        _em_line(
            em,
            [place + 0.04 for place, _, _ in greedy],
            [value for _, value, _ in greedy],
            [interval for _, _, interval in greedy],
            label="greedy",
            colour=theme.second,
            style="s--",
        )
    em.set_ylim(bottom=0)
    em.legend(frameon=False, labelcolor=theme.ink, loc="lower right")
    _finish(em, f"Held-out exact match ({rows[-1].num_questions} questions, bars: 95 %)", theme)

    searches.plot(places, [row.mean_searches for row in rows], "D-", color=theme.third)
    searches.set_ylim(0, max(row.mean_searches for row in rows) * 1.2 + 0.1)
    _finish(searches, "Searches per question", theme)
    for axes in (em, searches):
        axes.set_xticks(places, [row.name.replace("/", "\n") for row in rows])
        axes.set_xlim(-0.3, len(rows) - 0.7)
    return figure


def _em_line(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    *,
    label: str,
    colour: str,
    style: str,
) -> None:
    below = [value - low for value, (low, _) in zip(values, intervals, strict=True)]
    above = [high - value for value, (_, high) in zip(values, intervals, strict=True)]
    axes.errorbar(places, values, yerr=(below, above), fmt=style, color=colour, capsize=3, elinewidth=1, label=label)


def training_panels(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Value name and title of everything worth a panel that at least one step measured."""
    return [(key, title) for key, title in TRAINING if any(row["values"].get(key) is not None for row in metrics)]


def training_figure(metrics: Sequence[dict[str, Any]], panels: Sequence[tuple[str, str]], theme: Theme) -> Figure:
    """What each step measured, over all stages in turn."""
    columns = min(PANELS_A_ROW, len(panels))
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10, 2.4 * num_rows), dpi=144, layout="constrained", facecolor=theme.paper)
    every = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for unused in every[len(panels) :]:
        unused.set_visible(False)
    starts = [place for place, row in enumerate(metrics) if place and row["stage"] != metrics[place - 1]["stage"]]
    for axes, (key, title) in zip(every, panels, strict=False):
        measured = [
            (place, row["stage"], row["values"][key])
            for place, row in enumerate(metrics, start=1)
            if row["values"].get(key) is not None
        ]
        for stage in dict.fromkeys(stage for _, stage, _ in measured):  # a line does not run over a stage's end
            points = [(place, value) for place, name, value in measured if name == stage]
            axes.plot(*zip(*points, strict=True), ".-", color=theme.first, linewidth=1, markersize=4)
        for start in starts:
            axes.axvline(start + 0.5, color=theme.quiet, linewidth=1, linestyle=":")
        axes.set_xlabel("step, all stages", color=theme.ink, fontsize=9)
        axes.set_xlim(0, len(metrics) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        _finish(axes, title, theme)
    return figure


def timing_figure(seconds: Mapping[str, Mapping[str, float]], theme: Theme) -> Figure:
    """A bar for each stage: how its steps' seconds split over phases."""
    phases = list(dict.fromkeys(name for spent in seconds.values() for name in spent))
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(seconds)), dpi=144, layout="constrained", facecolor=theme.paper)
    axes = figure.subplots()
    left = [0.0] * len(seconds)
    for number, phase in enumerate(phases):
        widths = [spent.get(phase, 0.0) for spent in seconds.values()]
        colour = PHASE_COLOURS[number % len(PHASE_COLOURS)]
        axes.barh(list(seconds), widths, left=left, label=phase, color=colour, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.legend(frameon=False, labelcolor=theme.ink, ncols=min(4, len(phases)), fontsize=9, loc="best")
    _finish(axes, "Seconds of all steps, by phase", theme)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=theme.quiet, linewidth=0.6)
    return figure


def inline_svg(draw: Callable[[Theme], Figure], description: str) -> str:
    """A figure for a page: its colours are the page's own variables, so it turns dark with the page."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "font.family": "sans-serif"}):
        figure = draw(LIGHT)
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name in ("ink", "quiet", "paper", "first", "second", "third"):
        text = re.sub(re.escape(getattr(LIGHT, name)), f"var(--{name})", text, flags=re.IGNORECASE)
    head, _, rest = text.partition(">")
    head = re.sub(r' (width|height|xmlns(:\w+)?)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(description)}">{rest}'


def _finish(axes: Axes, title: str, theme: Theme) -> None:
    axes.set_title(title, loc="left", color=theme.ink, fontsize=10)
    axes.set_facecolor(theme.paper)
    axes.grid(axis="y", color=theme.quiet, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.quiet)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
