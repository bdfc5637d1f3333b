"""`retention fetch counterfact|trex|zsre|wikitext`: by file URLs, from what the repositories hold, made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retention import fetch_data
from retention.fetch_data import CHAIN, DATA, LOCFT, PARAREL, RELATIONS, WIKITEXT
from retention.types import UserError


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty host, and an empty folder for data."""
    monkeypatch.setattr(fetch_data, "RAW", (tmp_path / "host").as_uri())
    return tmp_path / "host"


def fetched(name: str, monkeypatch: pytest.MonkeyPatch, into: Path) -> list[Path]:
    monkeypatch.setenv("RETENTION_DATA", str(into))
    return fetch_data.fetch_data(name, say=lambda line: None)


def put(source: Path, place: str, content: bytes) -> None:
    (source / place).parent.mkdir(parents=True, exist_ok=True)
    (source / place).write_bytes(content)


def test_what_is_made_is_byte_for_byte_what_studies_read(source, real, tmp_path, monkeypatch) -> None:
    """From the repositories' forms, undone here by hand: without our two keys, indented, with CRLF."""
    ours = {name: real(name) for name in ("counterfact", "trex_pararel", "zsre", "wikitext-2")}
    lines = (ours["counterfact"] / "counterfact_10k.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    flat = [{k: v for k, v in json.loads(x).items() if k not in ("split", "relation_candidates")} for x in lines]
    put(source, f"{CHAIN}/data/counterfact/counterfact-edit.json", json.dumps(flat, indent=4).encode())
    records = json.loads((ours["zsre"] / "zsre_3k.json").read_text(encoding="utf-8"))
    put(source, f"{LOCFT}/data/zsre/zsre_3k.json", json.dumps(records, indent=4).encode())
    for file in ours["wikitext-2"].glob("*.raw"):
        put(source, f"{WIKITEXT}/data/{file.name}", file.read_bytes().replace(b"\n", b"\r\n"))
    for folder in ("trex_lms_vocab", "pattern_data/graphs_json"):
        for file in (ours["trex_pararel"] / folder).glob("*.jsonl"):
            put(source, f"{PARAREL}/data/{folder}/{file.name}", file.read_bytes())
    for name in DATA:
        for path in fetched(name, monkeypatch, tmp_path / "data"):
            assert path.read_bytes() == (ours["zsre"].parent / path.relative_to(tmp_path / "data")).read_bytes()
    assert fetched("zsre", monkeypatch, tmp_path / "data")  # what is there and equal stays


def test_another_file_than_the_pinned_one_is_refused_and_nothing_is_written(source, tmp_path, monkeypatch) -> None:
    put(source, f"{LOCFT}/data/zsre/zsre_3k.json", b'[{"subject": "someone else"}]')
    with pytest.raises(UserError, match="zsre, as downloaded, is not what is pinned here"):
        fetched("zsre", monkeypatch, tmp_path / "data")
    put(source, f"{LOCFT}/data/zsre/zsre_3k.json", b"<html>log in</html>")
    with pytest.raises(UserError, match="is no JSON"):
        fetched("zsre", monkeypatch, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", DATA)
def test_a_source_that_is_not_reached_is_said_in_one_sentence(name, source, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"is not reached from here .*put the data below \$RETENTION_DATA") as error:
        fetched(name, monkeypatch, tmp_path / "data")
    assert len(str(error.value).splitlines()) == 1
    monkeypatch.delenv("RETENTION_DATA")
    with pytest.raises(UserError, match="set RETENTION_DATA"):
        fetch_data.fetch_data(name)


def test_a_file_of_ones_own_is_never_overwritten(source, tmp_path, monkeypatch) -> None:
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        put(source, f"{WIKITEXT}/data/{name}", b"a text\r\n")
    pinned = fetch_data.digest({"a": b"a text\n", "b": b"a text\n"})
    data = fetch_data.Data(make=DATA["wikitext"].make, sha256=pinned, licence="", source="")
    monkeypatch.setattr(fetch_data, "DATA", {"wikitext": data})
    mine = tmp_path / "data" / "wikitext-2" / "wiki.test.raw"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="is there already and is another file"):
        fetched("wikitext", monkeypatch, tmp_path / "data")
    assert mine.read_text() == "mine"
    mine.unlink()
    assert [p.read_bytes() for p in fetched("wikitext", monkeypatch, tmp_path / "data")] == [b"a text\n"] * 2
    assert sorted(p.name for p in mine.parent.iterdir()) == ["wiki.test.raw", "wiki.valid.raw"]


def test_relations_are_listed_once() -> None:
    assert len(RELATIONS) == len(set(RELATIONS)) == 41
