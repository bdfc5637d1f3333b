"""Reading a large results folder: means by editor, objective, group and step, against pandas over the same files.

    python benchmarks/store.py [--rows 10000000] [--questions 2500] [--repeats 3] [--ways means retention] [--json]

Simulates a results folder of so many probe rows: 4 editors, 5 objectives, as many seeds as it takes, 10 checkpoints a
run. It is published as stages publish; the columns, the layout, the compression and the checksums are those of a study.
The rows are drawn at random, and written by column (a dict for each, as a stage has them, would take an hour).

  means        load(path, by=[editor, objective, group, step]): of all_correct, all files checked
  retention    the same, given all_correct: of the questions that were right at step 0
  pandas       the means by pandas: each run's files read with the columns that they need, and grouped. Checks nothing,
               and leaves out steps -1 and 0, which runs share
  rows         load(path): all columns of all rows. Only if asked for with --ways: 10^7 rows want about 8 GB

Each in a process of its own, files in the system's cache. Printed are the medians of wall and CPU seconds, from before
`import retention` to the table, and the largest resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retention.store import ROWS, Store, write_json, write_table

EDITORS = ("rome", "memit", "alphaedit", "lora")
OBJECTIVES = ("sft", "clm", "dpo", "kto", "orpo")
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
GROUPS = ("edited", "intrinsic", "neighbor", "control")


def simulate(root: Path, seeds: int, questions: int) -> int:
    """A results folder with one study; the number of rows that `load` gives."""
    store, drawn = Store(root, create=True), np.random.default_rng(0)
    runs: list[dict[str, Any]] = []
    asked = {
        "fact_id": pa.array([f"{i // 2:016x}" for i in range(questions)]),
        "question_id": pa.array([f"{i:016x}" for i in range(questions)]),
        "group": pa.array([GROUPS[i * len(GROUPS) // questions] for i in range(questions)]),
        "form": pa.array([("direct", "paraphrase")[i % 2] for i in range(questions)]),
    }
    words = pa.array([f" a plausible answer, number {i}" for i in range(500)])

    def rows(step: int, kept: float, **keys: Any) -> pa.Table:
        right = drawn.random(questions) < kept
        logp = drawn.exponential(1.0, (2, questions)).astype(np.float32)
        columns: dict[str, Any] = asked | {
            "step": np.full(questions, step, np.int32),
            "tokens_seen": np.full(questions, 1000 * max(step, 0)),
            "edits_applied": np.full(questions, 500 * (step >= 0), np.int32),
            "logp_target": -logp[0],
            "logp_foil": -logp[1],
            "n_target_tokens": drawn.integers(1, 5, questions),
            "n_foil_tokens": drawn.integers(1, 5, questions),
            "target_rank": np.where(right, 1, drawn.integers(2, 50_000, questions)),
            "first_correct": right | (drawn.random(questions) < 0.1),
            "all_correct": right,
            "prefers_target": logp[0] < logp[1],
            "generated": words.take(pa.array(drawn.integers(0, len(words), questions))),
            "gen_exact": right,
            "gen_contains": right,
            "state": pa.array(["ok"] * questions),
        }
        columns |= {name: pa.array([value] * questions) for name, value in keys.items()}
        table = pa.table({n: columns.get(n, pa.nulls(questions)) for n in ROWS.names})
        return table.cast(ROWS)

    def fill(kind: Any, key: str, keys: dict[str, Any], at: dict[int, float]) -> None:
        with store.publishing(kind, key) as folder:
            for step, kept in at.items():
                write_table(folder / f"probes-{step:06d}.parquet", rows(step, kept, **keys))
            ids = {name: value for name, value in keys.items() if name in ("base_id", "edit_id", "run_id")}
            write_json(folder / f"{kind[:-1]}.json", ids)

    for seed in range(seeds):
        base = {"base_id": f"b{seed}", "model_id": "m", "facts_seed": seed}
        fill("bases", f"b{seed}", base, {-1: 0.5})
        for editor in EDITORS:
            edit = base | {"edit_id": f"e{seed}-{editor}", "editor": editor, "seed": seed}
            fill("edits", f"e{seed}-{editor}", edit, {0: 0.95})
            for objective in OBJECTIVES:
                cell = {"task": "text", "objective": objective, "adapter": "full", "mitigations": "none"}
                run = edit | cell | {"run_id": f"r{seed}-{editor}-{objective}"}
                fill("runs", run["run_id"], run | {"trains_edited": True}, {s: 0.95 * s**-0.05 for s in STEPS})
                runs.append({"only": None} | {name: value for name, value in run.items() if name != "model_id"})
    store.write_study("simulated", "question: simulated\n", runs)
    return len(runs) * (len(STEPS) + 2) * questions


# ------------------------------------------------------------------------------------------------ measuring

BY = ["editor", "objective", "group", "step"]
WAYS = {
    "means": f"import retention; retention.load(root, by={BY})",
    "retention": f"import retention; retention.load(root, by={BY}, given='all_correct')",
    "pandas": f"""
import pandas as pd
runs = pd.read_parquet(root / "simulated" / "runs.parquet")["run_id"]
files = [path for run in runs for path in sorted((root / "runs" / run).glob("probes-*.parquet"))]
rows = pd.concat([pd.read_parquet(path, columns={[*BY, "all_correct"]}) for path in files])
rows.groupby({BY}, observed=True)["all_correct"].agg(["mean", "count"])
""",
    "rows": "import retention; retention.load(root)",
}


def measured(way: str, root: Path, repeats: int) -> dict[str, float]:
    code = f"""
import json, pathlib, resource, time
root, wall, cpu = pathlib.Path({str(root)!r}), time.perf_counter(), time.process_time()
{WAYS[way]}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{"seconds": wall, "cpu_seconds": cpu, "memory_mb": memory}}))
"""
    found = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
        found.append(json.loads(done.stdout))
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="at least so many")
    parser.add_argument("--questions", type=int, default=2500, help="rows of a file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["means", "retention", "pandas"])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    seeds = math.ceil(args.rows / (len(EDITORS) * len(OBJECTIVES) * (len(STEPS) + 2) * args.questions))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "results"
        rows = simulate(root, seeds, args.questions)
        files = [path for path in root.rglob("*") if path.is_file()]
        report: dict[str, Any] = {"rows": rows, "files": len(files), "mb": sum(p.stat().st_size for p in files) / 1e6}
        for way in args.ways:
            report[way] = measured(way, root, args.repeats)
    report["versions"] = {name: version(name) for name in ("duckdb", "pyarrow", "pandas")}
    if args.json:
        print(json.dumps(report))
        return
    print(f"{report['rows']:,} rows in {report['files']:,} files, {report['mb']:.0f} MB")
    for way, found in report.items():
        if isinstance(found, dict) and "seconds" in found:
            print(
                f"{way:10} {found['seconds']:6.2f} s   CPU {found['cpu_seconds']:6.2f} s   {found['memory_mb']:6.0f} MB"
            )


if __name__ == "__main__":
    main()
