"""Editing happens in float32, whatever precision the model is in: its weights are rounded, its edits are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from retention.editors._keys import Covariance
from retention.editors.alphaedit import AlphaEdit
from retention.editors.emmet import Emmet
from retention.editors.ft import Ft
from retention.editors.lora import Lora
from retention.editors.memit import Memit
from retention.editors.ptuning import PTuning
from retention.editors.rome import Rome
from tests.editors.small import edits, unchanged
from tests.tiny import build

SEARCH: dict[str, Any] = {"v_steps": 3, "context_lengths": (4,), "covariance": Covariance(tokens=0)}
EDITORS: list[Any] = [
    Rome(layer=1, **SEARCH),
    Memit(layers=(1, 2), **SEARCH),
    Emmet(layer=1, **SEARCH),
    AlphaEdit(layers=(1,), null_fraction=0.5, **(SEARCH | {"covariance": Covariance(tokens=100)})),
    Ft(layer=1, epochs=2),
    Lora(epochs=2),
    PTuning(epochs=2),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "falcon"])
def test_a_half_precision_model_gets_the_edit_of_its_float32_copy(name: str, dtype: torch.dtype) -> None:
    model, tokenizer = build(name)
    model.to(dtype)
    copied = copy.deepcopy(model).float()
    corpus = ("Anna was born in Rome .", "Carl plays the piano in Oslo .")
    for editor in EDITORS:
        with unchanged(model):
            found = editor.edit(model, tokenizer, edits(), seed=0, corpus=corpus)
        expected = editor.edit(copied, tokenizer, edits(), seed=0, corpus=corpus)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert found.delta.updates.keys() == expected.delta.updates.keys()
        for matrix in expected.delta.updates:
            assert torch.equal(found.delta.dense(matrix), expected.delta.dense(matrix)), (editor.name, matrix)
        if expected.soft_prompt is not None:
            assert torch.equal(found.soft_prompt, expected.soft_prompt)
