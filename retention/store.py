"""The layout of a results folder: what is written where, and when it counts as complete and as whole.

    results/store.json                  marks the folder as ours, with the schema version
    results/bases/<base_id>/            facts.parquet  questions.parquet  probes--00001.parquet
    results/edits/<edit_id>/            delta.safetensors  edits.parquet  probes-000000.parquet
    results/runs/<run_id>/              probes-000100.parquet ...  scores.parquet  training.parquet
                                        (probes-000001-000100.parquet once `retention compact` has put them together)
      each with settings (base.json, edit.json, run.json) and, written last, complete.json with every file's checksum
    results/<study>/                    study.yaml  runs.parquet  checksums.json
    results/failed/<kind>/<id>.json     stages that failed, with the traceback
    results/.work/                      what is being computed: claims, and artefacts that are not complete yet

Files and artefacts appear whole or not at all: each is written under a temporary name and renamed. What is read back
must be what was written: complete.json has the checksums. pyarrow writes, and reading.py reads tables. Knows nothing of
models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from retention.cache_folders import share
from retention.types import Question, Reading, UserError

SCHEMA = 2  # of the rows and the layout; raised when files written before could no longer be read
# Columns that rows written earlier under the same schema lack, and their types in SQL: null there.
ADDED = {"lead": "FLOAT", "precision": "VARCHAR"}
Kind = Literal["bases", "edits", "runs"]
KINDS: tuple[Kind, ...] = ("bases", "edits", "runs")
RESERVED = (*KINDS, "failed")  # names that no study can have
CHECKSUMS = "checksums.json"  # of a study's own two files, in its folder
SMALL = 1 << 20  # bytes; a quick check compares the checksums of files up to this size, and of others the size alone

_name = pa.dictionary(pa.int32(), pa.string())
ROWS = pa.schema(
    [
        ("base_id", _name),
        ("edit_id", _name),
        ("run_id", _name),
        ("model_id", _name),
        ("editor", _name),
        ("task", _name),
        ("objective", _name),
        ("adapter", _name),
        ("mitigations", _name),
        ("trains_edited", pa.bool_()),
        ("seed", pa.int32()),
        ("facts_seed", pa.int32()),
        ("step", pa.int32()),
        ("tokens_seen", pa.int64()),
        ("edits_applied", pa.int32()),
        ("fact_id", pa.string()),
        ("question_id", pa.string()),
        ("group", _name),
        ("form", _name),
        ("logp_target", pa.float32()),
        ("logp_foil", pa.float32()),
        ("n_target_tokens", pa.int16()),
        ("n_foil_tokens", pa.int16()),
        ("target_rank", pa.int32()),
        ("first_correct", pa.bool_()),
        ("all_correct", pa.bool_()),
        ("lead", pa.float32()),
        ("prefers_target", pa.bool_()),
        ("precision", _name),
        ("generated", pa.string()),
        ("gen_exact", pa.bool_()),
        ("gen_contains", pa.bool_()),
        ("state", _name),
    ]
)
SCORES = pa.schema(
    [
        ("run_id", _name),
        ("step", pa.int32()),
        ("tokens_seen", pa.int64()),
        ("score", _name),
        ("value", pa.float64()),
        ("n", pa.int32()),
        ("state", _name),
    ]
)


# What differs from one computation to the next although the numbers are the same: files that tell seconds and versions.
TIMED = ("base.json", "edit.json", "run.json", "edits.parquet", "training.parquet")
REPAIR = "\n`retention verify RESULTS --repair` removes what is broken, so that the next run computes it again"


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The columns that are the same in all rows of one file. None: the row is shared by many (steps -1 and 0)."""

    base_id: str | None
    edit_id: str | None = None
    run_id: str | None = None
    model_id: str
    editor: str | None = None
    task: str | None = None
    objective: str | None = None
    adapter: str | None = None
    mitigations: str | None = None
    trains_edited: bool | None = None  # whether fine-tuning may move a weight that the edit changed
    seed: int | None = None
    facts_seed: int | None


