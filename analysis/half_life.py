"""Half-lives of edited and intrinsic facts, as a heat map of editor and objective (or another axis).

    python analysis/half_life.py results/STUDY [--axis objective] [--criterion all_correct] [--out FOLDER]

Left edited, right intrinsic facts. A cell that tells no half-life says how many facts were lost. Other axes than the
editor's and the one chosen each have a row of maps. Writes PNG, PDF, and the table (CSV, Markdown, LaTeX).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from opened import GROUPS, Opened, drawn_from, names_of, parser, right_by, script, title

from retention import statistics as st
from retention.statistics import survival


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def heat(axes: Axes, part: pd.DataFrame, editors: list[str], across: list[str], axis: str, norm: LogNorm):
    """One map: value and interval in each cell, longer half-lives lighter."""
    grid = np.full((len(editors), len(across)), np.nan)
    for row in part.itertuples():
        i, j = editors.index(str(row.editor)), across.index(str(row.axis_value))
        if row.half_life == row.half_life:
            grid[i, j] = row.half_life
            text = f"{number(row.half_life)}\n[{number(row.half_life_low)}, {number(row.half_life_high)}]\nn = {row.n}"
        else:
            text = f"not told\n{row.lost} of {row.n} lost"
        dark = grid[i, j] == grid[i, j] and norm(grid[i, j]) < 0.55
        axes.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
    image = axes.imshow(np.ma.masked_invalid(grid), norm=norm, cmap="cividis", aspect="auto")
    axes.set_facecolor("#eeeeee")
    axes.set_xticks(range(len(across)), [style.wrap(name, 16) for name in across])
    axes.set_yticks(range(len(editors)), [style.wrap(name, 18) for name in editors])
    axes.grid(visible=False)
    axes.set_xlabel(axis)
    return image


def compute(study: Opened, axis: str | None = None) -> None:
    others = [name for name in ("objective", "adapter", "mitigations", "task") if name in study.varied]
    axis = st.arms_of(study.rows, axis) if axis else others[0] if others else "objective"
    lines = []
    for cell, group, rows in study.each():
        half = survival.half_life(survival.lifetimes(rows, group, study.criterion, form=study.form))
        lines.append(
            {"editor": cell.named["editor"], axis: cell.named[axis]} | study.named(cell)
            | {"group": group, "runs": len(cell.runs), "n": half.n}
            | {"lost": half.lost, "half_life": half.value, "half_life_low": half.low, "half_life_high": half.high}
            | {"shape": half.shape, "state": half.state, "axis": axis} | study.how
        )  # fmt: skip
    tables.keep(study.out, "half_life", pd.DataFrame(lines))


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, "half_life", names_end="group")
    names, axis = names_of(found, "group"), str(found["axis"].iloc[0])
    found["axis_value"] = found[axis]
    found["rest"] = [
        title(dict(zip(names, row, strict=True)), without=("editor", axis))
        for row in found[names].itertuples(index=False, name=None)
    ]
    editors, across = sorted(found["editor"].unique()), sorted(found["axis_value"].unique())
    rests = sorted(found["rest"].unique())
    known = found["half_life"].dropna().astype(float)
    norm = LogNorm(*((known.min() / 1.01, known.max() * 1.01) if len(known) else (1, 10)))
    plt.rcParams.update(style.RC)
    drawn, grid = plt.subplots(
        len(rests), 2, figsize=(1.6 + 1.7 * len(across), (0.7 + 0.5 * len(editors)) * len(rests) + 0.3), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for i, rest in enumerate(rests):
        for j, group in enumerate(GROUPS):
            part = found[(found["rest"] == rest) & (found["group"] == group)]
            image = heat(grid[i][j], part, editors, across, axis, norm)
            grid[i][j].set_title(style.wrap(" · ".join([f"{group} facts", *([rest] if rest else [])]), 40))
    if len(known):
        bar = drawn.colorbar(image, ax=grid, label="half-life, steps")
        bar.set_ticks(plain := style.round_numbers(norm.vmin, norm.vmax), labels=[f"{t:g}" for t in plain])
        bar.minorticks_off()
    for path in style.save(drawn, out, "half_life"):
        print(f"figure: {path}")
    plt.close(drawn)
    shown = found[[*names, "group", "runs"]].copy()
    shown["lost, n"] = [f"{row.lost}, {row.n}" for row in found.itertuples()]
    intervals = zip(found["half_life"], found["half_life_low"], found["half_life_high"], strict=True)
    shown["half-life, steps [95 %]"] = [
        f"{number(h)} [{number(low)}, {number(high)}]" if h == h else "-" for h, low, high in intervals
    ]
    shown["state"] = found["state"]
    note = (
        f"{right_by(found)} Steps after which half of the facts right at step 0 have been found wrong: a Weibull law, "
        "fitted to the intervals between checkpoints, interval over runs (of one run: over its facts)."
    )
    tables.show(out, "half_life", shown, note)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--axis", default=None, help="columns of the map; left out, the first that varies")
    args = arguments.parse_args()
    draw(*drawn_from(args, lambda study: compute(study, args.axis)))


if __name__ == "__main__":
    script(main, "half_life")
