"""Forgetting curves: retention of edited and intrinsic facts against fine-tuning steps.

    python analysis/forgetting_curves.py results/STUDY [--criterion all_correct] [--form direct] [--out FOLDER]

One panel for each editor and objective (columns) and mitigation (rows). A point is the share of the facts right at
step 0 that are still right; bands are 95 % intervals (retention/statistics.py says how). Writes PNG and PDF.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import style
from matplotlib.axes import Axes

import retention
from retention import statistics as st
from retention.types import UserError

GROUPS = ("edited", "intrinsic")


def draw(axes: Axes, rows, criterion: str, form: str) -> None:
    """The curves of one cell of the grid."""
    steps = sorted(step for step in rows["step"].unique() if step >= 0)
    for group in GROUPS:
        found = [(step, st.share(st.counts(rows, group, step, criterion, form=form))) for step in steps]
        points = [(step, e) for step, e in found if e is not None]
        if not points:  # identity writes nothing, and an edit may fail: then there is no curve, and the panel says so
            axes.plot([], [], label=f"{group}: none right at step 0", **style.GROUP[group])
            continue
        x = [step for step, _ in points]
        look = style.GROUP[group]
        # At step 0 all are right by definition, so there is nothing uncertain about it.
        low = [1.0 if step == 0 else e.low for step, e in points]
        axes.fill_between(x, low, [e.high for _, e in points], color=look["color"], alpha=0.2, lw=0)
        axes.plot(x, [e.value for _, e in points], label=f"{group} (n = {points[0][1].n})", **look)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, max(steps) * 1.1)
    ticks = [t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if t <= max(steps)]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="lower left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a study's folder in a results folder")
    parser.add_argument("--criterion", default="all_correct", help=", ".join(st.CRITERIA))
    parser.add_argument("--form", default="direct", help="direct or paraphrase")
    parser.add_argument("--out", type=Path, default=None, help="folder for the figures; left out, the study's own")
    args = parser.parse_args()
    style.check_study(args.results)
    rows = retention.load(args.results)
    st.check_criterion(rows, args.criterion)
    style.warn_incomplete(args.results)
    apart = [name for name in st.cell_columns(rows) if name != "mitigations"]
    columns = list(rows.groupby(apart, observed=True).groups)
    cells = {(*key,): cell for key, cell in rows.groupby([*apart, "mitigations"], observed=True)}
    lines = sorted(rows["mitigations"].unique(), key=lambda m: (m != "none", m))
    plt.rcParams.update(style.RC)
    figure, grid = plt.subplots(
        len(lines), len(columns), figsize=(0.6 + 2.2 * len(columns), 0.5 + 1.75 * len(lines)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    several = [name for name in apart if name != "editor" and rows[name].nunique() > 1]
    for i, mitigation in enumerate(lines):
        for j, column in enumerate(columns):
            axes, named = grid[i][j], dict(zip(apart, column, strict=True))
            cell = cells.get((*column, mitigation))
            if cell is None:
                axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes)
            else:
                draw(axes, cell, args.criterion, args.form)
            if i == 0:
                extra = [named[name] if name in st.CELL else f"{name} {named[name]}" for name in several]
                axes.set_title(" · ".join([style.wrap(named["editor"]), *extra]))
            if j == 0:
                axes.set_ylabel("still right" if mitigation == "none" else f"still right\n{style.wrap(mitigation)}")
    figure.supxlabel("fine-tuning steps", fontsize=style.RC["axes.labelsize"])
    out = args.out or args.results
    for path in style.save(figure, out, "forgetting_curves"):
        print(f"figure: {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"forgetting_curves: {error}")
