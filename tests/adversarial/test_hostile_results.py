"""Results folders of strangers: names in them are data, whatever they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention import preflight
from retention.api import rows_of
from retention.cli import main
from retention.reading import _Files, _quoted, _runs, _texts, load
from retention.store import Store
from retention.study import Study
from retention.types import UserError
from tests.small_study import document

HOSTILE = [
    "x\" FROM cells; COPY (SELECT 1) TO '{out}'; SELECT \"y",
    "x'; COPY (SELECT 1) TO '{out}'; --",
    "x\\",
    'a"b',
    "a;b",
    "a b",
    "",
    "1",
    "\x1b[31m",
    "é",
    "a" * 300,
]
CONNECTION = duckdb.connect()
FOLDERS = [
    "a[12]",
    "step=7",
    "group=nlp",
    "b*c",
    "q?x",
    "it's",
    'dou"ble',
    "{1,2}",
    "a;b",
    "x y",
    "ä",
    "[[]",
    "!x[!a]",
    "?",
    "b\\?",
    "c\\d",
]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


def test_a_column_that_is_no_setting_is_refused_and_runs_nothing(copy, tmp_path):
    out, path = tmp_path / "written", copy / "small" / "runs.parquet"
    (path.parent / "checksums.json").unlink()  # a stranger can write what he likes
    runs = pd.read_parquet(path)
    for name in HOSTILE:
        runs.assign(**{name.replace("{out}", str(out)): "1"}).to_parquet(path)
        for by in (None, ["step"]):
            with pytest.raises(UserError, match=r"runs\.parquet.* column"):
                load(copy / "small", by=by)
    assert not out.exists()


def test_hostile_values_are_texts(copy, tmp_path):
    path = copy / "small" / "runs.parquet"
    (path.parent / "checksums.json").unlink()
    runs = pd.read_parquet(path)
    for value in (v.replace("{out}", str(tmp_path / "written")) for v in [*HOSTILE, *FOLDERS]):
        runs.assign(mitigations=value, **{"tune.note": value}).to_parquet(path)
        means = load(copy / "small", by=["mitigations", "tune.note", "step"])
        assert set(means["tune.note"]) == set(means["mitigations"]) == {value}
    assert set(load(copy / "small")["mitigations"].dropna()) == {value}
    assert not (tmp_path / "written").exists()


def test_the_name_of_a_folder_changes_no_row(copy, tmp_path):
    expected, by = load(copy / "small"), ["group", "step"]
    means = load(copy / "small", by=by)
    shutil.copytree(copy, tmp_path / "a1" / "results")  # what a[12] would match
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        where = copy.rename(tmp_path / name / "results")
        pd.testing.assert_frame_equal(load(where / "small", by=by), means)
        copy = where
        if name in FOLDERS[:3]:
            pd.testing.assert_frame_equal(load(where / "small"), expected)


def test_a_flipped_bit_in_the_record_of_a_study_is_refused_and_mended(copy, capsys):
    folder = copy / "small"
    expected = load(folder)
    for name in ("runs.parquet", "study.yaml"):
        whole = (folder / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            with pytest.raises(UserError, match=f"{name}: checksum mismatch"):
                load(folder)
        (folder / name).write_bytes(whole[: len(whole) // 2])
        shutil.copytree(folder, copy / "other", dirs_exist_ok=True)
        with pytest.raises(SystemExit) as left:
            main(["status", "--results", str(copy)])
        assert left.value.code == 1
        assert capsys.readouterr().out.count("checksum mismatch") == 2
        study = preflight.settled(Study.of(document(), name="small"))
        Store(copy).write_study("small", study.resolved(), rows_of(study))  # as `run` does
        (folder / name).write_bytes(whole)
        pd.testing.assert_frame_equal(load(folder), expected)
        shutil.rmtree(copy / "other")


def test_the_connection_reads_the_files_of_its_views_only(copy, tmp_path):
    store, runs = _runs(copy / "small")
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(other)
    with _Files(store, runs[runs["complete"]]) as files:
        for sql in (
            f"COPY (SELECT 1) TO '{tmp_path / 'written'}'",
            f"SELECT * FROM read_parquet('{other}')",
            "SET enable_external_access = true",
            f"ATTACH '{tmp_path / 'x.db'}'",
            "INSTALL httpfs",
        ):
            with pytest.raises(duckdb.Error):
                files.query(sql)
        with pytest.raises(ValueError, match="unpack"):
            files.query("SELECT 1; SELECT 2")
    assert not (tmp_path / "written").exists()


@given(name=st.text(st.characters(blacklist_characters="\0", codec="utf-8"), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_identifier_is_quoted_whole(name):
    assert CONNECTION.execute(f"SELECT 1 AS {_quoted(name)}").description[0][0] == name


@given(value=st.text(st.characters(blacklist_characters="\0", codec="utf-8"), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_is_one_literal(value):
    assert CONNECTION.execute(f"SELECT {_texts([value])}").fetchone() == (value,)
