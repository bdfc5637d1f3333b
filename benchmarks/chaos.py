"""Kill a study at random moments until it is done, and compare its rows with an undisturbed run's.

    python benchmarks/chaos.py [--kills inline=84,ray=8,slurm=8] [--mean 0.8] [--seed 0] [--json]

SIGKILL, over real stages of the tests' small world, and fine-tunes that save themselves after every step.
inline: two processes at the same grid at once, forked from one that has imported everything; a killed one is replaced.
ray, slurm (submitit's local cluster): the process that began the study, or one of its workers; those that die with all
their retries are tried again. Three of four kills come within twice `--mean` seconds after something was begun or a
step was trained since the last one, the others at once within that time. When a grid completes before so many kills, it
is begun again in a new folder. Prints what was begun and how often, and how many steps were trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch

import retention
from retention import preflight
from retention.api import Unfinished
from retention.cache_folders import default_cache
from retention.engines import Engine, _work, slurm
from retention.engines import ray as engine_ray
from retention.study import Study
from tests.engines.noted import noted_settle, noting
from tests.small_study import ROME, TUNE, document

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"inline": None, "ray": "ray", "slurm": "submitit"}


def study_for(engine: str) -> Study:
    """A base, two edits and four fine-tunes; where each stage's process must import everything first, one of each."""
    grid = {} if engine == "inline" else {"grid": {"editor": [ROME]}}
    return Study.of(document(tune={**TUNE, "steps": 8}, at=[1, 4, 8], probes=["score"], **grid), name="small")


def start(engine: str, results: Path, cache: Path, log: Path, alone: bool = False) -> int:
    """A process that runs the study; its id, which is that of its group too. Exit code 1: stages failed."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.dup2(2, 1)  # what Ray tells is no result
        os.environ |= {"PYTHONPATH": str(ROOT), "RETENTION_CHAOS_LOG": str(log)}
        os.environ |= {"PYTHONWARNINGS": "ignore", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        chosen = Engine()
        if engine == "ray" and not alone:
            engine_ray.settle, chosen = noted_settle, Engine(name="ray", workers=2)
        elif engine == "slurm" and not alone:
            chosen = Engine(name="slurm", cluster="local", workers=2)
            vars(slurm)["Settled"] = lambda: noted_settle  # in a job; judged by the artefact, as everything is
            slurm.execute.__kwdefaults__ |= {"poll": 0.1, "late": 0.5}  # type: ignore[operator]
        with noting(log):
            retention.run(
                study_for(engine), results=results, cache=cache, engine=chosen, retry_failed=engine != "inline"
            )
        code = 0
    except Unfinished:
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def descendants(pid: int) -> list[tuple[int, str]]:
    """(process, its command line), of all that a process has started and whose parents live."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):
            continue
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += [(child, lines.get(child, "")) for child in level]
    return found


def victims(engine: str, child: int) -> list[int]:
    """The process that began the study, and the workers that compute for it."""
    if engine == "inline":
        return [child]
    mark = "ray::" if engine == "ray" else "submitit"
    return [child, *(pid for pid, line in descendants(child) if mark in line and "IDLE" not in line)]


def disturbed(engine: str, begin: Callable[[], int], kills: int, mean: float, drawn: random.Random, log: Path) -> int:
    """Run a study to its end under kills, `kills` at most; how many there were."""
    killed = size = 0
    children = [begin() for _ in range(2 if engine == "inline" else 1)]
    while children:
        if killed >= kills:
            status = os.waitpid(children[-1], 0)[1]
            child = children.pop()
        else:
            child, wait = drawn.choice(children), drawn.uniform(0, 2 * mean)
            working = drawn.random() < 0.25
            end = time.monotonic() + wait
            while (over := os.waitpid(child, os.WNOHANG))[0] == 0 and (not working or time.monotonic() < end):
                time.sleep(0.005)
                if not working and log.is_file() and log.stat().st_size > size:
                    working, end = True, time.monotonic() + wait
            size = log.stat().st_size if log.is_file() else 0
            status = over[1]
            if not over[0]:
                victim = drawn.choice(victims(engine, child))
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed += 1
                if victim != child:
                    continue
                status = os.waitpid(child, 0)[1]
            children.remove(child)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL or (code == 1 and engine != "inline"):
            children.append(begin())
        else:
            assert code == 0, f"a process ended with an error of its own: {code}"
    return killed


