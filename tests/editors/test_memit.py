"""MEMIT against an independent float64 derivation, over one layer and several, and the model's own predictions."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from facts import EDITS, FINAL_SUBJECT, ONE_TOKEN
from small import logp, unchanged
from test_rome import ridged

from retention.editors._keys import covariances, factored
from retention.editors._solve import Metric, least_squares
from retention.editors._values import ValueSettings, target_values
from retention.editors.memit import Memit
from retention.models import Loaded, anatomy
from retention.types import EditResult, LowRank, UserError

QUICK = {"layers": (0, 1, 2), "covariance_weight": 2.0, "v_steps": 8, "v_lr": 0.3, "v_weight_decay": 0.0,
         "clamp_norm_factor": 4.0, "kl_factor": 0.1, "context_lengths": (3, 5)}  # fmt: skip


def write(loaded: Loaded, edits: Any = EDITS, corpus: Any = (), **settings: Any) -> EditResult:
    return Memit(**{**QUICK, **settings}).edit(loaded.model, loaded.tokenizer, edits, seed=0, corpus=corpus)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_equals_the_papers_algorithm(loaded: Loaded, corpus: Any, layers: tuple[int, ...]) -> None:
    additive = anatomy(loaded.model).additive
    if not additive and len(layers) > 1:
        with unchanged(loaded.model), pytest.raises(UserError, match=r"normalises .*the MLP's output.*give one layer"):
            write(loaded, corpus=corpus, layers=layers)
        return
    with unchanged(loaded.model):
        result = write(loaded, corpus=corpus, layers=layers)
    site = "block" if additive else "mlp"
    assert result.info["site"] == site
    settings = ValueSettings(steps=8, lr=0.3, weight_decay=0.0, clamp=4.0, kl_factor=0.1)
    prefixes = tuple(result.info["prefixes"])
    values = target_values(
        loaded.model, loaded.tokenizer, EDITS, layer=layers[-1], site=site, settings=settings, prefixes=prefixes
    ).value
    covariance = {layer: ridged(loaded, layer, corpus, Memit(**QUICK).covariance) for layer in layers}
    expected = reference.memit(
        loaded.model, loaded.tokenizer, EDITS, list(layers), values, prefixes, covariance, 2.0, site
    )
    assert list(result.delta.updates) == [anatomy(loaded.model).down.format(layer) + ".weight" for layer in layers]
    for (name, update), layer in zip(result.delta.updates.items(), layers, strict=True):
        assert isinstance(update, LowRank)
        found = result.delta.dense(name).double()
        found = found.T if anatomy(loaded.model).transposed else found
        assert float((found - expected[layer]).norm() / expected[layer].norm()) < 2e-3


def test_least_squares_by_woodbury_equals_the_large_system() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, residuals = (torch.randn(n, m, generator=generator, dtype=torch.float64) for n, m in ((5, 20), (5, 7)))
    root = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    covariance = root @ root.T
    expected = residuals.T @ keys @ torch.linalg.inv(3.0 * covariance + keys.T @ keys)
    metric = factored(covariance, 0.0)
    found = least_squares(metric, 3.0, keys, residuals)
    torch.testing.assert_close(found.left @ found.right, expected, rtol=1e-9, atol=1e-12)
    identity = least_squares(Metric(None), 3.0, keys, residuals)
    expected = residuals.T @ keys @ torch.linalg.inv(3.0 * torch.eye(20, dtype=torch.float64) + keys.T @ keys)
    torch.testing.assert_close(identity.left @ identity.right, expected, rtol=1e-9, atol=1e-12)


def test_little_weight_on_the_covariance_meets_every_constraint(tiny_model: Any, corpus: Any) -> None:
    """As lambda goes to 0, (W + Delta) k_i goes to what v* asks for, for every edit at once."""
    loaded = tiny_model("llama")
    result = write(loaded, corpus=corpus, layers=(1,), covariance_weight=1e-6, context_lengths=())
    edits = [edit for edit in EDITS if len(edit.prompts) == 1]  # whose mean key is the bare prompt's
    settings = ValueSettings(steps=8, lr=0.3, weight_decay=0.0, clamp=4.0, kl_factor=0.1)
    found = target_values(loaded.model, loaded.tokenizer, EDITS, layer=1, site="block", settings=settings)
    module, block = loaded.model.model.layers[1].mlp.down_proj, loaded.model.model.layers[1]
    name = "model.layers.1.mlp.down_proj.weight"
    for edit in edits:
        i = EDITS.index(edit)
        text, subject = edit.fact.text(), edit.fact.subject
        key = reference.read(loaded.model, loaded.tokenizer, text, subject, module, "input")
        now = reference.read(loaded.model, loaded.tokenizer, text, subject, block, "output")
        asked = found.value[i].double() - now
        given = result.delta.dense(name).double() @ key
        assert float((given - asked).norm() / asked.norm()) < 1e-2


def test_the_target_becomes_more_probable_through_the_models_own_forward(loaded: Loaded, corpus: Any) -> None:
    strong = {"v_steps": 25, "v_lr": 0.5, "clamp_norm_factor": 20.0, "kl_factor": 0.0, "context_lengths": ()}
    # Over two layers random weights leave nothing to the tokens after the subject: it is asked at the subject itself.
    for layers, edit in (((1,), ONE_TOKEN), ((0, 1), FINAL_SUBJECT)):
        if len(layers) > 1 and not anatomy(loaded.model).additive:
            continue
        result = write(loaded, [edit], corpus, layers=layers, covariance_weight=0.01, **strong)
        before = logp(loaded.model, loaded.tokenizer, edit)
        with result.delta.applied(loaded.model):
            after = logp(loaded.model, loaded.tokenizer, edit)
        assert after > before + 0.3, (layers, before, after)


def test_more_edits_than_factors_pay_for_are_kept_dense(tiny_model: Any, corpus: Any) -> None:
    loaded = tiny_model("llama_square")  # 32 x 32: factors of 4 edits are smaller, of 17 they are not
    few = write(loaded, EDITS, corpus, layers=(1,))
    many = write(loaded, EDITS * 5, corpus, layers=(1,))
    assert isinstance(next(iter(few.delta.updates.values())), LowRank)
    assert isinstance(next(iter(many.delta.updates.values())), torch.Tensor)


def test_layers_are_taken_in_order_and_once(tiny_model: Any, corpus: Any) -> None:
    loaded = tiny_model("llama")
    assert write(loaded, corpus=corpus, layers=(2, 0, 2)).info["layers"] == [0, 2]
    with pytest.raises(UserError, match="layer 4 is out of range"):
        write(loaded, corpus=corpus, layers=(2, 4))


def test_covariance_of_all_layers_is_read_in_one_pass(tiny_model: Any, corpus: Any) -> None:
    loaded = tiny_model("llama")
    calls: list[int] = []
    handle = loaded.model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        covariances(loaded.model, loaded.tokenizer, [0, 1, 2], corpus, Memit(**QUICK).covariance)
    finally:
        handle.remove()
    assert len(calls) == 1
