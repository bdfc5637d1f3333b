"""One study as a report reads it: its tables, the state of each run, and the records of its stages.

Reads `retention.load` and the store's records; computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from retention import statistics as st
from retention.reading import load
from retention.store import Kind, Store
from retention.types import UserError
from retention.yaml_file import read_yaml

STAGES: tuple[tuple[Kind, str, str], ...] = (
    ("bases", "base_id", "prepare"),
    ("edits", "edit_id", "edit"),
    ("runs", "run_id", "tune"),
)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """One study."""

    name: str
    folder: Path
    question: str
    settings: str  # study.yaml
    runs: pd.DataFrame  # every run; `state`: complete, failed, waits or to do; `why`: of a failure
    columns: list[str]  # of runs and rows: what tells cells apart
    rows: pd.DataFrame | None  # None: no run is complete
    scores: pd.DataFrame | None
    facts: pd.DataFrame | None
    questions: pd.DataFrame | None
    records: dict[str, dict[str, dict[str, Any]]]  # kind of stage -> key -> base.json, edit.json, run.json


def opened(path: Path) -> Opened:
    """Read one study: its folder, or a results folder that holds no other. Raises UserError."""
    if (path / "store.json").is_file():
        names = Store(path).studies()
        if not names:
            raise UserError(f"{path}: no study has been run here yet")
        if len(names) > 1:
            raise UserError(f"{path}: give the folder of one study in it: {', '.join(names)}")
        path = path / names[0]
    path = path.absolute() if path.name in ("", "..") else path
    runs = load(path, "runs")
    store = Store(path.parent)
    settings = path / "study.yaml"
    text = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    document = read_yaml(settings) if text else {}
    question = document.get("question") if isinstance(document, dict) else None
    done = bool(runs["complete"].any())
    rows = load(path) if done else None
    columns = st.cell_columns(rows) if rows is not None else _columns(runs)
    failed = {(f["stage"], f["key"]): f for f in store.failures()}
    states = [_state(run, failed) for run in runs.to_dict("records")]
    return Opened(
        name=path.name, folder=path, question=str(question or ""), settings=text,
        runs=runs.assign(state=[s for s, _ in states], why=[w for _, w in states]), columns=columns, rows=rows,
        scores=load(path, "scores") if done else None, facts=load(path, "facts") if done else None,
        questions=load(path, "questions") if done else None, records=_records(store, runs),
    )  # fmt: skip


def _columns(runs: pd.DataFrame) -> list[str]:
    """`statistics.cell_columns` of rows that are not there yet."""
    keys = ("only", "run_id", "edit_id", "base_id", "seed", "facts_seed", "study", "complete", "state", *st.CELL)
    return [*st.CELL, *(name for name in runs.columns if name not in keys)]


def _state(run: dict[Any, Any], failed: dict[tuple[str, str], dict[str, Any]]) -> tuple[str, str]:
    """As `retention status` tells it."""
    if run["complete"]:
        return "complete", ""
    why = next((failed[stage, run[key]] for _, key, stage in STAGES if (stage, run[key]) in failed), None)
    if why is None:
        return "to do", ""
    return ("failed" if why["stage"] == "tune" else "waits"), f"{why['stage']}: {str(why['error']).splitlines()[0]}"


def _records(store: Store, runs: pd.DataFrame) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        kind: {str(k): store.settings(kind, k) for k in runs[key].drop_duplicates() if store.complete(kind, k)}
        for kind, key, _ in STAGES
    }
