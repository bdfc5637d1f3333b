"""Folders of the cache that appear whole or not at all, and are checked before they are used.

A folder is written beside its place, its marker last (the hash of every file), and moved there by one rename. Knows
nothing of what the folders hold.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from retention.types import UserError

MARKER = "made.json"


def default_cache() -> Path:
    """Where pretrained worlds, converted models, covariances and v* are: $RETENTION_CACHE, or the user's cache."""
    if path := os.environ.get("RETENTION_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retention"


def publish(place: Path, write: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Have `write` fill a folder and move it to `place`; returns `place`.

    Of several processes that want the same, one writes and the others wait; what an interrupted one left is removed.
    `write` returns what the marker records. Raises UserError as `sound` does.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent / f".{place.name}.lock"):
        if sound(place):
            return place
        for left in place.parent.glob(f".{place.name}-*"):  # under the lock nobody is writing it
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            record = dict(write(folder))
            files = {path.name: file_digest(path).hex() for path in sorted(folder.iterdir())}
            text = json.dumps({**record, "files": files}, indent=1)
            (folder / MARKER).write_text(text + "\n", encoding="utf-8")
            folder.chmod(0o755)
            os.replace(folder, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return place


def sound(place: Path) -> bool:
    """Whether the folder is there, every file as it was written.

    Raises UserError for a folder that was changed: it is left as it is, since the change may be somebody's work.
    """
    if not place.exists():
        return False
    if found := _fault(place):
        raise UserError(f"{place} in the cache is not as it was written: {found}; remove this folder and run again")
    return True


def _fault(place: Path) -> str | None:
    try:
        files = json.loads((place / MARKER).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if file_digest(place / Path(name).name).hex() != expected:
                return f"{name} has changed"
        more = sorted({path.name for path in place.iterdir()} - {*files, MARKER})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MARKER} or a file it names cannot be read ({type(error).__name__})"
    return f"{more[0]} was added" if more else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the kernel lets go of it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_digest(file: Path) -> bytes:
    """SHA-256 of a file's bytes. Read once in a process, unless its size or its time of change is another."""
    stat = file.stat()
    return _digest(file.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(file: Path, _size: int, _changed: int) -> bytes:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
