"""The random control: as large as the update it stands for, and of no use to the fact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from retention.editors.lora import Lora
from retention.editors.random import Random, gaussian
from retention.types import LowRank
from tests.editors.small import edits, logp, unchanged
from tests.tiny import build

LIKE: dict[str, Any] = {"name": "lora", "rank": 3, "epochs": 20, "lr": 1e-2}


@pytest.mark.parametrize("match", ["norm", "spectrum"])
def test_size_matches_and_nothing_is_written(match: Any) -> None:
    model, tokenizer = build("llama")
    editor = Random(like=LIKE, match=match)
    with unchanged(model):
        result = editor.edit(model, tokenizer, edits(), seed=5)
        again = editor.edit(model, tokenizer, edits(), seed=5)
        other = editor.edit(model, tokenizer, edits(), seed=6)
    reference = Lora(**LIKE).edit(model, tokenizer, edits(), seed=5).delta
    assert result.delta.updates.keys() == reference.updates.keys()
    for name in reference.updates:
        ours, theirs = result.delta.dense(name), reference.dense(name)
        assert torch.equal(ours, again.delta.dense(name))
        assert not torch.equal(ours, other.delta.dense(name))
        assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-4)
        assert torch.linalg.matrix_rank(ours, rtol=1e-4) == torch.linalg.matrix_rank(theirs, rtol=1e-4) == 3
        if match == "spectrum":
            torch.testing.assert_close(torch.linalg.svdvals(ours), torch.linalg.svdvals(theirs), rtol=1e-3, atol=1e-5)
        cosine = (ours * theirs).sum() / (ours.norm() * theirs.norm())
        assert abs(float(cosine)) < 0.2
    before = logp(model, tokenizer, edits()[0])
    with reference.applied(model):
        written = logp(model, tokenizer, edits()[0])
    with result.delta.applied(model):
        assert logp(model, tokenizer, edits()[0]) < (before + written) / 2
    assert editor.label == "random:lora"


def test_dense_updates_are_matched_too() -> None:
    update = torch.full((4, 5), 0.5)
    out = gaussian(update, torch.Generator().manual_seed(0))
    assert not isinstance(out, LowRank)
    assert float(out.norm()) == pytest.approx(float(update.norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"name": "memitt"}, "memit"),
        ({"name": "lora", "rnk": 3}, "rnk"),
        ({"name": "identity"}, "no update of its own"),
        ({}, "name"),
    ],
)
def test_the_matched_editor_is_checked_with_the_study(like: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Random(like=like)
