"""`make figures`: what is committed in results/ is what the stored tables give, and what the texts cite is drawn."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retention.statistics import VERSION

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
FEW = ("quickstart/forgetting_curves", "mitigations/mitigations")  # the rest takes 15 CPU seconds


@pytest.fixture(scope="module")
def figures() -> Iterator:
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "analysis"))
    import figures

    yield figures
    sys.path.remove(str(ROOT / "analysis"))
    for name in set(sys.modules) - before:  # other tests load these scripts for themselves
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "analysis")):
            del sys.modules[name]


def cited() -> set[str]:
    """Figures and tables of results/ that a text of ours points to."""
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {
        link for text in texts for link in re.findall(r"results/(\w+/[\w.]+\.(?:png|pdf|md|csv))", text.read_text())
    }
    return {link for link in found if (RESULTS / link.partition("/")[0]).is_dir()}


def apart(one: Path, two: Path) -> float:
    """Mean difference of two pictures, 0 to 1; 1 if their sizes differ."""
    import matplotlib.pyplot as plt

    a, b = plt.imread(one), plt.imread(two)
    return 1.0 if a.shape != b.shape else float(np.abs(a - b).mean())


def test_tables_equal_the_committed_ones(figures, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures.forest.style, "save", lambda *_: [])  # the slow part
    monkeypatch.setattr(sys, "argv", ["figures", str(RESULTS), "--out", str(tmp_path)])
    figures.main()
    drawn = sorted(path.relative_to(tmp_path) for path in [*tmp_path.rglob("*.md"), *tmp_path.rglob("*.tex")])
    committed = [*RESULTS.glob("*/*.md"), *RESULTS.glob("*/*.tex")]
    assert drawn == sorted(path.relative_to(RESULTS) for path in committed)
    for path in drawn:
        assert (tmp_path / path).read_text() == (RESULTS / path).read_text(), path
    for path in tmp_path.rglob("*.csv"):  # of studies with an excerpt, computed from it
        assert path.read_text() == (RESULTS / path.relative_to(tmp_path)).read_text(), path
    assert capsys.readouterr().out.count("drawn: ") == len({folder for folder, _ in figures.stored(RESULTS)})


def test_stored_tables_name_the_statistics_that_computed_them(figures):
    """Those of the present code, wherever an excerpt allows to compute them; else results/README.md names the study."""
    old = set()
    for path in sorted(RESULTS.glob("*/*.csv")):
        versions = set(pd.read_csv(path)["statistics"])
        assert len(versions) == 1, path
        if versions != {VERSION}:
            old.add(path.parent.name)
            assert not (path.parent / "excerpt").exists(), f"{path}: run make figures"
    listed = re.search(r"in forest tables\):\n([^.]*)\.", (RESULTS / "README.md").read_text())
    assert old == (set(listed.group(1).split(", ")) if listed else set())


@pytest.mark.parametrize("which", [pytest.param("few", id="few"), pytest.param("all", marks=pytest.mark.long)])
def test_figures_equal_the_committed_ones(figures, tmp_path, which):
    for folder, name in figures.stored(RESULTS):
        if which == "all" or f"{folder.name}/{name}" in FEW:
            figures.DRAW[name](folder, tmp_path / folder.name)
    drawn = sorted(tmp_path.rglob("*.png"))
    assert len(drawn) == len(FEW if which == "few" else list(RESULTS.glob("*/*.png")))
    for path in drawn:
        # Other builds of the font library shift letters by a part of a pixel.
        assert apart(path, RESULTS / path.relative_to(tmp_path)) < 0.01, path.name
        assert path.with_suffix(".pdf").read_bytes()[:5] == b"%PDF-"


def test_all_that_is_cited_can_be_drawn(figures):
    made = {f"{folder.name}/{name}" for folder, name in figures.stored(RESULTS)}
    for link in cited():
        assert (RESULTS / link).is_file(), link
        assert link.rpartition(".")[0] in made, link


@pytest.mark.parametrize("name", ["README.md", "docs/findings.md"])
def test_tables_and_findings_in_our_texts_are_the_stored_ones(figures, name):
    import cited as script

    text = (ROOT / name).read_text()
    assert script.MARK.search(text)
    assert script.written(text, RESULTS) == text
    mark = "<!-- table: remedies mitigations rome -->\n"
    new = script.written(f"a\n{mark}\n| old |\n| --- |\n\nb\n", RESULTS)
    assert new.startswith(f"a\n{mark}\n| remedy | edited, kept | intrinsic, kept | task accuracy gained |\n")
    assert new.endswith(" |\n\nb\n")
    assert "old" not in new
    mark, end = "<!-- finding: arms mitigations gain -->", "<!-- end -->"
    new = script.written(f"a\n\n{mark}\nold words\n\nof two paragraphs\n{end}\n\nb\n", RESULTS)
    assert new.startswith(f"a\n\n{mark}\n\nMitigations against none, task accuracy gain: ")
    assert new.endswith(f" paired seeds.\n\n{end}\n\nb\n")  # what follows is not ours
    assert "old" not in new
    for text in (f"{mark}\n\nwords by hand\n", f"{mark}\n\n{mark}\n{end}\n"):
        with pytest.raises(figures.UserError, match="a mark without its <!-- end -->"):
            script.written(text, RESULTS)
    with pytest.raises(figures.UserError, match="unknown kind 'arm'; expected one of equal_terms, arms, recency"):
        script.written(f"<!-- finding: arm mitigations -->\n{end}\n", RESULTS)
    with pytest.raises(figures.UserError, match="quickstart has no table of arms"):
        script.written(f"<!-- finding: arms quickstart edited -->\n{end}\n", RESULTS)
    with pytest.raises(figures.UserError, match="unknown kind 'hold'; expected one of held, gains, remedies"):
        script.written("<!-- table: hold quickstart -->\n", RESULTS)
    with pytest.raises(figures.UserError, match="mitigations has no line of the editor 'roma'"):
        script.written("<!-- table: remedies mitigations roma -->\n", RESULTS)


def test_a_folder_without_tables_is_said(figures, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["figures", str(tmp_path)])
    with pytest.raises(figures.UserError, match="no study with a table"):
        figures.main()
    with pytest.raises(figures.UserError, match=r"pareto\.csv: no such table; leave out --from-summary"):
        figures.pareto.draw(tmp_path, tmp_path)
    (tmp_path / "pareto.csv").write_text("editor,gain\nrome,1\n")
    with pytest.raises(figures.UserError, match="no column 'runs'; the table was written by another version"):
        figures.pareto.draw(tmp_path, tmp_path)
