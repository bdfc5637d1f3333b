"""benchmarks/calibration.py: that it sees what it should, on a few simulated studies; its figures are made by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retention import statistics as st

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration.py"


@pytest.fixture
def calibration(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_calibration", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_it_prints_its_figures(calibration, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["calibration", "--json", "--simulations", "8", "--runs", "6"])
    calibration.main()
    found = json.loads(capsys.readouterr().out)
    assert {"coverage", "false_positive_rate", "half_life_coverage", "cpu_seconds"} <= set(found)
    assert 0.8 < found["coverage"] <= 1
    assert 0 <= found["false_positive_rate"] < 0.25
    assert {line["what"] for line in found["lines"]} > {"share", "matched", "regression", "half-life", "hazards"}


def test_intervals_that_are_too_narrow_are_caught(calibration, monkeypatch):
    share = st.share

    def narrow(counts: st.Counts) -> st.Estimate:
        e = share(counts)
        assert e is not None
        third = (e.high - e.low) / 6
        return st.Estimate(value=e.value, low=e.value - third, high=e.value + third, n=e.n)

    monkeypatch.setattr(calibration.st, "share", narrow)
    lines = list(calibration.shares(np.random.default_rng(0), 6, 40))
    assert np.mean([line.coverage for line in lines]) < 0.7
