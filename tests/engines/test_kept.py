"""The base model that is kept in memory: loaded once, and what a stage does to its copy reaches no other."""

from __future__ import annotations

import pytest
import torch

from retention.engines import _models
from retention.engines._models import Kept
from retention.models import Loaded
from tests.tiny import build


def loader(calls: list[str], name: str) -> Loaded:
    calls.append(name)
    model, tokenizer = build("llama")
    return Loaded(model, tokenizer, "content", ("a line",))


def test_loaded_once_and_handed_out_as_it_was():
    keep, calls = Kept(), []  # type: ignore[var-annotated]
    first = keep("a", lambda: loader(calls, "a"))
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.add_(1.0)
            parameter.requires_grad_(False)
    first.model.train()
    first.model.forward = lambda *_: pytest.fail("patched as a trainer does")  # type: ignore[method-assign]
    first.tokenizer.pad_token = first.tokenizer.eos_token
    second = keep("a", lambda: loader(calls, "a"))
    assert calls == ["a"]
    assert not second.model.training
    assert all(p.requires_grad for p in second.model.parameters())
    after = second.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    text = second.tokenizer("one", return_tensors="pt")
    assert torch.equal(second.model(**text).logits, loader([], "").model(**text).logits)
    assert second.content == "content"
    assert second.corpus == ("a line",)
    tied = {id(p) for p in second.model.parameters()}
    assert not tied & {id(p) for p in first.model.parameters()}


def test_one_model_at_a_time_and_none_that_is_large(monkeypatch):
    keep, calls = Kept(), []  # type: ignore[var-annotated]
    for name in ("a", "b", "b", "a"):
        keep(name, lambda name=name: loader(calls, name))  # type: ignore[misc]
    assert calls == ["a", "b", "a"]
    monkeypatch.setattr(_models, "LARGEST", 1)
    for _ in range(2):
        keep("c", lambda: loader(calls, "c"))
    assert calls[3:] == ["c", "c"]
