"""A run's fine-tunes, saved on the way, so that an interrupted run goes on from there and ends with the same numbers.

In the folder that the run is being computed in: `resume/tune-2`, all weights and what the run holds as its second
fine-tune begins; `resume/tune-2-00000120`, what training has moved by its step 120. Gone once the run is published.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retention import snapshot
from retention.interrupts import Held

EVERY = 60.0  # seconds of training between two snapshots at least: what a kill may cost
SHARE = 0.05  # of the time that training may spend on them at most


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
        return not self._unable and time.monotonic() - self._last >= max(EVERY, self._cost / SHARE)

    def save(self, state: dict[str, Any]) -> None:
        """Within a fine-tune. state: the trainer's, with its `step`."""
        self._write(self._at(state["step"]), {"step": state["step"], "training": state})

    def begin(self, number: int, state: dict[str, Any]) -> None:
        """A later fine-tune than the first begins. state: all weights, and what outlasts one fine-tune."""
        self.number, self.first, self.begun = number, None, None
        self._write(self._at(), state)

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        if self._unable:
            return
        started = time.monotonic()
        files = {p.name: snapshot.checksum(p) for p in self.folder.glob("*.parquet")}
        try:
            snapshot.save(path, {**value, "run": self.run, "source": self.source, "files": files})
        except (OSError, TypeError, SafetensorError) as error:
            self._unable = True  # the run goes on without; killed, it begins again at its edit
            self._say(f"cannot be saved on the way: {error}")
            return
        for other in self.place.glob("*"):
            if other not in (path, self._at()):
                shutil.rmtree(other)
        self._last = time.monotonic()
        self._cost = self._last - started

    def over(self) -> None:
        """All is read: nothing of this is published."""
        shutil.rmtree(self.place, ignore_errors=True)
