"""Check a whole results folder against what was written, and remove what is broken.

Keys are made of content and stages are deterministic, so a removed artefact is computed again as it was, and what was
computed from it stays. Should it come out otherwise (another machine), `made_from` in complete.json tells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from retention.store import KINDS, SCHEMA, Kind, Store


@dataclass(frozen=True, kw_only=True)
class Fault:
    path: Path  # what --repair removes
    text: str


@dataclass(frozen=True, kw_only=True)
class Report:
    checked: int  # artefacts: bases, edits, runs
    files: int  # in them
    faults: tuple[Fault, ...]

    @property
    def broken(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(fault.path for fault in self.faults))


def verify(store: Store) -> Report:
    """Every checksum, every record, every study's own files. Reads all of it: about a gigabyte a second."""
    faults: list[Fault] = []
    checked = files = 0
    for kind in KINDS:
        for folder in sorted(p for p in (store.root / kind).glob("*") if p.is_dir()):
            checked += 1
            files += sum(1 for p in folder.rglob("*") if p.is_file())
            faults += [Fault(path=folder, text=text) for text in _artefact(store, kind, folder)]  # type: ignore[arg-type]
    for study in sorted(p.parent for p in store.root.glob("*/study.yaml")):
        faults += _study(study)
    for path in sorted((store.root / "failed").glob("*/*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            faults.append(Fault(path=path, text=f"{path}: damaged: {error}"))
    return Report(checked=checked, files=files, faults=tuple(faults))


def _artefact(store: Store, kind: Kind, folder: Path) -> Iterator[str]:
    key = folder.name
    if not (folder / "complete.json").is_file():
        yield f"{folder}: is not complete: an interrupted attempt, or complete.json was removed"
        return
    found = list(store.faults(kind, key))
    yield from found
    if found:
        return
    try:
        named = store.settings(kind, key).get(f"{kind[:-1]}_id", key)
    except (ValueError, FileNotFoundError, AttributeError) as error:
        yield f"{folder / kind[:-1]}.json: damaged: {error}"
        return
    if named != key:
        yield f"{folder}: holds {kind[:-1]} {named}, not {key}: a folder was renamed or copied"
    for path in sorted(folder.glob("*.parquet")):
        written = (pq.read_schema(path).metadata or {}).get(b"retention_schema", b"").decode()
        if written != str(SCHEMA):
            yield f"{path}: written with schema {written or 'unknown'}; this version reads schema {SCHEMA}"


def _study(folder: Path) -> Iterator[Fault]:
    path = folder / "runs.parquet"
    try:
        pq.read_table(path)
    except FileNotFoundError:
        return  # a summary that is committed without its rows
    except (OSError, ValueError) as error:
        yield Fault(path=path, text=f"{path}: damaged: {error}")


def remove(report: Report) -> list[Path]:
    """Delete what is broken; returns what was deleted. An artefact's mark goes first: never half there."""
    for path in report.broken:
        if path.is_dir():
            (path / "complete.json").unlink(missing_ok=True)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return list(report.broken)
