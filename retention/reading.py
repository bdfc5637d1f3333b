"""What a results folder holds, as tables: all rows of a study's runs, or means over them that never leave DuckDB.

Checks that files are as they were written before it reads them. Knows nothing of statistics: see retention/statistics.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

import pandas as pd

from retention import excerpt
from retention.explain import nearest
from retention.store import ADDED, KINDS, ROWS, Kind, Store
from retention.types import UserError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Table = Literal["rows", "sequence", "relearn", "scores", "weights", "runs", "facts", "questions"]
# What tells the runs of a study apart.
CELL = ("editor", "task", "objective", "adapter", "mitigations", "seed", "facts_seed")
IDS = ("base_id", "edit_id", "run_id")
NAMES = (
    *(name for name in CELL if "seed" not in name),
    *IDS,
    "model_id",
    "group",
    "form",
    "precision",
    "state",
)  # categories
CRITERIA = ("first_correct", "all_correct", "prefers_target", "gen_exact", "gen_contains")
AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,199}")  # the path of a setting, as a grid names it
EXPANDED = re.compile(r"[*?\[\\]")  # what makes a path a pattern to DuckDB
MEASURES = (*CRITERIA, "lead", "logp_target", "logp_foil", "target_rank")


def load(
    path: str | Path = "results",
    table: Table = "rows",
    *,
    by: str | Sequence[str] | None = None,
    measures: str | Sequence[str] | None = None,
    given: str | None = None,
) -> pd.DataFrame:
    """Read a results folder, or one study's folder in it, into one table.

    rows: one probe row a question, step and run, with the columns of results/README.md; rows at steps -1 and 0, which
    many runs share, are repeated for each of them. sequence: regime sequential's readings right after each batch of
    edits, never mixed with the rows, whose step 0 is read when all edits are written. relearn: readings while
    forgotten edits are taught again (groups `forgotten` and `never_edited`; step: of relearning). scores: held-out
    loss and accuracy of the task, and the abilities'. weights: what training did to the edited matrices. runs: the
    keys of each run, complete or not. facts, questions: what was asked, by base_id. Raises UserError if nothing is
    there, or if a file is not as it was written (Store.check_all). A study's folder that holds an excerpt alone
    (retention/excerpt.py) is read from it, with fewer columns.

    by: means instead of rows, one line for each combination of these columns (of `rows`, or an axis of the grid), in
    their order: of each of `measures` (all_correct unless said; see MEASURES) the mean over rows in which it is not
    null, and their number, as <measure>_n. A store too large for memory is read so, by the columns that are needed.
    given: of those questions alone for which this criterion was true at step 0 of the same edit: all_correct by
    all_correct is retention. A mean over rows has no interval; retention.statistics takes facts and runs as units.

        retention.load("results", by=["editor", "objective", "group", "step"], given="all_correct")
    """
    if table not in get_args(Table):
        raise UserError(
            f"load: no table {table!r}{nearest(table, get_args(Table))}; there are: {', '.join(get_args(Table))}"
        )
    if (found := excerpt.at(Path(path))) is not None:
        if by is not None:
            raise UserError(f"{found}: an excerpt; `by` is for results folders, use a pandas groupby here")
        return excerpt.read(found, table)
    store, runs = _runs(Path(path))
    if by is None and (measures is not None or given is not None):
        raise UserError("load: `measures` and `given` go with `by`: without it every row is read as it is")
    if by is not None and table != "rows":
        raise UserError(f"load: `by` gives means of the table rows, not of {table}")
    if table == "runs":
        return runs.assign(state=_states(store, runs))
    kind: Kind = "bases" if table in ("facts", "questions") else "runs"
    key = "base_id" if kind == "bases" else "run_id"
    done = runs[runs["complete"]]
    if done.empty:
        raise UserError(f"{store.root}: no run is complete; `retention status` tells what is left")
    columns = None if by is None else _asked_for(by, measures, given, store, done)
    read: tuple[tuple[Kind, str], ...] = (("bases", "base_id"), ("edits", "edit_id"), ("runs", "run_id"))
    store.check_all((k, i) for k, name in read if kind in ("runs", k) for i in done[name].drop_duplicates())
    if columns is not None:
        with _Files(store, done) as opened:
            return _means(opened, *columns, given)
    if table in ("rows", "sequence", "relearn"):
        with _Files(store, done) as opened:
            return _rows(opened, store, table)  # type: ignore[arg-type]
    files = {k: store.folder(kind, k) / f"{table}.parquet" for k in done[key].drop_duplicates()}
    tables = [pd.read_parquet(file).assign(**{key: k}) for k, file in files.items() if file.is_file()]
    if not tables:
        hint = ": no run read the edited matrices (weights: true)" if table == "weights" else ""
        raise UserError(f"{store.root}: no {table}.parquet with any run of this study{hint}")
    return pd.concat(tables, ignore_index=True)


def place(path: Path) -> tuple[Store, str | None]:
    """A results folder and None, or of a study's folder the results folder around it and the study's name."""
    path = path.absolute() if path.name in ("", "..") else path  # `.` has no name of its own
    if not (path / "store.json").is_file() and (path.parent / "store.json").is_file():
        return Store(path.parent), path.name
    return Store(path), None


def _runs(path: Path) -> tuple[Store, pd.DataFrame]:
    """The store, and the keys of the runs of one study or of all in it, complete or not."""
    store, study = place(path)
    path = store.root
    names = store.studies()
    if study is not None and study not in names:
        near = difflib.get_close_matches(study, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(names) or 'none'}"
        raise UserError(f"{path}: no study {study!r}{hint}")
    chosen = [study] if study is not None else names
    if not chosen:
        raise UserError(f"{path}: no study has been run here yet")
    runs = pd.concat([store.read_study(name).assign(study=name) for name in chosen])
    runs["complete"] = [store.complete("runs", run_id) for run_id in runs["run_id"]]
    if study is None:
        runs = runs.drop_duplicates("run_id")
    return store, runs.reset_index(drop=True)


def _states(store: Store, runs: pd.DataFrame) -> list[str]:
    """Of each run: `ok`, `to do`, or the stage that failed and why, in one line."""
    failed = {(f["stage"], f["key"]): f"{f['stage']} failed: {f['error']}".partition("\n")[0] for f in store.failures()}
    found = []
    for run in runs.itertuples():
        stages = (("prepare", run.base_id), ("edit", run.edit_id), ("tune", run.run_id))
        found.append("ok" if run.complete else next((failed[at] for at in stages if at in failed), "to do"))
    return found


# ------------------------------------------------------------------------------------------------ in DuckDB


class _Files:
    """Probe files as views of a DuckDB connection that can read nothing else.

    `cells` is the table of the runs; `bases`, `edits`, `runs`, `sequence` and `relearn` are the rows of their files,
    where there are any. Names and paths come from a results folder, which may be a stranger's: every identifier passes
    `_quoted`, no path is a pattern (DuckDB would expand `*`, `?` and `[`, with no way to escape them all, and read
    columns from folders named `step=7`), and once the views are there the connection opens no other file.
    """

    VIEWS: Mapping[str, tuple[Kind, str]] = MappingProxyType(
        {
            **{kind: (kind, "probes-*.parquet") for kind in KINDS},
            "sequence": ("edits", "sequence-*.parquet"),
            "relearn": ("runs", "relearn-*.parquet"),
        }
    )

    def __init__(self, store: Store, done: pd.DataFrame) -> None:
        import duckdb

        self.axes = _axes(store, done)
        self._closing = ExitStack()
        self.connection: DuckDBPyConnection = self._closing.enter_context(duckdb.connect())
        self.query("SET preserve_insertion_order = true")
        self.query("SET enable_progress_bar = false")  # it would print into our callers' output
        self.connection.register("cells", done[[*IDS, *CELL, *self.axes]])
        if EXPANDED.search(str(store.root)):
            alias = Path(self._closing.enter_context(TemporaryDirectory(prefix="retention-"))) / "results"
            alias.symlink_to(store.root.absolute())
            store = Store(alias)
        found = {name: self._paths(store, done, *where) for name, where in self.VIEWS.items()}
        self.views = frozenset(name for name, paths in found.items() if paths)
        self.query(f"SET allowed_paths = [{_texts(path for paths in found.values() for path in paths)}]")
        self.query("SET enable_external_access = false")
        absent = ", ".join(f"NULL::{kind} AS {_quoted(name)}" for name, kind in ADDED.items())
        for name in self.views:
            files = f"read_parquet([{_texts(found[name])}], hive_partitioning = false, union_by_name = true)"
            self.query(
                f"CREATE TEMP VIEW {_quoted(name)} AS "
                f"SELECT * FROM {files} UNION ALL BY NAME SELECT {absent} WHERE false"
            )
        self.query("SET lock_configuration = true")

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    @staticmethod
    def _paths(store: Store, done: pd.DataFrame, kind: Kind, pattern: str) -> list[str]:
        keys = done[f"{kind[:-1]}_id"].drop_duplicates()
        return [str(path) for key in keys for path in sorted(store.folder(kind, key).glob(pattern))]

    def query(self, sql: str) -> DuckDBPyConnection:
        """Run one statement. Raises ValueError for several: a name that was not quoted could add one."""
        (statement,) = self.connection.extract_statements(sql)
        return self.connection.execute(statement)

    def column(self, name: str) -> str:
        """A column of the joined rows: of the row `r` itself, or of its cell `c`."""
        if name in ("seed", "facts_seed"):
            return f"CAST(c.{_quoted(name)} AS INTEGER) AS {_quoted(name)}"
        return f"{'r' if _of_row(name) else 'c'}.{_quoted(name)}"

    def names(self, views: Sequence[str]) -> dict[str, str]:
        """For each column of names, a type of DuckDB's that counts its values: far smaller on the way than texts."""
        apart = [name for name in NAMES if not _of_row(name)]
        shared = ", ".join(_quoted(name) for name in NAMES if _of_row(name))
        self.query(
            f"CREATE TEMP TABLE shared AS SELECT DISTINCT {shared} "
            f"FROM ({' UNION ALL '.join(f'SELECT {shared} FROM {view}' for view in views)})"
        )
        found = {}
        for name in NAMES:
            source = "cells" if name in apart else "shared"
            texts = f"SELECT DISTINCT {_quoted(name)} t FROM {source} WHERE t IS NOT NULL"
            if self.query(f"SELECT count(*) FROM ({texts})").fetchone() != (0,):
                found[name] = _quoted(f"names of {name}")
                self.query(f"CREATE TYPE {found[name]} AS ENUM (SELECT t FROM ({texts}) ORDER BY t)")
        return found


