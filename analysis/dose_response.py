"""Dose and response: retention against a numeric setting that the study varies.

    python analysis/dose_response.py results/STUDY [--dose tune.steps] [--criterion all_correct] [--out FOLDER]

A dose is an axis of the grid with numbers (tune.steps, tune.trainer.learning_rate, facts.edited ...), `tokens_seen` at
the end of the fine-tune, `update_norm` of the edit (Frobenius), or a number in the names of parts (`n` of
`paraphrase(n=3)`). Points are runs, lines least squares over runs. The line "edited - intrinsic" tests whether edits
respond more strongly, as the elasticity claim of arXiv 2507.14198 has it. Writes the points (dose_points.csv), PNG, PDF
and the table of slopes (CSV, Markdown, LaTeX).
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
from retention.store import Store
from retention.types import UserError

INNER = re.compile(r"[(,]\s*([\w.]+)=([-+0-9.eE]+)(?=[,)]|$)")  # settings within a part's name
OF_RUNS = ("tokens_seen", "update_norm")  # doses that runs of one cell may differ in
APART = "edited - intrinsic"


def of_runs(study: Opened) -> dict[str, pd.Series]:
    """OF_RUNS: run_id -> tokens trained on by its end, and the norm of its edit where there is one."""
    ends = study.rows.groupby("run_id", observed=True)["tokens_seen"].max().astype(float)
    edits = study.rows.drop_duplicates("run_id").set_index("run_id")["edit_id"].astype(str)
    norms = {edit: update_norm(study.results, edit) for edit in edits.unique()}
    return {"tokens_seen": ends, "update_norm": edits.map(norms).dropna().astype(float)}


def update_norm(results: Path, edit_id: str) -> float | None:
    return Store(results.absolute().parent).settings("edits", edit_id).get("update_norm") or None  # identity: 0


def doses(study: Opened) -> dict[str, pd.Series]:
    """Every dose of the study that has two values or more: name -> run_id -> value."""
    found: dict[str, dict[str, float]] = {}
    for cell in study.cells:
        for name in study.varied:
            try:
                there = {name: float(cell.named[name])}
            except ValueError:
                there = {key: float(value) for key, value in INNER.findall(cell.named[name])}
            for key, value in there.items():
                found.setdefault(key, {}).update(dict.fromkeys(cell.runs, value))
    all_ = {name: pd.Series(values) for name, values in found.items()} | of_runs(study)
    return {name: values for name, values in all_.items() if values.nunique() > 1}


def points(study: Opened, values: pd.Series, name: str) -> pd.DataFrame:
    """One line a run and group: panel, dose, kept (share), n."""
    lines = []
    for cell in study.cells:
        # What the dose is a part of is named without it: paraphrase(n=3) is a point of the panel `paraphrase`.
        bare = {k: INNER.sub(lambda m: m[0][0] if m[1] == name else m[0], v) for k, v in cell.named.items()}
        rest = [re.sub(r"\(\s*[,)]\)?|,$", "", bare[k]) for k in study.varied if k != name]
        panel = cell.named["editor"] if name in OF_RUNS else " · ".join(rest)
        panel = "all editors" if name == "update_norm" else panel
        for group in GROUPS:
            c = st.counts(cell.rows, group, None, study.criterion, form=study.form)
            for run, kept, n in zip(c.runs, c.kept, c.possible, strict=True):
                if n and run in values:
                    lines.append(
                        {"panel": panel, "group": group, "run_id": run, "dose": values[run], "kept": kept / n, "n": n}
                    )
    return pd.DataFrame(lines, columns=["panel", "group", "run_id", "dose", "kept", "n"])


def slopes(part: pd.DataFrame) -> list[dict[str, object]]:
    """Lines of the table for one panel: each group's slope, and that of the difference run by run."""
    by_group = {group: part[part["group"] == group].set_index("run_id")[["dose", "kept"]] for group in GROUPS}
    both = by_group["edited"].join(by_group["intrinsic"]["kept"].rename("other"), how="inner")
    by_group[APART] = both.assign(kept=both["kept"] - both["other"])
    lines: list[dict[str, object]] = []
    for group, some in by_group.items():
        line: dict[str, object] = {"group": group, "runs": len(some)}
        if some.empty:
            none = "no fact right at step 0" if group != APART else "no run has both"
            lines.append(line | {"doses": 0, "state": none})
            continue
        fit = dose_response(some["dose"].to_numpy(), some["kept"].to_numpy())
        lines.append(
            line | {"doses": fit.levels, "per": fit.per} | tables.parts("slope", fit.slope)
            | {"p": fit.slope.p if fit.slope else None, "rank": fit.rank, "state": fit.state}
        )  # fmt: skip
    return lines


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
        ticks = style.round_numbers(part["dose"].min(), part["dose"].max())
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="lower left", fontsize=6)


def compute(study: Opened, dose: str | None = None) -> None:
    there = doses(study)
    names = sorted(there, key=lambda name: name in OF_RUNS)
    if not names:
        raise UserError("no setting with numbers varies between the complete runs of this study: no dose to respond to")
    name = dose or names[0]
    if name not in there:
        raise UserError(f"dose: {name!r} does not vary here, or is no number; expected one of {', '.join(names)}")
    found = points(study, there[name], name)
    if found.empty:
        raise UserError("no fact is right at step 0 in any run: nothing can be kept")
    parts = found.groupby("panel", sort=True)
    lines = [{"panel": panel} | line for panel, part in parts for line in slopes(part)]
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
        f"quantile, runs as independent. {APART}: of the difference, run by run; below zero, edits lose more. q: "
        "Benjamini and Hochberg's, over all lines."
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
