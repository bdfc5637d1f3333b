"""What `retention watch --once` prints of finished, running, failed and empty grids."""

from __future__ import annotations

from pathlib import Path

import pytest

import retention
from retention import statistics as st
from retention.cli import main
from retention.engines import _claims
from retention.store import Store, write_json


def watched(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["watch", *map(str, arguments)])
    out = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out.out, out.err


@pytest.fixture
def grid(tmp_path: Path) -> Store:
    """Four runs of two edits, none begun; the names would be markup of rich's."""
    store = Store(tmp_path / "results", create=True)
    cell = dict.fromkeys(("task", "objective", "adapter"), "x") | {"seed": 0, "facts_seed": 0, "only": None}
    keys = [
        {
            "run_id": f"r{i}",
            "edit_id": f"e{i // 2}",
            "base_id": "b",
            **cell,
            "editor": "[red]rome[/red]",
            "mitigations": f"m{i}",
        }
        for i in range(4)
    ]
    store.write_study("grid", "question: Why?\n", keys)
    return store


def test_a_finished_study_shows_its_curves(finished: Path, capsys):
    code, out, _ = watched(capsys, finished, "--once")
    assert code == 0
    assert "small  4 complete" in out
    rows = retention.load(finished / "small")
    cell = rows[(rows["editor"] == "rome") & (rows["mitigations"] == "none")]
    for group in ("edited", "intrinsic"):
        end = st.share(st.counts(cell, group, None, "all_correct"))
        (line,) = [ln for ln in out.splitlines() if ln.split()[:4] == ["rome", "none", "1", group]]
        assert (str(end) in line) if end else "none right at step 0" in line
        assert "█" in line or end is None


def test_what_is_running_and_what_failed(grid: Store, capsys):
    (grid.root / "failed" / "runs").mkdir(parents=True)
    told = {
        "stage": "tune",
        "key": "r3",
        "label": "[bold]x",
        "error": "ValueError: no\nmore",
        "attempts": 2,
        "time": "now",
    }
    write_json(grid.root / "failed" / "runs" / "r3.json", told)
    partial = grid.root / ".work" / "partial" / "runs-r0.abc"
    partial.mkdir(parents=True)
    for step in (1, 30):
        (partial / f"probes-{step:06d}.parquet").touch()
    claims = [_claims.take(grid.root / ".work" / "claims" / name) for name in ("runs-r0", "edits-e1")]
    try:
        code, out, _ = watched(capsys, grid.root / "grid", "--once")
    finally:
        for claim in claims:
            assert claim is not None
            claim.release()
    assert code == 0
    assert "grid  2 running  1 failed  1 to do" in out
    assert "[red]rome[/red] · x · m0 · seed 0: read at step 30" in out
    assert "failed: tune [bold]x: ValueError: no" in out
    assert "no run is complete yet" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no results here"),
        (["fresh"], "no study has been run here yet"),
        (["results/gird"], "no study 'gird'; did you mean 'grid'?"),
    ],
)
def test_bad_input(grid: Store, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(grid.root.parent)
    Store("fresh", create=True)
    code, _, error = watched(capsys, *arguments, "--once")
    assert code == 2
    assert said in error


def test_it_ends_when_all_is_done(finished: Path, capsys):
    code, out, _ = watched(capsys, finished / "small", "--every", "0.2")
    assert code == 0
    assert "4 complete" in out


def test_an_unknown_criterion(finished: Path, capsys):
    code, _, error = watched(capsys, finished, "--once", "--criterion", "right")
    assert code == 2
    assert "criterion: unknown 'right'" in error
