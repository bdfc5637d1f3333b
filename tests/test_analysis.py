"""Curves and summary of a finished study: what they write, and what they say where something is missing."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

import retention
from retention import statistics as st
from retention.study import Study
from tests.small_study import ROME, TUNE, document, one

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"analysis_{name}", ROOT / "analysis" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results")) / "small"


def call(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def test_curves(script, study, monkeypatch, capsys):
    call(script("forgetting_curves"), monkeypatch, study)
    png, pdf = study / "forgetting_curves.png", study / "forgetting_curves.pdf"
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert pdf.read_bytes()[:5] == b"%PDF-"
    table = study / "forgetting_curves.csv"
    assert capsys.readouterr().out == f"table: {table}\nfigure: {png}\nfigure: {pdf}\n"
    width, height = (int.from_bytes(png.read_bytes()[i : i + 4], "big") for i in (16, 20))
    assert width > 800  # two columns of panels at 200 dots an inch
    assert height > 600
    before = png.read_bytes()
    call(script("forgetting_curves"), monkeypatch, study)
    assert png.read_bytes() == before  # no time of day in it
    first = pdf.read_bytes()
    call(script("forgetting_curves"), monkeypatch, study, "--from-summary")
    assert (png.read_bytes(), pdf.read_bytes()) == (before, first)


def test_curves_show_the_numbers_that_the_statistics_give(script, study, monkeypatch):
    import matplotlib.pyplot as plt

    module = script("forgetting_curves")
    call(module, monkeypatch, study)
    table = module.tables.read(study, "forgetting_curves", names_end="group")
    rows = retention.load(study)
    for editor in ("rome", "identity"):
        cell = rows[(rows["editor"] == editor) & (rows["mitigations"] == "none")]
        figure, axes = plt.subplots()
        module.panel(axes, table[(table["editor"] == editor) & (table["mitigations"] == "none")])
        labels = [line.get_label() for line in axes.lines]
        shown = {str(line.get_label()).split(" ")[0].rstrip(":"): line for line in axes.lines}
        for group in ("edited", "intrinsic"):
            if editor == "identity" and group == "edited":
                assert "edited: none right at step 0" in labels  # nothing was written
                assert len(shown[group].get_xdata()) == 0
                continue
            expected = [st.share(st.counts(cell, group, step, "all_correct")) for step in (0, 1, 2, 4)]
            assert list(shown[group].get_xdata()) == [0, 1, 2, 4]
            assert list(shown[group].get_ydata()) == pytest.approx([e.value for e in expected if e], abs=1e-5)
            assert shown[group].get_ydata()[0] == 1.0
        for band in axes.collections:
            corners = band.get_paths()[0].vertices
            assert corners[corners[:, 0] == 0][:, 1] == pytest.approx(1.0)  # at step 0 all are right, by definition
            assert corners[:, 1].min() < 0.7  # and later few facts leave much open
            assert f"(n = {expected[0].n})" in str(shown[group].get_label())
        plt.close(figure)


def test_summary(script, study, monkeypatch, capsys):
    call(script("summary"), monkeypatch, study)
    table = pd.read_csv(study / "summary.csv", keep_default_na=False, na_values=[""])
    assert len(table) == 4
    rows = retention.load(study)
    for line in table.itertuples():
        cell = rows[(rows["editor"] == line.editor) & (rows["mitigations"] == line.mitigations)]
        first = cell[(cell["step"] == 0) & (cell["form"] == "direct")].set_index("group")["all_correct"]
        assert line.efficacy_at_0 == pytest.approx(first["edited"].mean())
        assert line.intrinsic_at_0 == pytest.approx(first["intrinsic"].mean())
        assert (line.efficacy_at_0_n, line.intrinsic_at_0_n, line.runs, line.steps) == (4, 8, 1, 4)
        assert line.efficacy_at_0_low <= line.efficacy_at_0 <= line.efficacy_at_0_high
        assert line.task_loss_end < line.task_loss_start
        if line.editor == "rome":
            assert line.edited_minus_intrinsic == pytest.approx(line.edited_kept - line.intrinsic_kept, abs=1e-5)
            assert line.edited_minus_intrinsic_low <= line.edited_minus_intrinsic <= line.edited_minus_intrinsic_high
        else:
            assert line.efficacy_at_0 == 0
            assert pd.isna(line.edited_kept)
    text = (study / "summary.md").read_text()
    out = capsys.readouterr().out
    assert out == f"table: {study / 'summary.csv'}\n{text}\n"
    assert "| editor | mitigations | runs | efficacy | paraphrase | intrinsic | neighbor | same subject |" in text
    assert text.count("| rome | freeze | 1 |") == 2
    assert "none right at step 0" in text  # what identity cannot keep


def test_another_criterion_form_and_folder(script, study, monkeypatch, tmp_path, capsys):
    call(script("summary"), monkeypatch, study, "--criterion", "gen_contains", "--out", tmp_path / "out")
    call(script("forgetting_curves"), monkeypatch, study, "--form", "paraphrase", "--out", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("summary.csv", "summary.md", *(f"forgetting_curves.{suffix}" for suffix in ("csv", "png", "pdf"))),
    }
    assert "Right by `gen_contains`" in capsys.readouterr().out
    assert not (study / "summary.csv").exists()


@pytest.mark.parametrize("name", ["forgetting_curves", "summary"])
def test_missing_runs_are_named(script, study, monkeypatch, capsys, name):
    runs = retention.load(study, "runs")
    lost = runs["run_id"][0]
    (study.parent / "runs" / lost / "complete.json").unlink()
    call(script(name), monkeypatch, study)
    err = capsys.readouterr().err
    assert err.count("incomplete: ") == 1
    assert lost in err
    assert f"editor={runs['editor'][0]}" in err


def test_runs_that_diverged_are_named(script, study, monkeypatch, capsys):
    rows = retention.load(study)
    lost = rows["run_id"][0]
    worse = rows.assign(state=rows["state"].astype(str).mask(rows["run_id"] == lost, "nan_logits"))
    script("summary")
    import style

    style.warn_not_finite(worse)
    assert (
        capsys.readouterr().err == f"not finite: {lost} has readings that are NaN or infinite, and they are left out\n"
    )
    style.warn_not_finite(rows)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["forgetting_curves", "summary"])
def test_what_cannot_be_shown_is_said(script, study, monkeypatch, name):
    module = script(name)
    from retention.types import UserError

    def said(*arguments: object) -> str:
        with pytest.raises(UserError) as caught:
            call(module, monkeypatch, *arguments)
        return str(caught.value)

    assert "give the folder of one study in it: small" in said(study.parent)
    assert "no study 'smal'; did you mean 'small'?" in said(study.parent / "smal")
    assert "unknown 'all_corect'" in said(study, "--criterion", "all_corect")
    for mark in study.parent.glob("runs/*/complete.json"):
        mark.unlink()
    assert "no run is complete" in said(study)
    assert not list(study.glob("summary*"))
    assert not list(study.glob("*.png"))


def test_generation_that_was_not_probed_is_no_criterion(script, cache, tmp_path, monkeypatch):
    from retention.types import UserError

    results = retention.run(Study.of(one(probes=["score"]), name="scored"), results=tmp_path / "r", cache=cache)
    with pytest.raises(UserError, match="gen_exact: not measured in this study; add the probe generate"):
        call(script("summary"), monkeypatch, results, "--criterion", "gen_exact")


def test_seeds_are_pooled_and_other_axes_are_not(script, finished, cache, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(finished, results)
    grid = {"editor": [ROME], "seed": [0, 1], "tune.steps": [2, 4]}
    study = Study.of(document(grid=grid, tune=TUNE, at=[2], probes=["score"]), name="axes")
    folder = retention.run(study, results=results, cache=cache)
    call(script("summary"), monkeypatch, folder)
    table = pd.read_csv(folder / "summary.csv")
    assert list(table["tune.steps"]) == [2, 4]
    assert list(table["runs"]) == [2, 2]
    assert list(table["intrinsic_at_0_n"]) == [16, 16]
    assert "| editor | mitigations | tune.steps | runs |" in (folder / "summary.md").read_text()
    call(script("forgetting_curves"), monkeypatch, folder)
