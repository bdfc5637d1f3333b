"""One look for all figures: legible in one column of a paper, told apart without colour, vector output."""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures are written to files; no window is opened

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import retention
from retention import statistics as st
from retention.types import UserError

RC: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "retention",
}
# Okabe and Ito's colours, which people with any colour vision tell apart; line and marker say the same again.
GROUP: dict[str, dict[str, Any]] = {
    "edited": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    "intrinsic": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "neighbor": {"color": "#009E73", "marker": "^", "linestyle": ":"},
    "same_subject": {"color": "#CC79A7", "marker": "v", "linestyle": "-."},
    "control": {"color": "#555555", "marker": "D", "linestyle": (0, (1, 1))},
}


def wrap(text: str, width: int = 26) -> str:
    """A long label on several lines."""
    return "\n".join(textwrap.wrap(text, width)) or text


def round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... between two positive numbers, for a logarithmic axis; the ends where fewer than two lie there."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return found if len(found) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]


def steps(axes: Axes, last: int) -> None:
    """An axis of fine-tuning steps from 0 on: logarithmic beyond 1."""
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, last * 1.1)
    ticks = [t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000) if t <= last]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()


def panels(table: pd.DataFrame, names: Sequence[str], draw: Callable[[Axes, pd.DataFrame], None], label: str) -> Figure:
    """A panel for each cell over fine-tuning steps: mitigations (if they vary) downwards, all else across."""
    plt.rcParams.update(RC)
    apart = [name for name in names if name != "mitigations"]
    table = table.assign(mitigations=table["mitigations"] if "mitigations" in names else "none")
    across = list(table[apart].drop_duplicates().itertuples(index=False, name=None))
    down = sorted(table["mitigations"].unique(), key=lambda m: (m != "none", m))
    cells = dict(iter(table.groupby([*apart, "mitigations"])))
    figure, grid = plt.subplots(
        len(down), len(across), figsize=(0.6 + 2.2 * len(across), 0.5 + 1.75 * len(down)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for i, mitigation in enumerate(down):
        for j, column in enumerate(across):
            axes, cell = grid[i][j], cells.get((*column, mitigation))
            if cell is None:
                axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes)
            else:
                draw(axes, cell)
            if i == 0:
                named = zip(apart, column, strict=True)
                axes.set_title(" · ".join(wrap(v) if n in st.CELL else f"{n} {v}" for n, v in named))
        grid[i][0].set_ylabel(label if mitigation == "none" else f"{label}\n{wrap(mitigation)}")
    figure.supxlabel("fine-tuning steps", fontsize=RC["axes.labelsize"])
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write PNG (for screens) and PDF (for papers), whole or not at all, without the time of day in them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, meta in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        temporary = folder / f".{name}.{os.getpid()}{suffix}"
        figure.savefig(temporary, dpi=200, metadata=meta)
        os.replace(temporary, folder / f"{name}{suffix}")
        paths.append(folder / f"{name}{suffix}")
    return paths


def check_study(results: Path) -> None:
    """Refuse a whole results folder: its studies may call different settings by one name."""
    if (results / "store.json").is_file():
        names = sorted(retention.load(results, "runs")["study"].unique())
        raise UserError(f"{results}: give the folder of one study in it: {', '.join(names)}")


def warn_not_finite(rows: pd.DataFrame) -> None:
    """Say on standard error which runs have no number to show: their facts count as neither kept nor forgotten."""
    if "state" in rows:
        for run_id in sorted(map(str, rows.loc[rows["state"] == "nan_logits", "run_id"].unique())):
            print(f"not finite: {run_id} has readings that are NaN or infinite, and they are left out", file=sys.stderr)


def warn_incomplete(results: Path) -> None:
    """Say on standard error which runs are missing: a figure of part of a grid must not look like the whole."""
    runs = retention.load(results, "runs")
    left = runs[~runs["complete"]]
    for row in left.itertuples():
        print(
            f"incomplete: editor={row.editor} objective={row.objective} mitigations={row.mitigations} seed={row.seed} "
            f"({row.run_id})",
            file=sys.stderr,
        )
