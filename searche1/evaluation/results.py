"""What an evaluation found, for people and programs: a table on the screen, and JSON, CSV, Markdown and LaTeX files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from searche1.benchmarks import BENCHMARKS, TITLES, in_table_order
from searche1.console import plain_table
from searche1.evaluation.intervals import Interval
from searche1.evaluation.published import PublishedRow, doubts, published_rows
from searche1.evaluation.scores import Score, questions_of
from searche1.evaluation.summary import EvalResult, SourceResult
from searche1.progress import duration
from searche1.runs import atomic_write_json, atomic_write_text

RESULTS_FILE = "results.json"
SEARCH_R1_BATCH = 256  # of its evaluation, which drops the last incomplete one
FOOTNOTE_MARKS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Provenance:
    """What was asked of whom, how, and how long the last call took for what was left to it."""

    model: str
    method: str  # search, direct or rag
    data: str
    temperature: float
    top_p: float
    samples: int
    seed: int
    last_call_trajectories: int
    last_call_seconds: float


@dataclass(frozen=True)
class Results:
    """Everything that results.json holds."""

    provenance: Provenance
    result: EvalResult
    search_r1_average: float | None  # macro EM as Search-R1's code takes it, its dropped batch included

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.provenance),
            "average_em": self.result.macro_em,
            "search_r1_average_em": self.search_r1_average,
            **self.result.to_json(),
        }


def write_results(
    directory: Path, result: EvalResult, scores: Sequence[Score], provenance: Provenance, console: Console
) -> None:
    """Writes results.json, .csv, .md and .tex into `directory` and prints the table. `scores` are in file order."""
    results = Results(provenance, result, search_r1_average(scores))
    atomic_write_json(directory / RESULTS_FILE, results.to_json())
    atomic_write_text(directory / "results.csv", to_csv(result))
    atomic_write_text(directory / "results.md", to_markdown(results))
    atomic_write_text(directory / "results.tex", to_latex(results))
    show(results, directory, console)


def search_r1_average(scores: Sequence[Score]) -> float | None:
    """Unweighted mean over sources of Search-R1's own grades, without the questions that its loader drops: those
    behind the last whole batch of 256. None without those grades, or if a source has nothing left.
    """
    questions = list(questions_of(scores).values())
    kept = questions[: len(questions) - len(questions) % SEARCH_R1_BATCH] or questions
    by_source: dict[str, list[float]] = {found[0].source: [] for found in questions}
    for found in kept:
        grades = [one.search_r1_em for one in found if one.status != "error"]
        if any(grade is None for grade in grades):
            return None
        if grades:
            by_source[found[0].source].append(fmean(grade for grade in grades if grade is not None))
    return fmean(map(fmean, by_source.values())) if all(by_source.values()) else None


# -- for the screen -------------------------------------------------------------------------------


def show(results: Results, directory: Path, console: Console) -> None:
    """The table by source, what stands out in it, and where the files are."""
    result, provenance = results.result, results.provenance
    console.print()
    console.print(plain_table(cells(result), title=f"{provenance.model}, {decoding(provenance)}"))
    for note in notes(results):
        console.print(note, markup=False, soft_wrap=True)
    if provenance.last_call_trajectories:
        rate = provenance.last_call_trajectories / max(provenance.last_call_seconds, 1e-9)
        console.print(
            f"{provenance.last_call_trajectories:,} trajectories in {duration(provenance.last_call_seconds)}, "
            f"{rate:,.1f}/s",
            markup=False,
        )
    console.print(f"\nresults       {directory / RESULTS_FILE}, .csv, .md, .tex", markup=False, soft_wrap=True)
    console.print(f"read them     searche1 report {directory}", markup=False, soft_wrap=True)


def cells(result: EvalResult) -> list[list[str]]:
    """The table by source as text, in the paper's order, then the two kinds of mean. Empty columns are left out."""
    has_search_r1 = result.overall.search_r1_em is not None
    has_errors = result.overall.num_errors > 0
    header = ["source", "questions", "EM", "95 %", "F1", "sub-EM"]
    header += ["Search-R1's EM"] if has_search_r1 else []
    header += ["searches", "answered", "tokens", *(["faults"] if has_errors else [])]
    by_name = {source.source: source for source in result.sources}
    lines = [_line(TITLES.get(name, name), by_name[name]) for name in in_table_order(by_name)]
    if len(lines) > 1:
        macro = ["average of sources", "", f"{result.macro_em:.3f}", _interval(result.macro_interval)]
        macro += [f"{result.macro_f1:.3f}", f"{result.macro_sub_em:.3f}"]
        macro += [f"{fmean(s.search_r1_em or 0.0 for s in result.sources):.3f}"] if has_search_r1 else []
        lines += [macro + [""] * (len(header) - len(macro)), _line("all questions", result.overall)]
    if not has_errors:
        lines = [line[: len(header)] for line in lines]
    return [header, *lines]


