"""Allowed versions: what `make test-versions` installs, and the one place that knows a renamed argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from benchmarks.versions import LIBRARIES, constraints, lowest
from retention import hooks
from tests import tiny

ROOT = Path(__file__).parents[1]


def test_the_lowest_set_is_the_lower_ends_and_the_newest_leaves_them_to_the_index():
    pins = dict(line.split("==") for line in constraints("lowest").splitlines() if not line.startswith("#"))
    assert {name: pins[name] for name in LIBRARIES} == lowest()
    assert pins["torch"] == "2.13.0"
    free = {line.partition("==")[0] for line in constraints("newest").splitlines()}
    assert not free & set(LIBRARIES)
    assert "torch" in free


def test_pinned_versions_are_within_the_ranges():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    for name, low in lowest().items():
        assert Version(low) <= Version(pinned[name]), name


def test_one_place_knows_what_the_cache_is_called():
    files = [*(ROOT / "retention").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert [file.name for file in files if "past_key_values" in file.read_text()] == ["hooks.py"]


@pytest.mark.parametrize(("version", "name"), [("5.23.0", "past_key_values"), ("5.24.0", "cache"), ("6.1", "cache")])
def test_the_cache_goes_by_the_name_of_its_time(monkeypatch, version, name):
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    hooks._cache_name.cache_clear()
    try:
        assert hooks.cache_argument("held") == {name: "held"}
        assert hooks.cache_argument(None) == {}
    finally:
        hooks._cache_name.cache_clear()


def test_a_model_takes_the_cache_and_gives_it_back():
    model: Any = tiny.build("llama")[0].eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        first = model(input_ids=ids[:, :3], use_cache=True)
        last = model(input_ids=ids[:, 3:], use_cache=True, **hooks.cache_argument(hooks.cache_of(first)))
        whole = model(input_ids=ids).logits[0, -1]
    assert torch.allclose(last.logits[0, -1], whole, atol=1e-5)