class Store:
    """One results folder."""

    def __init__(self, root: str | Path, *, create: bool = False) -> None:
        """Open a folder, or with `create` make it one. Raises UserError if it holds something else."""
        self.root = Path(root)
        mark = self.root / "store.json"
        if mark.is_file():
            try:
                marked = json.loads(mark.read_text())
                schema = marked["schema"] if marked["format"] == "retention" else None
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(
                    f"{mark}: damaged; expected {json.dumps({'format': 'retention', 'schema': SCHEMA})}"
                ) from None
            if schema != SCHEMA:
                raise UserError(
                    f"{self.root}: written with schema {schema}; this version reads schema {SCHEMA}. "
                    "Use another --results folder"
                )
            return
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root}: is a file; --results wants a folder")
        above = next(parent for parent in self.root.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UserError(f"{above}: is a file; --results wants a folder")
        self._refuse_foreign()
        if not create:
            raise UserError(f"{self.root}: no results here; `retention run STUDY --results {self.root}` makes some")
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"format": "retention", "schema": SCHEMA})

    @classmethod
    def peek(cls, root: str | Path) -> Store:
        """The store as it is or would be: nothing is made. Raises UserError if the folder holds something else."""
        root = Path(root)
        if (root / "store.json").is_file() or (root.exists() and not root.is_dir()):
            return cls(root)
        store = cls.__new__(cls)
        store.root = root
        store._refuse_foreign()
        return store

    def _refuse_foreign(self) -> None:
        # Summaries and a README are committed beside raw rows, so text files alone do not make a folder foreign.
        foreign = next((p.name for p in sorted(self.root.glob("*")) if not self._ours(p)), None)
        if foreign is not None:
            raise UserError(
                f"{self.root}: is not a results folder of retention (it holds {foreign!r} and no store.json); "
                "give an empty or a new folder with --results"
            )

    @staticmethod
    def _ours(path: Path) -> bool:
        if path.is_dir():
            marks = ("study.yaml", "summary.csv", "replication.csv")
            return path.name in RESERVED or any((path / mark).is_file() for mark in marks)
        # store.json: another process has made the folder ours since we looked
        return path.suffix in (".md", ".csv", ".png", ".pdf") or path.name[0] == "." or path.name == "store.json"

    def folder(self, kind: Kind, key: str) -> Path:
        assert re.fullmatch(r"[A-Za-z0-9_-]+", key), "keys are hashes: no name from a study becomes a path"
        return self.root / kind / key

    def complete(self, kind: Kind, key: str) -> bool:
        """Whether the artefact's completion mark, which is written last, is there."""
        return (self.folder(kind, key) / "complete.json").is_file()

    @contextmanager
    def publishing(self, kind: Kind, key: str, *, resume: bool = False) -> Iterator[Path]:
        """A folder to write an artefact into; on leaving without an error it is published whole, by one rename.

        What an interrupted attempt left is removed first, or with `resume` is there: its last folder, as it was when
        it was killed or interrupted (an error removes it, so that a new attempt is a fresh one). Every file in it at
        the end is published. Whoever writes into an earlier attempt's folder finds it gone.
        """
        folder, partial = self.folder(kind, key), self.root / ".work" / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        work = partial / f"{kind}-{key}.{uuid.uuid4().hex[:8]}"
        left = sorted(partial.glob(f"{kind}-{key}.*"), key=lambda p: p.stat().st_mtime_ns)
        if resume and left:
            os.rename(left.pop(), work)
            for path in [p for p in work.rglob(".*") if p.is_file()]:
                path.unlink()  # a file that was being written
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        work.mkdir(exist_ok=True)
        try:
            yield work
            self._mark(kind, work)
            if folder.exists() and not self.complete(kind, key):
                shutil.rmtree(folder)
            folder.parent.mkdir(exist_ok=True)
            if not folder.exists():
                os.rename(work, folder)
        except BaseException as error:
            if not resume or isinstance(error, Exception):
                shutil.rmtree(work, ignore_errors=True)
            raise

    def _mark(self, kind: Kind, folder: Path) -> None:
        share(folder)
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        mark: dict[str, Any] = {"schema": SCHEMA, "sha256": {name: _checksum(path) for name, path in files.items()}}
        mark["bytes"] = {name: path.stat().st_size for name, path in files.items()}
        record = folder / f"{kind[:-1]}.json"
        needs = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        parts: tuple[tuple[Kind, str], ...] = (("bases", "base_id"), ("edits", "edit_id"))
        mark["made_from"] = {
            f"{other}/{needs[name]}": self.content(other, needs[name])
            for other, name in parts
            if other != kind and name in needs and self.complete(other, needs[name])
        }
        write_json(folder / "complete.json", mark)

    def mark(self, kind: Kind, key: str) -> dict[str, Any]:
        """complete.json: schema, and by file sha256 and bytes; made_from: the content of what it was computed from.

        Raises UserError if it is damaged or was written by another schema version.
        """
        path = self.folder(kind, key) / "complete.json"
        try:
            mark = json.loads(path.read_text(encoding="utf-8"))
            schema, files = mark["schema"], mark["sha256"]
            assert isinstance(files, dict)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise UserError(f"{path}: damaged{REPAIR}") from None
        if schema != SCHEMA:
            raise UserError(f"{path}: written with schema {schema}; this version reads schema {SCHEMA}{REPAIR}")
        return mark

    def content(self, kind: Kind, key: str) -> str:
        """Digest of what other stages read of an artefact. Equal for two computations of the same numbers."""
        files = self.mark(kind, key)["sha256"]
        numbers = {name: digest for name, digest in files.items() if not name.endswith(TIMED)}
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]

    def faults(self, kind: Kind, key: str, *, quick: bool = False) -> Iterator[str]:
        """What is wrong with a published artefact, a line for each file. `quick`: see SMALL."""
        folder = self.folder(kind, key)
        try:
            mark = self.mark(kind, key)
        except UserError as error:
            yield str(error).removesuffix(REPAIR)
            return
        there = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}
        if "bytes" not in mark:  # written before files in folders of an artefact were named
            there = {name: path for name, path in there.items() if "/" not in name}
        there.pop("complete.json", None)
        for name, digest in mark["sha256"].items():
            if (path := there.pop(name, None)) is None:
                yield f"{folder / name}: is missing"
                continue
            size, expected = path.stat().st_size, mark.get("bytes", {}).get(name)
            if expected is not None and size < expected and path.suffix != ".json":  # a record is edited by hand
                yield f"{path}: is truncated: {size} of {expected} bytes"
            elif (expected is not None and size != expected) or (
                not (quick and size > SMALL) and _checksum(path) != digest
            ):
                yield f"{path}: is not what was written: edited by hand, or damaged (its checksum differs)"
        for path in there.values():
            yield f"{path}: does not belong here: complete.json does not name it"
        for needed, digest in mark.get("made_from", {}).items():
            other, _, its = needed.partition("/")
            if self.complete(other, its):  # type: ignore[arg-type]
                try:
                    same = self.content(other, its) == digest  # type: ignore[arg-type]
                except UserError:
                    continue  # told of where it lies
                if not same:
                    yield f"{folder}: was computed from another {needed} than the one that is here now"

    def check(self, kind: Kind, key: str, *, quick: bool = False) -> None:
        """Raises UserError that names each file of an artefact that is not as it was written."""
        if found := list(self.faults(kind, key, quick=quick)):
            raise UserError("\n".join(found) + REPAIR)

    def settings(self, kind: Kind, key: str) -> dict[str, Any]:
        """base.json, edit.json or run.json."""
        return json.loads((self.folder(kind, key) / f"{kind[:-1]}.json").read_text())

    def check_all(self, artefacts: Iterable[tuple[Kind, str]]) -> None:
        """A quick check of many: the sizes of all files and the checksums of those up to SMALL. Raises UserError."""
        found = [fault for kind, key in artefacts for fault in self.faults(kind, key, quick=True)]
        if found:
            raise UserError("\n".join(found) + REPAIR)

    def failures(self) -> list[dict[str, Any]]:
        """What is recorded of stages that failed (engines/_failures.py), with the `file` that holds the traceback."""
        found = []
        for path in sorted((self.root / "failed").glob("*/*.json")):
            try:
                found.append({**json.loads(path.read_text(encoding="utf-8")), "file": str(path)})
            except ValueError:
                continue  # a damaged record: the stage is tried again, and `retention verify` names the file
        return found

    def studies(self) -> list[str]:
        return sorted(p.parent.name for p in self.root.glob("*/runs.parquet"))

    def write_study(self, name: str, resolved: str, runs: Iterable[Mapping[str, Any]]) -> Path:
        """Record a study's settings and the keys of its runs, with their checksums, before anything runs.

        Files that hold the same already stay as they are; damaged ones are written again.
        """
        if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(
                f"{name!r}: cannot be a study's name; {', '.join(RESERVED)} are folders of the store itself"
            )
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        settings, keys, table = folder / "study.yaml", folder / "runs.parquet", table_of(list(runs))
        if not settings.is_file() or settings.read_bytes() != resolved.encode():
            write_text(settings, resolved)
        if self.study_fault(name) is not None or not pq.read_table(keys).equals(table):
            write_table(keys, table)
            write_json(folder / CHECKSUMS, {path.name: _checksum(path) for path in (settings, keys)})
        return folder

    def study_fault(self, name: str) -> str | None:
        """Say what is wrong with the record of a study, in one line; None if it is as it was written.

        A record without checksums is of an earlier version: its table only has to be readable.
        """
        folder = self.root / name
        sums, keys = folder / CHECKSUMS, folder / "runs.parquet"
        try:
            expected = json.loads(sums.read_text(encoding="utf-8")) if sums.is_file() else {}
            for file in sorted(expected):
                if _checksum(folder / Path(file).name) != expected[file]:
                    return f"{folder / file}: checksum mismatch: the file was edited or damaged"
        except FileNotFoundError as error:
            return f"{error.filename}: is missing"
        except (OSError, ValueError, TypeError, AttributeError) as error:
            return f"{sums}: damaged ({type(error).__name__})"
        try:
            pq.read_table(keys)
        except FileNotFoundError:
            return f"{keys}: is missing"
        except (OSError, ValueError) as error:
            return f"{keys}: damaged ({type(error).__name__})"
        return None

    def read_study(self, name: str) -> pd.DataFrame:
        """Read the keys of a study's runs. Raises UserError if its record is not as it was written."""
        if found := self.study_fault(name):
            raise UserError(f"{found}\n`retention run` of this study writes it again and computes nothing twice")
        return pd.read_parquet(self.root / name / "runs.parquet")


