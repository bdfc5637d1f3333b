"""A running grid on the terminal: which runs are done, running or failed, and the curves of those that are complete.

Looks at the results folder alone, so it may run anywhere that sees it, and disturbs nothing.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from retention import statistics as st
from retention.engines._claims import living
from retention.reading import load, place
from retention.statistics.curves import curves
from retention.store import Store
from retention.types import UserError

BARS = "▁▂▃▄▅▆▇█"
GROUPS = ("edited", "intrinsic")
LOOK = {"complete": "green", "running": "yellow", "failed": "red", "waits": "red", "to do": "dim"}


def watch(path: Path, *, once: bool = False, every: float = 5.0, criterion: str | None = None) -> None:
    """Print the state of a results folder, or of one study in it; unless `once`, again and again until all is done.

    every: seconds between two looks. Raises UserError if nothing has been run there.
    """
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file has room
    view = View(path, criterion)
    if once:
        console.print(view.look())
        return
    with Live(view.look(), console=console, auto_refresh=False, screen=False) as live:
        while not view.done:
            time.sleep(every)
            live.update(view.look(), refresh=True)


class View:
    """What is seen at each look. Rows are read anew only when another run is complete."""

    def __init__(self, path: Path, criterion: str | None = None) -> None:
        self.store, self.only = place(path)
        self.criterion, self.done = criterion, False
        self._read: dict[str, tuple[int, Table | Text]] = {}

    def look(self) -> Group:
        names = [self.only] if self.only else self.store.studies()
        if not names:
            raise UserError(f"{self.store.root}: no study has been run here yet")
        parts: list[Any] = []
        self.done = True
        for name in names:
            if name in self.store.studies() and (found := self.store.study_fault(name)):
                parts += [Text.assemble((name, "bold"), f"  {found}", ""), ""]
                continue
            runs = load(self.store.root / name, "runs")
            states = self._states(runs)
            self.done &= bool(runs["complete"].all())
            parts += [Text.assemble((name, "bold"), "  ", *_tally(states)), *self._running(runs, states)]
            complete = int(runs["complete"].sum())
            if name not in self._read or self._read[name][0] != complete:
                self._read[name] = (complete, self._curves(name) if complete else Text("no run is complete yet", "dim"))
            parts += [self._read[name][1], ""]
        parts += _failures(self.store)
        return Group(*parts)

    def _states(self, runs: pd.DataFrame) -> list[str]:
        working: set[str] = set()
        with suppress(OSError):  # a folder that may only be read: then nothing is known to be running
            working = {p.name for p in living(self.store.root / ".work" / "claims")}
        failed = {(f["stage"], f["key"]) for f in self.store.failures()}
        found = []
        for run in runs.to_dict("records"):
            stages = [
                (run["base_id"], "bases", "prepare"),
                (run["edit_id"], "edits", "edit"),
                (run["run_id"], "runs", "tune"),
            ]
            if run["complete"]:
                found.append("complete")
            elif any((stage, key) in failed for key, _, stage in stages):
                found.append("failed" if ("tune", run["run_id"]) in failed else "waits")
            else:
                found.append("running" if any(f"{kind}-{key}" in working for key, kind, _ in stages) else "to do")
        return found

    def _running(self, runs: pd.DataFrame, states: list[str]) -> list[Text]:
        """A line for each run that is being fine-tuned: the checkpoints that it has read."""
        lines = []
        for run, state in zip(runs.to_dict("records"), states, strict=True):
            partial = (self.store.root / ".work" / "partial").glob(f"runs-{run['run_id']}.*/probes-*.parquet")
            steps = sorted(int(p.stem.removeprefix("probes-")) for p in partial)
            if state == "running" and steps:
                label = " · ".join(str(run[name]) for name in ("editor", "objective", "mitigations"))
                lines.append(Text(f"  {label} · seed {run['seed']}: read at step {steps[-1]}", LOOK["running"]))
        return lines

    def _curves(self, name: str) -> Table | Text:
        rows = load(self.store.root / name)
        criterion = self.criterion or next((c for c in st.CRITERIA if rows[c].notna().any()), "all_correct")
        try:
            st.check_criterion(rows, criterion)
        except UserError as error:
            if self.criterion:
                raise
            return Text(str(error), "dim")
        columns = st.cell_columns(rows)
        varied = [n for n in columns if n == "editor" or rows[n].astype(str).nunique() > 1]
        table = Table(title=f"kept, of the facts right at step 0 ({criterion}, direct)", title_justify="left", box=None)
        for column in (*varied, "runs", "facts", "by step", "kept at the end [95 %]", "n"):
            table.add_column(column)
        for key, cell in rows.groupby(columns, observed=True, sort=True, dropna=False):
            named = dict(zip(columns, map(str, key), strict=True))
            for group in GROUPS:
                if not (cell["group"] == group).any():
                    continue
                found = curves(cell, group, criterion)
                bars = "".join(BARS[min(int(e.value * len(BARS)), len(BARS) - 1)] for e in found.kept.values())
                texts = [*(named[n] for n in varied), str(cell["run_id"].nunique()), group, bars]
                texts += [str(found.end), str(found.end.n)] if found.end else ["none right at step 0", "0"]
                table.add_row(*(Text(text) for text in texts))
        return table


def _tally(states: list[str]) -> list[tuple[str, str]]:
    there = [state for state in LOOK if state in states]
    return [(f"{states.count(state)} {state}" + ("  " if state != there[-1] else ""), LOOK[state]) for state in there]


def _failures(store: Store) -> list[Text]:
    return [
        Text(f"failed: {f['stage']} {f['label']}: {str(f['error']).splitlines()[0]}", LOOK["failed"])
        for f in store.failures()
    ]
