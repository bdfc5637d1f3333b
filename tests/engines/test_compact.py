"""A compact copy of a results folder: equal rows in fewer files, whole or not there, and studies go on in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import retention
from retention.cli import main
from retention.engines import _claims
from retention.engines import compact as module
from retention.engines.compact import compact
from retention.engines.verify import verify
from retention.reading import load
from retention.store import Store
from retention.study import Study
from retention.types import UserError
from tests.small_study import document


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_equal_tables_in_fewer_files(results, tmp_path):
    (results / "small" / "summary.csv").write_text("a figure's table\n")
    before = content(results)
    report = compact(Store(results), tmp_path / "new" / "results")
    new = tmp_path / "new" / "results"
    assert content(results) == before
    assert [p.name for p in new.parent.iterdir()] == ["results"]
    for table in ("rows", "scores", "runs", "facts", "questions"):
        pd.testing.assert_frame_equal(load(new / "small", table), load(results / "small", table))  # type: ignore[arg-type]
    assert (report.files, report.compact, report.left) == (len(before), len(content(new)), ())
    assert report.compact == report.files - 4 * (3 - 1)  # four runs, three checkpoints
    assert (new / "small" / "summary.csv").read_text() == "a figure's table\n"
    found = verify(Store(new))
    assert found.faults == ()
    assert found.files == sum(1 for p in new.rglob("*") if p.is_file() and p.parts[-3] in ("bases", "edits", "runs"))


def test_readings_of_each_kind_are_put_together_by_step(results, tmp_path):
    folder = next((results / "runs").iterdir())
    tables = {step: pq.read_table(folder / f"probes-{step:06d}.parquet") for step in (1, 2, 4)}
    store = Store(results)
    with store.publishing("runs", "with-relearn") as place:
        for step in (0, 1, 10):
            pq.write_table(tables[1].slice(step, 2), place / f"relearn-{step:06d}.parquet")
    compact(store, tmp_path / "new")
    names = {path.name for path in (tmp_path / "new" / "runs" / folder.name).iterdir()}
    assert {name for name in names if name.startswith("probes")} == {"probes-000001-000004.parquet"}
    merged = pq.read_table(tmp_path / "new" / "runs" / folder.name / "probes-000001-000004.parquet")
    assert merged.to_pylist() == [row for table in tables.values() for row in table.to_pylist()]
    assert merged.schema.metadata[b"retention_schema"] == tables[1].schema.metadata[b"retention_schema"]
    found = pq.read_table(tmp_path / "new" / "runs" / "with-relearn" / "relearn-000000-000010.parquet")
    assert found.to_pylist() == pa.concat_tables([tables[1].slice(s, 2) for s in (0, 1, 10)]).to_pylist()
    twice = tmp_path / "twice"
    compact(Store(tmp_path / "new"), twice)
    pd.testing.assert_frame_equal(load(twice / "small"), load(tmp_path / "new" / "small"))


def test_a_study_goes_on_in_it(results, cache, tmp_path, finished):
    lost = next((results / "runs").iterdir())
    (lost / "complete.json").unlink()
    report = compact(Store(results), tmp_path / "new")
    assert report.left == (lost,)
    assert not (tmp_path / "new" / "runs" / lost.name).exists()
    retention.run(Study.of(document(), name="small"), results=tmp_path / "new", cache=cache)
    pd.testing.assert_frame_equal(load(tmp_path / "new"), load(finished))
    assert verify(Store(tmp_path / "new")).faults == ()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_it_leaves_nothing(results, tmp_path, monkeypatch, error):
    before, merge = content(results), module._merge

    def broken(*places: Path) -> None:
        merge(*places)
        raise error

    monkeypatch.setattr(module, "_merge", broken)
    with pytest.raises(error):
        compact(Store(results), tmp_path / "new")
    assert content(results) == before
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_what_a_killed_one_left_is_no_results_folder_and_does_not_stay(results, tmp_path):
    half = tmp_path / ".new.compacting"
    shutil.copytree(results, half)
    (half / "runs" / "extra").mkdir()
    compact(Store(results), tmp_path / "new")
    assert not (tmp_path / "new" / "runs" / "extra").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"results", "new"}


def test_two_at_once_do_not_meet(results, tmp_path):
    claim = _claims.take(tmp_path / ".new.claim")
    assert claim is not None
    with pytest.raises(UserError, match="another `retention compact` is writing it"):
        compact(Store(results), tmp_path / "new")
    claim.release()


def test_what_is_damaged_is_named_and_not_taken_over(results, tmp_path):
    path = next((results / "runs").glob("*/probes-000002.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{path.parent.name}/probes-000002.parquet: is not what was written"):
        compact(Store(results), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize(
    ("out", "said"), [("results", "is there already"), ("results/new", "lies within"), ("small", "is there already")]
)
def test_places_that_cannot_be(results, tmp_path, out, said, capsys):
    (tmp_path / "small").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["compact", str(results), "--out", str(tmp_path / out)])
    assert left.value.code == 2
    assert f"--out {tmp_path / out}: {said}" in capsys.readouterr().err


def test_the_command(results, tmp_path, capsys: Any):
    main_ = pytest.raises(SystemExit)
    with main_ as left:
        main(["compact", str(results), "--out", str(tmp_path / "new")])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert f"results: {tmp_path / 'new'}" in told
    with pytest.raises(SystemExit) as left:
        main(["compact", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")])
    assert left.value.code == 2
    assert "no results here" in capsys.readouterr().err
