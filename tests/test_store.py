"""The results folder: whole artefacts or none, folders that are not ours, and what is written in them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retention.reading import CELL, load
from retention.store import ROWS, SCHEMA, Keys, Store, table_of, write_json, write_readings, write_table
from retention.types import Question, Reading, UserError


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished study that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_is_made_and_found_again(tmp_path):
    root = tmp_path / "a" / "b"
    with pytest.raises(UserError, match="no results here; `retention run STUDY --results"):
        Store(root)
    assert Store.peek(root).root == root
    assert not root.exists()
    Store(root, create=True)
    assert json.loads((root / "store.json").read_text()) == {"format": "retention", "schema": SCHEMA}
    assert Store(root).root == Store(root, create=True).root == root


@pytest.mark.parametrize("name", ["photo.jpg", "model.safetensors", "thesis/chapter.tex"])
@pytest.mark.parametrize("way", ["open", "create", "peek"])
def test_a_folder_that_belongs_to_something_else_is_refused_and_left(tmp_path, name, way):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("dear to me")
    with pytest.raises(UserError, match=r"is not a results folder of retention \(it holds '\w+[^)]*'.*--results"):
        Store.peek(tmp_path / "mine") if way == "peek" else Store(tmp_path / "mine", create=way == "create")
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [path]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "results").write_text("")
    for way in (Store, Store.peek):
        with pytest.raises(UserError, match="is a file; --results wants a folder"):
            way(tmp_path / "results")


def test_committed_summaries_make_no_folder_foreign(tmp_path):
    (tmp_path / "README.md").write_text("columns")
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "summary.csv").write_text("")
    (tmp_path / ".gitignore").write_text("")
    Store(tmp_path, create=True)
    assert (tmp_path / "store.json").is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{{"format": "retention", "schema": {SCHEMA - 1}}}', f"with schema {SCHEMA - 1}; this version reads schema"),
        (f'{{"format": "retention", "schema": {SCHEMA + 1}}}', f"with schema {SCHEMA + 1}; this version reads schema"),
        ("{", "damaged; expected"),
        ("[]", "damaged; expected"),
        ("{}", "damaged; expected"),
    ],
)
def test_other_schemas_and_damaged_marks_are_refused(tmp_path, text, said):
    (tmp_path / "store.json").write_text(text)
    for way in (Store, Store.peek, load):
        with pytest.raises(UserError) as caught:
            way(tmp_path)
        assert said in str(caught.value)
        assert str(tmp_path) in str(caught.value)


# ------------------------------------------------------------------------------------------------ publishing


def test_publishing_is_all_or_nothing(tmp_path):
    store = Store(tmp_path, create=True)

    def interrupted() -> None:
        with store.publishing("edits", "abc") as folder:
            (folder / "half.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not store.complete("edits", "abc")
    with store.publishing("edits", "abc") as folder:
        assert list(folder.iterdir()) == []  # what the interrupted attempt left is gone
        assert not store.complete("edits", "abc")
        (folder / "whole.txt").write_text("whole")
    assert store.complete("edits", "abc")
    mark = json.loads((tmp_path / "edits" / "abc" / "complete.json").read_text())
    assert mark == {
        "schema": SCHEMA,
        "sha256": {"whole.txt": hashlib.sha256(b"whole").hexdigest()},
        "bytes": {"whole.txt": 5},
        "made_from": {},
    }
    assert not store.complete("runs", "abc")


def test_files_appear_whole(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    write_table(path, pa.table({"a": [1]}))

    def interrupted(table: pa.Table, where: Path, **_: object) -> None:
        Path(where).write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_table(path, pa.table({"a": [2]}))
    monkeypatch.undo()
    assert pq.read_table(path).to_pylist() == [{"a": 1}]
    assert list(tmp_path.glob("*.parquet")) == [path]  # the half one has a name that nothing reads
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_rows_keep_every_key_that_any_of_them_has():
    assert table_of([{"a": 1}, {"a": 2, "b": "x"}]).to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    assert table_of([]).num_rows == 0


def test_readings_are_written_as_they_are(tmp_path):
    question = Question(fact_id="f", group="edited", form="direct", text="t", answer="a", foil=None)
    readings = [
        Reading(question_id=question.id, step=3, logp_target=-1.5, n_target_tokens=2, target_rank=1, first_correct=True,
                all_correct=False, generated="a ü\n"),
        Reading(question_id=question.id, step=3, state="too_long"),
    ]  # fmt: skip
    keys = Keys(base_id="b", model_id="m", facts_seed=1, run_id="r", seed=2)
    write_readings(tmp_path / "p.parquet", keys, [(question, r) for r in readings], 7, 5)
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.schema.equals(ROWS)
    first, second = table.to_pylist()
    same = {"base_id": "b", "model_id": "m", "run_id": "r", "edit_id": None, "editor": None, "seed": 2, "facts_seed": 1}
    same |= {"tokens_seen": 7, "edits_applied": 5, "fact_id": "f", "group": "edited", "form": "direct", "step": 3}
    assert first.items() >= same.items()
    assert second.items() >= same.items()
    assert (first["logp_target"], first["generated"], first["prefers_target"]) == (-1.5, "a ü\n", None)
    assert (second["logp_target"], second["all_correct"], second["state"]) == (None, None, "too_long")


def test_what_is_recorded_of_a_study_is_not_written_again(copy):
    store = Store(copy)
    rows = load(copy, "runs").drop(columns=["study", "complete", "state"])
    assert set(CELL) <= set(rows.columns)
    records = pa.Table.from_pandas(rows, preserve_index=False).to_pylist()
    before = (copy / "small" / "runs.parquet").stat().st_mtime_ns
    store.write_study("small", (copy / "small" / "study.yaml").read_text(), records)
    assert (copy / "small" / "runs.parquet").stat().st_mtime_ns == before
    store.write_study("small", "another: one\n", records[:2])
    assert len(load(copy / "small", "runs")) == 2


def test_the_committed_summaries_are_no_foreign_folder():
    """What lies in the project's own results/ does not stop the first run of a fresh clone."""
    Store.peek(Path(__file__).resolve().parents[1] / "results")
