"""Each mitigation against none, pair by pair: what it saves of edited and intrinsic facts, and what it costs the task.

    python analysis/mitigations.py results/STUDY [--axis mitigations] [--against none] [--out FOLDER]

Or each value of another axis (objective, adapter, task, editor) against one of them. Pairs share seed, draw and all
else of the study; facts are paired by fact_id, and for retention only those right at step 0 in both arms count. Writes
the table (CSV, Markdown, LaTeX), the runs behind it (NAME_runs.csv) and paired slopes (PNG, PDF): a thin line is a
seed, a bold one the mean. Where NAME_runs.csv is missing, slopes are drawn without seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import style
import tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from opened import GROUPS, Opened, drawn_from, names_of, parser, script

import retention
from retention import statistics as st
from retention.statistics import wording
from retention.types import UserError

NAMES = tuple(axis if axis == "mitigations" else f"by_{axis}" for axis in st.AXES)  # of the tables, by axis
TESTS = ("p_seeds", "p_t", "p_facts")


def table(
    questions: dict[str, pd.DataFrame], pairs: pd.DataFrame, scores: pd.DataFrame, axis: str, context: list[str]
) -> pd.DataFrame:
    """One line for each context, arm and measure (edited, intrinsic, the task's gain).

    questions: by group, as `retention.statistics.asked`. pairs: as `retention.statistics.pair_runs`.
    q_*: Benjamini and Hochberg's, over all lines of the same measure; `tests` says how many they are.
    """
    gains = {measure: st.task_gains(scores, measure) for measure in st.MEASURES}
    lines = []
    for key, part in pairs.groupby([*context, axis], sort=True):
        named, seeds = dict(zip([*context, axis], key, strict=True)), part["seed"].nunique()
        for group in GROUPS:
            lines.append(
                named
                | {"measure": group, "seeds": seeds}
                | retention_line(st.paired_questions(questions[group], part), group)
            )
        lines.append(named | {"seeds": seeds} | gain_line(part, gains))
    found = pd.DataFrame(lines)
    for test in TESTS:
        found[test] = found.get(test)
        found[test.replace("p_", "q_")] = found.groupby("measure")[test].transform(tables.false_discovery)
    return found.assign(tests=found.groupby("measure")["p_seeds"].transform("count"))


def runs_of(questions: dict[str, pd.DataFrame], pairs: pd.DataFrame, axis: str, context: list[str]) -> pd.DataFrame:
    """One line for each pair of runs and group: share kept in the arm and in the baseline, of the facts of both."""
    lines = []
    for group in GROUPS:
        paired = st.paired_questions(questions[group], pairs)
        paired = paired[paired["start"] & paired["start_base"]]
        ends = paired.groupby(["run_id", "fact_id"])[["end", "end_base"]].mean().groupby(level="run_id")
        shares = ends.mean().rename(columns={"end": "arm", "end_base": "baseline"}).assign(n=ends.size(), group=group)
        named = pairs[[*context, axis, "seed", "run"]].rename(columns={"run": "run_id"})
        lines.append(named.merge(shares.reset_index(), on="run_id"))
    return pd.concat(lines)[[*context, axis, "group", "seed", "run_id", "arm", "baseline", "n"]]


def retention_line(paired: pd.DataFrame, group: str) -> dict[str, object]:
    """The paired difference of retention, and beside it that of all facts of the group, whatever held at step 0."""
    kept, everything = st.compare(paired), st.compare(paired, both=False)
    at_0 = paired.groupby(["run_id", "fact_id"])[["start", "start_base"]].mean().mean()
    state = "ok" if kept.difference else "no fact is right at step 0 in both arms"
    if everything.difference is None:
        state = f"no {group} facts"
    return {
        **tables.difference("difference", kept.difference),
        "arm": kept.arm, "baseline": kept.against, "runs": kept.runs, "better": kept.more, "worse": kept.less,
        "p_seeds": kept.p_seeds, "p_t": kept.p_t, "p_facts": kept.p_facts, "least_p_seeds": kept.least_p,
        "right_at_0": at_0["start"], "right_at_0_baseline": at_0["start_base"],
        **tables.parts("unconditional", everything.difference),
        "state": state if kept.runs != 1 else "one pair of runs: the interval and McNemar's test are of these runs",
    }  # fmt: skip


def gain_line(pairs: pd.DataFrame, gains: dict[str, pd.Series]) -> dict[str, object]:
    """The task's gain in the arm minus that in the baseline, over seeds; n is pairs of runs."""
    for measure, gain in gains.items():
        if set(pairs["run"]) | set(pairs["baseline"]) <= set(gain.index):
            arm, base = gain[pairs["run"]].to_numpy(), gain[pairs["baseline"]].to_numpy()
            found = st.paired_means(arm, base)
            parts = tables.difference if measure == "task_accuracy" else tables.parts  # a loss is no share
            return {
                "measure": f"{measure} gain", **parts("difference", found.difference), "arm": found.arm,
                "baseline": found.against, "runs": len(pairs), "better": found.more, "worse": found.less,
                "p_seeds": found.p_seeds, "p_t": found.p_t, "least_p_seeds": found.least_p,
                "state": "ok" if len(pairs) > 1 else "one pair of runs: no interval",
            }  # fmt: skip
    return {"measure": "task gain", "runs": len(pairs), "better": 0, "worse": 0, "state": "no score in both arms"}


def shown(found: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The table for people: a line for each arm and measure, effect first."""
    context = names_of(found, axis)
    lines, said = [], judged(found)
    for i, line in found.iterrows():
        known = pd.notna(line["difference"])
        tests = {test: line[f"p_{test}"] for test in ("seeds", "t", "facts")}
        lines.append(
            {name: str(line[name]) for name in [*context, axis]}
            | {
                "of": line["measure"],
                "difference [95 %] (n)": _told(line, "difference") if known else line["state"],
                "verdict": said[i].short if known else "-",
                "arm, baseline": f"{line['arm']:.2f}, {line['baseline']:.2f}" if known else "-",
                "runs": str(line["runs"]),
                "better, worse": f"{line['better']}, {line['worse']}",
                **{
                    f"p ({name})": f"{tables.p_value(p)} (q {tables.p_value(line[f'q_{name}'])})"
                    if pd.notna(p)
                    else "-"
                    for name, p in tests.items()
                },
                "right at step 0": f"{line['right_at_0']:.2f}, {line['right_at_0_baseline']:.2f}"
                if pd.notna(line.get("right_at_0"))
                else "-",
                "unconditional (n)": _told(line, "unconditional") if pd.notna(line["unconditional"]) else "-",
            }
        )
    return pd.DataFrame(lines)


def judged(found: pd.DataFrame) -> pd.Series:
    """What each line can say (wording.Verdict): Student's p over seeds, of one seed McNemar's; a family a measure."""
    p = found["p_t"].where(found["seeds"] > 1, found["p_facts"])
    lines = found.assign(p=p)
    return pd.concat(
        pd.Series(tables.verdicts(own, "difference", "p", "state"), index=own.index)
        for _, own in lines.groupby("measure", sort=False)
    )


def sentences(found: pd.DataFrame, axis: str, only: pd.Index | None = None) -> list[str]:
    """What the lines say together, one sentence for each measure: retention of either group, the task's gain.

    only: the lines to speak of; the correction is for all.
    """
    said, out = judged(found), []
    against = found["against"].iloc[0]
    for measure, own in (found if only is None else found.loc[only]).groupby("measure", sort=False):
        of = f"retention of {measure} facts" if measure in GROUPS else f"{str(measure).replace('_', ' ')}"
        arms = [(str(name), said[i]) for i, name in own[axis].items()]
        out.append(wording.named(arms, f"{axis.capitalize()} against {against}, {of}"))
    return out


def _told(line: pd.Series, name: str) -> str:
    return tables.told(tables.estimate(line, name), "", signed=True)


def note(found: pd.DataFrame, axis: str) -> str:
    """What the columns say, in full sentences, under the table's name."""
    against, criterion, form = (found[name].iloc[0] for name in ("against", "criterion", "form"))
    tests = found.groupby("measure")["tests"].max()
    counted = ", ".join(f"{n} of {measure}" for measure, n in tests.items())
    least = ", ".join(f"{p:.3g}" for p in sorted(found["least_p_seeds"].dropna().unique()))
    return (
        f"{axis}: each minus `{against}`, same seed, same facts. Edited and intrinsic: retention, the share right "
        f"by `{criterion}` ({form} questions) at the last step, of the facts right at step 0 in both arms (n pairs of "
        "facts; better, worse: pairs in which one arm alone is right); intervals take the run as the unit of "
        "replication. Task gain: from step 0 to the end (n pairs of runs). p (seeds): sign-flip permutation of the "
        f"runs' differences, exact up to 16 runs (the least p that so many runs can give: {least or 'none'}); p (t): "
        "Student's over the same, dual to the interval; p (facts): McNemar's mid-p test, of these runs alone. q: "
        f"Benjamini and Hochberg's, over all lines of one measure ({counted} tests). Unconditional: all facts of the "
        "group, which also holds what the arm does to the edit itself. Verdict: lower or higher where the interval "
        f"excludes zero and q < {wording.LEVEL}; within ±{st.BOUND:.2f} by two one-sided tests (TOST) at the same "
        "rate; else these data cannot tell."
    )


def slopes(axes: Axes, part: pd.DataFrame, seeds: pd.DataFrame | None, arms: list[str], axis: str) -> None:
    """One context: for each arm a slot with the baseline at its left and the arm at its right.

    The bar at the right is the difference's interval, laid off from the baseline's mean.
    """
    for group, inset in (("edited", 0.0), ("intrinsic", 0.06)):
        look = style.GROUP[group]
        label: str | None = f"{group} facts"
        lines = part[part["measure"] == group].set_index(axis)
        for slot, arm in enumerate(arms):
            x = [slot - 0.28 + inset, slot + 0.28 - inset]
            if arm not in lines.index or pd.isna(lines.loc[arm, "difference"]):
                why = "not run" if arm not in lines.index else f"no {group} fact right at step 0"
                axes.text(slot, 0.5, why, ha="center", va="center", rotation=90, fontsize=6, color=look["color"])
                continue
            line = lines.loc[arm]
            if seeds is not None:
                each = seeds[(seeds["group"] == group) & (seeds[axis] == arm)][["baseline", "arm"]].to_numpy()
                axes.plot(x, each.T, color=look["color"], lw=0.5, alpha=0.5, ls=look["linestyle"])
            axes.plot(
                x, [line["baseline"], line["arm"]], color=look["color"], lw=1.8, marker=look["marker"],
                ls=look["linestyle"], label=label,
            )  # fmt: skip
            label = None
            ends_at = [line["baseline"] + line["difference_low"], line["baseline"] + line["difference_high"]]
            axes.plot([x[1], x[1]], ends_at, color=look["color"], lw=0.8)
    axes.set_xlim(-0.6, len(arms) - 0.4)
    axes.set_xticks(range(len(arms)), [style.wrap(arm, 24) for arm in arms])
    axes.tick_params(axis="x", labelrotation=90 if len(arms) > 3 else 0)
    axes.grid(axis="x", visible=False)


def figure(found: pd.DataFrame, seeds: pd.DataFrame | None, axis: str) -> Figure:
    """A panel for each context, one below the other."""
    plt.rcParams.update(style.RC)
    context = names_of(found, axis)
    panels = list(found.groupby(context, sort=True))
    arms = sorted(found[axis].unique())
    drawn, grid = plt.subplots(
        len(panels), 1, figsize=(max(0.9 + 0.45 * len(arms), 3.3), 0.8 + 1.5 * len(panels)), squeeze=False, sharex=True,
        sharey=True, layout="constrained",
    )  # fmt: skip
    wide = int(14 * drawn.get_figwidth())  # letters of a title
    for axes, (key, part) in zip(grid[:, 0], panels, strict=True):
        own = None
        if seeds is not None:
            own = seeds[(seeds[context] == list(key)).all(axis=1)]
        slopes(axes, part, own, arms, axis)
        told = [str(v) if n in st.CELL else f"{n} {v}" for n, v in zip(context, key, strict=True)]
        axes.set_title(style.wrap(" · ".join([*told, counted(part)]), wide))
        axes.set_ylabel("still right")
    grid[0, 0].set_ylim(top=1.03)
    grid[-1, 0].set_xlabel(f"left end: {found['against'].iloc[0]}; right end: the {axis} named")
    handles, texts = next((h for h in (a.get_legend_handles_labels() for a in grid[:, 0]) if h[0]), ([], []))
    drawn.legend(handles, texts, loc="outside upper left", ncols=2)
    return drawn


def counted(part: pd.DataFrame) -> str:
    """How many paired runs and facts a panel stands for."""

    def span(values: pd.Series) -> str:
        low, high = values.min(), values.max()
        return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"

    groups = part[part["measure"].isin(GROUPS)]
    known = groups.dropna(subset="difference_n")
    facts = [
        f"{span((own['difference_n'] / own['runs']).round())} {group}"
        for group in GROUPS
        if len(own := known[known["measure"] == group])
    ]
    pairs = part.loc[~part["measure"].isin(GROUPS), "runs"]  # the task's gain is told of every pair
    return f"{span(pairs)} paired runs of {' and '.join(facts) or 'no'} facts right at step 0"


def compute(study: Opened, axis: str | None = None, against: str | None = None) -> str:
    """The table and the runs behind it. Returns its name."""
    runs, scores = (retention.load(study.results, name) for name in ("runs", "scores"))
    axis = st.arms_of(study.rows, axis)
    rows, runs = st.arms_by_arguments(study.rows, runs, axis)
    against = st.baseline_of(rows, axis, against)
    pairs, context = st.pair_runs(runs, rows, axis, against), st.context_columns(rows, axis)
    if pairs.empty:
        raise UserError(
            f"no run of another {axis} has a complete partner with {axis} {against!r} and the same seed, draw and "
            f"{', '.join(context)}"
        )
    for arm in sorted(set(map(str, rows[axis].unique())) - {against} - set(pairs[axis])):
        print(f"no partner with {axis} {against!r}: {arm}", file=sys.stderr)
    context = [name for name in context if pairs[name].nunique() > 1 or name == "editor"]
    context = context or ["task"]  # where the editor is compared, and nothing else varies
    questions = {group: st.asked(rows, group, study.criterion, form=study.form) for group in GROUPS}
    found = table(questions, pairs, scores, axis, context)
    found.insert(found.columns.get_loc("measure"), "against", against)
    name = NAMES[st.AXES.index(axis)]
    tables.keep(study.out, name, found.assign(**study.how))
    tables.keep(study.out, f"{name}_runs", runs_of(questions, pairs, axis, context))
    return name


def draw(source: Path, out: Path, name: str = "mitigations") -> None:
    axis = name.removeprefix("by_")
    found = tables.read(source, name, names_end="against")
    behind = source / f"{name}_runs.csv"
    seeds = tables.read(source, behind.stem, names_end="group") if behind.is_file() else None
    drawn = figure(found, seeds, axis)
    for path in style.save(drawn, out, name):
        print(f"figure: {path}")
    plt.close(drawn)
    tables.show(out, name, shown(found, axis), "\n\n".join([*sentences(found, axis), note(found, axis)]))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--axis", default=None, help=f"{', '.join(st.AXES)}; left out, the first that varies")
    arguments.add_argument("--against", default=None, help="its value to compare with; left out, none, sft or full")
    args = arguments.parse_args()
    there = [name for name in NAMES if args.axis is None or name.endswith(args.axis)]
    name = next((name for name in there if (args.results / f"{name}.csv").is_file()), there[0] if there else NAMES[0])

    def make(study: Opened) -> None:
        nonlocal name
        name = compute(study, args.axis, args.against)

    source, out = drawn_from(args, make)
    draw(source, out, name)


if __name__ == "__main__":
    script(main, "mitigations")