def _line(name: str, source: SourceResult) -> list[str]:
    line = [name, f"{source.num_questions:,}", f"{source.em:.3f}", _interval(source.em_interval)]
    line += [f"{source.f1:.3f}", f"{source.sub_em:.3f}"]
    line += [] if source.search_r1_em is None else [f"{source.search_r1_em:.3f}"]
    line += [f"{source.mean_searches:.2f}", f"{source.answered_share:.1%}", f"{source.mean_response_tokens:.0f}"]
    return [*line, str(source.num_errors)]


def _interval(interval: Interval) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


def decoding(provenance: Provenance) -> str:
    """e.g. "search, greedy" or "rag, 3 samples at T=1, top-p 0.95"."""
    if provenance.temperature == 0:
        return f"{provenance.method}, greedy"
    samples = "1 sample" if provenance.samples == 1 else f"{provenance.samples} samples"
    return f"{provenance.method}, {samples} at T={provenance.temperature:g}, top-p {provenance.top_p:g}"


def notes(results: Results) -> list[str]:
    """Sentences about what the table alone would hide."""
    result = results.result
    found = []
    if result.macro_em_std is not None:
        runs = ", ".join(f"{em:.3f}" for em in result.macro_em_by_sample)
        found.append(f"Average EM of each sample: {runs}; standard deviation {result.macro_em_std:.3f}.")
    if result.overall.num_errors:
        unscored = result.overall.num_unscored
        found.append(
            f"{result.overall.num_errors} trajectories failed for engine or retriever faults and count nowhere; "
            f"{unscored} questions have no other. The same command asks them again."
        )
    if results.search_r1_average is not None and abs(results.search_r1_average - result.macro_em) >= 0.0005:
        found.append(
            f"As Search-R1's code takes it, the average EM is {results.search_r1_average:.3f}: it reads the prompt's "
            f"example with the response, and drops the questions behind the last whole batch of {SEARCH_R1_BATCH}."
        )
    sizes = {b.name: b for b in BENCHMARKS}
    for source in result.sources:
        benchmark = sizes.get(source.source)
        asked = source.num_questions + source.num_unscored
        if benchmark and asked != benchmark.num_questions:
            found.append(
                f"{benchmark.title}: {asked:,} of the {benchmark.num_questions:,} questions of its {benchmark.split} "
                "set; not comparable with published numbers."
            )
    return found


# -- files ----------------------------------------------------------------------------------------


def to_csv(result: EvalResult) -> str:
    """A row a source and one for all questions; an interval has two columns."""
    file = io.StringIO()
    names = [f.name for f in fields(SourceResult) if f.name != "em_interval"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, "em_low", "em_high"])
    by_name = {source.source: source for source in result.sources}
    for source in [*(by_name[name] for name in in_table_order(by_name)), result.overall]:
        writer.writerow([getattr(source, name) for name in names] + list(source.em_interval))
    return file.getvalue()


