"""The report's HTML: what it says of usual and odd studies, and that nothing from data becomes markup."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retention import statistics as st
from retention.cli import main
from retention.report import _page
from retention.report._cells import cells_of
from retention.report._histories import histories
from retention.report._page import html
from retention.report._read import opened as read
from retention.statistics.curves import curves
from retention.store import Store, write_json
from retention.types import UserError
from tests.analysis.made_up import STEPS, tables
from tests.report.made import ODD, opened, unread

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(autouse=True)
def _no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The charts' JavaScript takes two seconds to bundle and is not looked at here."""
    monkeypatch.setattr(_page, "bundle", lambda: "")


class Page(HTMLParser):
    """What a page holds: tags, texts outside of scripts and styles, ids, and the script's data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.within: list[str] = []
        self.data: dict[str, Any] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.within.pop()

    def handle_data(self, data: str) -> None:
        if not self.within:
            self.texts.append(data)
        elif self.tags[-1][1].get("type") == "application/json":
            self.data = json.loads(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize("odd", ODD)
def test_every_study_has_a_page_without_a_number_that_is_none(odd):
    page = Page(html([opened(editors=("rome",), mitigations=("none", "freeze"), **ODD[odd])]))
    assert not re.search(r"\b(nan|NaN|None|inf|undefined)\b", page.text)
    for part in ("Which is kept?", "What was found", "Runs", "study.yaml", "a processor"):
        assert part in page.text
    said = {
        "one seed": "one seed only: other seeds and draws were not measured",
        "nothing written": "cannot be compared on equal terms: no edited fact is right at step 0",
        "no intrinsic facts": "cannot be compared on equal terms: no intrinsic facts in this study",
        "no edited facts": "cannot be compared on equal terms: no edited facts in this study",
        "all kept": "retention of edited facts",
        "none kept": "retention of edited facts",
    }
    assert said.get(odd, "") in page.text


def test_a_page_loads_nothing_and_is_accessible():
    text = html([opened(editors=("rome",))])
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "base")
        assert not attributes.get("src")
        assert attributes.get("href", "#")[:1] == "#" or attributes["href"] == "data:,"
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text
    attributes = [a for tag, a in page.tags if tag == "html"]
    assert attributes == [{"lang": "en"}]
    assert {"header", "nav", "main", "footer", "caption", "fieldset", "legend", "noscript"} <= {t for t, _ in page.tags}
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for tag, a in page.tags if tag == "a"} <= set(ids)


def test_nothing_from_data_becomes_markup():
    small: dict[str, Any] = {"seeds": (0, 1), "mitigations": ("none",)}
    study = opened(EVIL, text=EVIL + " {}", editors=("rome", EVIL), **small)
    study = replace(study, question=EVIL, settings=EVIL)
    study = replace(study, rows=unread(study, generated=EVIL + "\u2028"))
    page = Page(html([study]))
    plain = Page(html([opened(editors=("rome", "x"), **small)]))
    scripts = [tag for tag, _ in page.tags if tag == "script"]
    assert len(scripts) == len([tag for tag, _ in plain.tags if tag == "script"])
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count(EVIL) > 10  # it is shown, as text
    assert page.data["facts"]["texts"] == [EVIL + "\u2028"]
    assert EVIL in page.data["values"]["editor"]


def same(a: st.Estimate | None, b: st.Estimate | None) -> None:
    assert a is not None
    assert b is not None
    assert (a.value, a.low, a.high, a.n) == pytest.approx((b.value, b.low, b.high, b.n), rel=1e-12)


def test_curves_are_the_shares_of_each_step():
    rows = tables(seeds=(0, 1))["rows"]
    cell = rows[(rows["editor"] == "rome") & (rows["mitigations"] == "none")]
    # A fact asked in two ways counts once; a reading that is missing counts in neither.
    again = cell[cell["fact_id"] == "edited 0 1"].assign(question_id="again", all_correct=True)
    cell = pd.concat([cell, again], ignore_index=True).astype({"all_correct": object})
    cell.loc[(cell["fact_id"] == "edited 1 2") & (cell["step"] == 3), "all_correct"] = None
    found = curves(cell, "edited", "all_correct")
    assert list(found.kept) == list(found.every) == list(STEPS)
    for step in STEPS:
        same(found.kept[step], st.share(st.counts(cell, "edited", step, "all_correct")))
        same(found.every[step], st.share(st.counts(cell, "edited", step, "all_correct", given=None)))
    assert found.end == found.kept[STEPS[-1]]
    # Runs that end at different steps: each run's last.
    first = str(cell["run_id"].iloc[0])
    short = cell[(cell["run_id"] != first) | (cell["step"] < 30)]
    same(curves(short, "edited", "all_correct").end, st.share(st.counts(short, "edited", None, "all_correct")))
    assert curves(cell, "neighbor", "all_correct").end is None


def test_the_page_holds_the_statistics():
    study = opened()
    page = Page(html([study]))
    names = ("cell", "group", "form", "criterion", "of", "step", "value", "low", "high", "n")
    points = pd.DataFrame(dict(zip(names, page.data["points"], strict=True)))
    cells = page.data["cells"]
    assert sorted(map(tuple, cells)) == sorted(
        (e, m) for e in ("memit", "rome") for m in ("none", "freeze", "replay(rate=0.1)")
    )
    at = cells.index(["rome", "freeze"])
    rows = study.rows
    assert rows is not None
    cell = rows[(rows["editor"] == "rome") & (rows["mitigations"] == "freeze")]
    expected = st.share(st.counts(cell, "edited", 10, "first_correct"))
    one = points[
        (points["cell"] == at) & (points["step"] == 10) & (points["of"] == 0)
        & (points["group"] == page.data["groups"].index("edited"))
        & (points["criterion"] == page.data["criteria"].index("first_correct"))
    ]  # fmt: skip
    assert expected is not None
    parts = [expected.value, expected.low, expected.high]
    assert one[["value", "low", "high"]].to_numpy()[0] == pytest.approx(parts, abs=1e-4)
    assert int(one["n"].iloc[0]) == expected.n
    end = st.share(st.counts(cell, "edited", None, "all_correct"))
    assert end is not None
    assert f"{end.value:.2f} [{end.low:.2f}, {end.high:.2f}] ({end.n})" in page.text


def test_a_facts_history_is_its_rows():
    study = opened(seeds=(0,), editors=("rome",), mitigations=("none", "freeze"))
    packed = histories([study])
    assert packed["left_out"] == 0
    assert len(packed["questions"]) == packed["all"] == 32
    rows = study.rows
    assert rows is not None
    number, group, form, text, answer, foil, readings = packed["questions"][3]
    fact = packed["facts"][number][0]
    assert (group, form, text, answer, foil) == ("edited", "direct", "{} is at", "x", "y")
    for run, right, target, rival, rank, said in readings:
        name, steps = packed["runs"][run]
        mitigation = name.split(" · ")[1]
        own = rows[(rows["fact_id"] == fact) & (rows["mitigations"] == mitigation)].sort_values("step")
        assert steps == own["step"].to_list()
        n = len(packed["criteria"])
        assert [right[i * n] == "1" for i in range(len(steps))] == own["all_correct"].to_list()
        assert target == own["logp_target"].to_list()
        assert rival == pytest.approx(own["logp_foil"].to_list(), abs=0.006)
        assert (set(rank), [packed["texts"][i] for i in said]) == ({1}, own["generated"].to_list())


def test_more_histories_than_fit_are_counted():
    study = opened(editors=("rome",), mitigations=("none",))
    packed = histories([study], most=100)  # 20 questions of 5 readings
    assert len(packed["questions"]) == 20
    assert packed["left_out"] == packed["all"] - 20 == 76
    assert {q[1] for q in packed["questions"]} == {"edited"}
    assert "Histories of 20 of 96 questions" in Page(html([study], most=100)).text


def test_two_studies_side_by_side():
    small: dict[str, Any] = {"editors": ("rome",), "mitigations": ("none",)}
    one, two = opened("one", **small), opened("two", kept=0.5, **small)
    two = replace(two, settings="question: Which is kept?\ntune: {steps: 200}\n")
    page = Page(html([one, two]))
    assert page.data["varied"][0] == "study"
    assert {line[0] for line in page.data["cells"]} == {"one", "two"}
    assert "two studies side by side" in page.text
    assert "tune.steps - 200" in page.text
    assert "not paired" in page.text


def test_the_criterion_is_one_that_was_read(tmp_path):
    study = opened(seeds=(0,), editors=("rome",), mitigations=("none",))
    none = replace(study, rows=unread(study, all_correct=None))
    assert "Right by first_correct" in Page(html([none])).text
    nothing = dict.fromkeys(st.CRITERIA)
    text = Page(html([replace(study, rows=unread(study, **nothing))])).text
    assert "neither of score and generate" in text
    with pytest.raises(UserError, match="criterion gen_exact: not measured in this study; add the probe generate"):
        html([study], "gen_exact")
    with pytest.raises(UserError, match="criterion: unknown 'right'"):
        html([study], "right")


def test_one_run_of_many_edits_is_one_seed():
    study = opened(seeds=(0, 1), editors=("rome",), mitigations=("none",))
    rows = unread(study, seed=0, facts_seed=0)
    (cell,) = cells_of(replace(study, rows=rows), "all_correct")
    assert (len(cell.runs), cell.seeds) == (2, 1)
    assert "one seed only" in Page(html([replace(study, rows=rows)])).text


# ------------------------------------------------------------------------------------------------ from the store


def test_a_finished_study(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["report", str(finished / "small"), "--out", str(tmp_path / "r.html")])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'r.html'}\n"
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "4 of 4 runs complete" in page.text
    study = read(finished)  # the only one of its results folder
    assert study.rows is not None
    prompts = {text for *_, text, _, _, _ in page.data["facts"]["questions"]}
    assert study.questions is not None
    assert prompts == set(study.questions["text"])
    said = page.data["facts"]["texts"]
    assert set(said) == set(study.rows["generated"].dropna())
    assert "torch" in page.text
    shutil.copytree(finished, tmp_path / "again")
    (tmp_path / "again" / "small" / "checksums.json").unlink()  # as of an earlier version, so that it may be changed
    (tmp_path / "again" / "small" / "study.yaml").write_text("question: Why?\n", encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["report", "--compare", str(tmp_path / "again" / "small"), str(finished / "small")])
    assert left.value.code == 0
    page = Page((tmp_path / "again" / "small" / "compare-small.html").read_text(encoding="utf-8"))
    assert {line[0] for line in page.data["cells"]} == {"again/small", "finished/small"}
    assert "question Why? Are edits forgotten" in page.text


def test_a_study_file_that_is_no_yaml(begun: Path):
    (begun / "begun" / "checksums.json").unlink()
    (begun / "begun" / "study.yaml").write_text("question: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"study\.yaml"):
        read(begun)
    (begun / "begun" / "study.yaml").unlink()
    assert "study.yaml is missing" in Page(html([read(begun)])).text


def test_what_cannot_be_paired_is_said():
    page = Page(html([opened(seeds=(0,), editors=("memit", "rome"), mitigations=("none",))]))
    assert "No paired comparison: axis editor has no baseline of its own." in page.text


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb by WCAG 2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_stands_out_on_light_and_dark_paper():
    css = (Path(_page.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = css.split("prefers-color-scheme: dark", 1)
    for part in (light, dark):
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part))
        for text in ("ink", "soft", "accent", "good", "bad"):
            for ground in ("paper", "card", "faint"):
                one, two = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
                assert (one + 0.05) / (two + 0.05) >= 4.5, f"{text} on {ground}"


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A results folder with a study of two runs, of which none is complete and one has failed."""
    store = Store(tmp_path / "results", create=True)
    cell = dict.fromkeys(("editor", "task", "objective", "adapter"), "x") | {"seed": 0, "facts_seed": 0, "only": None}
    keys = [{"run_id": f"r{i}", "edit_id": "e", "base_id": "b", **cell, "mitigations": f"m{i}"} for i in range(2)]
    store.write_study("begun", "question: Why?\n", keys)
    (store.root / "failed" / "runs").mkdir(parents=True)
    told = {"stage": "tune", "key": "r0", "label": "x", "error": "ValueError: <b>no</b>", "attempts": 2, "time": "now"}
    write_json(store.root / "failed" / "runs" / "r0.json", told)
    return store.root


