"""Edited against intrinsic facts, fairly: the difference of retention, unmatched, matched and by regression.

    python analysis/forest.py results/STUDY [--criterion all_correct] [--form direct] [--out FOLDER]

Facts right at step 0 are paired within run and relation by where they start (lead over the best other token), answer
length and frequency.
Writes a forest plot (PNG, PDF), the table of differences, and that of balance (CSV, Markdown, LaTeX).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import style
import tables
from opened import Opened, drawn_from, names_of, parser, right_by, script, title

import retention
from retention.statistics import matching, wording

HOW = {  # name -> look
    "matched": {"color": "#D55E00", "marker": "o"},
    "regression": {"color": "#0072B2", "marker": "s"},
    "unmatched": {"color": "#999999", "marker": "D"},
}


def compute(study: Opened) -> None:
    """One line a cell of differences; one a cell and covariate of balance."""
    facts = retention.load(study.results, "facts")
    found, balance = [], []
    for cell in study.cells:
        named = study.named(cell)
        table = matching.fact_table(cell.rows, facts, study.criterion, form=study.form)
        pairs, model = matching.matched(table), matching.regression(table)
        none = "no edited fact is right at step 0" if pairs.edited == 0 else "no intrinsic fact is right at step 0"
        p = pairs.matched.p_t if len(cell.runs) > 1 else pairs.matched.p_facts
        found.append(
            named | {"runs": len(cell.runs), "seeds": cell.seeds, "edited": pairs.edited, "intrinsic": pairs.intrinsic}
            | tables.difference("unmatched", pairs.unmatched)
            | {"unmatched_state": "ok" if pairs.unmatched else none}
            | {"unmatched_p": pairs.unmatched.p if pairs.unmatched else None}
            | tables.difference("matched", pairs.matched.difference)
            | {"matched_p": p, "matched_state": pairs.state}
            | tables.difference("regression", model.difference)
            | {"regression_p": model.p, "log_odds": model.log_odds, "regression_state": model.state}
            | {"not_measured_or_constant": ", ".join(pairs.left_out), "matched_on": "lead"}
        )  # fmt: skip
        balance += [named | {"pairs": pairs.matched.difference.n if pairs.matched.difference else 0} | dict(row)
                    for row in pairs.balance.to_dict("records")]  # fmt: skip
    differences = pd.DataFrame(found)
    for name in HOW:
        at = differences.columns.get_loc(f"{name}_p") + 1
        differences.insert(at, f"{name}_q", tables.false_discovery(differences[f"{name}_p"].astype(float)))
    tables.keep(study.out, "forest", differences.assign(**study.how))
    columns = [*study.varied, "pairs", "covariate", "edited", "intrinsic", "before", "after"]
    tables.keep(study.out, "balance", pd.DataFrame(balance, columns=columns))


def figure(found: pd.DataFrame):
    plt.rcParams.update(style.RC)
    names = names_of(found, "runs")
    titles = [title(dict(zip(names, row, strict=True))) for row in found[names].itertuples(index=False, name=None)]
    wide = min(max(map(len, titles)), 34)
    drawn, axes = plt.subplots(figsize=(3.0 + 0.055 * wide, 0.8 + 0.42 * len(found)), layout="constrained")
    for i, row in found.iterrows():
        assert isinstance(i, int)
        for j, (name, look) in enumerate(HOW.items()):
            e, y = tables.estimate(row, name), i + 0.25 * (j - 1)
            if e is None:
                axes.text(0, y, f"{name}: not told", fontsize=5.5, color=look["color"], va="center")
                continue
            # The legend needs one line of each kind.
            label = name if (found[name].first_valid_index() == i) else None
            axes.plot([e.low, e.high], [y, y], color=look["color"], lw=1)
            axes.plot(e.value, y, color=look["color"], marker=look["marker"], ms=3.5, ls="", label=label)
            axes.text(1.01, y, f"{e.n}", transform=axes.get_yaxis_transform(), fontsize=5.5, va="center")
    axes.axvline(0, color="black", lw=0.6)
    axes.set_yticks(range(len(titles)), [style.wrap(title, 34) for title in titles])
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.text(1.01, -0.75, "n", transform=axes.get_yaxis_transform(), fontsize=6)
    axes.set_xlabel("kept: edited - intrinsic, share [95 %]")
    axes.grid(axis="y", visible=False)
    if found[list(HOW)].notna().any(axis=None):
        drawn.legend(loc="outside upper left", ncols=3)
    return drawn


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, "forest", names_end="runs")
    few = found["matched_n"] < matching.LEAST_PAIRS  # tables stored earlier compare any number of pairs
    found.loc[few, ["matched", "matched_low", "matched_high", "matched_p", "matched_q"]] = float("nan")
    found.loc[few, "matched_state"] = [
        f"{wording.IMPOSSIBLE}: {n:.0f} pairs, fewer than {matching.LEAST_PAIRS}" for n in found.loc[few, "matched_n"]
    ]
    drawn = figure(found)
    for path in style.save(drawn, out, "forest"):
        print(f"figure: {path}")
    plt.close(drawn)
    shown = found[names_of(found, "runs")].copy()
    shown["runs"] = found["runs"]
    said = {name: tables.verdicts(found, name, f"{name}_p", f"{name}_state") for name in HOW}
    for name in HOW:
        shown[f"{name} (n)"] = [
            tables.told(tables.estimate(row, name), row[f"{name}_state"], signed=True) for _, row in found.iterrows()
        ]
        shown[f"p ({name}), q"] = [
            f"{tables.p_value(p)}, {tables.p_value(q)}" if pd.notna(p) else "-"
            for p, q in zip(found[f"{name}_p"], found[f"{name}_q"], strict=True)
        ]
        shown[f"verdict ({name})"] = [verdict.short for verdict in said[name]]
    left = found["not_measured_or_constant"].iloc[0]
    # Tables stored before 2026-11-28 are matched on the margin over the foil, which does not decide what is kept.
    on = "lead" if "matched_on" in found else "margin over the foil (stored before the lead was read, and not fair)"
    note = (
        f"{right_by(found)} Share kept at the last step of edited minus intrinsic facts, of those right at step 0 [95 "
        "% interval; the run is the unit of replication, of one run its facts]. Matched: pairs within run and "
        f"relation, {on} within {matching.CALIPER} standard deviations (n pairs; fewer than {matching.LEAST_PAIRS}: "
        f"{wording.IMPOSSIBLE}). Regression: mean effect of being edited at equal {on}, length and frequency "
        f"(logistic, errors clustered by run). Unmatched: {wording.SELECTION} q: Benjamini and Hochberg's, over all "
        f"{len(found)} lines." + (f" Not measured, or the same for all: {left}." if pd.notna(left) else "")
    )
    sentences = [wording.matched(said["matched"], on), wording.unmatched(said["unmatched"], said["matched"]), note]
    tables.show(out, "forest", shown, "\n\n".join(sentences))
    told = tables.read(source, "balance", names_end="pairs")
    for name in ("edited", "intrinsic", "before", "after"):
        why = (
            "no such fact"
            if name in ("edited", "intrinsic")
            else "no group to compare"
            if name == "before"
            else "no pair"
        )
        told[name] = [f"{x:.2f}" if pd.notna(x) else why for x in told[name]]
    known = matching.COVARIATES | {"margin": "log-probability of the answer minus that of its foil at step 0, nats"}
    what = "; ".join(f"{name}: {known[name]}" for name in known if (told["covariate"] == name).any())
    note = (
        "Means of edited and intrinsic facts right at step 0, and how far apart they are in standard deviations, "
        f"before and after matching. {what}."
    )
    tables.show(out, "balance", told, note)


def main() -> None:
    draw(*drawn_from(parser(__doc__).parse_args(), compute))


if __name__ == "__main__":
    script(main, "forest")
