"""What is kept against what is gained: retention and task gain of every cell of a study, with the Pareto front.

    python analysis/pareto.py results/STUDY [--axis mitigations] [--criterion all_correct] [--out FOLDER]

One point for each cell, panels for all but the axis. Right: the fine-tune's gain from step 0 to its end, in accuracy on
held-out rows, for plain text the drop of held-out loss. Up: of the facts right at step 0 the share right in the end.
Writes PNG, PDF, CSV, Markdown and LaTeX.
"""

from __future__ import annotations

from pathlib import Path

import labels
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from opened import GROUPS, Opened, drawn_from, names_of, parser, script

import retention
from retention import statistics as st

GAIN = {"task_accuracy": "gain in task accuracy", "task_loss": "drop of held-out loss (nats/token)"}


def cells(rows: pd.DataFrame, scores: pd.DataFrame, axis: str, criterion: str, form: str) -> pd.DataFrame:
    """One line a cell: the columns that tell it apart, its gain and its retention, each with interval and n."""
    gains = {measure: st.task_gains(scores, measure) for measure in st.MEASURES}
    columns, lines = st.cell_columns(rows), []
    for key, cell in rows.groupby(columns, observed=True, sort=True):
        runs = sorted(cell["run_id"].unique())
        measure = next((m for m in st.MEASURES if set(runs) <= set(gains[m].index)), None)
        gain = st.mean_estimate(gains[measure][runs].to_numpy()) if measure else None
        line = {**dict(zip(columns, key, strict=True)), "runs": len(runs), "measure": measure}
        line |= tables.parts("gain", gain)
        for group in GROUPS:
            line |= tables.parts(f"{group}_kept", st.share(st.counts(cell, group, None, criterion, form=form)))
        lines.append(line)
    found = pd.DataFrame(lines)
    numbers = [f"{name}{part}" for name in ("gain", *(f"{g}_kept" for g in GROUPS)) for part in ("", "_low", "_high")]
    found = found.astype(dict.fromkeys(numbers, float))
    found["front"] = False
    for _, panel in found.groupby(panel_columns(found, axis), observed=True, dropna=False):
        found.loc[front(panel, "edited_kept"), "front"] = True
    return found


def panel_columns(found: pd.DataFrame, axis: str) -> list[str]:
    return [
        *(name for name in names_of(found, "runs") if name != axis and (found[name].nunique() > 1 or name == "editor")),
        "measure",
    ]


def front(panel: pd.DataFrame, kept: str) -> pd.Index:
    """Cells that no other cell of the panel beats in one of gain and retention without losing in the other."""
    known = panel.dropna(subset=["gain", kept])
    x, y = known["gain"].round(9).to_numpy(), known[kept].round(9).to_numpy()  # means of equal numbers are equal
    beaten = [((x >= a) & (y >= b) & ((x > a) | (y > b))).any() for a, b in zip(x, y, strict=True)]
    return known.index[~np.array(beaten, bool)]


def panel_of(axes: Axes, panel: pd.DataFrame, numbers: dict[str, int], axis: str) -> list[labels.Point]:
    """The cells of one panel. Returns what is to be written beside its points: each cell's number."""
    points: list[labels.Point] = []
    for group in GROUPS:
        look, kept = style.GROUP[group], f"{group}_kept"
        known = panel.dropna(subset=["gain", kept])
        if known.empty:
            continue
        y = known[kept].to_numpy()
        errors = [y - known[f"{kept}_low"].to_numpy(), known[f"{kept}_high"].to_numpy() - y]
        across = np.stack([known["gain"] - known["gain_low"], known["gain_high"] - known["gain"]])
        axes.errorbar(
            known["gain"], y, yerr=np.maximum(errors, 0), xerr=None if np.isnan(across).any() else across, fmt="none",
            ecolor=look["color"], elinewidth=0.6, alpha=0.35,
        )  # fmt: skip
        best = known.loc[front(known, kept)].sort_values("gain")
        axes.plot(best["gain"], best[kept], color=look["color"], lw=0.9, ls=look["linestyle"], alpha=0.8)
        filled = look["color"] if group == "edited" else "white"
        axes.plot(
            known["gain"], y, ls="", marker=look["marker"], ms=4, mec=look["color"], mfc=filled, mew=0.9,
            label=f"{group} facts",
        )  # fmt: skip
        shown = zip(known["gain"], y, known[axis], strict=True)
        points += [labels.Point(x=a, y=b, text=str(numbers[name]), color=look["color"]) for a, b, name in shown]
    return points


