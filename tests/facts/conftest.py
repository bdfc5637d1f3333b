"""Small fact files."""

import json

import pytest


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