@dataclass(frozen=True)
class PaperTable:
    """Our line under the published ones of one table, with footnotes. Cells are text; marks are letters."""

    title: str
    header: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]  # method, then (cell, mark of its footnote or "")
    footnotes: list[tuple[str, str]]  # mark, text


def paper_tables(results: Results) -> list[PaperTable]:
    """Both tables of the paper with our line last; none if the questions are of none of its benchmarks."""
    ours = {source.source: source.em for source in results.result.sources if source.source in TITLES}
    if not ours:
        return []
    rows = published_rows()
    return [_paper_table(number, [row for row in rows if row.table == number], ours, results) for number in (1, 2)]


def _paper_table(
    number: int, published: Sequence[PublishedRow], ours: dict[str, float], results: Results
) -> PaperTable:
    marks: dict[str, str] = {}

    def mark(text: str) -> str:
        return marks.setdefault(text, FOOTNOTE_MARKS[len(marks)])

    lines = []
    for row in published:
        doubtful = doubts(row)
        line = []
        for benchmark in BENCHMARKS:
            em = row.em.get(benchmark.name)
            reason = doubtful.get(benchmark.name)
            line.append(("-" if em is None else f"{em:.3f}", mark(f"{reason}.") if reason else ""))
        lines.append((row.method, [*line, ("-" if row.average is None else f"{row.average:.3f}", "")]))
    own = [(f"{ours[b.name]:.3f}" if b.name in ours else "-", "") for b in BENCHMARKS]
    average = f"{results.result.macro_em:.3f}" if len(ours) == len(BENCHMARKS) == len(results.result.sources) else "-"
    lines.append((f"this model ({decoding(results.provenance)})", [*own, (average, "")]))
    return PaperTable(
        title=f"Beside Table {number} of the Search-E1 paper ({published[0].backbone})",
        header=["method", *TITLES.values(), "Avg."],
        rows=lines,
        footnotes=[(letter, text) for text, letter in marks.items()],
    )


def to_markdown(results: Results) -> str:
    """The table by source, the notes, and both tables of the paper with our line."""
    parts = [
        f"# {results.provenance.model}",
        "",
        f"{decoding(results.provenance)}; data: {results.provenance.data}",
        "",
    ]
    parts += _markdown_table(cells(results.result))
    parts += ["", *(f"- {note}" for note in notes(results))]
    for table in paper_tables(results):
        parts += ["", f"## {table.title}", ""]
        body = [[method, *(text + (f" [{m}]" if m else "") for text, m in line)] for method, line in table.rows]
        parts += _markdown_table([table.header, *body])
        parts += ["", *(f"[{m}] {text}" for m, text in table.footnotes)]
    return "\n".join(parts).rstrip() + "\n"


def _markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    header, *body = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *body)]


def to_latex(results: Results) -> str:
    """The same tables for a paper; needs booktabs."""
    parts = [f"% {decoding(results.provenance)}; needs \\usepackage{{booktabs}}"]
    parts += _latex_table(cells(results.result))
    for table in paper_tables(results):
        body = [[method, *(text + (f"$^{m}$" if m else "") for text, m in line)] for method, line in table.rows]
        parts += ["", f"% {table.title}", *_latex_table([table.header, *body])]
        parts += [f"% {m}: {text}" for m, text in table.footnotes]
    return "\n".join(parts) + "\n"


def _latex_table(lines: Sequence[Sequence[str]]) -> list[str]:
    def row(line: Sequence[str]) -> str:
        return " & ".join(_latex_text(cell) for cell in line) + r" \\"

    header, *body = lines
    columns = "l" + "r" * (len(header) - 1)
    rows = [row(header), r"\midrule", *map(row, body)]
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *rows, r"\bottomrule", r"\end{tabular}"]


def _latex_text(text: str) -> str:
    for character in "&%#_":
        text = text.replace(character, "\\" + character)
    return text
