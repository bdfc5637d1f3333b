"""An excerpt of one study: what its tables are computed from, in few bytes, so that it can be committed beside them.

For each run and question it holds whether the answer was right at every checkpoint, by every criterion, and the lead
at step 0. Texts, log-probabilities and weights stay in the results folder. `retention.load` reads an excerpt as it
reads a study. Knows nothing of statistics.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa

from retention.store import SCHEMA, write_json, write_table
from retention.types import UserError

FOLDER, RECORD = "excerpt", "excerpt.json"
TABLES = ("rows", "runs", "scores", "facts", "weights", "relearn")
RIGHT = ("first_correct", "all_correct", "prefers_target", "gen_exact", "gen_contains")
START = ("lead", "n_target_tokens")  # stored of step 0 only, where facts are matched by them
COLUMNS = {
    "rows": ("step", "group", "form", "question_id", "fact_id", "run_id", "trains_edited", *RIGHT, *START, "state"),
    "relearn": ("step", "group", "form", "question_id", "fact_id", "run_id", "all_correct", "state"),
    "facts": ("base_id", "fact_id", "subject", "relation", "target", "new_target", "exposures", "popularity"),
}
ORDER = ["edit_id", "step", "group", "question_id", "run_id"]  # what many runs share is then equal, row after row


def at(path: Path) -> Path | None:
    """The excerpt that a path names: an excerpt's own folder, or that of a study which was not run here.

    A study that was run here is read from its rows, even where an excerpt is beside them.
    """
    if (path / RECORD).is_file():
        return path
    ran = (path / "runs.parquet").is_file() and (path.parent / "store.json").is_file()
    return path / FOLDER if not ran and (path / FOLDER / RECORD).is_file() else None


def write(out: Path, tables: Mapping[str, pd.DataFrame]) -> Path:
    """Write an excerpt and return its folder. tables: name -> table, as `retention.load` gives it.

    Raises UserError where a run is not complete: an excerpt of part of a grid would look like the whole.
    """
    runs = tables["runs"]
    if left := int((~runs["complete"]).sum()):
        raise UserError(f"{left} of {len(runs)} runs are not complete; finish the study first (retention run)")
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.parquet"):
        old.unlink()
    for name, table in tables.items():
        chosen = [column for column in COLUMNS.get(name, table.columns) if column in table.columns]
        if "step" in table and "group" in table:
            table = table[table["step"] >= 0].sort_values(ORDER, kind="stable")
        kept = table[chosen].reset_index(drop=True)
        if name == "rows":
            kept[list(START)] = kept[list(START)].where(kept["step"] == 0)
        write_table(out / f"{name}.parquet", pa.Table.from_pandas(kept, preserve_index=False))
    record = {
        "schema": SCHEMA, "retention": importlib.metadata.version("retention"),
        "sha256": {path.name: _digest(path) for path in sorted(out.glob("*.parquet"))},
    }  # fmt: skip
    write_json(out / RECORD, record)
    return out


def read(folder: Path, table: str) -> pd.DataFrame:
    """One table of an excerpt, with the columns that `retention.load` gives it (less those that are not stored).

    Raises UserError for a table that it lacks, another schema, or a file that is not as it was written.
    """
    record, path = json.loads((folder / RECORD).read_text(encoding="utf-8")), folder / f"{table}.parquet"
    if record["schema"] != SCHEMA:
        raise UserError(f"{folder}: written with schema {record['schema']}; this version reads schema {SCHEMA}")
    if path.name not in record["sha256"]:
        there = ", ".join(name.removesuffix(".parquet") for name in record["sha256"])
        raise UserError(f"{folder}: an excerpt, and without {table}; it has {there}")
    if not path.is_file() or _digest(path) != record["sha256"][path.name]:
        raise UserError(f"{path}: checksum mismatch: the file was edited or damaged; restore it from version control")
    found = pd.read_parquet(path)
    if table in ("rows", "relearn"):
        runs = read(folder, "runs").drop(columns=["complete", "state", "study", "only"], errors="ignore")
        found = found.merge(runs, on="run_id", how="left", validate="many_to_one")
        names = found.select_dtypes(include=["object", "str"]).columns.difference([*RIGHT, "fact_id", "question_id"])
        found = found.astype(dict.fromkeys(names, "category"))
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
