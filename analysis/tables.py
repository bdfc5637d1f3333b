"""One table in three forms: CSV with every digit, Markdown for screens, LaTeX (booktabs) for papers.

The CSV is what a script computes from probe rows. All else, figures too, is drawn from the CSV alone, so that it can be
drawn again where the rows are gone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from retention.statistics import VERSION, Estimate, wording
from retention.statistics.wording import Compared, Verdict, adjusted
from retention.statistics.wording import p_value as p_value  # part of a table's words: tables.p_value, tables.told
from retention.statistics.wording import told as told
from retention.store import write_text
from retention.types import UserError

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}",
}  # fmt: skip


def difference(name: str, estimate: Estimate | None) -> dict[str, float | int | None]:
    """A difference of shares as columns of a CSV table, with the p that it is smaller than what would matter."""
    return parts(name, estimate) | {f"{name}_p_within": None if estimate is None else estimate.p_within}


def parts(name: str, estimate: Estimate | None) -> dict[str, float | int | None]:
    """An estimate as four columns of a CSV table."""
    names = {name: "value", f"{name}_low": "low", f"{name}_high": "high", f"{name}_n": "n"}
    return {column: None if estimate is None else getattr(estimate, part) for column, part in names.items()}


def markdown(shown: pd.DataFrame) -> str:
    lines = [list(map(str, shown.columns)), ["---"] * len(shown.columns), *shown.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def latex(shown: pd.DataFrame, note: str) -> str:
    def escaped(text: str) -> str:
        text = "".join(_LATEX.get(c, c) for c in text)
        return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)

    def line(cells: list[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    rows = [line(row) for row in shown.astype(str).to_numpy().tolist()]
    head = [r"\begin{tabular}{" + "l" * len(shown.columns) + "}", r"\toprule", line(list(map(str, shown.columns)))]
    comment = "\n".join(f"% {text}" for text in note.splitlines() if text)
    return "\n".join([comment, *head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""])


def keep(out: Path, name: str, frame: pd.DataFrame) -> None:
    """Write NAME.csv; the last column is the version of the statistics."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.csv", frame.assign(statistics=VERSION).to_csv(index=False, float_format="%.6g"))
    print(f"table: {out / f'{name}.csv'}")


def read(folder: Path, name: str, *, names_end: str) -> pd.DataFrame:
    """NAME.csv as `keep` wrote it. Columns left of `names_end` are names (text); empty fields elsewhere are missing."""
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such table; leave out --from-summary, and it is computed from the study's rows")
    columns = list(pd.read_csv(path, nrows=0).columns)
    if names_end not in columns:
        raise UserError(f"{path}: no column {names_end!r}; the table was written by another version: compute it anew")
    names = columns[: columns.index(names_end)]
    found = pd.read_csv(path, dtype=dict.fromkeys(names, str), keep_default_na=False, na_values=[""])
    return found.fillna(dict.fromkeys(names, "")).drop(columns="statistics", errors="ignore")


def show(out: Path, name: str, shown: pd.DataFrame, note: str) -> None:
    """Write NAME.md and NAME.tex with the note, and print the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    text = f"{note}\n\n{markdown(shown)}\n"
    write_text(out / f"{name}.md", text)
    write_text(out / f"{name}.tex", latex(shown, note))
    print(text)


def estimate(row: Any, name: str) -> Estimate | None:
    """An estimate from the columns that `parts` or `difference` made; None where it has no value."""
    value, low, high, n = (row[f"{name}{part}"] for part in ("", "_low", "_high", "_n"))
    if pd.isna(value):
        return None
    within = row.get(f"{name}_p_within")
    return Estimate(
        value=float(value), low=float(low), high=float(high), n=int(n),
        p_within=None if within is None or pd.isna(within) else float(within),
    )  # fmt: skip


def verdicts(lines: pd.DataFrame, name: str, p: str, state: str) -> list[Verdict]:
    """What each line's difference `name` can say, corrected for all these lines. p, state: columns; so is `seeds`."""
    return wording.verdicts(
        [
            Compared(
                estimate=estimate(row, name), p=None if pd.isna(row[p]) else float(row[p]), seeds=int(row["seeds"]),
                why=str(row[state]),
            )
            for _, row in lines.iterrows()
        ]
    )  # fmt: skip


def false_discovery(p: pd.Series) -> pd.Series:
    """Benjamini and Hochberg's q of the tests that there are; missing where p is."""
    return pd.Series(adjusted(p.tolist()), index=p.index, dtype=float)