def _quoted(name: str) -> str:
    """Write an identifier as SQL."""
    return '"' + name.replace('"', '""') + '"'


def _texts(values: Iterable[str]) -> str:
    """Write texts as a list of SQL literals."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)


def _of_row(name: str) -> bool:
    """Whether a column stands in the rows as they are stored. The others tell runs apart: null in shared rows."""
    return name in ROWS.names and name not in (*IDS, *CELL)


def _axes(store: Store, done: pd.DataFrame) -> list[str]:
    """Return the settings that a grid varies besides the parts (tune.steps, say): columns of their own.

    Raises UserError for a column that no setting can have.
    """
    found = [name for name in done.columns if name not in (*IDS, "only", "study", "complete", *CELL)]
    if strange := [name for name in found if not AXIS.fullmatch(str(name))]:
        raise UserError(
            f"{store.root}: runs.parquet has a column {strange[0]!r}, which is no setting's name (letters, digits, "
            "'_' and '.'); it was not written by retention"
        )
    return found


def _rows(files: _Files, store: Store, table: Literal["rows", "sequence", "relearn"]) -> pd.DataFrame:
    parts: dict[str, str]
    if table == "rows":
        parts = {f"{kind[:-1]}_id": kind for kind in KINDS if kind in files.views}
    elif table in files.views:
        parts = {f"{files.VIEWS[table][0][:-1]}_id": table}
    elif table == "sequence":
        raise UserError(f"{store.root}: no run edited in sequence (regime: sequential)")
    else:
        raise UserError(f"{store.root}: no run taught forgotten edits again (relearn), or none had forgotten any")
    names = files.names(list(parts.values()))
    columns = ", ".join(
        f"CAST({files.column(name)} AS {names[name]}) AS {_quoted(name)}" if name in names else files.column(name)
        for name in (*ROWS.names, *files.axes)
    )
    # A run that writes one edit alone (regime single) asks only some of the questions that its base answered.
    asked = "SELECT DISTINCT edit_id, question_id FROM edits"
    alone = f"JOIN ({asked}) q ON q.edit_id = c.edit_id AND q.question_id = r.question_id"
    selects = [
        f"SELECT {columns} FROM {view} r JOIN cells c USING ({key}) {alone if key == 'base_id' else ''}"
        for key, view in parts.items()
    ]
    order = 'run_id, step, edits_applied, "group", form, question_id'
    rows = files.query(f"SELECT * FROM ({' UNION ALL '.join(selects)}) ORDER BY {order}").df()
    for name in NAMES:
        rows[name] = rows[name].cat.as_unordered() if name in names else rows[name].astype("category")
    return rows


def _asked_for(
    by: str | Sequence[str],
    measures: str | Sequence[str] | None,
    given: str | None,
    store: Store,
    done: pd.DataFrame,
) -> tuple[list[str], list[str]]:
    """The columns of an aggregate: those it is grouped by, those it is about. Raises UserError for what is unknown."""
    groups = list(dict.fromkeys([by] if isinstance(by, str) else by))
    about = list(dict.fromkeys([measures] if isinstance(measures, str) else measures or ["all_correct"]))
    columns = [*(name for name in ROWS.names if name not in (*MEASURES, "generated")), *_axes(store, done)]
    allowed = {"by": (groups, columns), "measures": (about, MEASURES), "given": ([given] if given else [], CRITERIA)}
    for what, (names, known) in allowed.items():
        for name in names:
            if name not in known:
                raise UserError(f"load: {what}: unknown {name!r}{nearest(name, known)}; expected of {', '.join(known)}")
    return groups, about


def _means(files: _Files, by: list[str], measures: list[str], given: str | None) -> pd.DataFrame:
    """Sums and counts within each base, edit and run first: rows that runs share are added up once, then repeated."""
    within = "".join(f", r.{_quoted(name)}" for name in by if _of_row(name))
    sums = "".join(
        f", sum(CAST(r.{_quoted(m)} AS DOUBLE)) AS {_quoted(m)}, count(r.{_quoted(m)}) AS {_quoted(m + '_n')}"
        for m in measures
    )
    right = "FROM edits" + (f" WHERE {_quoted(given)}" if given else "")
    among = f"SEMI JOIN (SELECT edit_id, question_id {right}) USING (edit_id, question_id)" if given else ""
    asked = f"(SELECT DISTINCT base_id, edit_id, question_id {right}) q USING (base_id, question_id)"
    parts = [
        ("edit_id", f"SELECT q.edit_id{within}{sums} FROM bases r JOIN {asked} GROUP BY ALL"),
        ("edit_id", f"SELECT r.edit_id{within}{sums} FROM edits r {among} GROUP BY ALL"),
        ("run_id", f"SELECT r.run_id{within}{sums} FROM runs r {among} GROUP BY ALL"),
    ]
    columns = ", ".join(
        [files.column(name) for name in by] + [f"r.{_quoted(m)}, r.{_quoted(m + '_n')}" for m in measures]
    )
    joined = [
        f"SELECT {columns} FROM ({sql}) r JOIN cells c USING ({key})"
        for key, sql in parts[: 2 + ("runs" in files.views)]
    ]
    groups = ", ".join(_quoted(name) for name in by)
    means = ", ".join(
        f"sum({_quoted(m)}) / sum({_quoted(m + '_n')}) AS {_quoted(m)}, "
        f"CAST(sum({_quoted(m + '_n')}) AS BIGINT) AS {_quoted(m + '_n')}"
        for m in measures
    )
    return files.query(
        f"SELECT {groups}{', ' * bool(by)}{means} FROM ({' UNION ALL '.join(joined)}) "
        + (f"GROUP BY {groups} ORDER BY {groups}" if by else "")
    ).df()
