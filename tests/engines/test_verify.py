"""Damage of every kind is named, never used, and repaired by computing again what is broken and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

import retention
from retention.cli import main
from retention.engines.verify import verify
from retention.reading import load
from retention.store import SCHEMA, Store
from retention.study import Study
from retention.types import UserError
from tests.engines.fakes import faked
from tests.small_study import document


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def by_hand(path: Path) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"seed": 99}))


def other_schema(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": SCHEMA - 1}))


def blank(path: Path) -> None:
    path.write_text("{")


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("runs/*/probes-000002.parquet", cut, "is truncated: "),
    ("runs/*/probes-000002.parquet", flip, "is not what was written"),
    ("runs/*/scores.parquet", Path.unlink, "is missing"),
    ("runs/*/run.json", by_hand, "is not what was written: edited by hand"),
    ("edits/*/delta.safetensors", cut, "is truncated: "),
    ("edits/*/edit.json", by_hand, "edited by hand"),
    ("bases/*/facts.parquet", flip, "its checksum differs"),
    ("runs/*/complete.json", blank, "damaged"),
    ("edits/*/complete.json", other_schema, f"written with schema {SCHEMA - 1}; this version reads schema {SCHEMA}"),
]


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    return int(left.value.code or 0)


def test_what_is_whole_is_left(results, capsys):
    report = verify(Store(results))
    assert (report.checked, report.faults) == (7, ())
    assert report.files == sum(1 for p in results.glob("*/*/*") if p.is_file())
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*")}
    assert called("verify", str(results), "--repair") == 0
    assert "7 artefacts checked" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in results.rglob("*")} == before


@pytest.mark.parametrize(("where", "damage", "said"), DAMAGE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_damage_is_named_never_used_and_removed(results, capsys, tmp_path, monkeypatch, where, damage, said):
    path = sorted(results.glob(where))[0]
    damage(path)
    with pytest.raises(UserError) as caught:
        load(results / "small")
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "retention verify" in str(caught.value)
    with pytest.raises(UserError) as caught:  # before any work
        retention.run(Study.of(document(), name="small"), results=results, cache=tmp_path / "none")
    assert str(path) in str(caught.value)
    before = {p for p in results.rglob("*") if p.is_file()}
    assert called("verify", str(results)) == 1
    out = capsys.readouterr()
    assert str(path) in out.out
    assert said in out.out
    assert "1 broken" in out.out
    assert "--repair" in out.err
    assert {p for p in results.rglob("*") if p.is_file()} == before
    assert called("verify", str(results), "--repair") == 0
    assert f"removed {path.parent}" in capsys.readouterr().out
    assert {p for p in results.rglob("*") if p.is_file()} == {p for p in before if path.parent not in p.parents}
    assert called("verify", str(results)) == 0


def test_what_was_added_renamed_or_never_finished_is_named(results):
    first, second, third, _ = sorted((results / "runs").iterdir())
    (first / "probes-000009.parquet").write_bytes(b"")
    second.rename(second.with_name("0" * 16))
    (third / "complete.json").unlink()
    (results / "small" / "runs.parquet").write_bytes(b"PAR1")
    texts = [fault.text for fault in verify(Store(results)).faults]
    assert len(texts) == 4
    for part in ("probes-000009.parquet: does not belong here", "a folder was renamed or copied",
                 f"{third}: is not complete", "small/runs.parquet: checksum mismatch"):  # fmt: skip
        assert any(part in text for text in texts), part


def test_repaired_and_run_again_the_rows_are_the_same_and_only_the_broken_is_computed(results, finished, cache):
    edit = next(p for p in sorted((results / "edits").iterdir()) if json.loads((p / "edit.json").read_text())["edits"])
    run = sorted((results / "runs").iterdir())[0]
    cut(edit / "delta.safetensors")
    cut(run / "probes-000001.parquet")
    kept = {p: p.stat().st_mtime_ns for p in results.rglob("*.json") if p.parent not in (edit, run)}
    assert called("verify", str(results), "--repair") == 0
    retention.run(Study.of(document(), name="small"), results=results, cache=cache)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert verify(Store(results)).faults == ()
    for table in ("rows", "scores"):
        again, before = (load(place / "small", table).astype(str) for place in (results, finished))  # type: ignore[arg-type]
        order = ["run_id", "step", "question_id" if table == "rows" else "score"]
        again, before = (t.sort_values(order, ignore_index=True) for t in (again, before))
        pd.testing.assert_frame_equal(again, before)


def test_what_was_computed_from_another_edit_than_the_present_one_is_told(results):
    """As when a removed edit is computed again on a machine whose numbers differ."""
    run = sorted((results / "runs").iterdir())[0]
    edit = results / "edits" / json.loads((run / "run.json").read_text())["edit_id"]
    flip(edit / "probes-000000.parquet")
    mark = json.loads((edit / "complete.json").read_text())
    name = "probes-000000.parquet"
    mark["sha256"][name] = hashlib.sha256((edit / name).read_bytes()).hexdigest()
    (edit / "complete.json").write_text(json.dumps(mark))
    found = list(Store(results).faults("runs", run.name))
    assert found == [f"{run}: was computed from another edits/{edit.name} than the one that is here now"]
    with pytest.raises(UserError, match="was computed from another edits/"):
        load(results / "small")


def test_a_stage_reads_nothing_that_is_damaged(results, tmp_path):
    """Larger files are compared in full before a stage builds on them."""
    (base,) = (results / "bases").iterdir()
    flip(base / "facts.parquet")
    store = Store(results)
    with pytest.raises(UserError, match=r"facts\.parquet: is not what was written"):
        store.check("bases", base.name)


@pytest.mark.parametrize("name", ["../outside", "/etc/x", "a/b", "bases", "failed", ".hidden", "..", ""])
def test_no_name_of_a_study_leaves_the_folder(tmp_path, name):
    if name != "failed":  # `Study.of` knows the folders of artefacts alone; the store refuses the others
        with pytest.raises(UserError, match="a study is called by its file name"):
            Study.of(document(), name=name)
    store = Store(tmp_path / "r", create=True)
    with pytest.raises(UserError, match="cannot be a study's name"):
        store.write_study(name, "", [])
    with pytest.raises(AssertionError, match="keys are hashes"):
        store.folder("runs", f"../{name}")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["store.json"]


def test_no_text_of_a_study_becomes_a_path(tmp_path, monkeypatch):
    """What can be named freely, named `../../evil`: nothing appears outside the results folder."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    evil = "../../evil"
    ability = {"name": "heldout", "label": evil, "data": {"name": "world", "task": "text", "heldout": 8}}
    with pytest.raises(UserError, match=r"abilities.*label"):
        Study.of(document(abilities=[ability]), name="plain")
    study = Study.of(document(question=evil), name="plain")
    with faked(tmp_path / "log"):
        retention.run(study, results=place / "r", cache=place / "cache")
    assert yaml.safe_load((place / "r" / "plain" / "study.yaml").read_text())["question"] == evil
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and place / "r" not in p.parents]
    assert outside == [tmp_path / "log"]
