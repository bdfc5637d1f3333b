"""Files of the cache that a disk, a copy or a hand has changed: named, set aside, computed again, never read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from retention.cache_folders import appearing, publish, share, sound
from retention.editors._saved import with_cache

VALUES = {"b": torch.arange(12.0).reshape(3, 4), "a": torch.tensor([1, 2], dtype=torch.int64)}


def _cached(cache: Path) -> dict[str, torch.Tensor]:
    return with_cache(cache, ["values", 1], lambda: dict(VALUES))


def _file(cache: Path) -> Path:
    (file,) = cache.glob("values-*.safetensors")
    return file


def test_a_flip_of_any_bit_is_noticed(tmp_path, caplog):
    _cached(tmp_path)
    raw = _file(tmp_path).read_bytes()
    for at in range(0, len(raw), 7):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << (at % 8)
        _file(tmp_path).write_bytes(flipped)
        found = _cached(tmp_path)
        assert all(torch.equal(found[name], tensor) for name, tensor in VALUES.items())
        assert _file(tmp_path).read_bytes() == raw
    assert caplog.text.count("not as it was written") == len(range(0, len(raw), 7))


@pytest.mark.parametrize("raw", [b"", b"\0" * 8, b"x" * 4, b"\xff" * 64], ids=["empty", "zeros", "short", "ones"])
def test_an_empty_or_foreign_file_is_made_again(tmp_path, caplog, raw):
    _cached(tmp_path)
    _file(tmp_path).write_bytes(raw)
    assert torch.equal(_cached(tmp_path)["b"], VALUES["b"])
    assert "not as it was written" in caplog.text


def test_a_truncated_file_is_made_again(tmp_path):
    _cached(tmp_path)
    raw = _file(tmp_path).read_bytes()
    for size in range(0, len(raw), 31):
        _file(tmp_path).write_bytes(raw[:size])
        assert torch.equal(_cached(tmp_path)["b"], VALUES["b"])


def test_a_folder_with_a_change_is_set_aside(tmp_path, caplog):
    place = tmp_path / "place"

    def write(folder: Path) -> dict[str, Any]:
        (folder / "a").write_text("first")
        return {"note": 1}

    publish(place, write)
    for change in (
        lambda: (place / "a").write_text("fisrt"),
        lambda: (place / "b").write_text(""),
        lambda: (place / "a").unlink(),
        lambda: (place / "made.json").unlink(),
        lambda: (place / "made.json").write_text("["),
    ):
        change()
        assert not sound(place)
        assert not place.exists()
        assert (publish(place, write) / "a").read_text() == "first"
    assert len(list(tmp_path.glob(".place.broken-*"))) == 5
    assert caplog.text.count("not as it was written") == 5


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask):
    old = os.umask(mask)
    try:
        _cached(tmp_path)
        with appearing(tmp_path / "folder") as folder:
            (folder / "x").touch(0o600)
        (tmp_path / "y").touch(0o600)
        share(tmp_path / "y")
    finally:
        os.umask(old)
    files = [_file(tmp_path), tmp_path / "folder" / "x", tmp_path / "y"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask
