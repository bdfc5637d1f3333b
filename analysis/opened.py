"""What every script of this folder does first: read its arguments, open one study, name its cells.

A script has two halves: `compute` reads probe rows and writes tables (CSV); `draw` reads these and writes all else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import style

import retention
from retention import statistics as st
from retention.types import UserError

GROUPS = ("edited", "intrinsic")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs that differ in their seeds alone."""

    named: dict[str, str]  # the columns that tell cells apart -> value
    rows: pd.DataFrame
    runs: tuple[str, ...]

    @property
    def seeds(self) -> int:
        """Different draws of facts and training among the runs."""
        return len(self.rows[["seed", "facts_seed"]].drop_duplicates())


@dataclass(frozen=True, kw_only=True)
class Opened:
    """One study's complete runs."""

    rows: pd.DataFrame
    cells: tuple[Cell, ...]
    varied: tuple[str, ...]  # columns in which the cells differ, editor always among them
    results: Path
    out: Path  # folder for what is made
    criterion: str
    form: str

    def named(self, cell: Cell) -> dict[str, str]:
        """What tells the cell from the study's others."""
        return {name: cell.named[name] for name in self.varied}

    @property
    def how(self) -> dict[str, str]:
        """What facts were judged by: the last columns of every table."""
        return {"criterion": self.criterion, "form": self.form}

    def each(self) -> Iterator[tuple[Cell, str, pd.DataFrame]]:
        """Cell, group and the cell's rows, for edited and intrinsic facts."""
        for cell in self.cells:
            for group in GROUPS:
                yield cell, group, cell.rows


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that all scripts take."""
    out = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    out.add_argument("results", type=Path, help="a study's folder in a results folder")
    out.add_argument("--criterion", default="all_correct", help=", ".join(st.CRITERIA))
    out.add_argument("--form", default="direct", help="direct or paraphrase")
    out.add_argument("--out", type=Path, default=None, help="folder for what is made; left out, the study's own")
    out.add_argument(
        "--from-summary", action="store_true", help="draw from the tables (CSV) in the folder, without the study's rows"
    )
    return out


def opened(args: argparse.Namespace) -> Opened:
    """The study that the arguments name; runs that are missing are told on standard error. Raises UserError."""
    style.check_study(args.results)
    rows = retention.load(args.results)
    st.check_criterion(rows, args.criterion)
    forms = sorted(map(str, rows["form"].unique()))
    if args.form not in forms:
        raise UserError(f"form: unknown {args.form!r}; this study asked {', '.join(forms)}")
    style.warn_incomplete(args.results)
    style.warn_not_finite(rows)
    columns = st.cell_columns(rows)
    cells = tuple(
        Cell(
            named=dict(zip(columns, map(str, key), strict=True)),
            rows=cell,
            runs=tuple(sorted(map(str, cell["run_id"].unique()))),
        )
        for key, cell in rows.groupby(columns, observed=True, sort=True)
    )
    varied = tuple(name for name in columns if name == "editor" or len({c.named[name] for c in cells}) > 1)
    return Opened(
        rows=rows, cells=cells, varied=varied, results=args.results, out=args.out or args.results,
        criterion=args.criterion, form=args.form,
    )  # fmt: skip


def drawn_from(args: argparse.Namespace, compute: Callable[[Opened], None]) -> tuple[Path, Path]:
    """Folder of the tables (CSV) to draw from, and folder for what is drawn.

    Computes the tables first, unless the arguments say --from-summary.
    """
    out = args.out or args.results
    if args.from_summary:
        return args.results, out
    compute(opened(args))
    return out, out


def names_of(table: pd.DataFrame, first: str) -> list[str]:
    """The columns that tell cells apart: those left of `first`."""
    return list(table.columns[: table.columns.get_loc(first)])


def title(named: Mapping[str, str], *, without: tuple[str, ...] = ()) -> str:
    """A cell's name for people: what varies in this study."""
    shown = [(name, value) for name, value in named.items() if name not in without]
    return " · ".join(value if name in st.CELL else f"{name} {value}" for name, value in shown)


def right_by(table: pd.DataFrame) -> str:
    """How a note under a table begins."""
    return f"Right by `{table['criterion'].iloc[0]}` ({table['form'].iloc[0]} questions)."


def script(main: Callable[[], None], name: str) -> None:
    """Run a script; what the user can mend is one sentence."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{name}: {error}")
