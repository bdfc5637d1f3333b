"""Tiny models of every architecture, made once a session, saved to disk and loaded as any user's model would be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from retention.models import Loaded, load_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """`tiny_model(name)`: the loaded model of an architecture in tiny.ARCHITECTURES. Leave it as you found it."""
    made: dict[str, Loaded] = {}

    def get(name: str) -> Loaded:
        if name not in made:
            made[name] = load_model(tiny.save(name, tmp_path_factory.mktemp(name)), device="cpu")
        return made[name]

    return get


@pytest.fixture(params=sorted(tiny.ARCHITECTURES))
def loaded(request: pytest.FixtureRequest, tiny_model: Any) -> Loaded:
    """Each architecture in turn."""
    found: Loaded = tiny_model(request.param)
    return found


@pytest.fixture(scope="session")
def corpus() -> tuple[str, ...]:
    """Texts in the tiny tokenizer's words, of unequal length."""
    words = tiny.WORDS
    return tuple(" ".join(words[(i * 7 + j * j) % len(words)] for j in range(8 + i % 13)) for i in range(60))
