"""Strength and margin: the update is scaled as said, and v* is searched until the probability that was asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from retention.editors.alphaedit import AlphaEdit
from retention.editors.emmet import Emmet
from retention.editors.ft import Ft
from retention.editors.identity import Identity
from retention.editors.lora import Lora
from retention.editors.memit import Memit
from retention.editors.ptuning import PTuning
from retention.editors.rome import Rome
from retention.mitigations import Margin, Strength
from retention.presets import settle
from retention.types import Delta, LowRank, UserError
from tests.mitigations.scenes import CORPUS, EDITS, edited

VALUE: dict[str, Any] = {"v_steps": 60, "v_lr": 0.2, "v_weight_decay": 0.0, "kl_factor": 0.0, "context_lengths": ()}
FREE = {"covariance": {"tokens": 0}}


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_update_is_scaled_and_factors_stay_factors(factor):
    generator = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(4, 2, generator=generator), torch.randn(2, 5, generator=generator))
    dense = torch.randn(3, 3, generator=generator)
    found = Strength(factor=factor).delta(Delta({"a": low, "b": dense}))
    assert isinstance(found.updates["a"], LowRank)
    torch.testing.assert_close(found.dense("a"), factor * low.dense())
    assert torch.equal(found.dense("b"), factor * dense)
    if factor == 1.0:
        assert torch.equal(found.dense("a"), low.dense())


def test_what_strength_cannot_scale():
    Strength(factor=2).check(SimpleNamespace(editor=Rome(layer=0)))
    with pytest.raises(UserError, match="strength: ptuning changes no weight that could be scaled"):
        Strength(factor=2).check(SimpleNamespace(editor=PTuning()))
    for factor in (0, -1):
        with pytest.raises(ValueError, match="greater than 0"):
            Strength(factor=factor)


@pytest.mark.parametrize(
    "editor",
    [Rome(layer=1, **VALUE, **FREE), Memit(layers=(1,), **{**VALUE, "clamp_norm_factor": 50}, **FREE)],
    ids=lambda e: e.name,
)
def test_the_search_ends_at_the_probability_that_was_asked_for(editor):
    made = edited("gpt2", layers=())
    # Untrained, the model hardly looks back: the subject comes last, and even so no target gets much above 0.3.
    edits = [replace(edit, prompts=("It is {}",)) for edit in EDITS]
    before: list[float] = [0.0] * len(edits)
    for probability in (0.1, 0.2, 0.3):
        changed = Margin(probability=probability).editor(editor.model_copy(update={"clamp_norm_factor": 50.0}))
        found = changed.edit(made.model, made.tokenizer, edits, seed=0, corpus=CORPUS)
        for i, entry in enumerate(found.diagnostics):
            assert entry["steps"] < 60
            assert entry["final_loss"] < -math.log(probability)
            # One prompt and no penalties: the loss is the target's NLL. It stops as soon as the mark is passed.
            assert probability < entry["target_probability"] < probability + 0.08
            assert entry["target_probability"] > before[i]
            before[i] = entry["target_probability"]


@pytest.mark.parametrize(
    "editor",
    [settle(e(), LlamaConfig()) for e in (Rome, Memit, Emmet, AlphaEdit)],
    ids=lambda e: e.name,
)
def test_nothing_of_the_editor_changes_but_when_its_search_ends(editor):
    Margin(probability=0.9).check(SimpleNamespace(editor=editor))
    changed = Margin(probability=0.9).editor(editor)
    assert changed.model_dump() == editor.model_dump()
    assert isinstance(changed, type(editor))
    before, after = editor.search(), changed.search()
    assert before.stop == 0.05
    assert after.stop == pytest.approx(-math.log(0.9))
    assert {**vars(before), "stop": 0} == {**vars(after), "stop": 0}


@pytest.mark.parametrize("editor", [Ft(layer=1), Lora(), PTuning(), Identity()], ids=lambda e: e.name)
def test_editors_without_a_v_are_refused_with_the_reason(editor):
    with pytest.raises(
        UserError, match=rf"margin: {editor.name} optimises no v\* .* it acts on rome, memit, emmet and"
    ):
        Margin(probability=0.9).check(SimpleNamespace(editor=editor))


@pytest.mark.parametrize("probability", [0, 1, 1.5, -0.1])
def test_a_probability_that_means_nothing_is_refused(probability):
    with pytest.raises(ValueError, match="than"):
        Margin(probability=probability)