def test_no_complete_run(begun: Path):
    page = Page(html([read(begun / "begun")]))
    assert "No run is complete yet: nothing can be said." in page.text
    assert "0 of 2 runs complete; 1 failed, 1 to do" in page.text
    assert "tune: ValueError: <b>no</b>" in page.text
    assert not page.data["cells"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no results here"),
        (["empty"], "no results here"),
        (["fresh"], "no study has been run here yet"),
        (["results/begin"], "no study 'begin'; did you mean 'begun'?"),
        (["results", "results"], "expected one study; two want --compare, got 2"),
        (["--compare", "results"], "expected two studies: retention report --compare A B, got 1"),
        (["--compare", "results/begun", "results"], "the same study twice"),
        (["results", "--out", "results"], "is a folder; --out wants a file"),
        (["results", "--out", "away/r.html"], "no such folder"),
    ],
)
def test_bad_input(begun: Path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(begun.parent)
    Path("empty").mkdir()
    Store("fresh", create=True)
    with pytest.raises(SystemExit) as left:
        main(["report", *arguments])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_several_studies_want_a_choice(begun: Path):
    store = Store(begun)
    store.write_study("other", "", [{"run_id": "r9", "edit_id": "e", "base_id": "b"}])
    with pytest.raises(UserError, match="give the folder of one study in it: begun, other"):
        read(begun)


def test_a_missing_library_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "altair":
            raise ImportError("no", name="altair")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"a report needs altair: pip install 'retention\[report\]'"):
        _page.write(["x"])
