"""Time to forgetting: survival curves, half-lives, laws and hazards of edited and intrinsic facts.

    python analysis/survival.py results/STUDY [--criterion all_correct] [--form direct] [--out FOLDER]

A fact right at step 0 is lost at the first checkpoint that finds it wrong. Panels as in forgetting_curves. Writes the
curves (survival_curves.csv; PNG, PDF), survival (half-lives, log-rank, the law of least AIC) and hazards (hazard
ratios) as CSV, Markdown and LaTeX.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from opened import GROUPS, Cell, Opened, drawn_from, names_of, parser, right_by, script

import retention
from retention import statistics as st
from retention.statistics import laws, matching, survival


def curve_lines(lives: pd.DataFrame, last: int) -> list[dict[str, object]]:
    """Kaplan and Meier's curve as lines of a table: from step 0 to the last checkpoint, a line where it falls."""
    curve = survival.kaplan_meier(lives)
    if curve is None:
        return [{"step": last, "surviving": None, "low": None, "high": None, "n": 0}]
    found = zip(curve.steps, curve.surviving, curve.low, curve.high, strict=True)
    lines: list[dict[str, object]] = [{"step": 0, "surviving": 1.0, "low": 1.0, "high": 1.0}]
    lines += [{"step": int(t), "surviving": s, "low": low, "high": high} for t, s, low, high in found]
    if lines[-1]["step"] != last:
        lines.append(lines[-1] | {"step": last})
    return [line | {"n": curve.n} for line in lines]


def panel(axes: Axes, part: pd.DataFrame) -> None:
    """The curves of one cell, with pointwise bands (facts as units)."""
    last = int(part["step"].max())
    for group in GROUPS:
        look, own = style.GROUP[group], part[part["group"] == group].dropna(subset="surviving")
        if own.empty:
            axes.plot([], [], label=f"{group}: none right at step 0", color=look["color"], ls=look["linestyle"])
            continue
        steps = [*own["step"], last * 1.15]
        low, high, surviving = ([*own[name], own[name].iloc[-1]] for name in ("low", "high", "surviving"))
        axes.fill_between(steps, low, high, step="post", color=look["color"], alpha=0.2, lw=0)
        label = f"{group} (n = {own['n'].iloc[0]})"
        axes.step(steps, surviving, where="post", color=look["color"], ls=look["linestyle"], label=label)
    style.steps(axes, last)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="lower left")


def line(study: Opened, cell: Cell, group: str, lives: pd.DataFrame) -> dict[str, object]:
    """Half-life and best law of one group in one cell."""
    half = survival.half_life(lives)
    steps = sorted(int(s) for s in cell.rows["step"].unique() if s > 0)
    found = [st.counts(cell.rows, group, step, study.criterion, form=study.form) for step in steps]
    kept, n = [float(c.kept.sum()) for c in found], [int(c.possible.sum()) for c in found]
    fitted = laws.laws(np.array(steps), np.array(kept), np.array(n)) if steps and all(n) else []
    best = fitted[0] if fitted else None
    second = fitted[1].aic - best.aic if best and len(fitted) > 1 and fitted[1].state == "ok" else None
    return {
        **study.named(cell), "group": group, "runs": len(cell.runs), "n": half.n,
        "lost": half.lost, "half_life": half.value, "half_life_low": half.low, "half_life_high": half.high,
        "shape": half.shape, "state": half.state, "law": best.name if best and best.state == "ok" else None,
        "law_state": best.state if best else "no fact is right at step 0", "aic_to_next": second,
        **{f"law_{k}": v for k, v in (best.parameters.items() if best and best.state == "ok" else ())},
    }  # fmt: skip


def told(found: pd.DataFrame) -> pd.DataFrame:
    """The table for people."""
    varied = names_of(found, "group")

    def number(x: float) -> str:
        return f"{x:.0f}" if x >= 10 else f"{x:.2g}"

    lines = []
    for _, row in found.iterrows():
        known = pd.notna(row["half_life"])
        interval = f"{number(row['half_life'])} [{number(row['half_life_low'])}, {number(row['half_life_high'])}]"\
            if known else ""  # fmt: skip
        after = " (beyond the last checkpoint)" if known and row["state"] != "ok" else ""
        law = row["law_state"]
        if pd.notna(row["law"]):
            next_ = f", next AIC +{row['aic_to_next']:.1f}" if pd.notna(row["aic_to_next"]) else ", no other identified"
            law = f"{row['law']}{next_}"
        p = row["p_log_rank"]
        lines.append(
            {name: row[name] for name in varied}
            | {"group": row["group"], "runs": row["runs"], "lost, n": f"{row['lost']}, {row['n']}"}
            | {"half-life, steps [95 %]": interval + after if known else row["state"]}
            | {"shape": f"{row['shape']:.2f}" if known else "-", "law": law}
            | {"p (log-rank)": tables.p_value(None if pd.isna(p) else p)}
        )
    return pd.DataFrame(lines)


