"""Each script of analysis/ on studies that nobody ran: the usual one, and those in which something is missing."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

import retention
from retention import statistics as st
from retention.types import UserError
from tests.analysis.made_up import tables

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "pareto", "mitigations", "survival", "forest", "half_life", "fact_map", "fates", "weights", "forgetting_curves",
    "summary", "by_lead",
)  # fmt: skip
ODD: dict[str, dict[str, Any]] = {
    "usual": {},
    "one seed": {"seeds": (0,)},
    "all kept": {"kept": 1.0},
    "none kept": {"kept": 0.0},
    "nothing written": {"right_at_0": 0.0},
    "no intrinsic facts": {"groups": ("edited",)},
}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Run a script's main on made-up tables. Figures are drawn, but only pareto's are written (the slow part)."""
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))

    def run(name: str, made: dict[str, pd.DataFrame], *arguments: str) -> Path:
        monkeypatch.setattr(retention, "load", lambda path, table="rows": made[table].copy())
        module = load(name)
        import matplotlib.pyplot as plt
        import style

        if name == "dose_response":
            monkeypatch.setattr(module, "update_norm", lambda _, edit: 1.0 + len(edit))
        if name != "pareto":
            monkeypatch.setattr(style, "save", lambda *_: [])
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "study"), "--out", str(tmp_path), *arguments])
        try:
            module.main()
        finally:
            plt.close("all")
        return tmp_path

    return run


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"analysis_{name}", ROOT / "analysis" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_shows_or_says(call, capsys, name, odd):
    out = call(name, tables(editors=("rome",), mitigations=("none", "freeze"), **ODD[odd]))
    assert capsys.readouterr().out
    for path in [*out.glob("*.md"), *out.glob("*.tex")]:
        assert not re.search(r"\bnan\b|\bNone\b|\bNaN\b|\binf\b", path.read_text()), path.name


def test_pareto_tells_the_gain_and_the_front(call):
    made = tables()
    table = pd.read_csv(call("pareto", made) / "pareto.csv")
    assert len(table) == 6
    one = table[(table["editor"] == "rome") & (table["mitigations"] == "none")].iloc[0]
    assert one["gain"] == pytest.approx(0.6)  # 0.02 * 30 steps, in each seed
    assert (one["gain_n"], one["runs"], one["measure"]) == (3, 3, "task_accuracy")
    cell = made["rows"][(made["rows"]["editor"] == "rome") & (made["rows"]["mitigations"] == "none")]
    expected = st.share(st.counts(cell, "edited", 30, "all_correct"))
    assert expected is not None
    assert one["edited_kept"] == pytest.approx(expected.value, abs=1e-5)
    for _, panel in table.groupby("editor"):
        for _, cell in panel.iterrows():
            gain, kept = panel["gain"], panel["edited_kept"]
            better = (gain >= cell["gain"]) & (kept >= cell["edited_kept"])
            better &= (gain > cell["gain"]) | (kept > cell["edited_kept"])
            assert cell["front"] == (not better.any())


def test_mitigations_are_compared_with_none_and_corrected_for_their_number(call):
    table = pd.read_csv(call("mitigations", tables()) / "mitigations.csv")
    assert set(table["mitigations"]) == {"freeze", "replay(rate=0.1)"}
    assert set(table["against"]) == {"none"}
    edited = table[table["measure"] == "edited"]
    assert set(edited["tests"]) == {4}  # two mitigations of two editors
    assert (edited["least_p_seeds"] == 0.25).all()
    p, q = edited["p_facts"].to_numpy(), edited["q_facts"].to_numpy()
    assert (q >= p - 1e-12).all()
    assert q.max() == pytest.approx(max(p))  # Benjamini and Hochberg leave the largest as it is
    gain = table[(table["measure"] == "task_accuracy gain") & (table["mitigations"] == "freeze")]
    assert gain["difference"].to_numpy() == pytest.approx(0, abs=1e-9)  # the same loss at start and end


def test_another_axis_and_baseline(call):
    out = call("mitigations", tables(mitigations=("none",)), "--axis", "editor", "--against", "memit")
    table = pd.read_csv(out / "by_editor.csv")
    assert set(table["editor"]) == {"rome"}
    assert set(table["against"]) == {"memit"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--axis", "mitigation"], "did you mean 'mitigations'"),
        (["--axis", "objective"], "varied here: mitigations, editor"),
        (["--axis", "editor"], "name one with --against: memit, rome"),
        (["--against", "frozen"], "no complete run has mitigations 'frozen'"),
        (["--criterion", "gen_exact"], "add the probe generate"),
    ],
)
def test_what_cannot_be_compared_is_said(call, arguments, said):
    with pytest.raises(UserError, match=said):
        call("mitigations", tables(), *arguments)


def test_dose_response(call):
    doses = {"none": 10, "freeze": 20, "replay(rate=0.1)": 80}
    out = call("dose_response", tables(editors=("rome",), axis=doses), "--dose", "tune.steps")
    table = pd.read_csv(out / "dose_response.csv")
    assert len(table) == 9  # a panel for each mitigation, which goes with the dose here
    made = tables(editors=("rome", "memit"), mitigations=("none", "paraphrase(n=3)", "paraphrase(n=9)"), seeds=range(4))
    table = pd.read_csv(call("dose_response", made, "--dose", "n") / "dose_response.csv").set_index(["panel", "group"])
    assert set(table.index) == {
        (f"{editor} · paraphrase", group)
        for editor in ("rome", "memit")
        for group in ("edited", "intrinsic", "edited - intrinsic")
    }
    of = {group: table.loc[("rome · paraphrase", group)] for group in ("edited", "intrinsic", "edited - intrinsic")}
    assert of["edited - intrinsic"]["slope"] == pytest.approx(
        of["edited"]["slope"] - of["intrinsic"]["slope"], abs=1e-5
    )
    assert (of["edited"]["runs"], of["edited"]["per"]) == (8, "unit")
    cell = made["rows"][(made["rows"]["editor"] == "rome") & (made["rows"]["group"] == "edited")]
    kept = [
        st.share(st.counts(cell[cell["mitigations"] == f"paraphrase(n={n})"], "edited", None, "all_correct"))
        for n in (3, 9)
    ]
    assert of["edited"]["slope"] > 0
    assert kept[1].value > kept[0].value
    table = pd.read_csv(call("dose_response", made, "--dose", "update_norm") / "dose_response.csv")
    assert list(table["panel"].unique()) == ["all editors"]
    assert list(table["runs"]) == [24, 24, 24]
    with pytest.raises(UserError, match="no setting with numbers varies"):
        call("dose_response", tables(editors=("rome",), mitigations=("none",)))
    with pytest.raises(UserError, match="expected one of tune\\.steps"):
        call("dose_response", tables(editors=("rome",), axis=doses), "--dose", "lr")
