"""The settings that editors with a v* share: they are in every key, so defaults and names may not move unnoticed."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from retention.editors import AnyEditor
from retention.editors._base import WeightEditor
from retention.editors._value_editor import ValueEditor
from retention.editors.emmet import Emmet
from retention.editors.memit import Memit
from retention.editors.rome import Rome

COVARIANCE = {"tokens": 100_000, "length": 512, "ridge": 1e-4, "settle": None}
SHARED = {
    "postprocess": [],
    "kl_factor": 0.0625,
    "context_lengths": [10] * 5,
    "covariance": COVARIANCE,
    "tokens_per_batch": None,
}
PLAIN = {"v_weight_decay": 0.5, "clamp_norm_factor": 0.75}
DEFAULTS: dict[str, dict[str, Any]] = {
    "rome": {
        **SHARED, "layer": None, "variant": "r-rome", "v_steps": None, "v_lr": 0.5, "v_weight_decay": None,
        "clamp_norm_factor": None, "context_lengths": [5] * 10 + [10] * 10,
    },
    "memit": {
        **SHARED, "layers": None, "covariance_weight": None, "v_steps": None, "v_lr": 0.5, "v_weight_decay": None,
        "clamp_norm_factor": None,
    },
    "emmet": {
        **SHARED, **PLAIN, "layer": None, "covariance_weight": None, "relax": 0.1, "v_steps": 20, "v_lr": 0.5,
    },
    "alphaedit": {
        **SHARED, **PLAIN, "layers": None, "null_below": None, "null_fraction": None, "ridge": None, "v_steps": 25,
        "v_lr": None,
    },
}  # fmt: skip


def editor(**settings: Any) -> Any:
    return TypeAdapter(AnyEditor).validate_python(settings)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_each_papers_own(name):
    assert editor(name=name).model_dump(mode="json") == {"name": name, **DEFAULTS[name]}


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize(
    "wrong", [{"v_steps": 0}, {"v_lr": 0}, {"v_weight_decay": -1}, {"clamp_norm_factor": 0}, {"kl_factor": -1}]
)
def test_settings_out_of_range_are_refused(name, wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        editor(name=name, **wrong)


def test_only_what_a_preset_gives_may_be_omitted():
    with pytest.raises(ValidationError, match="v_steps"):
        editor(name="emmet", v_steps=None)
    assert Memit(v_steps=None).v_steps is None


def test_the_search_has_the_settings_of_the_editor():
    found = Rome(v_steps=3, v_weight_decay=0.0, clamp_norm_factor=4.0).search()
    assert (found.steps, found.lr, found.weight_decay, found.clamp, found.kl_factor) == (3, 0.5, 0.0, 4.0, 0.0625)
    with pytest.raises(AssertionError, match="preset"):
        Rome(v_steps=3).search()
    found = Emmet(v_lr=0.1).search()
    assert (found.steps, found.lr, found.weight_decay, found.clamp) == (20, 0.1, 0.5, 0.75)


@pytest.mark.parametrize("abstract", [WeightEditor, ValueEditor])
def test_an_editor_without_a_method_cannot_be_made(abstract):
    with pytest.raises(TypeError, match="abstract"):
        abstract(v_steps=1, v_lr=1, v_weight_decay=1, clamp_norm_factor=1)
