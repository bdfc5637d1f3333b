"""AlphaEdit against its published system, its null space, and its memory of earlier batches."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from retention.editors.alphaedit import AlphaEdit, Earlier, null_space, projected
from retention.types import UserError
from tests.editors.small import CORPUS, edits, logp, single, unchanged
from tests.editors.test_emmet import matrices
from tests.tiny import build


def published(
    covariance: torch.Tensor,
    size: int,
    ridge: float,
    earlier: torch.Tensor,
    keys: torch.Tensor,
    residuals: torch.Tensor,
) -> torch.Tensor:
    """X^T of (P (K K^T + Kp Kp^T) + ridge I) X = P K R^T, by LU of the m x m system."""
    u, _, _ = torch.linalg.svd(covariance)  # descending
    p = u[:, -size:] @ u[:, -size:].T
    system = p @ (keys.T @ keys + earlier.T @ earlier) + ridge * torch.eye(len(p), dtype=p.dtype)
    return torch.linalg.solve(system, p @ keys.T @ residuals).T


@pytest.mark.parametrize("fraction", [0.25, 0.7])
@pytest.mark.parametrize("before", [0, 3, 40])
def test_equals_the_published_system(fraction: float, before: int) -> None:
    keys, residuals, covariance = matrices()
    earlier = torch.randn(before, 24, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    projection = null_space(covariance, None, fraction)
    assert projection.size == round(fraction * 24)
    assert projection.complement == (fraction > 0.5)
    update = projected(projection, 2.0, earlier, keys, residuals)
    expected = published(covariance, projection.size, 2.0, earlier, keys, residuals)
    torch.testing.assert_close(update.left @ update.right, expected, rtol=1e-8, atol=1e-10)


def test_the_update_leaves_the_other_directions_alone() -> None:
    keys, residuals, covariance = matrices()
    update = projected(null_space(covariance, None, 0.5), 1e-6, keys[:0], keys, residuals)
    kept = torch.linalg.eigh(covariance).eigenvectors[:, 12:]
    assert float(((update.left @ update.right) @ kept).abs().max()) < 1e-10
    # With almost no ridge every key, of which there are fewer than null directions, gets its value all the same.
    torch.testing.assert_close(keys @ (update.left @ update.right).T, residuals, rtol=1e-4, atol=1e-4)


def test_threshold_and_fraction_name_the_same_space() -> None:
    _, _, covariance = matrices()
    values = torch.linalg.eigvalsh(covariance)
    below = float(values[9] + values[10]) / 2
    assert null_space(covariance, below, None).size == 10
    x = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(null_space(covariance, below, None)(x), null_space(covariance, None, 10 / 24)(x))


@pytest.mark.parametrize("name", ["gpt2", "llama_square", "gptj"])
def test_writes_the_edits_in_sequence_with_an_explicit_state(name: str) -> None:
    model, tokenizer = build(name)
    editor = AlphaEdit(
        layers=(0, 1),
        null_fraction=0.8,
        ridge=0.01,
        v_steps=12,
        clamp_norm_factor=4,
        v_weight_decay=0,
        context_lengths=(),
    )
    first, second = single()
    with unchanged(model):
        one = editor.edit(model, tokenizer, [first], seed=0, corpus=CORPUS)
        again = editor.edit(model, tokenizer, [first], seed=0, corpus=CORPUS)
        with one.delta.applied(model):
            two = editor.edit(model, tokenizer, [second], seed=0, corpus=CORPUS, state=one.state)
            forgetful = editor.edit(model, tokenizer, [second], seed=0, corpus=CORPUS)
    assert all(torch.equal(one.delta.dense(n), again.delta.dense(n)) for n in one.delta.updates)  # no state is kept
    assert isinstance(two.state, Earlier)
    assert [len(one.state.keys[0]), len(two.state.keys[1])] == [1, 2]
    assert two.info["keys_before"] == 1
    before = [logp(model, tokenizer, edit) for edit in single()]
    with one.delta.applied(model):
        assert logp(model, tokenizer, first) > before[0] + 0.5
        with two.delta.applied(model):
            assert logp(model, tokenizer, second) > before[1] + 0.5
    # The second batch moves the first one's keys less when it knows of them.
    parameter = next(iter(two.delta.updates))
    key = one.state.keys[0][0].float()

    def moved(delta: torch.Tensor) -> float:
        return float((key @ delta if len(key) == delta.shape[0] and name == "gpt2" else delta @ key).norm())

    assert moved(two.delta.dense(parameter)) < 0.5 * moved(forgetful.delta.dense(parameter))


def test_keys_of_the_state_are_read_from_the_edited_model() -> None:
    """Layer 1's key after a batch differs from the unedited one, since layer 0 was changed below it."""
    model, tokenizer = build("llama")
    editor = AlphaEdit(layers=(0, 1), null_fraction=0.8, ridge=0.01, v_steps=6, clamp_norm_factor=4, context_lengths=())
    result = editor.edit(model, tokenizer, single()[:1], seed=0, corpus=CORPUS)
    ids = torch.tensor([tokenizer("Anna Klein")["input_ids"]])

    def key(layer: int) -> torch.Tensor:
        found: list[torch.Tensor] = []
        handle = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
            lambda _m, args: found.append(args[0])
        )
        with torch.no_grad():
            model(ids)
        handle.remove()
        return found[0][0, -1].double()

    unedited = key(1)
    with result.delta.applied(model):
        for layer in (0, 1):
            torch.testing.assert_close(result.state.keys[layer][0], key(layer), rtol=1e-4, atol=1e-5)
        assert (key(1) - unedited).norm() > 1e-3


def test_mistakes_are_named() -> None:
    model, tokenizer = build("llama")
    with pytest.raises(UserError, match="every direction"):
        AlphaEdit(layers=(0,), null_below=1e9).edit(model, tokenizer, edits(), seed=0, corpus=CORPUS)
    with pytest.raises(UserError, match=r"no direction.*from 1 to 1.*null_fraction"):
        null_space(torch.eye(4), None, None)
    with pytest.raises(UserError, match="corpus"):
        AlphaEdit(layers=(0,)).edit(model, tokenizer, edits(), seed=0)
    with pytest.raises(ValidationError, match="not both"):
        AlphaEdit(null_below=0.1, null_fraction=0.5)
    with pytest.raises(ValidationError, match="without a covariance"):
        AlphaEdit(covariance={"tokens": 0})  # type: ignore[arg-type]
