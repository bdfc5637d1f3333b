"""ROME and MEMIT written out once more, in float64 and as the papers put them: explicit inverses, whole forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retention.hooks import on_input, on_output
from retention.models import anatomy
from retention.types import Edit, fill


def word_at(tokenizer: Any, text: str, subject: str) -> tuple[Tensor, int]:
    """Ids of the text and the last place of the subject's last word in it (a prefix may hold the word too)."""
    ids = tokenizer(text)["input_ids"]
    last = tokenizer(subject, add_special_tokens=False)["input_ids"][-1]
    return torch.tensor([ids]), max(i for i, token in enumerate(ids) if token == last)


def read(model: Any, tokenizer: Any, text: str, subject: str, module: Any, what: str) -> Tensor:
    """Input or output of a module at the subject, by one whole forward, float64."""
    ids, at = word_at(tokenizer, text, subject)
    found: list[Tensor] = []
    hook = on_input if what == "input" else on_output
    with torch.no_grad(), hook(module, lambda states: found.append(states.clone())):  # type: ignore[operator]
        model(ids, use_cache=False)
    return found[0].reshape(ids.shape[1], -1)[at].double()


def texts_of(edit: Edit, prefixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Bare texts and texts after a prefix."""
    subject = edit.fact.subject
    bare = [fill(prompt, subject) for prompt in edit.prompts]
    return bare, [prefix + bare[0] for prefix in prefixes]


def matrix(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """The second matrix as a map from keys to values [d, m], and its bias, float64."""
    parts = anatomy(model)
    module = parts.down_module(model, layer)
    weight = module.weight.detach().double()
    bias = torch.zeros(parts.hidden, dtype=torch.float64) if module.bias is None else module.bias.detach().double()
    return (weight.T if parts.transposed else weight), bias


def rome(model: Any, tokenizer: Any, edits: list[Edit], layer: int, values: Tensor, prefixes: tuple[str, ...],
         covariance: Tensor, variant: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """W after all edits less W before [d, m]; and each edit's mean and bare key."""
    module = anatomy(model).down_module(model, layer)
    before, bias = matrix(model, layer)
    weight, inverse = before.clone(), torch.linalg.inv(covariance)
    means, bares = [], []
    for edit, value in zip(edits, values.double(), strict=True):
        bare, prefixed = texts_of(edit, prefixes)
        keys = [read(model, tokenizer, text, edit.fact.subject, module, "input") for text in bare + prefixed]
        mean, key = torch.stack(keys).mean(0), keys[0]
        direction = inverse @ (key if variant == "p-rome" else mean)
        at = mean if variant == "r-rome" else key
        weight = weight + torch.outer(value - bias - weight @ at, direction) / (direction @ at)
        means.append(mean)
        bares.append(key)
    return weight - before, means, bares


def memit(model: Any, tokenizer: Any, edits: list[Edit], layers: list[int], values: Tensor, prefixes: tuple[str, ...],
          covariance: dict[int, Tensor], weight: float, site: str) -> dict[int, Tensor]:  # fmt: skip
    """The update of each layer [d, m]. The model is given back as it was."""
    parts = anatomy(model)
    updates = {}
    saved = {layer: parts.down_module(model, layer).weight.detach().clone() for layer in layers}
    last = parts.down_module(model, layers[-1]) if site == "mlp" else parts.blocks(model)[layers[-1]]
    for i, layer in enumerate(layers):
        module = parts.down_module(model, layer)
        keys, rest = [], []
        for edit, value in zip(edits, values.double(), strict=True):
            subject = edit.fact.subject
            bare, prefixed = texts_of(edit, prefixes)
            groups = [
                torch.stack([read(model, tokenizer, text, subject, module, "input") for text in group]).mean(0)
                for group in (bare, prefixed)
            ]
            keys.append(sum(groups) / 2)
            rest.append((value - read(model, tokenizer, bare[0], subject, last, "output")) / (len(layers) - i))
        k, r = torch.stack(keys).T, torch.stack(rest).T
        updates[layer] = r @ k.T @ torch.linalg.inv(weight * covariance[layer] + k @ k.T)
        with torch.no_grad():
            module.weight += (updates[layer].T if parts.transposed else updates[layer]).float()
    with torch.no_grad():
        for layer, before in saved.items():
            parts.down_module(model, layer).weight.copy_(before)
    return updates
