"""Dose and response: retention against a numeric setting that the study varies.

    python analysis/dose_response.py results/STUDY [--dose tune.steps] [--criterion all_correct] [--out FOLDER]

A dose is an axis of the grid with numbers (tune.steps, tune.trainer.learning_rate, facts.edited ...), `tokens_seen` at
the end of the fine-tune, or a number in the names of parts (`n` of `paraphrase(n=3)`). Points are runs, lines least
squares over runs. Writes the points (dose_points.csv), PNG, PDF and the table of slopes (CSV, Markdown, LaTeX).
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from opened import GROUPS, Opened, drawn_from, parser, right_by, script

from retention import statistics as st
from retention.statistics.dose import dose_response
from retention.types import UserError

INNER = re.compile(r"[(,]\s*([\w.]+)=([-+0-9.eE]+)(?=[,)])")  # settings within a part's name


def doses(study: Opened) -> dict[str, dict[int, float]]:
    """Every dose of the study that has two values or more: name -> cell's number -> value."""
    found: dict[str, dict[int, float]] = {}
    for i, cell in enumerate(study.cells):
        for name in study.varied:
            try:
                found.setdefault(name, {})[i] = float(cell.named[name])
            except ValueError:
                for key, value in INNER.findall(cell.named[name]):
                    found.setdefault(key, {})[i] = float(value)
        found.setdefault("tokens_seen", {})[i] = float(cell.rows["tokens_seen"].max())
    return {name: values for name, values in found.items() if len(set(values.values())) > 1}


def points(study: Opened, values: dict[int, float], name: str) -> pd.DataFrame:
    """One line a run and group: panel, dose, kept (share), n."""
    lines = []
    for i, dose in values.items():
        cell = study.cells[i]
        by_hand = {k: INNER.sub(lambda m: m[0][0] if m[1] == name else m[0], v) for k, v in cell.named.items()}
        rest = [re.sub(r"\(\s*[,)]\)?", "", by_hand[k]) for k in study.varied if k != name]
        for group in GROUPS:
            c = st.counts(cell.rows, group, None, study.criterion, form=study.form)
            ends = cell.rows.groupby("run_id", observed=True)["tokens_seen"].max()
            for run, kept, n in zip(c.runs, c.kept, c.possible, strict=True):
                own = float(ends[run]) if name == "tokens_seen" else dose
                panel = cell.named["editor"] if name == "tokens_seen" else " · ".join(rest)
                if n:
                    lines.append({"panel": panel, "group": group, "run_id": run, "dose": own, "kept": kept / n, "n": n})
    return pd.DataFrame(lines, columns=["panel", "group", "run_id", "dose", "kept", "n"])


def draw_panel(axes: Axes, part: pd.DataFrame, fits: pd.DataFrame) -> None:
    """Runs as points, and the fitted lines. fits: slopes, by group."""
    for group in GROUPS:
        look, some, fit = style.GROUP[group], part[part["group"] == group], fits.loc[group]
        if some.empty:
            continue
        label = f"{group} ({len(some)} runs of {some['n'].min()} facts or more)"
        axes.plot(some["dose"], some["kept"], ls="", marker=look["marker"], color=look["color"], alpha=0.6, label=label)
        if pd.notna(fit["slope"]):
            x = np.linspace(some["dose"].min(), some["dose"].max(), 50)
            at = np.log2(x) if fit["per"] == "doubling" else x
            mean = np.log2(some["dose"]).mean() if fit["per"] == "doubling" else some["dose"].mean()
            axes.plot(x, some["kept"].mean() + fit["slope"] * (at - mean), color=look["color"], ls=look["linestyle"])
    if (fits["per"].dropna() == "doubling").all() and fits["per"].notna().any():
        axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="lower left", fontsize=6)


def compute(study: Opened, dose: str | None = None) -> None:
    there = doses(study)
    names = [name for name in there if name != "tokens_seen"] + [name for name in there if name == "tokens_seen"]
    if not names:
        raise UserError("no setting with numbers varies between the complete runs of this study: no dose to respond to")
    name = dose or names[0]
    if name not in there:
        raise UserError(f"dose: {name!r} does not vary here, or is no number; expected one of {', '.join(names)}")
    found = points(study, there[name], name)
    if found.empty:
        raise UserError("no fact is right at step 0 in any run: nothing can be kept")
    lines = []
    for panel, part in found.groupby("panel", sort=True):
        for group in GROUPS:
            some = part[part["group"] == group]
            line = {"panel": panel, "group": group, "runs": len(some)}
            if some.empty:
                lines.append(line | {"doses": 0, "state": "no fact right at step 0"})
                continue
            fit = dose_response(some["dose"].to_numpy(), some["kept"].to_numpy())
            lines.append(
                line | {"doses": fit.levels, "per": fit.per} | tables.parts("slope", fit.slope)
                | {"p": fit.slope.p if fit.slope else None, "rank": fit.rank, "state": fit.state}
            )  # fmt: skip
    table = pd.DataFrame(lines)
    for column in ("per", "slope", "slope_low", "slope_high", "slope_n", "p", "rank"):
        table[column] = table.get(column)
    table["q"] = tables.false_discovery(table["p"].astype(float))
    tables.keep(study.out, "dose_points", found)
    tables.keep(study.out, "dose_response", table.assign(dose=name, **study.how))


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, "dose_points", names_end="run_id")
    table = tables.read(source, "dose_response", names_end="runs")
    panels, name = list(found.groupby("panel", sort=True)), table["dose"].iloc[0]
    plt.rcParams.update(style.RC)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    drawn, grid = plt.subplots(
        down, across, figsize=(0.6 + 2.6 * across, 0.4 + 2.2 * down), squeeze=False, sharey=True, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (panel, part) in zip(grid.flat, panels, strict=False):
        draw_panel(axes, part, table[table["panel"] == panel].set_index("group"))
        axes.set_title(style.wrap(str(panel)))
        axes.set_xlabel(name)
    for line in grid:
        line[0].set_ylabel("still right")
    for path in style.save(drawn, out, "dose_response"):
        print(f"figure: {path}")
    plt.close(drawn)
    shown = pd.DataFrame(
        {
            "": table["panel"], "group": table["group"], "runs": table["runs"], "doses": table["doses"],
            "slope [95 %]": [slope_told(row) for _, row in table.iterrows()],
            "p": [tables.p_value(p) for p in table["p"]], "q": [tables.p_value(q) for q in table["q"]],
            "rank correlation": [f"{r:+.2f}" if pd.notna(r) else "-" for r in table["rank"]],
        }
    )  # fmt: skip
    note = (
        f"{right_by(table)} Change of the share kept (of the facts right at step 0) with {name}, for each doubling "
        "where the doses span a factor of four, else for each unit. Least squares over runs, HC3 errors, Student's "
        "quantile. q: Benjamini and Hochberg's, over all lines."
    )
    tables.show(out, "dose_response", shown, note)


def slope_told(row: pd.Series) -> str:
    if pd.isna(row["slope"]):
        return str(row["state"])
    if pd.isna(row["slope_low"]):
        return f"{row['slope']:+.3g} per {row['per']} ({row['state']})"
    return f"{row['slope']:+.3g} [{row['slope_low']:+.3g}, {row['slope_high']:+.3g}] per {row['per']}"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dose", default=None, help="a numeric axis; left out, the first that the study varies")
    args = arguments.parse_args()
    draw(*drawn_from(args, lambda study: compute(study, args.dose)))


if __name__ == "__main__":
    script(main, "dose_response")
