"""The line of a judged stage in summary.json, and the table of a run's stages."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from searche1.console import plain_table
from searche1.evaluation.intervals import Interval
from searche1.evaluation.summary import EvalResult
from searche1.runs import StageRow


def stage_row(
    name: str, result: EvalResult, *, temperature: float, greedy: EvalResult | None, seconds: float
) -> StageRow:
    """The line of a stage in summary.json. At temperature 0, `result` is the greedy one itself."""
    if temperature == 0.0:
        greedy = result
    return StageRow(
        name=name,
        em=result.macro_em,
        em_interval=result.macro_interval,
        temperature=temperature,
        em_greedy=greedy.macro_em if greedy else None,
        em_greedy_interval=greedy.macro_interval if greedy else None,
        em_by_source={source.source: source.em for source in result.sources},
        mean_searches=result.overall.mean_searches,
        answered_share=result.overall.answered_share,
        num_questions=result.overall.num_questions,
        seconds=seconds,
    )


def format_table(rows: Sequence[StageRow]) -> Table:
    """The stages of a run, one line each; "+/-" is half the width of the bootstrap 95 % interval."""
    title = f"Held-out exact match by stage, {rows[-1].num_questions} questions" if rows else "No stage is finished"
    return plain_table(table_cells(rows), title=title)


def table_cells(rows: Sequence[StageRow]) -> list[list[str]]:
    """Header and lines of the stage table as text. A way of decoding that no stage used has no column."""
    sampled_at = sorted({row.temperature for row in rows if row.temperature > 0})
    has_greedy = any(row.em_greedy is not None for row in rows)
    header = ["stage", *[f"EM at T={t:g}" for t in sampled_at], *(["EM greedy"] if has_greedy else [])]
    lines = [[*header, "searches", "answered", "seconds"]]
    for row in rows:
        cells = [row.name]
        cells += [_with_interval(row.em, row.em_interval) if row.temperature == t else "-" for t in sampled_at]
        cells += [_with_interval(row.em_greedy, row.em_greedy_interval)] if has_greedy else []
        cells += [f"{row.mean_searches:.2f}", f"{row.answered_share:.0%}", f"{row.seconds:.0f}"]
        lines.append(cells)
    return lines


def _with_interval(em: float | None, interval: Interval | None) -> str:
    if em is None or interval is None:
        return "-"
    return f"{em:.3f} +/- {(interval[1] - interval[0]) / 2:.3f}"
