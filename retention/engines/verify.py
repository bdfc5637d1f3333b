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

from retention.cache_folders import BROKEN, MARKER, fault
from retention.store import CHECKSUMS, KINDS, SCHEMA, Kind, Store


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
    for name in store.studies():
        if found := store.study_fault(name):
            faults.append(Fault(path=store.root / name / "runs.parquet", text=found))
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


def verify_cache(cache: Path) -> Report:
    """Check every model, covariance and v* of a cache against the checksums that they were written with."""
    from retention.checked_tensors import read_checked  # torch takes its time

    folders = {path.parent for path in cache.rglob(MARKER)}
    folders |= {path for kind in ("worlds", "facts") for path in cache.glob(f"{kind}/*") if path.is_dir()}
    folders = {path for path in folders if path.name[0] != "."}
    files = [p for p in sorted(cache.rglob("*.safetensors")) if p.name[0] != "." and p.parent not in folders]
    files = [p for p in files if BROKEN not in str(p)]
    told = {folder: fault(folder) for folder in sorted(folders)}
    told |= {file: found if isinstance(found := read_checked(file), str) else None for file in files}
    faults = tuple(Fault(path=path, text=f"{path}: {text}") for path, text in told.items() if text is not None)
    return Report(checked=len(told), files=len(files) + sum(len(list(f.iterdir())) for f in folders), faults=faults)


def remove(report: Report) -> list[Path]:
    """Delete what is broken; returns what was deleted. An artefact's mark goes first: never half there."""
    for path in report.broken:
        if path.is_dir():
            (path / "complete.json").unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
            if path.name == "runs.parquet":  # of a study, which `run` records again
                (path.parent / CHECKSUMS).unlink(missing_ok=True)
    return list(report.broken)
