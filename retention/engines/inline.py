"""The default engine: every stage in this process, one after another, in an order that shares what can be shared.

Several such processes may work on one grid: each takes what nobody else has claimed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from retention.engines._claims import owner_of
from retention.engines._models import Kept
from retention.engines._work import WORK, Board, Stage, attempt, claims, plan
from retention.stages import Bench

__all__ = ["WORK", "Stage", "execute", "plan"]

POLL = (0.1, 2.0)  # seconds between two looks at what another process computes: at first, and at most


def execute(board: Board, bench: Bench, tell: Callable[[Stage, int, int], None], keep: Kept | None = None) -> None:
    """Compute what is not there yet. `tell` hears of each stage as it starts: (stage, index, how many).

    keep: the model in memory, where calls follow one another.
    """
    with _collected_no_more():
        _execute(board, replace(bench, keep=keep or Kept()), tell)


@contextmanager
def _collected_no_more() -> Iterator[None]:
    """What is alive now is not looked at by the garbage collector within the block.

    Trainers collect at every stage, and looking through all that is imported takes 0.26 CPU seconds each time, as much
    as three steps of a small model.
    """
    if gc.get_freeze_count():  # whoever has frozen before us decides
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _execute(board: Board, bench: Bench, tell: Callable[[Stage, int, int], None]) -> None:
    wait = POLL[0]
    while left := board.left():
        moved = False
        for stage in left:
            if not board.ready(stage):
                continue
            outcome = attempt(stage, bench, lambda stage=stage: board.start(stage, tell))  # type: ignore[misc]
            if outcome == "done":
                board.done.add((stage.kind, stage.key))
            moved = moved or outcome != "elsewhere"
        if moved:
            wait = POLL[0]
            continue
        for stage in left:
            if owner := owner_of(claims(bench.store) / f"{stage.folder}-{stage.key}"):
                bench.report(f"waiting for {owner.who}: {stage.label}", 0, 1)
                break
        time.sleep(wait)
        wait = min(1.5 * wait, POLL[1])
