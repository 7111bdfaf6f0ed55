"""report.html: a run or an evaluation in one page that needs no other file and no network."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from searche1.evaluation.results import RESULTS_FILE
from searche1.report.gather import Gathered, gather
from searche1.report.pack import Packed, pack
from searche1.report.plots import write_curve
from searche1.report.story import evaluation_story, provenance, run_story, settings
from searche1.runs import atomic_write_text, read_summary
from searche1.types import UserError

ASSETS = Path(__file__).parents[1] / "assets" / "report"
NO_SCRIPT = "This page needs JavaScript to show trajectories; everything above does not."


def write_report(directory: Path) -> Path:
    """Writes report.html, and curve.png of a run, into its directory and returns the page's path. Raises UserError."""
    rows = read_summary(directory).stages
    if rows:
        write_curve(rows, directory / "curve.png")
        sections = run_story(directory, rows)
    elif (directory / RESULTS_FILE).is_file():
        sections = evaluation_story(directory)
    else:
        raise UserError(
            f"{directory} holds neither a finished stage (summary.json) nor a finished evaluation ({RESULTS_FILE}); "
            "give the folder of a run that has evaluated a stage, or of `searche1 eval`"
        )
    found = gather(directory)
    packed = pack(found, token_texts(directory))
    page = directory / "report.html"
    atomic_write_text(page, render_page(directory, sections, found, packed))
    return page


def token_texts(directory: Path) -> Callable[[int], str] | None:
    """Text of a token id, by the tokenizer of the run's model; None if it is no longer there."""
    from transformers import AutoTokenizer

    from searche1.config import load_config

    stages = sorted(path.parent for path in directory.rglob("tokenizer_config.json"))
    config = load_config(directory / "config.yaml") if (directory / "config.yaml").is_file() else None
    folders = [*stages[:1], *([Path(config.model.path)] if config else [])]
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            return lambda token_id: str(tokenizer.decode([token_id]))
    return None


def render_page(directory: Path, sections: list[tuple[str, str]], found: Gathered, packed: Packed) -> str:
    """The page as text: first what paints at once, last the pieces that the script unpacks when they are asked for."""
    name = html.escape(directory.resolve().name)
    story = "".join(
        f"<section>{f'<h2>{html.escape(title)}</h2>' if title else ''}{content}</section>"
        for title, content in sections
    )
    explorer = (ASSETS / "explorer.html").read_text(encoding="utf-8") if found.shown else ""
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in packed.notes)
    explorer = explorer.replace("{notes}", f'<ul class="quiet">{notes}</ul>' if notes else "")
    pieces = "\n".join(
        f'<script type="text/plain" id="piece-{key}">{text}</script>' for key, text in packed.pieces.items()
    )
    script = (ASSETS / "explorer.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{(ASSETS / 'report.css').read_text(encoding='utf-8')}</style></head>\n<body>\n"
        f'<header><h1>{name}</h1><button id="theme" type="button" title="light or dark">\u25d0</button></header>\n'
        f"{provenance(directory)}\n{story}\n{explorer}\n"
        f"<section><h2>Settings</h2>{settings(directory)}</section>\n"
        f"<noscript>{NO_SCRIPT}</noscript>\n"
        + (f"{pieces}\n<script>{script}</script>\n" if found.shown else "")
        + "</body></html>\n"
    )
