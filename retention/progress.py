"""Progress bars on a terminal, plain lines elsewhere, with an estimate of the time left."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Called as (what, done, total). `stage` names the place in the whole study that the bars stand for."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self.started = time.monotonic()
        self._bars: Any = None
        self._task: Any = None
        self._whole: Any = None
        self._what = ""
        self._told = 0.0

    def __enter__(self) -> Progress:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            self._bars = Bars(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, what: str, index: int, total: int) -> None:
        """Stage `index` (from 0) of `total` begins."""
        if self._bars is not None:
            if self._whole is None:
                self._whole = self._bars.add_task("stages", total=total)
            self._bars.update(self._whole, completed=index, description=f"stages: {what}")
        elif not self.quiet:
            elapsed = time.monotonic() - self.started
            left = f", about {elapsed / index * (total - index):.0f} s left" if index else ""
            print(f"[{index + 1}/{total}] {what} ({elapsed:.0f} s{left})", file=sys.stderr, flush=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bars is not None:
            if self._task is None or what != self._what:
                if self._task is not None:
                    self._bars.remove_task(self._task)
                self._task = self._bars.add_task(what, total=total)
            self._bars.update(self._task, completed=done)
        elif not self.quiet and (what != self._what or time.monotonic() - self._told > 15):
            self._told = time.monotonic()
            print(f"    {what}" + (f" {done}/{total}" if total > 1 else ""), file=sys.stderr, flush=True)
        self._what = what
