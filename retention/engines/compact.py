"""Consolidate a results folder into a new one: one file of probe rows for each run instead of one for each checkpoint.

The new folder is a results folder like the old one: same keys, equal rows, verified and added to by the same commands.
It appears whole, by one rename; the old one is only read.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retention.engines import _claims
from retention.store import KINDS, Store, write_table
from retention.types import UserError

ROW_GROUP = 122_880  # rows that DuckDB reads at a time
STEPS = re.compile(r"(probes|relearn)-(-?\d+)\.parquet")


@dataclass(frozen=True, kw_only=True)
class Report:
    files: int  # in the folder that was read, and were taken over
    compact: int  # in the new one
    left: tuple[Path, ...]  # artefacts that are not complete, left out


def compact(store: Store, out: Path) -> Report:
    """Write a compact copy of a store. Every file is checked against its checksum as it is taken over.

    Bases and edits, whose files later stages read by name, are taken over as they are; so is what else lies in the
    folder, but for work in progress. Raises UserError if `out` is there, or if a file is not as it was written.
    """
    if out.exists():
        raise UserError(f"--out {out}: is there already; give a new folder")
    if out.absolute().is_relative_to(store.root.absolute()):
        raise UserError(f"--out {out}: lies within {store.root}, which would then hold itself; give a folder beside it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.compacting"
    claim = _claims.take(out.parent / f".{out.name}.claim")
    if claim is None:
        raise UserError(f"--out {out}: another `retention compact` is writing it")
    try:
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        new = Store(work, create=True)
        left: list[Path] = []
        for kind in KINDS:
            for folder in sorted(p for p in (store.root / kind).glob("*") if p.is_dir()):
                if not store.complete(kind, folder.name):
                    left.append(folder)
                    continue
                store.check(kind, folder.name)  # so that what `publishing` notes of its base and edit is as it was
                if kind == "runs":
                    with new.publishing(kind, folder.name) as target:
                        _merge(folder, target)
                else:
                    _copy(folder, new.folder(kind, folder.name))
        for path in sorted(store.root.iterdir()):
            if path.name not in (*KINDS, ".work", "store.json"):
                _copy(path, work / path.name)
        shutil.rmtree(work / ".work", ignore_errors=True)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        claim.release()
    return Report(files=_count(store.root) - sum(map(_count, left)), compact=_count(out), left=tuple(left))


def _merge(folder: Path, target: Path) -> None:
    """A run's files, those of one kind of reading in one file, in the order of their steps."""
    steps: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if found := STEPS.fullmatch(path.name):
            steps[found[1]].append((int(found[2]), path))
        elif path.name != "complete.json":
            _copy(path, target / path.name)
    for name, found_ in steps.items():
        found_.sort()
        table = pa.concat_tables([pq.read_table(path) for _, path in found_]).unify_dictionaries()
        first, last = (f"{step:06d}" for step in (found_[0][0], found_[-1][0]))
        write_table(target / f"{name}-{first}-{last}.parquet", table, row_group_size=ROW_GROUP)


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copy2(path, target)


def _count(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts)
