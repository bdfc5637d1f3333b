"""Run a study from Python: what `retention run` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retention import ids, preflight
from retention.cache_folders import default_cache
from retention.engines import Engine, inline
from retention.engines._failures import ATTEMPTS, forget, path_of
from retention.engines._work import Board, tidy, unwritable
from retention.progress import Progress
from retention.stages import Bench
from retention.store import Store
from retention.study import Run, Study
from retention.types import UserError


class Unfinished(RuntimeError):
    """Some stages failed; all others are done. The message says which and why."""


def run(
    study: Study | str | Path,
    *,
    results: str | Path = "results",
    overrides: Sequence[str] = (),
    cache: str | Path | None = None,
    progress: Progress | None = None,
    attempts: int = ATTEMPTS,
    retry_failed: bool = False,
    engine: Engine | None = None,
) -> Path:
    """Run what is not done yet of a study; returns its results folder.

    attempts: how often a stage that fails is tried, all calls counted together. retry_failed: try also what has failed
    so often, from the start. engine: who runs the stages; left out, this process.

    Raises UserError before any work starts if a setting cannot be run or a file of what is done is damaged; Unfinished
    in the end if stages failed (UserError if by the user's mistakes alone). What is done stays done if interrupted.
    """
    loaded = preflight.settled(study if isinstance(study, Study) else Study.load(study, overrides))
    progress = progress or Progress(quiet=True)
    store = Store.peek(results)
    bench = Bench(store=store, cache=Path(cache) if cache else default_cache(), report=progress)
    try:
        stages = inline.plan(loaded.runs, bench)
    except UserError:
        preflight.check(loaded)  # tells of a missing file together with what else is wrong
        raise
    if not all(stage.done for stage in stages):
        preflight.check(loaded)
    store.check_all((stage.folder, stage.key) for stage in stages if stage.done)
    try:
        bench = Bench(store=Store(results, create=True), cache=bench.cache, report=progress)
        folder = bench.store.write_study(loaded.name, loaded.resolved(), rows_of(loaded))
        if retry_failed:
            for stage in stages:
                forget(bench.store, stage.folder, stage.key)
    except OSError as error:
        if (reason := unwritable(error, bench)) is None:
            raise
        raise UserError(f"{reason}; give another folder with --results") from None
    board = Board(stages, bench.store, attempts)
    try:
        (engine or Engine()).execute(board, bench, lambda stage, i, n: progress.stage(stage.label, i, n))
    finally:
        tidy(bench.store)
    if board.failed:
        mistakes = all(failed.mistake for failed in board.failed.values())
        raise UserError(summary(board)) if mistakes else Unfinished(summary(board))
    return folder


def summary(board: Board) -> str:
    """What failed and why, and what waits for it."""
    if all(failed.mistake for failed in board.failed.values()):
        return "\n".join(dict.fromkeys(failed.error for failed in board.failed.values()))
    blocked = board.waiting()
    wait = f", and {len(blocked)} more wait for what failed" if blocked else ""
    lines = [f"{len(board.failed)} of {len(board.stages)} stages failed{wait}"]
    for (kind, key), failed in board.failed.items():
        stage = board.stages[kind, key]
        error = failed.error.splitlines()[0] if failed.error else ""
        lines.append(f"  failed   {stage.label}: {error} ({failed.attempts} attempts)")
        lines.append(f"           {path_of(board.store, stage.folder, key)}")
    lines += [f"  waiting  {stage.label}" for stage in blocked]
    lines.append("The same command with --retry-failed tries again what failed")
    return "\n".join(lines)


def left(study: Study | str | Path, overrides: Sequence[str], results: str | Path) -> str:
    """What an interrupted study still has to do, in one line."""
    loaded = preflight.settled(study if isinstance(study, Study) else Study.load(study, overrides))
    stages = inline.plan(loaded.runs, Bench(store=Store.peek(results), cache=default_cache()))
    todo = [stage.kind for stage in stages if not stage.done]
    kinds = ", ".join(f"{todo.count(kind)} {kind}" for kind in dict.fromkeys(todo))
    keys = (stage.key for stage in stages if stage.kind == "tune" and not stage.done)
    saved = sum(any((Path(results) / ".work" / "partial").glob(f"runs-{key}.*/resume/*")) for key in keys)
    kinds += f", {saved} of them begun and saved" if saved else ""
    return f"{len(todo)} of {len(stages)} stages are left ({kinds or 'none'}); run the same command to go on"


def rows_of(study: Study) -> list[dict[str, object]]:
    """The keys of a study's runs, a row each, with what its grid varies."""
    rows = [
        {
            "only": r.only,
            "run_id": ids.run_id(r),
            "edit_id": ids.edit_id(r),
            "base_id": ids.base_id(r),
            **ids.names(r),
        }
        | {key: value for key, value in r.cell.items() if _axis(key, r)}
        for r in study.runs
    ]
    if not any(row.get("tune") for row in rows):  # the parts' names tell the fine-tunes apart
        rows = [{key: value for key, value in row.items() if key != "tune"} for row in rows]
    return rows


def _axis(key: str, run: Run) -> bool:
    """Whether a key of the grid needs a column of its own: the names of the parts, and the seeds, have theirs."""
    named = key.split(".")[0] in run.names or key.startswith("tune.data")
    return not named and key not in ("seed", "facts.seed")
