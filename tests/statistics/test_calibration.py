"""benchmarks/calibration.py: that it sees what it should, on a few simulated studies; its figures are made by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
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
    assert {"coverage", "false_positive", "half_life_coverage", "matched_bias", "cpu_seconds"} <= set(found)
    assert 0.8 < found["coverage"] <= 1
    assert 0 <= found["false_positive"] < 0.25
    assert abs(found["matched_bias"]) < 0.1
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


def test_a_difference_that_matching_does_not_see_is_caught(calibration, monkeypatch):
    """Matched on what does not decide, a true null looks like a difference: the benchmark must show it."""
    lines = list(calibration.matchings(np.random.default_rng(1), 6, 24))
    by_name = {(line.what, line.planted): line for line in lines}
    lead, foil = by_name["matched", "0.0"], by_name["matched on the foil margin, as a warning", "0.0"]
    plain = by_name["unmatched, as a warning", "0.0"]
    assert abs(lead.bias) < 0.04 < min(abs(foil.bias), plain.bias)
    assert lead.told == 1
    assert abs(by_name["matched", "-0.15"].bias) < 0.04


def test_what_is_simulated_holds_what_was_planted(calibration):
    """The generator's own law: edited facts are kept `planted` more often than intrinsic ones of the same lead."""
    rng = np.random.default_rng(0)
    tables = [calibration.simulated(rng, 8, -0.15) for _ in range(60)]
    both = pd.concat(tables).query("3 < lead < 5")
    x = np.column_stack([np.ones(len(both)), both["edited"], both["lead"]])
    assert np.linalg.lstsq(x, both["kept"], rcond=None)[0][1] == pytest.approx(-0.15, abs=0.02)
    assert (both["foil"] - both["lead"])[both["edited"] == 1].min() >= 2


def test_a_probability_never_leaves_the_unit_interval(calibration):
    """The generator asserts it; with the most extreme draws of everything that adds up."""

    class Extreme:
        def __init__(self, sign: float) -> None:
            self.sign = sign

        def random(self, size: tuple[int, ...]) -> np.ndarray:
            return np.full(size, 1 - 1e-9 if self.sign > 0 else 1e-9)

        def integers(self, low: int, high: int, size: tuple[int, ...]) -> np.ndarray:
            rows = np.arange(low, high)
            return np.full(size, max(rows, key=lambda r: self.sign * np.sin(2.0 * r)))

        def normal(self, mean: float, sd: float, size: tuple[int, ...]) -> np.ndarray:
            return np.full(size, mean + self.sign * sd)

        def standard_normal(self, size: tuple[int, ...]) -> np.ndarray:
            return np.full(size, self.sign)

    for sign in (-1.0, 1.0):
        for planted in (0.0, -0.15):
            assert len(calibration.simulated(Extreme(sign), 6, planted, recurring=True))
