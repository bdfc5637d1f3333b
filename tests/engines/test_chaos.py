"""Killed at random moments, a study ends as if nothing had happened: the short form of benchmarks/chaos.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_study_killed_twelve_times_has_the_rows_of_an_undisturbed_one(cache: Path) -> None:
    """Within prepare, edit and tune of real stages, two processes at a time. The script compares the rows itself."""
    out = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", "inline=12", "--mean", "0.4", "--json",
         "--cache", str(cache)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-2000:]
    report = json.loads(out.stdout)
    found = report["engines"]["inline"]
    assert (report["kills"], found["rows"]) == (12, "equal")
    assert all(n >= 0 for n in found["begun_again"].values())
    assert sum(found["begun_again"].values()) > 0  # it did hit
    assert found["steps"]["trained"] >= found["steps"]["needed"] > 0