def figure(found: pd.DataFrame, axis: str, against: str | None) -> Figure:
    """All panels, and a legend that names the numbers."""
    plt.rcParams.update(style.RC)
    names = sorted(found[axis].unique(), key=lambda name: (name != against, name))
    numbers = {name: i for i, name in enumerate(names)}
    by = panel_columns(found, axis)
    panels = list(found.groupby(by, observed=True, dropna=False))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    legend = [f"{number}  {name}" for name, number in numbers.items()]
    wide = max(int((0.6 + 2.6 * across) / (0.06 * max(map(len, legend)) + 0.2)), 1)
    drawn, grid = plt.subplots(
        down, across, figsize=(0.6 + 2.6 * across, 0.5 + 2.4 * down + 0.14 * -(-len(legend) // wide)),
        squeeze=False, sharey=True, sharex=found["measure"].nunique() == 1, layout="constrained",
    )  # fmt: skip
    written = []
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (key, panel) in zip(grid.flat, panels, strict=False):
        named = dict(zip(by, key, strict=True))
        shown = [style.wrap(str(v)) if n in st.CELL else f"{n} {v}" for n, v in named.items() if n != "measure"]
        axes.set_title(" · ".join(shown))
        axes.set_xlabel(GAIN.get(str(named["measure"]), "no task score"))
        if panel["gain"].notna().any():
            written.append((axes, panel_of(axes, panel, numbers, axis)))
        else:
            axes.text(0.5, 0.5, "no score at step 0 and later", ha="center", transform=axes.transAxes)
    for line in grid:
        line[0].set_ylabel("still right")
    seen: dict[str, object] = {}
    for axes in grid.flat:
        seen |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(seen.values(), seen.keys(), loc="outside upper left", ncols=2)
    blank = plt.Line2D([], [], ls="")
    drawn.legend(
        [blank] * len(legend), legend, loc="outside lower left", ncols=wide, handlelength=0.0, handletextpad=0.0,
        columnspacing=1.2, labelspacing=0.25,
    )  # fmt: skip
    least = found[[f"{group}_kept_low" for group in GROUPS]].min(axis=None)
    grid.flat[0].set_ylim(max(0.1 * np.floor(10 * least) - 0.03, -0.03) if least == least else -0.03, 1.03)
    drawn.draw_without_rendering()  # a layout decides where the axes lie only then
    for axes, points in written:
        labels.place(axes, points)
    return drawn


def compute(study: Opened, axis: str | None = None) -> None:
    scores, axis = retention.load(study.results, "scores"), st.arms_of(study.rows, axis)
    rows, _ = st.arms_by_arguments(study.rows, study.rows, axis)
    found = cells(rows, scores, axis, study.criterion, study.form)
    tables.keep(study.out, "pareto", found.assign(axis=axis, **study.how))


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, "pareto", names_end="runs")
    axis = str(found["axis"].iloc[0])
    drawn = figure(found, axis, st.AGAINST.get(axis))
    for path in style.save(drawn, out, "pareto"):
        print(f"figure: {path}")
    plt.close(drawn)
    varied = [name for name in names_of(found, "runs") if name == axis or found[name].nunique() > 1]
    shown = found[varied].copy()
    shown["runs"] = found["runs"]
    shown["task gain"] = [
        f"{GAIN[m]}: {_told(line, 'gain', True)}" if pd.notna(m) else "no score" for m, line in _lines(found)
    ]
    for group in GROUPS:
        shown[f"{group}, kept"] = [_told(line, f"{group}_kept") for _, line in _lines(found)]
    shown["on the front"] = ["yes" if best else "" for best in found["front"]]
    note = (
        f"Kept: right by `{found['criterion'].iloc[0]}` ({found['form'].iloc[0]} questions) at the last step, of the "
        "facts right at step 0: share [95 % interval over runs and facts] (n facts). Task gain: mean over runs [95 % "
        "interval] (n runs). Front: no other cell of the panel gains more and keeps as many edited facts, or keeps "
        "more and gains as much."
    )
    tables.show(out, "pareto", shown, note)


def _lines(found: pd.DataFrame) -> list[tuple[str | None, pd.Series]]:
    return [(line["measure"], line) for _, line in found.iterrows()]


def _told(line: pd.Series, name: str, signed: bool = False) -> str:
    return tables.told(tables.estimate(line, name), "none right at step 0", signed=signed)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--axis", default=None, help=f"{', '.join(st.AXES)}; left out, the first that varies")
    args = arguments.parse_args()
    draw(*drawn_from(args, lambda study: compute(study, args.axis)))


if __name__ == "__main__":
    script(main, "pareto")
