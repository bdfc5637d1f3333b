"""Real stages that write down what they do, in any process: for counting what was begun again after a kill."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retention import resume
from retention.engines import _work
from retention.engines.ray import settle
from retention.stages import Bench
from retention.study import Run


@contextmanager
def noting(log: Path) -> Iterator[None]:
    """Within it `begin KIND`, `end KIND` and `step` go into the log, and fine-tunes are saved after every step."""

    def note(text: str) -> None:
        with log.open("ab", buffering=0) as file:  # one line by one write: several processes append to the same file
            file.write(f"{text}\n".encode())

    def noted(kind: str, work: Callable[[Run, Bench], None]) -> Callable[[Run, Bench], None]:
        def both(run: Run, bench: Bench) -> None:
            note(f"begin {kind}")
            work(run, bench)
            note(f"end {kind}")

        return both

    def due(self: resume.Resume) -> bool:
        note("step")
        return own(self)

    before, own, every = dict(_work.WORK), resume.Resume.due, (resume.EVERY, resume.SHARE)
    _work.WORK.update({kind: noted(kind, work) for kind, work in before.items()})
    resume.Resume.due, resume.EVERY, resume.SHARE = due, 0.0, math.inf  # type: ignore[method-assign]
    try:
        yield
    finally:
        _work.WORK.update(before)
        resume.Resume.due, (resume.EVERY, resume.SHARE) = own, every  # type: ignore[method-assign]


def noted_settle(*where: Any) -> bool:
    """In a worker of Ray or submitit, which finds it by name here: `settle`, noted down."""
    with noting(Path(os.environ["RETENTION_CHAOS_LOG"])):
        return settle(*where)
