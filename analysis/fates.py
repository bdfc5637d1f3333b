"""What becomes of facts, by every criterion side by side: kept, flipped, recovered, emerged.

    python analysis/fates.py results/STUDY [--form direct] [--out FOLDER]

Right by the first token, by all tokens, over the foil, and by what is generated: one column each. Writes fates as CSV,
Markdown and LaTeX.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import tables
from opened import Opened, drawn_from, names_of, parser, script

from retention.statistics.fates import FATES, by_criteria


def compute(study: Opened) -> None:
    lines = []
    for cell, group, rows in study.each():
        named = study.named(cell) | {"group": group, "runs": len(cell.runs)}
        for line in by_criteria(rows, group, form=study.form).to_dict("records"):
            lines.append(named | line | {"form": study.form})
    tables.keep(study.out, "fates", pd.DataFrame(lines))


def draw(source: Path, out: Path) -> None:
    found = tables.read(source, "fates", names_end="group").rename(columns={"low": "value_low", "high": "value_high"})
    found = found.rename(columns={"n": "value_n"})
    names = [*names_of(found, "group"), "group", "runs"]
    shown = []
    for key, part in found.groupby([*names, "fate"], sort=False):
        told = {
            row["criterion"]: tables.told(tables.estimate(row, "value"), "no such fact") for _, row in part.iterrows()
        }
        shown.append(dict(zip([*names, "of facts"], key, strict=True)) | told)
    form = found["form"].iloc[0]
    note = (
        f"Shares of facts ({form} questions) with 95 % intervals (n facts), by each criterion. "
        + "; ".join(f"{name}: {text}" for name, text in FATES.items())
        + "."
    )
    order = {fate: i for i, fate in enumerate(FATES)}
    table = pd.DataFrame(shown).sort_values("of facts", key=lambda f: f.map(order), kind="stable")
    table = table.sort_values(names, kind="stable") if names else table
    tables.show(out, "fates", table, note)


def main() -> None:
    draw(*drawn_from(parser(__doc__).parse_args(), compute))


if __name__ == "__main__":
    script(main, "fates")
