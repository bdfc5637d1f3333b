"""Weight drift against retention: how far fine-tuning moved the edited matrices, and what was kept meanwhile.

    python analysis/weights.py results/STUDY [--criterion all_correct] [--form direct] [--out FOLDER]

For studies with `weights: true`. Drift: norm of the fine-tune's update of the edited matrices over the edit's norm.
Effect left: how much of what the edit does to its own keys is still there (1: all). A point is a checkpoint of a cell,
bars are 95 % intervals. Writes weights (PNG, PDF, CSV, Markdown, LaTeX); the table has the rank correlation over runs
at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from opened import GROUPS, Opened, drawn_from, names_of, parser, right_by, script, title
from scipy import stats

import retention
from retention import statistics as st
from retention.statistics.bootstrap import bootstrap
from retention.types import UserError

MEASURES = {"drift": "update over the edit's norm", "effect_left": "share of the edit's effect left"}
LEAST = 5  # runs that a correlation wants


def by_run(weights: pd.DataFrame) -> pd.DataFrame:
    """One line for each run and step: drift, effect_left (NaN where no key tells it). Matrices are taken together."""
    known = weights[weights["state"] == "ok"].astype({"run_id": str})
    squares = known.assign(
        moved=known["update_norm"].astype(float) ** 2, edit=known["edit_norm"].astype(float) ** 2,
        left=known["effect_left"].astype(float),
    )  # fmt: skip
    found = squares.groupby(["run_id", "step"]).agg(moved=("moved", "sum"), edit=("edit", "sum"), left=("left", "mean"))
    drift = np.sqrt(found["moved"] / found["edit"].where(found["edit"] > 0))
    return pd.DataFrame({"drift": drift, "effect_left": found["left"]}).reset_index()


def correlation(x: np.ndarray, y: np.ndarray) -> dict[str, object]:
    """Spearman's rank correlation of drift and retention over runs, with a bootstrap interval, or why there is none."""
    if len(x) < LEAST:
        return {"rank_n": len(x), "rank_state": f"{len(x)} runs: too few to correlate"}

    def rank(at: np.ndarray) -> float:
        if len(np.unique(x[at])) < 2 or len(np.unique(y[at])) < 2:
            return float("nan")
        return float(stats.spearmanr(x[at], y[at]).statistic)

    run = np.arange(len(x))
    found = bootstrap(rank, run, run)
    if not np.isfinite(found.value):
        return {"rank_n": len(x), "rank_state": "all runs moved or kept the same"}
    interval = {"rank": found.value, "rank_low": found.low, "rank_high": found.high}
    return interval | {"rank_n": len(x), "rank_state": found.method}


def compute(study: Opened) -> None:
    """One line for each cell, group and checkpoint; the correlation stands in the last checkpoint's."""
    moved = by_run(retention.load(study.results, "weights"))
    lines = []
    for cell, group, rows in study.each():
        own = moved[moved["run_id"].isin(cell.runs)].dropna(subset="drift")
        for step in sorted(own["step"].unique()):
            at = own[own["step"] == step]
            kept = st.counts(rows, group, int(step), study.criterion, form=study.form)
            line = study.named(cell) | {"group": group, "step": int(step), "runs": len(at)}
            for name in MEASURES:
                values = at[name].dropna().to_numpy(float)
                line |= tables.parts(name, st.mean_estimate(values) if len(values) else None)
            line |= tables.parts("kept", st.share(kept))
            if step == own["step"].max():
                shares = pd.Series(kept.kept / np.maximum(kept.possible, 1), index=kept.runs)[kept.possible > 0]
                both = at.set_index("run_id")["drift"].to_frame().join(shares.rename("kept"), how="inner")
                line |= correlation(both["drift"].to_numpy(float), both["kept"].to_numpy(float))
            lines.append(line | study.how)
    if not lines:
        raise UserError(
            "no run of this study has moved matrices to measure: none is edited, or training left them alone"
        )
    found = pd.DataFrame(lines)
    for column in ("rank", "rank_low", "rank_high"):
        found[column] = found.get(column, np.nan)
    tables.keep(study.out, "weights", found)


def panel(axes: Axes, part: pd.DataFrame, measure: str) -> None:
    for group in GROUPS:
        look = style.GROUP[group]
        own = part[part["group"] == group].dropna(subset=[measure, "kept"]).sort_values("step")
        if own.empty:
            axes.plot([], [], label=f"{group}: not told", **look)
            continue
        bars = [np.maximum(own["kept"] - own["kept_low"], 0), np.maximum(own["kept_high"] - own["kept"], 0)]
        wide = own[[measure, f"{measure}_low", f"{measure}_high"]].to_numpy(float)
        across = None if np.isnan(wide).any() else [wide[:, 0] - wide[:, 1], wide[:, 2] - wide[:, 0]]
        label = f"{group} (n = {own['kept_n'].iloc[0]:.0f})"
        axes.errorbar(own[measure], own["kept"], yerr=bars, xerr=across, elinewidth=0.6, label=label, **look)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(MEASURES[measure])
    axes.legend(loc="best", fontsize=6)


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, "weights", names_end="group")
    names = names_of(found, "group")
    cells = list(found.groupby(names, sort=False))
    plt.rcParams.update(style.RC)
    drawn, grid = plt.subplots(
        len(cells), 2, figsize=(5.4, 0.4 + 1.8 * len(cells)), squeeze=False, sharex="col", sharey=True,
        layout="constrained",
    )  # fmt: skip
    for line, (key, part) in zip(grid, cells, strict=True):
        for axes, measure in zip(line, MEASURES, strict=True):
            panel(axes, part, measure)
        line[0].set_title(style.wrap(title(dict(zip(names, key, strict=True)))))
        line[0].set_ylabel("still right")
    for path in style.save(drawn, out, "weights"):
        print(f"figure: {path}")
    plt.close(drawn)
    last = found[found["step"] == found.groupby([*names, "group"])["step"].transform("max")]
    shown = last[[*names, "group", "step", "runs"]].copy()
    for name in (*MEASURES, "kept"):
        shown[f"{name} [95 %] (n)"] = [
            tables.told(tables.estimate(row, name), "not told") for row in last.to_dict("records")
        ]
    shown["rank correlation over runs"] = [rank_told(row) for row in last.to_dict("records")]
    note = (
        f"{right_by(found)} At the last checkpoint. Drift: norm of the fine-tune's update of the edited matrices over "
        "the edit's norm; effect_left: how much of what the edit does to its own keys is there still (n runs). Kept: "
        "of the facts right at step 0 (n facts). Rank correlation: Spearman's, of drift and share kept, over runs, "
        "with a bootstrap interval."
    )
    tables.show(out, "weights", shown, note)


def rank_told(row: Mapping[str, object]) -> str:
    if pd.isna(row["rank"]):
        return str(row["rank_state"])
    return tables.told(tables.estimate(row, "rank"), "", signed=True)


def main() -> None:
    draw(*drawn_from(parser(__doc__).parse_args(), compute))


if __name__ == "__main__":
    script(main, "weights")
