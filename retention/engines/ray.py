"""Stages as Ray tasks: a pool of local workers, one box with several GPUs, or a cluster that is already there.

Ray starts tasks once what they need is done, and again if a worker or a node dies; the artefact on disk tells whether a
stage is done. Needs the extra `ray`. Leaves Ray's token authentication as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retention.engines import inline
from retention.engines._failures import record
from retention.engines._models import Kept
from retention.engines._work import KEYS, Board, Stage
from retention.stages import Bench
from retention.store import Store
from retention.types import UserError

_KEPT = Kept()  # of a worker, from one stage to the next
RETRIES = 3  # how often a task whose worker or node died is started again


def execute(
    board: Board,
    bench: Bench,
    tell: Callable[[Stage, int, int], None],
    *,
    workers: int = 1,
    gpus_per_run: float = 0.0,
    address: str | None = None,
) -> None:
    """Compute what is not there yet, at most `workers` stages at a time.

    gpus_per_run: of each stage; parts of one are shared. address: of a Ray cluster (`auto`: the one that this machine
    is part of); left out, RAY_ADDRESS, else a local one is started and stopped. A stage takes as many CPUs as it has
    threads.
    """
    ray = _library()
    stages = board.left()
    threads = max((stage.run.settings.threads for stage in stages), default=1)
    with _running(ray, pool(workers, threads, gpus_per_run), threads, address):
        # A process that ends gives back all of its GPU memory; without one it keeps what it has imported.
        task = ray.remote(max_retries=RETRIES, num_gpus=gpus_per_run, max_calls=1 if gpus_per_run else 0)(settle)
        refs: dict[tuple[str, str], Any] = {}
        for stage in stages:
            needed = [refs[need] for need in stage.needs if need in refs]
            refs[stage.kind, stage.key] = task.options(num_cpus=stage.run.settings.threads, name=stage.label).remote(
                stage, bench.store.root.absolute(), bench.cache.absolute(), board.attempts, *needed
            )
        waiting = {ref: at for at, ref in refs.items()}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            stage = board.stages[waiting.pop(ready[0])]
            board.start(stage, tell)
            try:
                ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from None
                raise
            except ray.exceptions.RayError as error:  # its workers died, however often it was started
                record(
                    bench.store, stage.folder, stage=stage.kind, key=stage.key, label=stage.run.label, error=error,
                    times=board.attempts,
                )  # fmt: skip
    board.left()  # sees what was done and what failed


def settle(stage: Stage, results: Path, cache: Path, attempts: int, *needed: bool) -> bool:
    """In a worker: compute a stage, or wait for who does. Whether it is done."""
    if not all(needed):
        return False
    if KEYS[stage.kind](stage.run) != stage.key:
        raise UserError(
            f"{stage.label}: a worker would compute it as {KEYS[stage.kind](stage.run)}, not as {stage.key}: its "
            "accelerator, library versions or data files are others. Run `retention run` on a machine like the workers"
        )
    bench = Bench(store=Store(results), cache=cache)
    board = Board([stage], bench.store, attempts)
    board.done |= set(stage.needs)
    inline.execute(board, bench, lambda *_: None, _KEPT)
    return (stage.kind, stage.key) in board.done


def pool(workers: int, threads: int, gpus_per_run: float) -> int:
    """Workers that the machine's cores bear. On a GPU a stage's CPU mostly waits, so there as many as asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers if gpus_per_run else max(1, min(workers, cores // threads))


@contextmanager
def _running(ray: Any, workers: int, threads: int, address: str | None) -> Iterator[None]:
    """A connection to the cluster, or a local one for the time being."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, **quiet)
    else:
        # `local`: left out, Ray takes any cluster that runs on this machine, another study's of its own included.
        ray.init("local", num_cpus=workers * threads, include_dashboard=False, object_store_memory=128 << 20, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _library() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks without a GPU leave its variables alone
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; pip install 'retention[ray]'") from None
    return ray
