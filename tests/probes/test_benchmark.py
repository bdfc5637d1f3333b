"""The probing benchmark at a small size: its object has what is promised, and plain and packed ways agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long  # and red since the benchmark takes --model: to be mended
def test_json():
    small = ["--model=toy", "--layers=2", "--width=64", "--vocabulary=800", "--edits=1", "--new-tokens=4"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "probing.py", "--json", *small],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    result = json.loads(done.stdout)["toy"]
    assert result["ratio"].keys() == {"scoring", "generation", "generation_lean"}
    assert result["max_difference"] < 1e-5
    assert result["unequal_texts"] == 0
    assert result["threads"] == 1
    assert result["sizes"]["questions"] == 13
    assert done.stderr == ""