# ------------------------------------------------------------------------------------------------ writing


def write_readings(
    path: Path, keys: Keys, readings: Sequence[tuple[Question, Reading]], tokens_seen: int | None,
    edits: int | None,
) -> None:  # fmt: skip
    """One parquet file of probe rows: the readings of one model at one step."""
    same = {name: getattr(keys, name) for name in Keys.__dataclass_fields__}
    same |= {"tokens_seen": tokens_seen, "edits_applied": edits}
    columns = []  # one by one: pyarrow takes rows of dicts apart at four times the cost
    for field in ROWS:
        if field.name in same:
            values: list[Any] = [same[field.name]] * len(readings)
        elif field.name in ("fact_id", "group", "form"):
            values = [getattr(question, field.name) for question, _ in readings]
        else:
            values = [getattr(reading, field.name) for _, reading in readings]
        columns.append(pa.array(values, field.type))
    write_table(path, pa.Table.from_arrays(columns, schema=ROWS))


def read_readings(path: Path, measure: str) -> dict[str, Any]:
    """One measure of a file of probe rows, by question id."""
    table = pq.read_table(path, columns=["question_id", measure])
    return dict(zip(table["question_id"].to_pylist(), table[measure].to_pylist(), strict=True))


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> pa.Table:
    """Rows as a table with every key that any of them has; pyarrow alone would take the first row's."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows], schema=schema)


def write_table(path: Path, table: pa.Table, *, row_group_size: int | None = None) -> None:
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"retention_schema": str(SCHEMA).encode()})
    with _appearing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=row_group_size)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with _appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A name to write under; the file then appears whole under its own. No two writers have the same."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
