"""What every engine does with one stage: see whether it is wanted, claim it, compute it, record it if it fails.

An artefact on disk is the only truth about a stage. Knows not in which order or where stages are run.
"""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retention.cache_folders import sound
from retention.engines import _claims
from retention.engines._failures import ATTEMPTS, Failure, failure, forget, record
from retention.fine_tuning import tune
from retention.ids import base_id, edit_id, model_id, run_id
from retention.models import HubModel
from retention.stages import Bench, edit, prepare
from retention.store import Kind, Store
from retention.study import Run
from retention.types import UserError

WORK = {"prepare": prepare, "edit": edit, "tune": tune}
FOLDERS: dict[str, Kind] = {"prepare": "bases", "edit": "edits", "tune": "runs"}
KEYS: dict[str, Callable[[Run], str]] = {"prepare": base_id, "edit": edit_id, "tune": run_id}
ORDER = tuple(WORK)

Outcome = Literal["done", "elsewhere", "failed"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing to compute, and the runs that want it."""

    kind: str  # prepare, edit or tune
    key: str
    run: Run  # one of the runs that want it: all of them describe it alike
    done: bool

    @property
    def folder(self) -> Kind:
        return FOLDERS[self.kind]

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        """(kind, key) of the stages that it reads."""
        before = ORDER[: ORDER.index(self.kind)]
        return tuple((kind, KEYS[kind](self.run)) for kind in before)

    @property
    def label(self) -> str:
        return f"{self.kind} {self.run.label}"


def plan(runs: Sequence[Run], bench: Bench) -> list[Stage]:
    """The distinct stages of all runs, in the order in which they are computed: bases, edits, fine-tunes.

    Raises UserError where two runs are one by content.
    """
    steps: dict[tuple[str, str], Stage] = {}
    for kind, key_of in KEYS.items():
        for run in runs:
            key = key_of(run)
            if kind == "tune" and (kind, key) in steps:
                raise UserError(
                    f"grid: two cells are the same run: {steps[kind, key].run.label}; {run.label}. "
                    "Their settings differ only in what changes nothing; remove one"
                )
            if (kind, key) not in steps:
                steps[kind, key] = Stage(kind=kind, key=key, run=run, done=bench.store.complete(FOLDERS[kind], key))
    return list(steps.values())


# ------------------------------------------------------------------------------------------------ one stage


def attempt(stage: Stage, bench: Bench, start: Callable[[], Any] = lambda: None) -> Outcome:
    """Compute a stage unless it is done or another process is at it. `start` is called once it is ours.

    A failure is recorded, not raised. Raises UserError where no stage could go on: the disk is full, or read-only.
    """
    try:
        return _attempt(stage, bench, start)
    except Exception as error:
        if (reason := unwritable(error, bench)) is None:
            raise
        raise UserError(f"{reason}. Nothing half-written is used; mend it and run the same command") from error


def _attempt(stage: Stage, bench: Bench, start: Callable[[], Any]) -> Outcome:
    store = bench.store
    claim = _claims.take(claims(store) / f"{stage.folder}-{stage.key}")
    if claim is None:
        return "elsewhere"
    try:
        if store.complete(stage.folder, stage.key):  # by whoever held the claim before
            return "done"
        start()
        made(stage.run, bench)
        for kind, key in stage.needs:
            store.check(FOLDERS[kind], key)
        WORK[stage.kind](stage.run, bench)
        forget(store, stage.folder, stage.key)
        return "done"
    except Exception as error:
        if not claim.mine():  # whoever took it over has also removed what we had written
            return "elsewhere"
        if unwritable(error, bench):
            raise
        record(store, stage.folder, stage=stage.kind, key=stage.key, label=stage.run.label, error=error)
        return "failed"
    finally:
        claim.release()
        gc.collect()  # a model goes when its last reference does, and trainers hold on to it in cycles


def made(run: Run, bench: Bench) -> None:
    """Pretrain a model of ours if it is not in the cache; one process does, the others wait."""
    part = run.settings.model
    if isinstance(part, HubModel) or sound(part.place(bench.cache)):
        return
    with _claims.alone(bench.cache / "claims" / model_id(part)):
        part.folder(bench.cache, lambda done, total: bench.report(f"pretraining {part.name}", done, total))


def claims(store: Store) -> Path:
    return store.root / ".work" / "claims"


def tidy(store: Store) -> None:
    """Remove the folder of work in progress, unless somebody is at work."""
    _claims.sweep(claims(store))
    for path in (store.root / ".work" / "partial", store.root / ".work"):
        try:
            path.rmdir()
        except OSError:
            continue


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM)  # the same, if it is about one of our own folders


def unwritable(error: BaseException | None, bench: Bench) -> str | None:
    """Why nothing can be written, if that is what an error or its cause says."""
    while error is not None:
        where = str(getattr(error, "filename", None) or "")
        ours = any(
            where and Path(where).absolute().is_relative_to(p.absolute()) for p in (bench.store.root, bench.cache)
        )
        for number in UNWRITABLE + FORBIDDEN * ours:
            # safetensors tells the number in its message alone
            if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
                return f"{where or bench.store.root}: cannot be written: {os.strerror(number)}"
        error = error.__cause__
    return None


# ------------------------------------------------------------------------------------------------ a grid


class Board:
    """Which stages of a grid are done, failed, blocked, or can be started; other processes may be at the same grid."""

    def __init__(self, stages: Sequence[Stage], store: Store, attempts: int = ATTEMPTS) -> None:
        self.stages = {(s.kind, s.key): s for s in stages}
        self.store, self.attempts = store, attempts
        self.done = {at for at, stage in self.stages.items() if stage.done}
        self.total = len(self.stages) - len(self.done)
        self.failed: dict[tuple[str, str], Failure] = {}
        self.tried: set[tuple[str, str]] = set()
        self.started = 0

    def left(self) -> list[Stage]:
        """What is neither done nor given up, in order. What other processes did or failed at since is seen."""
        found = []
        for at, stage in self.stages.items():
            if at in self.done or at in self.failed:
                continue
            if self.store.complete(stage.folder, stage.key):
                self.done.add(at)
            elif (failed := failure(self.store, stage.folder, stage.key)) and self._final(at, failed):
                self.failed[at] = failed
            elif not self.blocked(stage):
                found.append(stage)
        return found

    def _final(self, at: tuple[str, str], failed: Failure) -> bool:
        """A mistake of the user's may have been mended since the last run, so it is tried once in each."""
        return at in self.tried if failed.mistake else failed.attempts >= self.attempts

    def ready(self, stage: Stage) -> bool:
        return all(need in self.done for need in stage.needs)

    def blocked(self, stage: Stage) -> bool:
        return any(need in self.failed for need in stage.needs)

    def waiting(self) -> list[Stage]:
        """Stages that cannot be computed because one that they need has failed."""
        return [s for at, s in self.stages.items() if at not in self.done and at not in self.failed and self.blocked(s)]

    def start(self, stage: Stage, tell: Callable[[Stage, int, int], None]) -> None:
        self.tried.add((stage.kind, stage.key))
        tell(stage, self.started, self.total)
        self.started = min(self.started + 1, self.total - 1)  # a second attempt at the last one is still the last
