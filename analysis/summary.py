"""The table of a study: what held at step 0, what was kept at the end, and the difference, each with n and interval.

    python analysis/summary.py results/STUDY [--criterion all_correct] [--out FOLDER]

Writes summary.csv and summary.md, and prints the table. Runs that differ in their seeds alone are one line.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import tables
from opened import Opened, drawn_from, names_of, parser, script

import retention
from retention import statistics as st
from retention.statistics import matching, wording
from retention.store import write_text


def line(cell: pd.DataFrame, scores: pd.DataFrame, facts: pd.DataFrame, criterion: str, form: str) -> dict[str, object]:
    """One line: `_at_0` shares of all facts of a group, `kept` shares of those right at step 0."""
    ends = cell.groupby("run_id", observed=True)["step"].max()  # runs of one cell may end at different steps

    def at_0(group: str, form: str = form) -> st.Estimate | None:
        return st.share(st.counts(cell, group, 0, criterion, form=form, given=None))

    table = matching.fact_table(cell, facts, criterion, form=form)
    edited, intrinsic = (st.counts(cell, group, None, criterion, form=form) for group in ("edited", "intrinsic"))
    kept = {"edited_kept": st.share(edited), "intrinsic_kept": st.share(intrinsic)}
    out: dict[str, object] = {"runs": cell["run_id"].nunique(), "steps": int(ends.max())}
    estimates = {
        "efficacy_at_0": at_0("edited"),
        "paraphrase_at_0": at_0("edited", "paraphrase"),
        "intrinsic_at_0": at_0("intrinsic"),
        "neighbor_at_0": at_0("neighbor"),
        "same_subject_at_0": at_0("same_subject"),
        **kept,
        "matched": matching.matched(table).matched.difference,
        "edited_minus_intrinsic": st.difference(edited, intrinsic),
    }
    for name, estimate in estimates.items():
        for part in ("value", "low", "high", "n"):
            key = name if part == "value" else f"{name}_{part}"
            out[key] = None if estimate is None else getattr(estimate, part)
    for step, when in ((0, "start"), (scores["run_id"].map(ends), "end")):
        for score in ("task_accuracy", "task_loss"):
            values = scores[(scores["step"] == step) & (scores["score"] == score)]["value"]
            out[f"{score}_{when}"] = None if values.empty else float(values.mean())
    return out


def compute(study: Opened) -> None:
    """All lines of a study."""
    scores, facts = retention.load(study.results, "scores"), retention.load(study.results, "facts")
    lines = [
        cell.named
        | line(cell.rows, scores[scores["run_id"].isin(cell.runs)], facts, study.criterion, study.form)
        | study.how
        for cell in study.cells
    ]
    tables.keep(study.out, "summary", pd.DataFrame(lines))


def markdown(frame: pd.DataFrame) -> str:
    """The table for people: shares with 95 % intervals."""
    criterion, form = frame["criterion"].iloc[0], frame["form"].iloc[0]

    def cell(row: pd.Series, name: str) -> str:
        if pd.isna(row[name]):
            if name == "matched":
                return wording.IMPOSSIBLE
            return "none right at step 0" if name in end else "no such rows"
        return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}] ({int(row[f'{name}_n'])})"

    varied = [
        name for name in names_of(frame, "runs") if name in ("editor", "mitigations") or frame[name].nunique() > 1
    ]
    at_0 = ["efficacy_at_0", "paraphrase_at_0", "intrinsic_at_0", "neighbor_at_0", "same_subject_at_0"]
    matched = ["matched"] * ("matched" in frame)  # tables stored before 2026-11-28 lack it
    end = ["edited_kept", "intrinsic_kept", *matched, "edited_minus_intrinsic"]

    def block(columns: list[str], titles: list[str], extra: bool) -> list[str]:
        head = [*varied, "runs", *titles] + (["task accuracy, start to end", "task loss (nats/token)"] if extra else [])
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for _, row in frame.iterrows():
            cells = [*(str(row[name]) for name in varied), str(row["runs"]), *(cell(row, name) for name in columns)]
            if extra:
                accuracy = (row["task_accuracy_start"], row["task_accuracy_end"])
                cells.append(
                    "text: no accuracy" if any(pd.isna(a) for a in accuracy) else "{:.2f} to {:.2f}".format(*accuracy)
                )
                cells.append(f"{row['task_loss_start']:.2f} to {row['task_loss_end']:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    steps = ", ".join(str(s) for s in sorted(frame["steps"].unique()))
    return "\n".join(
        [
            f"Right by `{criterion}`, {form} questions unless said otherwise: share [95 % interval] (n facts).",
            "",
            "At step 0, just after the edit:",
            "",
            *block(at_0, ["efficacy", "paraphrase", "intrinsic", "neighbor", "same subject"], False),
            "",
            f"At the last step ({steps}), of those right at step 0:",
            "",
            *block(
                end,
                [
                    "edited, kept",
                    "intrinsic, kept",
                    *(f"edited - intrinsic, {how}" for how in (*matched, "unmatched")),
                ],
                True,
            ),
            "",
            f"{'Matched on the lead at step 0 (n pairs of facts). ' if matched else ''}Unmatched: {wording.SELECTION}",
            "",
        ]
    )


def draw(source: Path, out: Path) -> None:
    text = markdown(tables.read(source, "summary", names_end="runs"))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "summary.md", text)
    print(text)


def main() -> None:
    draw(*drawn_from(parser(__doc__).parse_args(), compute))


if __name__ == "__main__":
    script(main, "summary")
