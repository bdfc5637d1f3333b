"""Recency: edited facts against facts taught by ordinary training just before them, and relearning of forgotten edits.

    python analysis/recency.py results/STUDY [--criterion all_correct] [--form direct] [--out FOLDER]

For studies with `late` facts and `relearn`. Writes recency (retention of late facts, edited minus late) and relearn
(share correct after so many steps of relearning: forgotten edits, as many facts never edited, their difference), each
as CSV, Markdown and LaTeX.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import tables
from opened import Opened, drawn_from, names_of, parser, right_by, script

import retention
from retention import statistics as st
from retention.statistics import wording
from retention.types import UserError

AGAIN = ("forgotten", "never_edited")


def compute(study: Opened) -> None:
    """One line a cell of recency; one a cell and step of relearn. Raises UserError for a study without late facts."""
    if "late" not in set(study.rows["group"].astype(str)):
        raise UserError(f"{study.results}: this study taught no late facts (late: in facts)")
    lines, again = [], []
    relearned = retention.load(study.results, "relearn")
    for cell in study.cells:
        named = study.named(cell) | {"runs": len(cell.runs), "seeds": cell.seeds}
        edited, late = (st.counts(cell.rows, g, None, study.criterion, form=study.form) for g in ("edited", "late"))
        found = st.difference(edited, late)
        lines.append(
            named | tables.parts("edited", st.share(edited)) | tables.parts("late", st.share(late))
            | tables.difference("difference", found) | {"p": found.p if found else None}
            | {"state": "ok" if found else "no such fact is right at step 0"}
        )  # fmt: skip
        own = relearned[relearned["run_id"].isin(cell.runs)]
        for step in sorted(int(s) for s in own["step"].unique()):
            shares = [st.counts(own, g, step, "all_correct", given=None) for g in AGAIN]
            found = st.difference(*shares)
            again.append(
                named | {"step": step} | tables.parts("forgotten", st.share(shares[0]))
                | tables.parts("never_edited", st.share(shares[1])) | tables.difference("difference", found)
                | {"p": found.p if found else None, "state": "ok" if found else "no edit was forgotten"}
            )  # fmt: skip
    tables.keep(study.out, "recency", pd.DataFrame(lines).assign(**study.how))
    tables.keep(study.out, "relearn", pd.DataFrame(again).assign(criterion="all_correct", form=study.form))


def sentences(folder: Path) -> tuple[str, str]:
    """What both tables say: edited against late facts; forgotten edits against facts never edited, at every step."""
    late, again = (tables.read(folder, name, names_end="runs") for name in ("recency", "relearn"))
    taught = again[again["step"] > 0].reset_index(drop=True)
    said = [tables.verdicts(found, "difference", "p", "state") for found in (late, taught)]
    steps = int(taught["step"].max())
    return (
        wording.tally(said[0], "Retention of edited facts against late ones"),
        wording.tally(
            said[1],
            f"Over {steps} steps of relearning, each a cell, the share correct of forgotten edits against facts never "
            "edited",
        ),
    )


def draw(source: Path, out: Path) -> None:
    notes = sentences(source)
    for name, first, note in (("recency", ("edited", "late"), notes[0]), ("relearn", AGAIN, notes[1])):
        found = tables.read(source, name, names_end="runs")
        shown = found[[*names_of(found, "runs"), "runs", *(["step"] if name == "relearn" else [])]].copy()
        for column in (*first, "difference"):
            shown[f"{column} (n)"] = [
                tables.told(tables.estimate(row, column), row["state"], signed=column == "difference")
                for row in found.to_dict("records")
            ]
        shown["p"] = [tables.p_value(p) for p in found["p"]]
        what = "step counts relearning" if name == "relearn" else "at the last step, of those right at step 0"
        tables.show(out, name, shown, f"{note}\n\n{right_by(found)} Share [95 % interval] (n facts); {what}.")


def main() -> None:
    draw(*drawn_from(parser(__doc__).parse_args(), compute))


if __name__ == "__main__":
    script(main, "recency")
