"""The report as a browser shows it: charts are drawn, the filters work, facts are found, nothing is logged or loaded.

Skipped where there is no Chromium (`apt-get install chromium`); there is no network in it in any case.
"""

from __future__ import annotations

import html as escaping
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retention.report._page import html
from tests.report.made import opened

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    *("--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
EVIL = "<img src=x onerror=document.title='owned'></script><script>document.title='owned'</script>"
# What a reader would do, after the page's own script; `out` is read back as text.
STEPS = """
<script type="module">
const $ = (id) => document.getElementById(id);
const drawn = () => new Promise((done) => setTimeout(done, 500));  // of the virtual time
const choose = async (element, value) => {
  element.value = value;
  element.dispatchEvent(new Event("change", { bubbles: true }));
  await drawn();
};
const out = {};
const look = (name) => { out[name] = {
  panels: [...document.querySelectorAll("#panels figcaption")].map((e) => e.textContent),
  lines: document.querySelectorAll("#panels .mark-line path").length,
  points: document.querySelectorAll("#panels .mark-symbol path").length,
  legend: $("legend").textContent, rows: document.querySelectorAll("#points tbody tr").length,
  first: document.querySelector("#points tbody tr")?.textContent,
  forest: document.querySelectorAll("#forest .mark-symbol path").length,
  pareto: document.querySelectorAll("#pareto .mark-symbol path").length,
  alternative: document.querySelector("#panels [role=img]")?.getAttribute("aria-label"),
}; };
await drawn(); look("start");
const over = [...document.querySelectorAll("#panels .mark-symbol path")].at(-1);
if (over) {
  const { x, y, width, height } = over.getBoundingClientRect();
  const at = { bubbles: true, clientX: x + width / 2, clientY: y + height / 2 };
  for (const type of ["pointerover", "pointermove"]) over.dispatchEvent(new PointerEvent(type, at));
  await drawn();
  out.hover = document.getElementById("vg-tooltip-element")?.textContent;
}
DO_THIS
out.title = document.title;
out.requests = performance.getEntriesByType("resource").map((e) => e.name);
const pre = document.createElement("pre");
pre.id = "out";
pre.textContent = JSON.stringify(out);
document.body.append(pre);
</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def browse(page: str, do: str, *, flags: tuple[str, ...] = ()) -> dict[str, Any]:
        file = tmp_path / "report.html"
        before, end, after = page.rpartition("</body>")
        file.write_text(before + STEPS.replace("DO_THIS", do) + end + after, encoding="utf-8")
        assert CHROMIUM is not None
        words = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
        run = subprocess.run(words, capture_output=True, text=True, timeout=120)
        logged = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
        assert logged == []
        found = re.search(r'<pre id="out">(.*?)</pre>', run.stdout, re.DOTALL)
        assert found, run.stderr[-2000:]
        return json.loads(escaping.unescape(found[1]))

    return browse


def test_charts_filters_and_facts(browse):
    page = html([opened(seeds=(0, 1))])  # 2 editors, 3 mitigations, 2 groups, 5 steps
    out = browse(
        page,
        """
        await choose(document.querySelector("[data-dim=editor]"), "rome"); look("rome");
        await choose(document.querySelector("[data-dim=mitigations]"), "freeze"); look("freeze");
        await choose($("of"), "1"); look("all");
        await choose($("of"), "0");
        await choose(document.querySelector("[data-dim=mitigations]"), "");
        await choose($("line"), "mitigations"); look("line");
        document.querySelector("input[name=group][value=intrinsic]").click(); await drawn(); look("edited");
        const search = $("search");
        search.value = "intrinsic 1 7"; search.dispatchEvent(new Event("input")); await drawn();
        out.count = $("count").textContent;
        document.querySelector("#matches button").click(); await drawn();
        out.fact = $("fact").textContent; out.chart = document.querySelectorAll("#fact .mark-symbol path").length;
        search.value = "nothing like it"; search.dispatchEvent(new Event("input")); out.none = $("count").textContent;
        """,
    )
    start = out["start"]
    assert len(start["panels"]) == 6
    assert start["panels"][0] == "memit · none"
    assert (start["lines"], start["rows"]) == (12, 60)
    assert start["points"] == 120  # each with a larger one that the pointer meets
    assert start["legend"] == "editedintrinsic"
    assert start["forest"] >= 6
    assert start["pareto"] == 12
    assert "edited: 1.00 at step 0, " in start["alternative"]
    assert re.search(r"facts\D*\d+", out["hover"])  # the pointer is told value, interval and n
    assert re.search(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]", out["hover"])
    assert len(out["rome"]["panels"]) == 3
    assert out["rome"]["pareto"] == 6
    assert (len(out["freeze"]["panels"]), out["freeze"]["lines"]) == (1, 2)
    assert "1.00 [" in out["freeze"]["first"]
    assert out["all"]["first"] != out["freeze"]["first"]  # of all facts fewer are right at step 0
    assert (len(out["line"]["panels"]), out["line"]["lines"]) == (2, 6)
    assert out["line"]["legend"] == "nonefreezereplay(rate=0.1)"
    assert (len(out["edited"]["panels"]), out["edited"]["lines"]) == (1, 3)
    assert out["count"] == "4 facts"  # 0 7 (of relation r1), 0 17, 1 7, 1 17: each word anywhere
    assert "intrinsic 0 17 is at" in out["fact"]
    assert re.search(r"0, edited(✓ right|✗ wrong)x", out["fact"])
    assert out["chart"] == 10
    assert out["none"] == "0 facts"
    assert out["requests"] == []


def test_markup_in_data_stays_text(browse):
    page = html([opened(EVIL, text=EVIL + " {}", seeds=(0,), editors=(EVIL, "rome"), mitigations=("none",))])
    out = browse(page, 'out.fact = $("fact").textContent; out.images = document.images.length;')
    assert out["title"] != "owned"
    assert EVIL in out["fact"]
    assert any(EVIL in panel for panel in out["start"]["panels"])
    assert out["images"] == 0


def test_odd_studies_and_dark_paper(browse):
    study = opened(seeds=(0,), editors=("rome",), mitigations=("none",), groups=("edited",))
    dark = ("--blink-settings=preferredColorScheme=0", "--window-size=390,800")
    out = browse(html([study]), '$("lost").click(); out.lost = $("count").textContent;', flags=dark)
    rows = study.rows
    assert rows is not None
    right = rows.pivot(index="fact_id", columns="step", values="all_correct")
    forgotten = int((right[0] & ~right[30]).sum())
    assert 1 < forgotten < len(right)
    assert out["lost"] == f"{forgotten} facts"
    assert out["start"]["lines"] == 1
    assert out["start"]["forest"] == 0
    none = opened(seeds=(0,), editors=("rome",), mitigations=("none",), right_at_0=0.0)
    out = browse(html([none]), 'out.note = $("panels").textContent; await choose($("of"), "1"); look("all");')
    assert "No such fact was right at step 0" in out["note"]
    assert out["all"]["lines"] == 2


def test_two_studies(browse):
    studies = [opened(name, seeds=(0,), editors=("rome",), mitigations=("none",)) for name in ("one", "two")]
    out = browse(html(studies), 'await choose($("line"), "study"); look("line");')
    assert out["start"]["panels"] == ["one", "two"]
    assert out["line"]["legend"] == "onetwo"
