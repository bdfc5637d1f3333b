"""One job a stage through submitit: on Slurm with dependencies and requeueing, or as local processes.

The artefact on disk tells whether a stage is done, never the state of a job. Needs the extra `slurm`. submitit keeps
its pickled jobs and logs in the cache, away from the results, from which nothing is ever unpickled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from retention.engines._failures import failure, record
from retention.engines._work import Board, Stage
from retention.engines.ray import settle
from retention.stages import Bench
from retention.types import UserError

POLL = 2.0  # seconds between two looks at what the jobs have done
LATE = 60.0  # seconds for which a finished job's artefact may not be seen yet on a shared folder


def execute(
    board: Board,
    bench: Bench,
    tell: Callable[[Stage, int, int], None],
    *,
    cluster: str,
    workers: int = 1,
    gpus_per_run: float = 0.0,
    parameters: Mapping[str, Any] | None = None,
    poll: float = POLL,
    late: float = LATE,
) -> None:
    """Compute what is not there yet. cluster: `slurm`, or `local` to try it out: processes here.

    On Slurm all jobs are handed in at once, each waiting for those that it needs (`afterok`), requeued if a node fails.
    Elsewhere at most `workers` run at a time. parameters: submitit's, such as slurm_partition and timeout_min.
    """
    executor = _executor(bench, cluster, gpus_per_run, parameters or {})
    jobs: dict[tuple[str, str], Any] = {}
    over: dict[tuple[str, str], float] = {}
    while left := board.left():
        for stage in left:
            at = (stage.kind, stage.key)
            waits = [jobs[need].job_id for need in stage.needs if need in jobs and need not in board.done]
            free = board.ready(stage) and sum(not job.done() for job in jobs.values()) < workers
            if at not in jobs and (cluster == "slurm" or free):
                extra: dict[str, Any] = {"requeue": True}
                if waits:
                    extra |= {"dependency": "afterok:" + ":".join(waits), "kill_on_invalid_dep": "yes"}
                if cluster == "slurm":
                    executor.update_parameters(
                        cpus_per_task=stage.run.settings.threads, slurm_additional_parameters=extra
                    )
                jobs[at] = executor.submit(
                    Settled(), stage, bench.store.root.absolute(), bench.cache.absolute(), board.attempts
                )
                board.start(stage, tell)
            elif at in jobs and board.ready(stage) and jobs[at].done():
                _judge(stage, jobs[at], bench, board, over, late)
        if board.left():
            time.sleep(poll)


class Settled:
    """In a job: as `settle`; a stage that failed ends the job with an error, so that jobs which need it never start."""

    def __call__(self, stage: Stage, *where: Any) -> None:
        if not settle(stage, *where):
            raise RuntimeError(f"{stage.label} failed; the results folder has the traceback")

    def checkpoint(self, stage: Stage, *where: Any) -> Any:
        """What submitit queues again when the time limit is near: the stage goes on where it last saved itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, stage, *where)


def _judge(stage: Stage, job: Any, bench: Bench, board: Board, over: dict[tuple[str, str], float], late: float) -> None:
    """A job ended and the stage is neither done nor recorded as failed: record that, once it cannot be mere delay."""
    at = (stage.kind, stage.key)
    first = over.setdefault(at, time.monotonic())
    error = job.exception()
    if isinstance(error, UserError):
        raise error
    if failure(bench.store, stage.folder, stage.key) is None and time.monotonic() - first > late:
        lost = error or RuntimeError(f"job {job.job_id} ended ({job.state}) and left nothing")
        record(
            bench.store, stage.folder, stage=stage.kind, key=stage.key, label=stage.run.label, error=lost,
            times=board.attempts,
        )  # fmt: skip


def _executor(bench: Bench, cluster: str, gpus_per_run: float, parameters: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("--engine slurm: submitit is not installed; pip install 'retention[slurm]'") from None
    if gpus_per_run != int(gpus_per_run):
        raise UserError(
            f"--gpus-per-run {gpus_per_run}: Slurm gives whole GPUs; the engine ray shares one between runs"
        )
    try:
        executor = submitit.AutoExecutor(folder=str(bench.cache / "jobs" / "%j"), cluster=cluster)
    except RuntimeError as error:
        raise UserError(f"--cluster {cluster}: submitit finds none on this machine: {error}") from None
    try:
        executor.update_parameters(
            name="retention", gpus_per_node=int(gpus_per_run), **{"timeout_min": 1440} | dict(parameters)
        )
    except (NameError, TypeError, AssertionError) as error:  # a name or a value that it does not take
        raise UserError(f"--job: submitit refuses a parameter: {error}") from None
    return executor
