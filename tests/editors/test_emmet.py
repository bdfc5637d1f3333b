"""EMMET against its formula with explicit inverses, ROME for one edit, and the real forward."""

from __future__ import annotations

import pytest
import torch

from retention.editors._solve import Metric, rank_one_in_order
from retention.editors._values import ValueSettings, target_values
from retention.editors.emmet import Emmet, constrained
from retention.hooks import on_output
from retention.models import anatomy
from retention.tokens import subject_last
from retention.types import LowRank, UserError
from tests.editors.small import CORPUS, edits, logp, single, unchanged
from tests.tiny import ARCHITECTURES, build


def matrices(n: int = 5, m: int = 24, d: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys as rows [n, m], residuals as rows [n, d], a covariance [m, m]; float64."""
    generator = torch.Generator().manual_seed(n)
    sample = torch.randn(3 * m, m, generator=generator, dtype=torch.float64)
    keys = torch.randn(n, m, generator=generator, dtype=torch.float64)
    return keys, torch.randn(n, d, generator=generator, dtype=torch.float64), sample.T @ sample / len(sample)


@pytest.mark.parametrize("relax", [0.0, 0.1, 10.0])
def test_the_formula(relax: float) -> None:
    keys, residuals, covariance = matrices()
    update = constrained(Metric(torch.linalg.cholesky(covariance)), 3.0, relax, keys, residuals)
    inverse = torch.linalg.inv(3.0 * covariance)
    k, r = keys.T, residuals.T  # as columns, as in the paper
    expected = r @ torch.linalg.inv(k.T @ inverse @ k + relax * torch.eye(5, dtype=torch.float64)) @ k.T @ inverse
    torch.testing.assert_close(update.left @ update.right, expected, rtol=1e-9, atol=1e-11)
    reached = (update.left @ update.right) @ k
    assert torch.allclose(reached, r, atol=1e-8) == (relax == 0)


def test_it_is_the_smallest_change_that_meets_the_constraints() -> None:
    """Any other update with the same values at the keys does more to keys drawn with covariance C."""
    keys, residuals, covariance = matrices()
    update = constrained(Metric(torch.linalg.cholesky(covariance)), 1.0, 0.0, keys, residuals)
    ours = update.left @ update.right
    orthogonal = torch.linalg.svd(keys).Vh[5:]  # directions that no key has
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = ours + 0.1 * torch.randn(7, len(orthogonal), generator=generator, dtype=torch.float64) @ orthogonal
        assert torch.trace(other @ covariance @ other.T) > torch.trace(ours @ covariance @ ours.T)


def test_one_edit_is_rome() -> None:
    keys, residuals, covariance = matrices(n=1)
    metric = Metric(torch.linalg.cholesky(covariance))
    emmet, rome = constrained(metric, 1.0, 0.0, keys, residuals), rank_one_in_order(metric, keys, keys, residuals)
    torch.testing.assert_close(emmet.left @ emmet.right, rome.left @ rome.right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_edited_layer_gives_v_star_and_the_model_is_left_as_it_was(name: str) -> None:
    """With one key per edit and no relaxation: what the layer gives at the subject, through the real forward."""
    model, tokenizer = build(name)
    editor = Emmet(layer=1, v_steps=15, clamp_norm_factor=4, v_weight_decay=0, relax=0, context_lengths=())
    model.train()
    with unchanged(model):
        result = editor.edit(model, tokenizer, single(), seed=0, corpus=CORPUS)
        again = editor.edit(model, tokenizer, single(), seed=0, corpus=CORPUS)
    model.eval().requires_grad_(False)
    (parameter,) = result.delta.updates
    assert isinstance(result.delta.updates[parameter], LowRank)
    assert torch.equal(result.delta.dense(parameter), again.delta.dense(parameter))

    places = anatomy(model)
    settings = ValueSettings(steps=15, lr=0.5, weight_decay=0, clamp=4, kl_factor=0.0625)
    site = "block" if places.additive else "mlp"
    star = target_values(model, tokenizer, single(), layer=1, site=site, settings=settings).value
    module = places.blocks(model)[1] if places.additive else places.down_module(model, 1)
    before = sum(logp(model, tokenizer, edit) for edit in single())
    with result.delta.applied(model):
        for i, edit in enumerate(single()):
            ids = torch.tensor([tokenizer(edit.fact.text())["input_ids"]])
            found: list[torch.Tensor] = []
            with on_output(module, found.append):
                model(ids)
            at = subject_last(tokenizer, edit.prompts[0], edit.fact.subject)
            torch.testing.assert_close(found[0].reshape(ids.shape[1], -1)[at], star[i], rtol=1e-3, atol=1e-3)
        assert sum(logp(model, tokenizer, edit) for edit in single()) > before


def test_mistakes_are_named() -> None:
    model, tokenizer = build("llama")
    with pytest.raises(UserError, match="out of range"):
        Emmet(layer=7).edit(model, tokenizer, edits(), seed=0, corpus=CORPUS)
    keys, residuals, _ = matrices()
    with pytest.raises(UserError, match="share their key"):
        constrained(Metric(None), 1.0, 0.0, keys[[0, 0]], residuals[:2])