def rows(results: Path, table: str) -> pd.DataFrame:
    """As texts, in one order: categories are told by their order of appearance, which is no result."""
    order = ["run_id", "step", "question_id" if table == "rows" else "score"]
    return retention.load(results, table).astype(str).sort_values(order, ignore_index=True)  # type: ignore[arg-type]


def chaos(engine: str, kills: int, mean: float, seed: int, cache: Path, folder: Path) -> dict[str, object]:
    """What was begun, ended and trained under so many kills. Raises AssertionError where a row differs."""
    log, alone = folder / "log", folder / "alone"
    # Not in this process: what has computed here would be forked with its threads gone.
    assert os.waitpid(start(engine, alone, cache, log, alone=True), 0)[1] == 0
    once = Counter(line.split()[0] for line in log.read_text().splitlines())
    drawn, killed, grids, told = random.Random(f"{seed} {engine}"), 0, 0, Counter[str]()
    while killed < kills:
        results, log = folder / f"grid{grids}", folder / f"log{grids}"
        begin = lambda results=results, log=log: start(engine, results, cache, log)  # noqa: E731
        killed += disturbed(engine, begin, kills - killed, mean, drawn, log)
        grids += 1
        told.update(" ".join(line.split()[:2]) for line in log.read_text().splitlines())
        for table in ("rows", "scores"):
            pd.testing.assert_frame_equal(rows(results, table), rows(alone, table))
        assert not (results / ".work").exists()
        assert not list(results.glob("failed/*/*"))
    needed = {kind: grids * len(list((alone / _work.FOLDERS[kind]).iterdir())) for kind in _work.ORDER}
    begun = {kind: told[f"begin {kind}"] for kind in _work.ORDER}
    steps = {"needed": grids * once["step"], "trained": sum(n for what, n in told.items() if what.startswith("step"))}
    return {
        "kills": killed, "grids": grids, "rows": "equal", "needed": needed, "begun": begun,
        "begun_again": {kind: begun[kind] - needed[kind] for kind in needed}, "steps": steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", default="inline=84,ray=8,slurm=8", help="by engine; of a missing one inline")
    parser.add_argument("--mean", type=float, default=0.8, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=None, help="where the small world lies, or is pretrained to")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    preflight.check(study_for("inline"))  # imports the trainer, so that the forks need not
    started, report = time.monotonic(), {}
    asked = {engine: int(kills) for engine, kills in (part.split("=") for part in args.kills.split(","))}
    missing = [engine for engine in asked if NEEDS[engine] and importlib.util.find_spec(NEEDS[engine]) is None]
    for engine in missing:
        asked["inline"] = asked.get("inline", 0) + asked.pop(engine)
    for engine, kills in asked.items():
        with tempfile.TemporaryDirectory() as place:
            report[engine] = chaos(engine, kills, args.mean, args.seed, args.cache or default_cache(), Path(place))
    total = sum(found["kills"] for found in report.values())  # type: ignore[misc]
    seconds = round(time.monotonic() - started)
    if args.json:
        print(json.dumps({"kills": total, "seconds": seconds, "engines": report, "not_installed": missing}))
        return
    for engine, found in report.items():
        again = ", ".join(f"{n} {kind}" for kind, n in found["begun_again"].items())  # type: ignore[attr-defined]
        steps = found["steps"]
        print(
            f"{engine}: {found['kills']} kills over {found['grids']} grids; rows equal an undisturbed run's; "
            f"begun again: {again}; {steps['trained']} steps trained for {steps['needed']}"  # type: ignore[index]
        )
    print(f"{total} kills in {seconds} s" + (f"; not installed: {', '.join(missing)}" if missing else ""))


if __name__ == "__main__":
    main()
