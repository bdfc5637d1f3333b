"""Small fact files, and the real ones where they are."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def write(tmp_path):
    """Writes records as JSON lines (or a text as it is) and gives the path."""

    def write(content, name="facts.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def real(monkeypatch):
    """Path of a real data file or folder below $RETENTION_DATA; skips where it is absent. Sets the variable."""
    root = Path(os.environ.get("RETENTION_DATA") or ROOT.parent / "shared" / "data")
    monkeypatch.setenv("RETENTION_DATA", str(root))

    def real(place):
        if not (root / place).exists():
            pytest.skip(f"no {place} below {root} (set RETENTION_DATA)")
        return root / place

    return real
