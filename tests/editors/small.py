"""Two edits on tiny models, and what must be true of a model after any editor has had it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from retention.types import Edit, Fact

CORPUS = ("Carl plays the piano .", "Dora was born in Madrid .", "the city of Oslo is in Vienna .")


def edits() -> list[Edit]:
    def fact(subject: str, old: str) -> Fact:
        return Fact(id=subject, subject=subject, relation="born", prompt="{} was born in", target=old)

    return [
        Edit(
            fact=fact("Anna Klein", "Rome"),
            target="Paris",
            prompts=("{} was born in", "the city of {} is"),
            anchors=("{} works at", "{} speaks"),
        ),
        Edit(fact=fact("Emil Vogel", "Berlin"), target="New York", prompts=("{} was born in",)),
    ]


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Weights, flags, modes, module tree, attributes and RNG state are those from before."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    modules = [(name, id(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
    state, config = torch.get_rng_state(), model.config.to_dict()
    yield
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(weights)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert [(name, id(m), m.training, sorted(vars(m))) for name, m in model.named_modules()] == modules
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config


def logp(model: Any, tokenizer: Any, edit: Edit) -> float:
    """Log-probability of the edit's target after its direct prompt, by a plain forward; nats."""
    prompt = tokenizer(edit.fact.text())["input_ids"]
    full = tokenizer(f"{edit.fact.text()} {edit.target}")["input_ids"]
    with torch.no_grad():
        out = model(torch.tensor([full])).logits[0].log_softmax(-1)
    return sum(float(out[i - 1, full[i]]) for i in range(len(prompt), len(full)))


def single() -> list[Edit]:
    """The same edits with their direct prompt alone: one key each."""
    return [replace(edit, prompts=edit.prompts[:1]) for edit in edits()]
