"""Retention by where facts start: a curve of edited and one of intrinsic facts over the lead, and the gap between them.

    python analysis/by_lead.py results/STUDY [--criterion all_correct] [--form direct] [--out FOLDER]

The lead is how far the answer's weakest token is above the best other token just after the edit (step 0), in nats.
Facts right at step 0 fall into bins of equal size; above, the share of each group kept at the last step, below, edited
minus intrinsic, with 95 % intervals. Writes CSV, Markdown, LaTeX, PNG and PDF.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from opened import GROUPS, Opened, drawn_from, names_of, parser, right_by, script, title

import retention
from retention.statistics.by_lead import LEAST, by_lead
from retention.statistics.matching import fact_table

NAME = "by_lead"


def compute(study: Opened) -> None:
    """One line for each cell and bin of leads; state says why there are none."""
    facts = retention.load(study.results, "facts")
    lines: list[dict[str, object]] = []
    for cell in study.cells:
        named = study.named(cell) | {"runs": len(cell.runs)}
        table = fact_table(cell.rows, facts, study.criterion, form=study.form)
        found = by_lead(table)
        if not found:
            why = "no fact is right at step 0" if table.empty else "the lead was not read"
            lines.append(named | {"bin": 0, "state": why})
        for i, one in enumerate(found, 1):
            lines.append(
                named | {"bin": i, "lead_low": one.low, "lead_high": one.high, "lead": one.lead}
                | tables.parts("edited", one.edited) | tables.parts("intrinsic", one.intrinsic)
                | tables.parts("gap", one.gap)
                | {"state": "ok" if one.gap else f"fewer than {LEAST} facts of one group"}
            )  # fmt: skip
    first = ["lead_low", "lead_high", "lead"]
    values = [f"{name}{end}" for name in (*GROUPS, "gap") for end in ("", "_low", "_high", "_n")]
    frame = pd.DataFrame(lines).reindex(columns=[*study.varied, "runs", "bin", *first, *values, "state"])
    tables.keep(study.out, NAME, frame.assign(**study.how))


def curves(axes: Axes, part: pd.DataFrame) -> None:
    """Share kept against the lead, one curve a group."""
    for group in GROUPS:
        look, known = style.GROUP[group], part[part[group].notna()]
        if known.empty:
            axes.plot([], [], label=f"{group}: none", **look)
            continue
        axes.fill_between(
            known["lead"], known[f"{group}_low"], known[f"{group}_high"], color=look["color"], alpha=0.2, lw=0
        )
        axes.plot(known["lead"], known[group], label=f"{group} (n = {known[f'{group}_n'].sum():.0f})", **look)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="lower right")


def gaps(axes: Axes, part: pd.DataFrame) -> None:
    """Edited minus intrinsic within each bin."""
    axes.axhline(0, color="black", lw=0.6)
    known = part[part["gap"].notna()]
    if known.empty:
        axes.text(0.5, 0.6, f"no bin with {LEAST} of each", ha="center", transform=axes.transAxes, fontsize=6)
        return
    spread = [known["gap"] - known["gap_low"], known["gap_high"] - known["gap"]]
    axes.errorbar(known["lead"], known["gap"], yerr=spread, color="#333333", fmt="o", ms=3, lw=1)


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, NAME, names_end="runs")
    names = names_of(found, "runs")
    cells = list(found.groupby(names, sort=False))
    plt.rcParams.update(style.RC)
    drawn, grid = plt.subplots(
        2, len(cells), figsize=(0.8 + 2.2 * len(cells), 3.6), squeeze=False, sharex="col", sharey="row",
        layout="constrained", height_ratios=[1.6, 1],
    )  # fmt: skip
    for j, (key, part) in enumerate(cells):
        grid[0][j].set_title(style.wrap(title(dict(zip(names, key, strict=True)))))
        curves(grid[0][j], part)
        gaps(grid[1][j], part)
    grid[0][0].set_ylabel("kept")
    grid[1][0].set_ylabel("edited - intrinsic")
    drawn.supxlabel("lead at step 0, nats", fontsize=style.RC["axes.labelsize"])
    for path in style.save(drawn, out, NAME):
        print(f"figure: {path}")
    plt.close(drawn)
    shown = found[[*names, "runs"]].copy()
    shown["lead, nats"] = [
        f"{low:.1f} to {high:.1f}" if pd.notna(low) else "-"
        for low, high in zip(found["lead_low"], found["lead_high"], strict=True)
    ]
    for name, head in (("gap", "edited - intrinsic"), ("edited", "edited, kept"), ("intrinsic", "intrinsic, kept")):
        why = found["state"] if name == "gap" else pd.Series("none", index=found.index)
        shown[head] = [
            tables.told(tables.estimate(row, name), str(why[i]), signed=name == "gap") for i, row in found.iterrows()
        ]
    note = (
        f"{right_by(found)} Share of the facts right at step 0 that are right at the last step [95 % interval] (n "
        "facts), by their lead at step 0: log-probability of the answer's weakest token minus that of the best other "
        f"token. Bins hold equally many facts of both groups together; a gap needs {LEAST} of each."
    )
    tables.show(out, NAME, shown, note)


def main() -> None:
    draw(*drawn_from(parser(__doc__).parse_args(), compute))


if __name__ == "__main__":
    script(main, NAME)
