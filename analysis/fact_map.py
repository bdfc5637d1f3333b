"""Each fact's own history: a heat map of facts and checkpoints, by how far the answer leads the best other token.

    python analysis/fact_map.py results/STUDY [--mitigations none] [--criterion all_correct] [--out FOLDER]

A line is a fact of one run that was right at step 0, the ones that start nearest the brink at the bottom; a cross marks
where it is wrong. One column of maps for each cell with the chosen mitigations. Writes PNG, PDF, and as CSV each fact's
lead at each step, whether it is right, and the step at which it was first found wrong.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from opened import GROUPS, Cell, Opened, drawn_from, names_of, parser, script, title

from retention.statistics import survival
from retention.statistics.fates import histories
from retention.types import UserError

SCALE = 8.0  # nats: leads beyond are drawn as this


def table(study: Opened, cell: Cell, group: str) -> pd.DataFrame:
    """One line for each fact right at step 0, by its lead there: run_id, fact_id, lead@STEP (nats), right@STEP,
    last_right and first_wrong (steps), state.
    """
    right = histories(cell.rows, group, study.criterion, form=study.form)
    if right.empty or 0 not in right:
        return pd.DataFrame(columns=["run_id", "fact_id"])
    leads = histories(cell.rows, group, "lead", form=study.form, kind="Float64")
    both = pd.concat([leads.add_prefix("lead@"), right.astype("Float64").add_prefix("right@")], axis=1)
    both = both[both["right@0"] == 1].sort_values("lead@0", ascending=False, kind="stable").reset_index()
    lost = survival.lifetimes(cell.rows, group, study.criterion, form=study.form)
    lost = lost.rename(columns={"low": "last_right", "high": "first_wrong"}).replace(np.inf, np.nan)
    lost["state"] = np.where(lost["first_wrong"].isna(), "never found wrong", "lost")
    return both.merge(lost, on=["run_id", "fact_id"], how="left").drop(columns="question_id")


def heat(axes: Axes, values: np.ndarray, right: np.ndarray, steps: list[int]):
    image = axes.imshow(values, cmap="PuOr", vmin=-SCALE, vmax=SCALE, aspect="auto", interpolation="nearest")
    y, x = np.nonzero(right == 0)
    size = float(np.clip(160 / max(len(right), 1), 0.4, 3))
    axes.plot(x, y, ls="", marker="x", ms=size, mew=size / 4, color="black")
    axes.set_xticks(range(len(steps)), [str(s) for s in steps])
    axes.set_yticks([0, len(right) - 1] if len(right) > 1 else [0])
    axes.grid(visible=False)
    return image


def compute(study: Opened, mitigations: str | None = None) -> None:
    there = sorted({cell.named["mitigations"] for cell in study.cells})
    chosen = mitigations or ("none" if "none" in there else there[0])
    if chosen not in there:
        near = difflib.get_close_matches(chosen, there, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"mitigations: no complete run has {chosen!r}; there are {', '.join(there)}{hint}")
    parts = []
    for cell in study.cells:
        if cell.named["mitigations"] == chosen:
            named = study.named(cell)
            for group in GROUPS:
                found = table(study, cell, group)
                if found.empty:
                    found = pd.DataFrame([{"run_id": None, "fact_id": None, "state": "none right at step 0"}])
                parts.append(found.assign(**named, group=group))
    found = pd.concat(parts, ignore_index=True).assign(**study.how)
    first = [*study.varied, "group", "run_id", "fact_id"]
    tables.keep(study.out, "fact_map", found[[*first, *(name for name in found if name not in first)]])


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, "fact_map", names_end="group")
    names = names_of(found, "group")
    cells = list(found.groupby(names, sort=False))
    plt.rcParams.update(style.RC)
    drawn, grid = plt.subplots(
        2, len(cells), figsize=(1.0 + 1.8 * len(cells), 5.2), squeeze=False, sharex="col", layout="constrained",
        height_ratios=[1, 1.4],
    )  # fmt: skip
    image = None
    for j, (key, cell) in enumerate(cells):
        for i, group in enumerate(GROUPS):
            part = cell[(cell["group"] == group) & cell["fact_id"].notna()]
            # Runs of one cell may be read at other steps: a column that is empty throughout is not this cell's.
            steps = [n.partition("@")[2] for n in part if n.startswith("right@") and part[n].notna().any()]
            if len(part):
                values, right = (part[[f"{what}@{s}" for s in steps]].to_numpy(float) for what in ("lead", "right"))
                image = heat(grid[i][j], values, right, [int(s) for s in steps])
            else:
                grid[i][j].text(0.5, 0.5, "none right\nat step 0", ha="center", transform=grid[i][j].transAxes)
            head = "" if i else style.wrap(title(dict(zip(names, key, strict=True)))) + "\n"
            grid[i][j].set_title(f"{head}{group}, n = {len(part)}")
    if image is not None:
        drawn.colorbar(image, ax=grid, label="answer over the best other token, nats", extend="both", shrink=0.6)
    for line in grid:
        line[0].set_ylabel("facts, by lead at step 0")
    drawn.supxlabel("fine-tuning steps (x: wrong)", fontsize=style.RC["axes.labelsize"])
    for path in style.save(drawn, out, "fact_map"):
        print(f"figure: {path}")
    plt.close(drawn)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--mitigations", default=None, help="of the cells shown; left out, none")
    args = arguments.parse_args()
    draw(*drawn_from(args, lambda study: compute(study, args.mitigations)))


if __name__ == "__main__":
    script(main, "fact_map")
