"""A grid of small runs: by one process, by two Ray workers on two cores, and with nothing shared between the runs.

    python benchmarks/grid.py [--seeds 12] [--steps 20] [--sample 8] [--arms inline ray unshared] [--json]

2 editors x 2 objectives x 2 mitigations x seeds on the embedded world, which is pretrained first if it is not in the
cache; facts are drawn once. One thread a stage. Covariances and v* are computed in each arm, in a cache of its own.

  inline     `retention run`: base readings once, an edit once for its 4 fine-tunes, the model loaded once
  ray        the same by `--engine ray --workers 2`, its start and end included
  unshared   `--sample` runs of the grid, drawn at random, each in a results folder and a cache of its own, its model
             loaded anew, all in one process. What the grid would take is computed from them; a process for each run
             would add its imports to it

Printed: runs a minute, the speed-up of sharing (CPU seconds, unshared over inline) and of two workers (seconds), and
where the CPU time of `inline` goes: training (trl's loop), probing (base, edit and checkpoints; held-out rows), editing
(writing the edits), and the rest: settings, hashes, loading and copying models, data, the making of trainers,
publishing, claims. Imports are not in it. The rows of `inline` and `ray` are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
import trl  # noqa: F401  # imports are not what is measured

import retention
from retention import fine_tuning, preflight, stages
from retention.cache_folders import default_cache
from retention.engines import Engine
from retention.study import Study
from retention.world import WorldModel

EDITORS: list[dict[str, Any]] = [
    {"name": "rome", "layer": 0, "v_steps": 20, "v_lr": 0.3, "kl_factor": 0.3},
    {"name": "memit", "layers": [0, 1], "covariance_weight": 100, "v_steps": 20, "clamp_norm_factor": 4},
]


def study(seeds: int, steps: int) -> Study:
    return Study.of(
        {
            "question": "How fast does a grid of small runs go?",
            "model": "world",
            "facts": {"name": "world", "edited": 20, "intrinsic": 40, "control": 10, "neighbors": 1, "seed": 0},
            "tune": {"data": {"name": "world", "task": "new_facts", "rows": 500}, "steps": steps},
            "probes": ["score"],
            "at": [steps // 4, steps],
            "grid": {
                "editor": EDITORS,
                "objective": ["sft", "clm"],
                "mitigations": [[], ["freeze"]],
                "seed": list(range(seeds)),
            },
        },
        name="grid",
    )


class Clock:
    """CPU seconds within parts of the work, each without the parts within it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.stack = ["rest"]
        self.since = 0.0

    def turn(self) -> None:
        now = time.process_time()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def within(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self.stack.append(part)
            try:
                return work(*args, **kwargs)
            finally:
                self.turn()
                self.stack.pop()

        return timed


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Within it, the clock tells the parts of the work apart."""
    places = [
        (transformers.Trainer, "train", "training"),
        (fine_tuning, "read_all", "probing"),
        (fine_tuning, "heldout", "probing"),
        (stages, "read_all", "probing"),
        (stages, "rivals", "probing"),
        (stages, "draw", "probing"),  # asks the model what it knows
        (stages, "write_edits", "editing"),
    ]
    kept = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, part), work in zip(places, kept, strict=True):
        setattr(owner, name, clock.within(part, work))
    clock.since = time.process_time()
    try:
        yield
    finally:
        clock.turn()
        for (owner, name, _), work in zip(places, kept, strict=True):
            setattr(owner, name, work)


def own_cache(folder: Path, cache: Path) -> Path:
    """A cache that holds the pretrained world and nothing else."""
    source = WorldModel().folder(cache)
    target = folder / source.relative_to(cache)
    target.parent.mkdir(parents=True)
    shutil.copytree(source, target)
    return folder


def run(
    grid: Study, place: Path, cache: Path, engine: Engine | None = None, clock: Clock | None = None
) -> dict[str, float]:
    """What the grid takes: `seconds` by the wall, and `cpu_seconds` of this process."""
    own = own_cache(place / "cache", cache)
    wall, cpu = time.perf_counter(), time.process_time()
    with nullcontext() if clock is None else clocked(clock):
        retention.run(grid, results=place / "results", cache=own, engine=engine)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def rows(place: Path) -> pd.DataFrame:
    """As texts, in one order: categories are told by their order of appearance, which is no result."""
    found = retention.load(place / "results").astype(str)
    return found.sort_values(["run_id", "step", "question_id"], ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12, help="8 runs each")
    parser.add_argument("--steps", type=int, default=20, help="of each fine-tune")
    parser.add_argument("--sample", type=int, default=8, help="runs of the arm unshared")
    parser.add_argument(
        "--arms", nargs="+", choices=["inline", "ray", "unshared"], default=["inline", "ray", "unshared"]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache, grid = default_cache(), study(args.seeds, args.steps)
    n = len(grid.runs)
    report: dict[str, Any] = {"runs": n, "steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        preflight.check(grid)  # what it imports is not what is measured
        if "inline" in args.arms:
            clock = Clock()
            report["inline"] = told = run(grid, place / "inline", cache, clock=clock)
            parts = {part: clock.seconds[part] for part in ("training", "probing", "editing", "rest")}
            told |= {"runs_a_minute": 60 * n / told["seconds"], "parts": parts}
            report["outside"] = {
                "training_and_probing": 1 - (parts["training"] + parts["probing"]) / sum(parts.values()),
                "training_probing_and_editing": parts["rest"] / sum(parts.values()),
            }
        if "ray" in args.arms:
            seconds = run(grid, place / "ray", cache, Engine(name="ray", workers=2))["seconds"]
            report["ray"] = {"seconds": seconds, "runs_a_minute": 60 * n / seconds}
        if {"inline", "ray"} <= set(args.arms):
            report["ray"]["speed_up"] = report["inline"]["seconds"] / report["ray"]["seconds"]
            pd.testing.assert_frame_equal(rows(place / "inline"), rows(place / "ray"))
            report["ray"]["rows"] = "equal"
        if "unshared" in args.arms:
            drawn = random.Random(0).sample(range(n), args.sample)
            spent = [run(replace(grid, runs=(grid.runs[i],)), place / f"unshared{i}", cache) for i in drawn]
            mean = {name: sum(one[name] for one in spent) / len(spent) for name in spent[0]}
            report["unshared"] = {name: n * value for name, value in mean.items()}
            report["unshared"] |= {"sample": len(spent), "runs_a_minute": 60 / mean["seconds"]}
            if "inline" in args.arms:
                report["speed_up_of_sharing"] = report["unshared"]["cpu_seconds"] / report["inline"]["cpu_seconds"]
    if args.json:
        print(json.dumps(report))
        return
    print(f"{n} runs of {args.steps} steps")
    for arm in args.arms:
        told = report[arm]
        more = f"   (of a sample of {told['sample']})" if "sample" in told else ""
        cpu = f"{told['cpu_seconds']:7.1f} s CPU" if "cpu_seconds" in told else ""
        print(f"{arm:10} {told['seconds']:7.1f} s   {cpu:13}   {told['runs_a_minute']:6.1f} runs a minute{more}")
    if "inline" in args.arms:
        total = sum(report["inline"]["parts"].values())
        print("inline     " + "   ".join(f"{part} {s / total:.1%}" for part, s in report["inline"]["parts"].items()))
    if "speed_up_of_sharing" in report:
        print(f"sharing is worth {report['speed_up_of_sharing']:.2f}x")
    if "speed_up" in report.get("ray", {}):
        print(f"two workers are worth {report['ray']['speed_up']:.2f}x; the rows are equal")


if __name__ == "__main__":
    main()