def hazard_table(study: Opened, lives: dict[int, dict[str, pd.DataFrame]]) -> survival.Hazards:
    """All cells together: where a fact starts, what it is, and what was varied."""
    facts = retention.load(study.results, "facts")
    parts, names = [], ["edited", *matching.COVARIATES]
    trains = study.rows[study.rows["step"] > 0].groupby("run_id", observed=True)["trains_edited"].first()
    for number, cell in enumerate(study.cells):
        table = matching.fact_table(cell.rows, facts, study.criterion, form=study.form)
        known = pd.concat([v.assign(edited=float(k == "edited")) for k, v in lives[number].items()])
        part = known.merge(table[["run_id", "fact_id", *names]], on=["run_id", "fact_id", "edited"])
        for name in study.varied:
            part[name] = cell.named[name]
        part["fine-tuning may move edited matrices"] = part["run_id"].map(trains).astype(float)
        parts.append(part)
    pooled = pd.concat(parts, ignore_index=True)
    names.append("fine-tuning may move edited matrices")
    for name in study.varied:
        first = "none" if name == "mitigations" and (pooled[name] == "none").any() else pooled[name].min()
        for value in sorted(set(pooled[name]) - {first}):
            column = f"{name} {value}, not {first}"
            pooled[column] = (pooled[name] == value).astype(float)
            # What a mitigation does and whether edited matrices are trained may be one and the same.
            if np.linalg.matrix_rank(pooled[[*_varying(pooled, names), column]].assign(one=1.0)) == len(
                [*_varying(pooled, names), column, "one"]
            ):
                names.append(column)
    steps = sorted(float(s) for s in study.rows["step"].unique() if s > 0)
    return survival.hazards(pooled, names, steps)


def _varying(table: pd.DataFrame, names: list[str]) -> list[str]:
    return [name for name in names if table[name].notna().all() and table[name].nunique() > 1]


def compute(study: Opened) -> None:
    lives = {
        i: {group: survival.lifetimes(cell.rows, group, study.criterion, form=study.form) for group in GROUPS}
        for i, cell in enumerate(study.cells)
    }
    lines, curves = [], []
    for i, cell in enumerate(study.cells):
        p = survival.log_rank(lives[i]["edited"], lives[i]["intrinsic"])
        for group in GROUPS:
            lines.append(line(study, cell, group, lives[i][group]) | {"p_log_rank": p} | study.how)
            steps = curve_lines(lives[i][group], int(cell.rows["step"].max()))
            curves += [study.named(cell) | {"group": group} | at for at in steps]
    numbers = ("half_life", "half_life_low", "half_life_high", "shape", "aic_to_next", "p_log_rank")
    columns = ["step", "surviving", "low", "high", "n"]
    tables.keep(study.out, "survival", pd.DataFrame(lines).astype(dict.fromkeys(numbers, float)))
    tables.keep(study.out, "survival_curves", pd.DataFrame(curves)[[*study.varied, "group", *columns]])
    risk = hazard_table(study, lives)
    table = risk.table if len(risk.table) else pd.DataFrame([dict.fromkeys(risk.table.columns)])
    counted = {"lost": risk.lost, "intervals": risk.intervals, "clusters": risk.clusters, "state": risk.state}
    tables.keep(study.out, "hazards", table.assign(**counted, **study.how))


def draw(source: Path, out: Path) -> None:
    curves = tables.read(source, "survival_curves", names_end="group")
    drawn = style.panels(curves, names_of(curves, "group"), panel, "never found wrong")
    for path in style.save(drawn, out, "survival"):
        print(f"figure: {path}")
    plt.close(drawn)
    found = tables.read(source, "survival", names_end="group")
    note = (
        f"{right_by(found)} A fact right at step 0 is lost at the first checkpoint that finds it wrong. Half-life: "
        "steps after which half are lost, of a Weibull law fitted to the intervals between checkpoints (shape below 1: "
        "early losses), interval over runs (one run: over its facts). Law: of least AIC among exponential and power, "
        "without and with a floor, of what is right at each checkpoint. Log-rank: edited against intrinsic, "
        "stratified by run, facts as units, not matched on where they start (forest.py does)."
    )
    tables.show(out, "survival", told(found), note)
    risk = tables.read(source, "hazards", names_end="hazard_ratio")
    first = risk.iloc[0]
    if first["state"] != "ok":
        tables.show(out, "hazards", pd.DataFrame({"hazards": [first["state"]]}), right_by(risk))
        return
    shown = pd.DataFrame(
        {
            "covariate": risk["covariate"],
            "hazard ratio [95 %]": [f"{r.hazard_ratio:.2f} [{r.low:.2f}, {_high(r.high)}]" for r in risk.itertuples()],
            "p": [tables.p_value(p) for p in risk["p"]],
        }
    )
    note = (
        f"{right_by(risk)} Discrete-time proportional hazards (complementary log-log) of being lost, all cells of "
        f"the study together: {first['lost']} losses in {first['intervals']} intervals between checkpoints, errors "
        f"clustered by run and fact ({first['clusters']} runs, or facts of one run). margin: per nat of "
        "log-probability over the foil at step 0; length: per token; frequency: per factor of e in "
        "pretraining. Above 1: lost sooner."
    )
    tables.show(out, "hazards", shown, note)


def _high(x: float) -> str:
    return f"{x:.2f}" if math.isfinite(x) and x < 1000 else "beyond 1000"


def main() -> None:
    draw(*drawn_from(parser(__doc__).parse_args(), compute))


if __name__ == "__main__":
    script(main, "survival")
