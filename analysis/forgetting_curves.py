"""Forgetting curves: retention of edited and intrinsic facts against fine-tuning steps.

    python analysis/forgetting_curves.py results/STUDY [--criterion all_correct] [--form direct] [--out FOLDER]

One panel for each editor and objective (columns) and mitigation (rows). A point is the share of the facts right at
step 0 that are still right; bands are 95 % intervals (retention/statistics says how). Writes CSV, PNG and PDF.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from opened import GROUPS, Opened, drawn_from, names_of, parser, script

from retention import statistics as st

NAME = "forgetting_curves"


def compute(study: Opened) -> None:
    """One line for each cell, group and step from 0 on; state says why there is no value."""
    lines = []
    for cell, group, rows in study.each():
        for step in sorted(int(step) for step in rows["step"].unique() if step >= 0):
            kept = st.share(st.counts(rows, group, step, study.criterion, form=study.form))
            lines.append(
                study.named(cell) | {"group": group, "step": step, "runs": len(cell.runs)}
                | tables.parts("kept", kept) | {"state": "ok" if kept else "none right at step 0"} | study.how
            )  # fmt: skip
    tables.keep(study.out, NAME, pd.DataFrame(lines))


def panel(axes: Axes, part: pd.DataFrame) -> None:
    """The curves of one cell of the grid."""
    for group in GROUPS:
        look, known = style.GROUP[group], part[(part["group"] == group) & part["kept"].notna()]
        if known.empty:  # identity writes nothing, and an edit may fail: then there is no curve, and the panel says so
            axes.plot([], [], label=f"{group}: none right at step 0", **look)
            continue
        # At step 0 all are right by definition, so there is nothing uncertain about it.
        low = known["kept_low"].where(known["step"] > 0, 1.0)
        axes.fill_between(known["step"], low, known["kept_high"], color=look["color"], alpha=0.2, lw=0)
        axes.plot(known["step"], known["kept"], label=f"{group} (n = {known['kept_n'].iloc[0]:.0f})", **look)
    style.steps(axes, int(part["step"].max()))
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="lower left")


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, NAME, names_end="group")
    drawn = style.panels(found, names_of(found, "group"), panel, "still right")
    for path in style.save(drawn, out, NAME):
        print(f"figure: {path}")
    plt.close(drawn)


def main() -> None:
    draw(*drawn_from(parser(__doc__).parse_args(), compute))


if __name__ == "__main__":
    script(main, NAME)
