"""A run's fine-tunes, saved on the way, so that an interrupted run goes on from there and ends with the same numbers.

In the folder that the run is being computed in: `resume/tune-2`, all weights and what the run holds as its second
fine-tune begins; `resume/tune-2-00000120`, what training has moved by its step 120. Gone once the run is published.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from retention import memory, snapshot
from retention.interrupts import Held

EVERY = 60.0  # seconds of training between two snapshots at least: what a kill may cost
SHARE = 0.02  # of the time that training may spend on them at most, what is written meanwhile included
SPARE = 2  # copies of a snapshot that free memory must hold, for one to be taken and written while training goes on


class Resume:
    """Asked by the stage where to begin, and told by it where it is."""

    def __init__(self, folder: Path, source: str, signals: Held, say: Callable[[str], None]) -> None:
        """folder: of the run's files. source: content of the edit that it starts from; a snapshot of another is none.

        What an earlier attempt left in the folder is looked through: the latest snapshot that is whole and whose
        readings are what they were is `begun`, everything else is removed.
        """
        self.folder, self.source, self.signals, self._say = folder, source, signals, say
        self.place = folder / "resume"
        self.run: dict[str, Any] = {}  # what the run holds now, as of the last step: set by the stage
        self.number = 1  # of the present fine-tune
        self._last, self._cost, self._unable = time.monotonic(), 0.0, False
        self._writing: Thread | None = None
        self._failed: OSError | None = None
        self._sums: dict[str, str] = {}  # of readings' files, which are written once
        self._kept: list[Path] = []
        self.first, self.begun = self._found()
        for path in self.place.glob("*"):
            if path not in self._kept:
                shutil.rmtree(path)
        readings = (self.begun or self.first or {"files": {}})["files"]
        for path in folder.glob("*.parquet"):
            if path.name not in readings:
                path.unlink()  # read after the snapshot: will be read again

    # -------------------------------------------------------------------------------------------- looking back

    def before(self) -> dict[str, Any] | None:
        """`run` as it was when the snapshot was made; None where there is none."""
        found = self.begun or self.first
        return None if found is None else found["run"]

    def _found(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The beginning of a later fine-tune than the first, and what was saved within one; either may lack."""
        names = sorted((path.name for path in self.place.glob("tune-*")), reverse=True)
        for number in sorted({int(name.split("-")[1]) for name in names}, reverse=True):
            self.number = number
            first = self._whole(self._at()) if number > 1 else None
            if number > 1 and first is None:
                continue
            within = (self._whole(self.place / name) for name in names if name.startswith(f"tune-{number}-"))
            begun = next((found for found in within if found is not None), None)
            if first is not None or begun is not None:
                return first, begun
        self.number = 1
        return None, None

    def _whole(self, path: Path) -> dict[str, Any] | None:
        """A snapshot that can be built on; None for any other."""
        try:
            found: dict[str, Any] = snapshot.load(path)
        except ValueError:
            return None
        if found["source"] != self.source or found["files"] != {name: self._sum(name) for name in found["files"]}:
            return None
        self._kept.append(path)
        return found

    def _sum(self, name: str) -> str | None:
        path = self.folder / name
        return snapshot.checksum(path) if path.is_file() else None

    def _at(self, step: int | None = None) -> Path:
        return self.place / (f"tune-{self.number}" if step is None else f"tune-{self.number}-{step:08d}")

    # -------------------------------------------------------------------------------------------- on the way

    def due(self) -> bool:
        """Whether training should be saved after this step: a signal waits, or enough time has passed."""
        if self.signals.waiting is not None:
            return True
        if self._unable or (self._writing is not None and self._writing.is_alive()):
            return False
        return time.monotonic() - self._last >= max(EVERY, self._cost / SHARE)

    def save(self, state: dict[str, Any]) -> None:
        """Within a fine-tune. state: the trainer's, with its `step`."""
        self._write(self._at(state["step"]), {"step": state["step"], "training": state})

    def begin(self, number: int, state: dict[str, Any]) -> None:
        """A later fine-tune than the first begins. state: all weights, and what outlasts one fine-tune."""
        self.number, self.first, self.begun = number, None, None
        self._write(self._at(), state)

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        """Take a snapshot, and write it while training goes on: now, where a signal waits or memory holds no copy."""
        self.settle()
        if self._unable:
            return
        started = time.monotonic()
        for file in self.folder.glob("*.parquet"):
            if file.name not in self._sums:
                self._sums[file.name] = snapshot.checksum(file)
        try:
            taken = snapshot.taken({**value, "run": self.run, "source": self.source, "files": self._sums})
        except TypeError as error:
            self._give_up(error)
            return
        if self.signals.waiting is None and SPARE * taken.size < memory.available():
            taken = taken.copied()
            self._cost = time.monotonic() - started
            self._writing = Thread(target=self._finish, args=(taken, path, time.thread_time), daemon=True)
            self._writing.start()
        else:
            self._cost = 0.0
            self._finish(taken, path, lambda: time.monotonic() - started)
            self.settle()
        self._last = time.monotonic()

    def _finish(self, taken: snapshot.Taken, path: Path, clock: Callable[[], float]) -> None:
        try:
            taken.write(path)
        except OSError as error:
            self._failed = error
        else:
            for other in self.place.glob("*"):
                if other not in (path, self._at()):
                    shutil.rmtree(other, ignore_errors=True)
        self._cost += clock()

    def settle(self) -> None:
        """Wait until what was taken is written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failed is not None:
            self._give_up(self._failed)
            self._failed = None

    def _give_up(self, error: Exception) -> None:
        self._unable = True  # the run goes on without; killed, it begins again at its edit
        self._say(f"cannot be saved on the way: {error}")

    def __enter__(self) -> Resume:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()

    def over(self) -> None:
        """All is read: nothing of this is published."""
        self.settle()
        shutil.rmtree(self.place, ignore_errors=True)
