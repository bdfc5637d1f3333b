"""A study's data files are found where they are written, or below $RETENTION_DATA."""

import pytest

from retention.data.jsonl import JsonLines
from retention.data.text import Text
from retention.types import UserError


def test_a_file_is_looked_for_here_and_below_the_data_folder(tmp_path, monkeypatch):
    below, here = tmp_path / "data", tmp_path / "here"
    for folder in (below, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("RETENTION_DATA", str(below))
    (below / "a.txt").write_text("below")
    assert Text(path="a.txt").files() == [below / "a.txt"]
    (here / "a.txt").write_text("here")
    assert Text(path="a.txt").files()[0].read_text() == "here"
    with pytest.raises(UserError, match=r"b\.jsonl nor .*data/b\.jsonl"):
        JsonLines(path="b.jsonl").files()


def test_without_a_data_folder_the_message_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETENTION_DATA", raising=False)
    with pytest.raises(UserError, match="set RETENTION_DATA"):
        Text(path="a.txt").files()
