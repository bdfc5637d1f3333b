"""What the cache holds: folders and files that appear whole or not at all, checked each time they are used.

A folder is written beside its place, its marker last (the hash of every file), and moved there by one rename. What is
not as it was written is set aside under another name, with a warning, and computed again. Knows nothing of what the
folders hold.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

MARKER = "made.json"
BROKEN = ".broken-"  # in the name of what was set aside
log = logging.getLogger("retention")


def default_cache() -> Path:
    """Where pretrained worlds, converted models, covariances and v* are: $RETENTION_CACHE, or the user's cache."""
    if path := os.environ.get("RETENTION_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retention"


def publish(place: Path, write: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Have `write` fill a folder and move it to `place`; returns `place`.

    Of several processes that want the same, one writes and the others wait; what an interrupted one left is removed.
    `write` returns what the marker records. Others may read the folder as far as the umask lets them.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent / f".{place.name}.lock"):
        if sound(place):
            return place
        for left in place.parent.glob(f".{place.name}-*"):  # under the lock nobody is writing it
            shutil.rmtree(left, ignore_errors=True)
        with appearing(place) as folder:
            record = dict(write(folder))
            files = {path.name: file_digest(path).hex() for path in sorted(folder.iterdir())}
            text = json.dumps({**record, "files": files}, indent=1)
            (folder / MARKER).write_text(text + "\n", encoding="utf-8")
    return place


@contextmanager
def appearing(place: Path) -> Iterator[Path]:
    """Give a folder to fill beside `place`, which becomes `place` by one rename on leaving without an error."""
    folder = place.with_name(f".{place.name}-{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True)
    try:
        yield folder
        share(folder)
        os.replace(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sound(place: Path) -> bool:
    """Return whether the folder is there, every file as it was written.

    A folder that was changed is set aside, not removed: the change may be somebody's work.
    """
    if not place.exists():
        return False
    if found := fault(place):
        set_aside(place, found)
        return False
    return True


def set_aside(path: Path, why: str) -> None:
    """Move a broken file or folder of the cache out of the way, and warn."""
    aside = path.with_name(f".{path.name}{BROKEN}{uuid.uuid4().hex[:8]}")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process was faster
        return
    log.warning("%s in the cache is not as it was written: %s; moved to %s, computing it again", path, why, aside.name)


def share(path: Path) -> None:
    """Give a file, or a folder and all in it, the mode that the umask gives new ones.

    safetensors and tempfile write for the owner only, whatever the umask says; a group could not share a cache.
    """
    mask = os.umask(0)
    os.umask(mask)
    for item in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not item.is_symlink():
            item.chmod((0o777 if item.is_dir() else 0o666) & ~mask)


def fault(place: Path) -> str | None:
    """Say what differs in a folder from what its marker records; None if nothing does."""
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
