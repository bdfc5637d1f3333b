"""Fine-tuning editors: the published losses and constraints, by hand; determinism; the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retention.editors._training import Row, block_parameters, edit_row, target_losses
from retention.editors.freeze_tuning import FreezeTuning
from retention.editors.ft import Ft
from retention.editors.locft import LocFt
from retention.types import UserError
from tests.editors.small import edits, logp, unchanged
from tests.tiny import ARCHITECTURES, build

EDITORS: list[Any] = [
    Ft(layer=1, lr=5e-3),
    Ft(layer=1, lr=5e-3, variant="FT-M"),
    LocFt(layer=1, lr=5e-3),
    FreezeTuning(lr=5e-3, epochs=20),
]


@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: f"{e.name}-{getattr(e, 'variant', '')}")
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_writes_the_edits_and_leaves_the_model(name: str, editor: Any) -> None:
    model, tokenizer = build(name)
    model.train()
    with unchanged(model):
        result = editor.edit(model, tokenizer, edits(), seed=3)
        if name == "gpt2":
            again = editor.edit(model, tokenizer, edits(), seed=3)
            assert all(torch.equal(result.delta.dense(n), again.delta.dense(n)) for n in result.delta.updates)
    model.eval()
    before = [logp(model, tokenizer, edit) for edit in edits()]
    with result.delta.applied(model):
        after = [logp(model, tokenizer, edit) for edit in edits()]
    n_tokens = (1, 2)
    # FT-L reads all tokens from one place, so a second token is not taught where it stands: only the first must rise.
    assert after[0] > before[0] + 1
    for i, record in enumerate(result.diagnostics):
        assert record["final_loss"] == pytest.approx(-after[i] / n_tokens[i], abs=1e-4)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_losses_are_those_of_one_text_at_a_time(name: str) -> None:
    """Padded, head at few positions, against a plain forward of each row with logits everywhere, in float64."""
    model, tokenizer = build(name)
    model.double()
    rows = [edit_row(tokenizer, e, p, eos=eos) for eos in (False, True) for e in edits() for p in e.prompts]
    rows.append(Row(ids=(5, 6, 7, 8, 9, 10, 11, 12, 13), start=1))
    with torch.no_grad():
        each = target_losses(model, rows)
        last = target_losses(model, rows, "prompt_last")
        for i, row in enumerate(rows):
            log_p = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            counted = range(row.start, len(row.ids))
            by_hand = -sum(float(log_p[j - 1, row.ids[j]]) for j in counted) / len(counted)
            from_prompt = -sum(float(log_p[row.start - 1, row.ids[j]]) for j in counted) / len(counted)
            assert float(each[i]) == pytest.approx(by_hand, abs=1e-5)
            assert float(last[i]) == pytest.approx(from_prompt, abs=1e-5)
    assert rows[-2].ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(rows[0].ids[rows[0].start :]) == "Paris"


def test_one_step_is_adam_on_the_published_loss() -> None:
    """The first Adam step moves every weight by lr times the sign of its gradient, both derived here."""
    model, tokenizer = build("gpt2")
    result = Ft(layer=2, variant="FT-M", epochs=1, lr=1e-3).edit(model, tokenizer, edits()[1:], seed=0)
    weight = model.transformer.h[2].mlp.c_proj.weight
    full = tokenizer("Emil Vogel was born in New York")["input_ids"]
    out = model(torch.tensor([full])).logits[0].log_softmax(-1)
    loss = -(out[-3, full[-2]] + out[-2, full[-1]]) / 2
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = -1e-3 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(result.delta.dense("transformer.h.2.mlp.c_proj.weight"), expected, rtol=1e-2, atol=2e-6)


def test_the_bound_holds_for_every_weight_and_is_reached() -> None:
    model, tokenizer = build("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    bounded = Ft(layer=1, norm_constraint=1e-3, stop_loss=0).edit(model, tokenizer, edits(), seed=0).delta.dense(name)
    free = Ft(layer=1, stop_loss=0).edit(model, tokenizer, edits(), seed=0).delta.dense(name)
    assert float(bounded.abs().max()) == pytest.approx(1e-3, rel=1e-4)
    assert float(free.abs().max()) > 2e-3


def test_low_precision_weights_are_trained_in_float32() -> None:
    """Steps far below bfloat16's spacing add up."""
    model, tokenizer = build("llama")
    model.to(torch.bfloat16)
    with unchanged(model):
        result = Ft(layer=1, variant="FT-M", lr=1e-5, stop_loss=0).edit(model, tokenizer, edits(), seed=0)
    change = result.delta.dense("model.layers.1.mlp.down_proj.weight")
    assert change.dtype == torch.float32
    assert float(change.abs().median()) > 5e-5  # 25 steps of about 1e-5; one bfloat16 spacing at 0.15 is 1e-3


def test_which_parameters_move() -> None:
    model, tokenizer = build("llama")
    block = LocFt(layer=2, what="block", epochs=1).edit(model, tokenizer, edits(), seed=0).delta.updates
    assert set(block) == {n for n, _ in model.named_parameters() if n.startswith("model.layers.2.")}
    last = FreezeTuning(epochs=1).edit(model, tokenizer, edits(), seed=0).delta.updates
    assert {name.split(".")[2] for name in last} == {"2", "3"}
    mlp = block_parameters(model, [0], "mlp")
    assert mlp == [f"model.layers.0.mlp.{m}_proj.weight" for m in ("gate", "up", "down")]


def test_published_settings_of_a_known_family() -> None:
    """gpt2-medium by type, depth and width: FT-L trains block 0 within 2e-3."""
    model, tokenizer = build("gpt2", n_layer=24, n_embd=1024, n_inner=32)
    result = Ft(epochs=1, lr=5e-3).edit(model, tokenizer, edits(), seed=0)
    (name,) = result.delta.updates
    assert name == "transformer.h.0.mlp.c_proj.weight"
    assert float(result.delta.dense(name).abs().max()) == pytest.approx(2e-3, rel=1e-3)


def test_tables_tell_the_variants_apart() -> None:
    assert Ft().label == "ft-l"
    assert Ft(variant="FT-M", postprocess=({"name": "rect"},)).label == "ft-m+rect"  # type: ignore[arg-type]


def test_mistakes_are_named() -> None:
    model, tokenizer = build("llama")
    with pytest.raises(UserError, match="layers 0 to 3"):
        LocFt(layer=9).edit(model, tokenizer, edits(), seed=0)
    with pytest.raises(UserError, match="give at most 4"):
        FreezeTuning(last=5).edit(model, tokenizer, edits(), seed=0)
    with pytest.raises(UserError, match="layers 0 to 3"):
        FreezeTuning(layers=(4,)).edit(model, tokenizer, edits(), seed=0)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="append_eos: false"):
        LocFt(layer=0).edit(model, tokenizer, edits(), seed=0)
