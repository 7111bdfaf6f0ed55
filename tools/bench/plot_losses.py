"""Draws docs/losses.png: when the clip of Eq. 7 binds, and what the losses cost, from reports of losses.py.

python tools/bench/losses.py --threads 1,2 | tail -n 1 > docs/results/losses-cpu-float32.json
python tools/bench/plot_losses.py docs/results/losses-cpu-float32.json --out docs/losses.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OURS, OTHERS = "#1b6ca8", "#b9bec4"
CLIPS = ((0.05, "#c8553d"), (1.0, "#588b8b"), (10.0, "#1b6ca8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="last line of losses.py's output, with the jobs kl and tokens")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), gridspec_kw={"width_ratios": [1.0, 1.1, 1.1]})
    plot_clip(axes[0])
    for axis, job, title in ((axes[1], "kl", "Clipped KL"), (axes[2], "tokens", "Logprob and entropy")):
        plot_times(axis, report["jobs"][job], f"{title}, values and gradient")
    what = f"{report['rows']:,} rows x {report['vocab']:,}, {report['dtype']}"
    axes[1].set_xlabel(f"ms a row, log scale, one thread unless said ({what})")
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)


def plot_clip(axis: Any) -> None:
    """The student's probability below which an entry is clipped: P_T log(P_T / P_S) = tau."""
    teacher = np.linspace(0.02, 1.0, 400)
    for tau, colour in CLIPS:
        student = np.exp(np.log(teacher) - tau / teacher)
        axis.plot(teacher, student, color=colour, lw=2, label=f"clip {tau:g}")
        axis.fill_between(teacher, 1e-12, student, color=colour, alpha=0.10)
    axis.set(yscale="log", ylim=(1e-12, 1), xlim=(0, 1))
    axis.set_xlabel("teacher's probability of the entry")
    axis.set_ylabel("student's probability of it")
    axis.set_title("Below its line an entry is clipped\nand has no gradient", fontsize=11)
    axis.legend(loc="lower right", frameon=False)
    axis.grid(alpha=0.2)


def plot_times(axis: Any, rows: dict[str, Any], title: str) -> None:
    measured = {name: row for name, row in rows.items() if "ms_per_row" in row}
    names = sorted(measured, key=lambda name: -measured[name]["ms_per_row"])
    times = [measured[name]["ms_per_row"] for name in names]
    colours = [OURS if name.startswith("ours") else OTHERS for name in names]
    axis.barh(range(len(names)), times, color=colours)
    for k, name in enumerate(names):
        extra = measured[name]["extra_mib"]
        memory = f"+{extra / 1024:.1f} GiB" if extra > 512 else f"+{extra:.1f} MiB"
        axis.text(times[k] * 1.08, k, f"{times[k]:.3g} ms, {memory}", va="center", fontsize=8)
    partial = {name: "\n(no entropy)" for name in names if measured[name]["covers"].startswith("no entropy")}
    axis.set_yticks(range(len(names)), [name + partial.get(name, "") for name in names], fontsize=8)
    axis.set(xscale="log", xlim=(min(times) / 1.6, max(times) * 9))
    axis.set_title(title, fontsize=11)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
